// Torch glue of the guided family's CUDA kernels: sorts, workspaces, launches. Nothing here waits for the device.
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "cuda/operand_torch.h"
#include "ops/guided/guided.h"
#include "ops/guided/guided_launch.h"
#include "ops/knn/topk_torch.h"

namespace ltood {

namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

constexpr const char* kOp = "guided";

// A temperature in the forms that the arguments and the kernels take.
struct Temperature {
  Temperature(double number, const MaybeTensor& tensor) : value(number) {
    if (!tensor.has_value()) return;
    if (tensor->is_cpu()) {
      value = tensor->item().toDouble();
    } else {
      value = 1;  // unknown here
      on_device = tensor->to(at::kFloat);
    }
  }

  double value;
  at::Tensor on_device;
};

// One call: the kernels' parameters, and the tensors behind them.
class GuidedCall {
 public:
  GuidedCall(const GuidedArguments& arguments, const Temperature& temperature, std::optional<double> teacher,
             const at::Tensor& neighbors)
      : in_(arguments), stream_(current_stream(arguments.z)) {
    p.n = static_cast<int>(in_.n()), p.d = static_cast<int>(in_.z.size(1));
    p.padded = (p.n + kGuidedRows - 1) / kGuidedRows * kGuidedRows;
    p.contrast = in_.clusters.has_value(), p.distill = in_.distill, p.normalize = in_.normalize;
    p.weighted = in_.force.weighted, p.gamma = static_cast<float>(in_.force.gamma);
    p.inv_tau = static_cast<float>(1 / temperature.value);
    p.inv_teacher_tau = teacher.has_value() ? static_cast<float>(1 / *teacher) : 0.f;
    p.temperature = temperature.on_device.defined() ? temperature.on_device.const_data_ptr<float>() : nullptr;
    if (p.contrast) sort_rows(neighbors);
    prepare_operands();
  }

  // Room that the kernels write.
  template <typename T>
  T* fresh(at::IntArrayRef shape) {
    held_.push_back(empty(shape, c10::CppTypeToScalarType<T>::value));
    return held_.back().template mutable_data_ptr<T>();
  }

  at::Tensor empty(at::IntArrayRef shape, at::ScalarType dtype) const {
    return at::empty(shape, in_.z.options().dtype(dtype));
  }

  // Float64 rows that the kernels read; null where there is nothing.
  const double* rows(const MaybeTensor& x) {
    if (!x.has_value() || x->numel() == 0) return nullptr;
    held_.push_back(x->to(at::kDouble).contiguous());
    return held_.back().const_data_ptr<double>();
  }

  void plan(bool backward) {
    const int64_t blocks = p.padded / kGuidedRows, tiles = p.padded / kGuidedColumns;
    p.backward = backward;
    if (p.contrast) {
      p.position_of = fresh<int>({p.n});
      p.spans = reinterpret_cast<GuidedSpans*>(fresh<int>({p.n, 4}));
      p.fallback = fresh<uint8_t>({p.n});
      p.fallback_tiles = fresh<uint8_t>({tiles});
    }
    p.tiles = reinterpret_cast<uint32_t*>(fresh<int>({blocks, (tiles + 31) / 32}));
    p.fields = fresh<float>({kGuidedFields, p.padded});
    check_launch(kOp, ltood_launch_guided_plan(&p, stream_));
  }

  void forward() {
    split(false);
    p.sums = fresh<float>({p.splits, kGuidedSums, p.padded});
    check_launch(kOp, ltood_launch_guided_forward(&p, stream_));
  }

  void backward() {
    if (p.contrast) {
      const auto [keys, order] = at::sort(neighbor_at_.flatten(), true, 0, false);
      p.reverse_keys = hold(keys), p.reverse_order = hold(order);
    }
    split(true);
    p.gradient = fresh<float>({p.splits, p.n, int64_t(kSlice) * p.z.slices});
    check_launch(kOp, ltood_launch_guided_backward(&p, stream_));
  }

  GuidedParams p{};

 private:
  const int64_t* hold(const at::Tensor& x) {
    held_.push_back(x);
    return x.const_data_ptr<int64_t>();
  }

