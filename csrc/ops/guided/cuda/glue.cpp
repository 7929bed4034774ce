// Torch glue of the guided family's CUDA kernels: sorts, workspaces, launches. Nothing here waits for the device.
#include <ATen/ops/cat.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "cuda/operand_torch.h"
#include "cuda/topk/torch.h"
#include "ops/guided/cuda/launch.h"
#include "ops/guided/guided.h"

namespace ltood {

namespace {

using GuidedOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kOp = "guided";

// Within what sums of row numbers can hold: a diagonal outside (-n, M) meets nothing.
int diagonal_of(const GuidedArguments& in) {
  return static_cast<int>(std::clamp(in.rows->diagonal, -in.rows->z.size(0), in.z.size(0)));
}

// One call: the kernels' parameters, and the tensors behind them.
class GuidedCall {
 public:
  GuidedCall(const GuidedArguments& arguments, const at::Tensor& neighbors)
      : in_(arguments), stream_(current_stream(arguments.z)) {
    const int64_t columns = in_.z.size(0), first = in_.rows.has_value() ? whole_blocks(columns) : 0;
    const int64_t n = in_.rows.has_value() ? first + in_.rows->z.size(0) : columns;
    LTOOD_CHECK_VALUE(whole_blocks(n) <= std::numeric_limits<int>::max(), kOp, "z", "of fewer than 2^31 rows", n);
    p.n = static_cast<int>(n), p.padded = static_cast<int>(whole_blocks(n)), p.d = static_cast<int>(in_.z.size(1));
    p.columns = static_cast<int>(columns), p.first = static_cast<int>(first);
    p.diagonal = in_.rows.has_value() ? diagonal_of(in_) : 0;
    p.contrast = in_.clusters.has_value(), p.distill = in_.distill, p.normalize = in_.normalize;
    p.weighted = in_.force.weighted, p.gamma = static_cast<float>(in_.force.gamma);
    if (in_.tau.tensor && !in_.tau.tensor->is_cpu()) tau_on_device_ = in_.tau.tensor->to(at::kFloat);
    p.inv_tau = static_cast<float>(1 / in_.temperature);
    p.inv_teacher_tau = in_.teacher_temperature ? static_cast<float>(1 / *in_.teacher_temperature) : 0.f;
    p.temperature = tau_on_device_.defined() ? tau_on_device_.const_data_ptr<float>() : nullptr;
    if (p.contrast) sort_rows(neighbors);
    prepare_operands();
  }

  // Undefined where the temperature is known on the host.
  const at::Tensor& tau_on_device() const { return tau_on_device_; }

  // Room that the kernels write.
  template <typename T>
  T* fresh(at::IntArrayRef shape) {
    kept_.push_back(empty(shape, c10::CppTypeToScalarType<T>::value));
    return kept_.back().template mutable_data_ptr<T>();
  }

  at::Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) const {
    return at::empty(shape, in_.z.options().dtype(dtype));
  }

  // Float64 rows that the kernels read; null where there is nothing.
  const double* rows(const OptionalTensor& x) {
    if (!x.has_value() || x->numel() == 0) return nullptr;
    kept_.push_back(x->to(at::kDouble).contiguous());
    return kept_.back().const_data_ptr<double>();
  }

  // Columns, nothing up to the first row, rows, as the kernels number them: the columns alone are a square.
  at::Tensor numbered(const at::Tensor& columns, const OptionalTensor& rows) const {
    if (!rows.has_value()) return columns;
    std::vector<int64_t> between = columns.sizes().vec();
    between[0] = p.first - p.columns;
    return at::cat({columns, at::zeros(between, columns.options()), *rows});
  }

  // The same of what has come in one piece.
  at::Tensor numbered(const at::Tensor& both) const {
    if (!in_.rows.has_value()) return both;
    return numbered(both.narrow(0, 0, p.columns), both.narrow(0, p.columns, p.n - p.first));
  }

  // Doubles by number.
  const double* states(const OptionalTensor& columns, const OptionalTensor& rows) {
    if (!columns.has_value()) return nullptr;
    kept_.push_back(numbered(*columns, rows));
    return kept_.back().const_data_ptr<double>();
  }