  // The order of the plan, and the views in it.
  void sort_rows(const at::Tensor& neighbors) {
    p.clusters = in_.clusters->const_data_ptr<int64_t>(), p.far = in_.far->const_data_ptr<int64_t>();
    p.clusters_count = static_cast<int>(in_.far->numel());
    const at::Tensor unsorted = empty({p.n}, at::kLong);
    p.keys = unsorted.mutable_data_ptr<int64_t>();
    check_launch(kOp, ltood_launch_guided_keys(&p, stream_));
    const auto [keys, order] = at::sort(unsorted, true, 0, false);
    order_ = order;
    p.keys = const_cast<int64_t*>(hold(keys)), p.order = hold(order);
    if (in_.instance_ids.has_value()) {
      const at::Tensor instance = at::index_select(*in_.instance_ids, 0, order);
      const auto [instance_keys, members] = at::sort(instance, true, 0, false);
      p.instance = hold(instance), p.instance_keys = hold(instance_keys), p.members = hold(members);
    }
    neighbor_at_ = at::empty_like(neighbors);
    p.k = static_cast<int>(neighbors.size(1));
    held_.push_back(neighbors);
    p.neighbors = neighbors.mutable_data_ptr<int64_t>(), p.neighbor_at = neighbor_at_.mutable_data_ptr<int64_t>();
  }

  // Rows in the order of the plan. Student and guide are multiplied in one type, bfloat16 if one of them is: two parts
  // of it hold a float16. Float32 rows are two parts of float16, 22 bits, for the products that exponents are made of.
  void prepare_operands() {
    const auto is = [&](const at::Tensor& x, at::ScalarType type) { return x.scalar_type() == type; };
    const bool one_part = in_.normalize && is(in_.z, at::kHalf) && is(in_.guide, at::kHalf);
    const bool half_parts = !is(in_.z, at::kBFloat16) && !is(in_.guide, at::kBFloat16);
    const auto ordered = [&](const at::Tensor& x) {
      const at::Tensor rows = order_.defined() ? at::index_select(x, 0, order_) : x;
      return one_part || is(x, at::kBFloat16) ? rows : rows.to(at::kFloat);
    };
    element_type(kOp, "z", in_.z);
    const at::Tensor z = ordered(in_.z);
    z_ = prepare_rows(kOp, "z", z, in_.normalize, half_parts);
    e_ = prepare_rows(kOp, "guide", ordered(in_.guide), true, half_parts);
    p.z = p.v = z_.view, p.e = e_.view, p.inv_norm = z_.inv_norm.const_data_ptr<float>();
    if (!z_.view.is_half) return;
    values_ = one_part ? z_.data.to(at::kBFloat16) : prepare_rows(kOp, "z", z, in_.normalize).data;
    p.v.data = values_.data_ptr(), p.v.is_half = 0;  // the scales are the same
  }

  void split(bool backward) {
    p.splits = ltood_guided_splits(p.n, p.z.slices, backward);
    check_launch(kOp, p.splits < 0 ? -p.splits : 0);
  }