  void plan(bool backward) {
    const int64_t blocks = (p.padded - p.first) / kGuidedRows, tiles = p.padded / kGuidedColumns;
    p.backward = backward;
    if (p.contrast) {
      p.position_of = fresh<int>({p.n});
      p.spans = reinterpret_cast<GuidedSpans*>(fresh<int>({p.n, 4}));
      p.fallback = fresh<uint8_t>({p.n});
      p.fallback_tiles = fresh<uint8_t>({tiles});
    }
    if (p.first) p.self_at = fresh<int>({p.padded});
    p.tiles = reinterpret_cast<uint32_t*>(fresh<int>({blocks, (tiles + 31) / 32}));
    p.fields = fresh<float>({kGuidedFields, p.padded});
    check_launch(kOp, ltood_launch_guided_plan(&p, stream_));
  }

  void forward() {
    split(false);
    p.sums = fresh<float>({p.k_splits, kGuidedSums, p.padded - p.first});
    check_launch(kOp, ltood_launch_guided_forward(&p, stream_));
  }

  void backward() {
    if (p.contrast && p.k > 0) {
      const auto [keys, order] = at::sort(neighbor_at_.flatten(), true, 0, false);
      p.reverse_keys = hold(keys), p.reverse_order = hold(order);
    }
    split(true);
    p.gradient = fresh<float>({p.k_splits, p.n - p.first, int64_t(kKTile) * p.z.k_tiles});
    check_launch(kOp, ltood_launch_guided_backward(&p, stream_));
  }

  GuidedParams p{};

 private:
  static int64_t whole_blocks(int64_t rows) { return (rows + kGuidedRows - 1) / kGuidedRows * kGuidedRows; }

  const int64_t* hold(const at::Tensor& x) {
    kept_.push_back(x);
    return x.const_data_ptr<int64_t>();
  }

  // The order of the plan, and the views in it.
  void sort_rows(const at::Tensor& neighbors) {
    p.clusters = hold(numbered(*in_.clusters)), p.far = in_.far->const_data_ptr<int64_t>();
    p.clusters_count = static_cast<int>(in_.far->numel());
    const at::Tensor unsorted = empty({p.n}, at::kLong);
    p.keys = unsorted.mutable_data_ptr<int64_t>();
    check_launch(kOp, ltood_launch_guided_keys(&p, stream_));
    const auto [keys, order] = at::sort(unsorted, true, 0, false);
    order_ = order;
    p.keys = const_cast<int64_t*>(hold(keys)), p.order = hold(order);
    if (in_.instance_ids.has_value()) {
      const at::Tensor instance = at::index_select(numbered(*in_.instance_ids), 0, order);
      const auto [instance_keys, members] = at::sort(instance, true, 0, false);
      p.instance = hold(instance), p.instance_keys = hold(instance_keys), p.members = hold(members);
    }
    neighbor_at_ = at::empty_like(neighbors);
    p.k = static_cast<int>(neighbors.size(1));
    kept_.push_back(neighbors);
    p.neighbors = neighbors.mutable_data_ptr<int64_t>(), p.neighbor_at = neighbor_at_.mutable_data_ptr<int64_t>();
  }

  // Rows in the order of the plan. Student and guide are multiplied in one type, bfloat16 if one of them is: two splits
  // of it hold a float16. Float32 rows are two splits of float16, 22 bits, for the products that exponents are made of.
  void prepare_operands() {
    const auto is = [&](const at::Tensor& x, at::ScalarType type) { return x.scalar_type() == type; };
    const bool one_split = in_.normalize && is(in_.z, at::kHalf) && is(in_.guide, at::kHalf);
    const bool half_splits = !is(in_.z, at::kBFloat16) && !is(in_.guide, at::kBFloat16);
    const auto ordered = [&](const at::Tensor& x, const OptionalTensor& more) {
      const at::Tensor all = numbered(x, more), rows = order_.defined() ? at::index_select(all, 0, order_) : all;
      return one_split || is(x, at::kBFloat16) ? rows : rows.to(at::kFloat);
    };
    element_type(kOp, "z", in_.z);
    const OptionalTensor more_z = in_.rows.has_value() ? OptionalTensor(in_.rows->z) : std::nullopt;
    const OptionalTensor more_guide = in_.rows.has_value() ? OptionalTensor(in_.rows->guide) : std::nullopt;
    const at::Tensor z = ordered(in_.z, more_z);
    z_ = prepare_rows(kOp, "z", z, in_.normalize, half_splits);
    e_ = prepare_rows(kOp, "guide", ordered(in_.guide, more_guide), true, half_splits);
    p.z = p.v = z_.view, p.e = e_.view, p.inv_norm = z_.inv_norm.const_data_ptr<float>();
    if (!z_.view.is_half) return;
    values_ = one_split ? z_.data.to(at::kBFloat16) : prepare_rows(kOp, "z", z, in_.normalize).data;
    p.v.data = values_.data_ptr(), p.v.is_half = 0;  // the scales are the same
  }