  const GuidedArguments& in_;
  void* stream_;
  std::vector<at::Tensor> held_;
  at::Tensor order_, neighbor_at_, values_;
  OperandTensors z_, e_;
};

// The k rows nearest to each by guide cosine, outside its own image.
at::Tensor search_neighbors(const GuidedArguments& in, int64_t k) {
  const int64_t n = in.n();
  const bool wide = in.guide.scalar_type() == at::kDouble;
  const OperandTensors guide = prepare_rows(kOp, "guide", wide ? in.guide.to(at::kFloat) : in.guide, true, true);
  const at::Tensor values = at::empty({n, k}, in.z.options().dtype(at::kFloat));
  at::Tensor indices = at::empty({n, k}, in.z.options().dtype(at::kLong));
  TopkParams params{};
  params.x = params.y = guide.view;
  params.k = static_cast<int>(k);
  params.exclude_self = 1;
  if (in.instance_ids.has_value()) {
    params.x_instance = params.y_instance = in.instance_ids->const_data_ptr<int64_t>();
  } else {
    params.views = static_cast<int>(n / 2);
  }
  params.values = values.mutable_data_ptr<float>();
  params.indices = indices.mutable_data_ptr<int64_t>();
  launch_topk(kOp, params, in.z);
  return indices;
}

Outputs guided_cuda(const at::Tensor& z,              // [N, D]
                    const at::Tensor& guide,          // [N, Dg]
                    const MaybeTensor& clusters,      // [N]
                    const MaybeTensor& far,           // [K]
                    const MaybeTensor& instance_ids,  // [N]
                    const MaybeTensor& pos_idx,       // [N, k]
                    double temperature, const MaybeTensor& temperature_tensor,
                    std::optional<double> teacher_temperature, int64_t k, bool weighted, double gamma, bool normalize,
                    bool distill) {
  const c10::DeviceGuard guard(z.device());
  const Temperature tau(temperature, temperature_tensor);
  const GuidedArguments arguments{z,
                                  guide,
                                  clusters,
                                  far,
                                  instance_ids,
                                  pos_idx,
                                  tau.value,
                                  teacher_temperature.value_or(tau.value),
                                  {weighted && gamma != 0, gamma},
                                  normalize,
                                  distill};
  check_guided(arguments);
  const bool contrast = clusters.has_value();
  const at::Tensor neighbors = !contrast             ? at::empty({z.size(0), 0}, z.options().dtype(at::kLong))
                               : pos_idx.has_value() ? pos_idx->clone(at::MemoryFormat::Contiguous)
                                                     : search_neighbors(arguments, k);
  GuidedCall call(arguments, tau, teacher_temperature, neighbors);
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

std::tuple<at::Tensor, at::Tensor> guided_bwd_cuda(
    const MaybeTensor& grad_loss, const MaybeTensor& grad_lse,  // [N], none = 0
    const MaybeTensor& grad_kl, const MaybeTensor& grad_student_lse,
    const at::Tensor& z,              // [N, D]
    const at::Tensor& guide,          // [N, Dg]
    const MaybeTensor& clusters,      // [N]
    const MaybeTensor& far,           // [K]
    const MaybeTensor& instance_ids,  // [N]
    const at::Tensor& weight, const at::Tensor& lse, const at::Tensor& neighbors, const at::Tensor& student_lse,
    const at::Tensor& teacher_lse, double temperature, const MaybeTensor& temperature_tensor,
    std::optional<double> teacher_temperature, bool weighted, double gamma, bool normalize, bool distill) {
  const c10::DeviceGuard guard(z.device());
  const Temperature tau(temperature, temperature_tensor);
  const GuidedArguments arguments{z,
                                  guide,
                                  clusters,
                                  far,
                                  instance_ids,
                                  neighbors,
                                  tau.value,
                                  teacher_temperature.value_or(tau.value),
                                  {weighted && gamma != 0, gamma},
                                  normalize,
                                  distill};
  check_guided(arguments,
               {grad_loss, grad_lse, weight, lse, neighbors, grad_kl, grad_student_lse, student_lse, teacher_lse});
  GuidedCall call(arguments, tau, teacher_temperature, neighbors.clone(at::MemoryFormat::Contiguous));
  GuidedParams& p = call.p;
  p.grad_loss = call.rows(grad_loss), p.grad_lse = call.rows(grad_lse);
  p.grad_kl = call.rows(grad_kl), p.grad_student_lse = call.rows(grad_student_lse);
  p.weight = const_cast<double*>(call.rows(weight)), p.lse = const_cast<double*>(call.rows(lse));
  p.student_lse = const_cast<double*>(call.rows(student_lse));
  p.teacher_lse = const_cast<double*>(call.rows(teacher_lse));
  call.plan(true);
  at::Tensor grad_z = at::empty(z.sizes(), z.options());
  at::Tensor along = call.empty({z.size(0)}, at::kFloat);
  p.grad_type = element_type(kOp, "z", z), p.grad_z = grad_z.data_ptr();
  p.along = along.mutable_data_ptr<float>();
  call.backward();
  const at::Tensor total = along.sum();
  return {grad_z, tau.on_device.defined() ? at::div(total, tau.on_device).div_(-2) : total.div(-2 * tau.value)};
}

}  // namespace

}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CUDA, m) {
  m.impl("guided", &ltood::guided_cuda);
  m.impl("guided_bwd", &ltood::guided_bwd_cuda);
}