  void split(bool backward) {
    p.k_splits = ltood_guided_k_splits(p.n - p.first, p.columns, p.z.k_tiles, backward);
    check_launch(kOp, p.k_splits < 0 ? -p.k_splits : 0);
  }

  const GuidedArguments& in_;
  void* stream_;
  std::vector<at::Tensor> kept_;
  at::Tensor tau_on_device_, order_, neighbor_at_, values_;
  OperandTensors z_, e_;
};

struct FoundNeighbors {
  at::Tensor cosines, indices;  // [n, k]
};

// The k columns nearest to each row by guide cosine, outside its own image.
FoundNeighbors search_neighbors(const GuidedArguments& in, int64_t k) {
  const at::Tensor& rows = in.rows.has_value() ? in.rows->guide : in.guide;
  const FoundNeighbors found{at::empty({rows.size(0), k}, in.z.options().dtype(at::kFloat)),
                             at::empty({rows.size(0), k}, in.z.options().dtype(at::kLong))};
  if (k == 0) return found;
  const auto prepared = [](const at::Tensor& x) {
    return prepare_rows(kOp, "guide", x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x, true, true);
  };
  const OperandTensors of_columns = prepared(in.guide), of_rows = in.rows.has_value() ? prepared(rows) : of_columns;
  TopkParams params{};
  params.x = of_rows.view, params.y = of_columns.view;
  params.k = static_cast<int>(k);
  params.exclude_self = 1;
  params.diagonal = in.rows.has_value() ? diagonal_of(in) : 0;
  if (in.instance_ids.has_value()) {
    params.y_instance = in.instance_ids->const_data_ptr<int64_t>();
    params.x_instance = params.y_instance + (in.rows.has_value() ? in.z.size(0) : 0);
  } else if (!in.rows.has_value()) {
    params.views = static_cast<int>(in.n() / 2);
  }
  params.values = found.cosines.mutable_data_ptr<float>();
  params.indices = found.indices.mutable_data_ptr<int64_t>();
  launch_topk(kOp, params, in.z);
  return found;
}

at::Tensor no_neighbors(const GuidedArguments& in) { return at::empty({in.n(), 0}, in.z.options().dtype(at::kLong)); }

GuidedOutputs guided_cuda(const Arguments& arguments) {
  const GuidedArguments in = guided_arguments(arguments);
  const at::Tensor& z = in.z;
  const c10::DeviceGuard guard(z.device());
  const int64_t k = arguments.integer("k");
  check_guided(in, k);
  const bool contrast = in.clusters.has_value(), distill = in.distill;
  const at::Tensor neighbors = !contrast                  ? no_neighbors(in)
                               : in.neighbors.has_value() ? in.neighbors->clone(at::MemoryFormat::Contiguous)
                                                          : search_neighbors(in, k).indices;
  GuidedCall call(in, neighbors);
  call.plan(false);
  const auto rows = [&](bool used, at::ScalarType dtype) { return call.empty({used ? z.size(0) : 0}, dtype); };
  at::Tensor loss = rows(contrast, at::kFloat), kl = rows(distill, at::kFloat);
  at::Tensor weight = rows(contrast, at::kDouble), lse = rows(contrast, at::kDouble);
  at::Tensor student_lse = rows(distill, at::kDouble), teacher_lse = rows(distill, at::kDouble);
  call.p.loss = loss.mutable_data_ptr<float>(), call.p.kl = kl.mutable_data_ptr<float>();
  call.p.weight = weight.mutable_data_ptr<double>(), call.p.lse = lse.mutable_data_ptr<double>();
  call.p.student_lse = student_lse.mutable_data_ptr<double>();
  call.p.teacher_lse = teacher_lse.mutable_data_ptr<double>();
  call.forward();
  return {loss, weight, lse, neighbors, kl, student_lse, teacher_lse};
}

std::tuple<at::Tensor, at::Tensor> guided_bwd_cuda(const Arguments& arguments) {
  GuidedArguments in = guided_arguments(arguments);
  const GuidedSaved saved = guided_saved(arguments);
  in.neighbors = saved.neighbors;
  const at::Tensor& z = in.z;
  const c10::DeviceGuard guard(z.device());
  check_guided_bwd(in, saved);
  GuidedCall call(in, saved.neighbors.clone(at::MemoryFormat::Contiguous));
  GuidedParams& p = call.p;
  p.grad_loss = call.rows(saved.grad_loss), p.grad_lse = call.rows(saved.grad_lse);
  p.grad_kl = call.rows(saved.grad_kl), p.grad_student_lse = call.rows(saved.grad_student_lse);
  p.weight = const_cast<double*>(call.rows(saved.weight)), p.lse = const_cast<double*>(call.rows(saved.lse));
  p.student_lse = const_cast<double*>(call.rows(saved.student_lse));
  p.teacher_lse = const_cast<double*>(call.rows(saved.teacher_lse));
  call.plan(true);
  at::Tensor grad_z = at::empty(z.sizes(), z.options());
  at::Tensor u_dot_du = call.empty({z.size(0)}, at::kFloat);
  p.grad_type = element_type(kOp, "z", z), p.grad_z = grad_z.data_ptr();
  p.u_dot_du = u_dot_du.mutable_data_ptr<float>();
  call.backward();
  const at::Tensor total = u_dot_du.sum();
  const at::Tensor& tau = call.tau_on_device();
  return {grad_z, tau.defined() ? at::div(total, tau).div_(-2) : total.div(-2 * in.temperature)};
}

using GuidedPartialOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                        at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The negatives of the marked rows are all columns: a second pass, which reads no tile for 128 rows without a mark.
void forward_every(GuidedCall& call, const at::Tensor& x_every, double* lse) {
  GuidedParams& p = call.p;
  p.every = reinterpret_cast<const uint8_t*>(x_every.const_data_ptr<bool>());
  p.distill = 0, p.lse = lse, p.weight = p.positive_logit = nullptr;
  call.plan(false);
  call.forward();
}

GuidedPartialOutputs guided_partial_cuda(const Arguments& arguments) {
  GuidedArguments in = guided_partial_arguments(arguments);
  in.distill = arguments.flag("distill");
  const OptionalTensor x_every = arguments.optional("x_every");
  const int64_t k = arguments.integer("k");
  const at::Tensor& x = in.rows->z;
  const c10::DeviceGuard guard(x.device());
  check_guided_partial(in, x_every, k);
  const bool contrast = in.clusters.has_value(), distill = in.distill;
  GuidedCall call(in, no_neighbors(in));
  const auto doubles = [&](bool used) { return call.empty({used ? x.size(0) : 0}, at::kDouble); };
  at::Tensor lse = doubles(contrast), weight = doubles(contrast), positive_logit = doubles(contrast);
  at::Tensor lse_every = at::full({contrast ? x.size(0) : 0}, -INFINITY, lse.options());
  at::Tensor student_lse = doubles(distill), teacher_lse = doubles(distill);
  at::Tensor excess = doubles(distill), gap = doubles(distill);
  call.p.lse = lse.mutable_data_ptr<double>();
  call.p.weight = weight.mutable_data_ptr<double>(), call.p.positive_logit = positive_logit.mutable_data_ptr<double>();
  call.p.student_lse = student_lse.mutable_data_ptr<double>();
  call.p.teacher_lse = teacher_lse.mutable_data_ptr<double>();
  call.p.excess = excess.mutable_data_ptr<double>(), call.p.gap = gap.mutable_data_ptr<double>();
  call.plan(false);
  call.forward();
  if (contrast && x_every.has_value()) forward_every(call, *x_every, lse_every.mutable_data_ptr<double>());
  const FoundNeighbors best = search_neighbors(in, k);
  return {lse, lse_every, weight, positive_logit, best.cosines, best.indices, student_lse, teacher_lse, excess, gap};
}

at::Tensor guided_partial_bwd_cuda(const Arguments& arguments) {
  GuidedArguments in = guided_partial_arguments(arguments);
  const GuidedStates states = guided_states(arguments);
  in.distill = states.x_distill.has_value();
  const at::Tensor& x = in.rows->z;
  const c10::DeviceGuard guard(x.device());
  check_guided_partial_bwd(in, states);
  GuidedCall call(in, no_neighbors(in));
  call.p.contrast_state = call.states(states.y_contrast, states.x_contrast);
  call.p.distill_state = call.states(states.y_distill, states.x_distill);
  call.plan(true);
  at::Tensor grad_unit = call.empty(x.sizes(), at::kFloat);
  call.p.grad_unit = grad_unit.mutable_data_ptr<float>();
  call.backward();
  return grad_unit;
}

}  // namespace

}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CUDA, m) {
  m.impl("guided", ltood::by_name<ltood::guided_cuda>());
  m.impl("guided_bwd", ltood::by_name<ltood::guided_bwd_cuda>());
  m.impl("guided_partial", ltood::by_name<ltood::guided_partial_cuda>());
  m.impl("guided_partial_bwd", ltood::by_name<ltood::guided_partial_bwd_cuda>());
}
