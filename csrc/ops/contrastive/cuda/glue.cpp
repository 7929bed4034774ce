// The contrastive losses on CUDA: tensors in, launches out. Nothing here waits for the device.
#include <ATen/ops/abs.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/scatter.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cuda/operand_torch.h"
#include "cuda/segment_sums.h"
#include "cuda/topk/torch.h"
#include "ops/contrastive/contrastive.h"
#include "ops/contrastive/cuda/launch.h"
#include "ops/contrastive/partial.h"

namespace ltood {
namespace {

constexpr const char* kOp = "contrastive";

// Unit rows bound an exponent by log2(e) / tau; from the largest to the smallest one, 2 log2(e) / tau has to fit
// the 126 binary orders of float's normal range: tau >= 0.0229. A temperature on the device is not known here.
bool needs_online(bool normalize, const Temperature& temperature) {
  return !normalize || temperature.tensor || temperature.number < 0.0229;
}

// tau for the kernels: a number, or a float on the device.
struct DeviceTemperature {
  at::Tensor tensor;
  Exponents exponents{};

  DeviceTemperature(const Temperature& given, bool normalize) {
    if (given.tensor) tensor = given.tensor->to(at::kFloat).contiguous();
    exponents.inv_tau = static_cast<float>(1 / given.number);
    exponents.temperature = given.tensor ? tensor.const_data_ptr<float>() : nullptr;
    exponents.online = needs_online(normalize, given);
  }
};

const int64_t* indices_of(const OptionalTensor& x) { return x ? x->const_data_ptr<int64_t>() : nullptr; }

// sums[key] of weight * u over rows that are sorted by key.
at::Tensor segment_sums(const OperandTensors& u, const at::Tensor& keys, const at::Tensor& order, int entries_per_row,
                        const at::Tensor& weight, int64_t d) {
  const auto floats = u.scale.options();
  const at::Tensor sums = at::zeros({u.view.rows, d}, floats);
  const at::Tensor edges = at::empty({ltood_segment_edges(keys.numel()), d}, floats);
  SegmentSumsParams params{};
  params.x = u.view;
  params.keys = keys.const_data_ptr<int64_t>();
  params.order = order.const_data_ptr<int64_t>();
  params.count = keys.numel();
  params.entries_per_row = entries_per_row;
  params.weight = weight.defined() ? weight.const_data_ptr<float>() : nullptr;
  params.d = static_cast<int>(d);
  params.sums = sums.mutable_data_ptr<float>();
  params.edges = edges.mutable_data_ptr<float>();
  check_launch(kOp, ltood_launch_segment_sums(&params, current_stream(u.scale)));
  return sums;
}

// Rows by segment, segments numbered from 0 in the order of their ids; sums of u and, in the backward, of positive_grad
// * u.
struct SegmentTensors {
  at::Tensor ids, sorted, order, sums, grad_sums;

  SegmentTensors() = default;
  SegmentTensors(const at::Tensor& labels, const OperandTensors& u, int64_t d, const at::Tensor& positive_grad = {}) {
    at::Tensor values;
    std::tie(values, order) = at::sort(labels, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    const at::Tensor starts = at::ne(values.slice(0, 1), values.slice(0, 0, -1)).to(at::kLong);
    sorted = at::cat({at::zeros({1}, values.options()), at::cumsum(starts, 0)});
    ids = at::scatter(at::empty_like(sorted), 0, order, sorted);
    sums = segment_sums(u, sorted, order, 1, {}, d);
    if (positive_grad.defined()) grad_sums = segment_sums(u, sorted, order, 1, positive_grad, d);
  }

  SegmentView view() const {
    if (!ids.defined()) return {};
    return {ids.const_data_ptr<int64_t>(), sorted.const_data_ptr<int64_t>(), sums.const_data_ptr<float>(),
            grad_sums.defined() ? grad_sums.const_data_ptr<float>() : nullptr};
  }
};

// The sole positives of a part of the loss; the tensor that holds them.
struct PairTensors {
  at::Tensor partner;
  SolePairs view{};

  PairTensors(const SegmentTensors& segments, const at::Tensor& z) {
    const int n = static_cast<int>(z.size(0));
    if (!segments.ids.defined()) {
      view.half = n / 2;
      return;
    }
    partner = at::empty({n}, z.options().dtype(at::kInt));
    const SegmentPairs params{n, segments.ids.const_data_ptr<int64_t>(), segments.sorted.const_data_ptr<int64_t>(),
                              segments.order.const_data_ptr<int64_t>(), partner.mutable_data_ptr<int>()};
    check_launch(kOp, ltood_launch_contrastive_pairs(&params, current_stream(z)));
    view.partner = partner.const_data_ptr<int>();
  }
};

// Rows of z or of the bank as an operand. Rows of two types are taken as float32, so that both have the same splits.
// Splits of float32 rows are float16, 22 bits together; but not of unnormalised rows, whose weights would leave its
// range.
OperandTensors operand(const char* argument, const at::Tensor& x, const OptionalTensor& other, bool normalize) {
  const bool mixed = other && other->scalar_type() != x.scalar_type();
  return prepare_rows(kOp, argument, mixed ? x.to(at::kFloat) : x, normalize, /*half_splits=*/normalize);
}

struct Slots {
  at::Tensor sums, maxima, nearest;
};

// The tiles' pass. One nearest row is found on the way; more, or those of a bank, by the top-k kernel.
Slots launch_tiles(ContrastiveForward& tiles, const at::Tensor& like, void* stream) {
  check_launch(kOp, ltood_plan_contrastive(&tiles));
  const int64_t n = tiles.u.rows, chunks = tiles.plan.chunks, slots = chunks + tiles.plan.strips;
  Slots memory;
  memory.sums = at::empty({slots, n}, like.options());
  tiles.row_sums = memory.sums.mutable_data_ptr<float>();
  tiles.col_sums = tiles.row_sums + chunks * n;
  if (tiles.exponents.online) {
    memory.maxima = at::empty({slots, n}, like.options());
    tiles.row_maxima = memory.maxima.mutable_data_ptr<float>();
    tiles.col_maxima = tiles.row_maxima + chunks * n;
  }
  if (tiles.nearest) {
    static_assert(sizeof(Nearest) == 2 * sizeof(float));
    memory.nearest = at::empty({slots, n, 2}, like.options());
    tiles.row_nearest = reinterpret_cast<Nearest*>(memory.nearest.mutable_data_ptr<float>());
    tiles.col_nearest = tiles.row_nearest + chunks * n;
  }
  check_launch(kOp, ltood_launch_contrastive_tiles(&tiles, stream));
  return memory;
}

void launch_search(const ContrastiveInputs& in, const OperandTensors& u, const NeighborRules& rules,
                   const at::Tensor& cosines, const at::Tensor& indices) {
  OperandTensors bank;
  if (in.bank) bank = operand("bank", *in.bank, in.z, in.normalize);
  const bool instances = in.bank_ids.has_value(), domains = in.bank_domain.has_value();
  TopkParams params{};
  params.x = u.view;
  params.y = in.bank ? bank.view : u.view;
  params.k = static_cast<int>(in.k);
  params.exclude_self = !in.bank;
  params.views = in.bank ? 0 : rules.views;
  params.x_instance = in.bank && !instances ? nullptr : rules.instance;
  params.y_instance = in.bank ? indices_of(in.bank_ids) : rules.instance;
  params.x_domain = in.bank && !domains ? nullptr : rules.domain;
  params.y_domain = in.bank ? indices_of(in.bank_domain) : rules.domain;
  params.values = cosines.mutable_data_ptr<float>();
  params.indices = indices.mutable_data_ptr<int64_t>();
  launch_topk(kOp, params, u.scale);
}

using ContrastiveOutputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ContrastiveOutputs forward(const ContrastiveInputs& in) {
  const c10::DeviceGuard guard(in.z.device());
  void* stream = current_stream(in.z);
  const int64_t n = in.z.size(0), d = in.z.size(1);
  const OperandTensors u = operand("z", in.z, in.bank, in.normalize);
  const auto floats = u.scale.options(), doubles = floats.dtype(at::kDouble);
  const at::Tensor cosines = at::empty({n, in.k}, floats), indices = at::empty({n, in.k}, floats.dtype(at::kLong));
  const DeviceTemperature tau(in.temperature, in.normalize);
  const NeighborRules rules{in.instance_ids ? 0 : static_cast<int>(n / 2), indices_of(in.instance_ids),
                            indices_of(in.domain)};
  ContrastiveForward tiles{};
  tiles.u = u.view;
  tiles.exponents = tau.exponents;
  tiles.rules = rules;
  SegmentTensors instances, classes;
  if (in.views && in.instance_ids) instances = SegmentTensors(*in.instance_ids, u, d);
  if (in.labels) classes = SegmentTensors(*in.labels, u, d);
  const PairTensors pairs(in.views ? instances : classes, in.z);
  tiles.pairs = pairs.view;
  tiles.nearest = in.k == 1 && !in.bank;
  const Slots slots = launch_tiles(tiles, u.scale, stream);
  if (in.k > 0 && !tiles.nearest) launch_search(in, u, rules, cosines, indices);

  const int64_t n_instance = in.views ? n : 0, n_class = in.labels ? n : 0;
  const at::Tensor lse = at::empty({n}, doubles);
  const at::Tensor instance_loss = at::empty({n_instance}, floats), class_loss = at::empty({n_class}, floats);
  const at::Tensor instance_weight = at::empty({n_instance}, doubles), class_weight = at::empty({n_class}, doubles);
  ContrastiveRows rows{};
  rows.u = u.view;
  rows.d = static_cast<int>(d);
  rows.exponents = tau.exponents;
  rows.tiles = tiles;
  rows.has_views = in.views;
  rows.instances = instances.view();
  rows.classes = classes.view();
  rows.k = static_cast<int>(in.k);
  rows.neighbor_weight = static_cast<float>(in.neighbor_weight);
  rows.neighbor_weights = in.neighbor_weights ? in.neighbor_weights->const_data_ptr<double>() : nullptr;
  rows.cosines = cosines.mutable_data_ptr<float>();
  rows.indices = indices.mutable_data_ptr<int64_t>();
  rows.lse = lse.mutable_data_ptr<double>();
  rows.instance_loss = instance_loss.mutable_data_ptr<float>();
  rows.class_loss = class_loss.mutable_data_ptr<float>();
  rows.instance_weight = instance_weight.mutable_data_ptr<double>();
  rows.class_weight = class_weight.mutable_data_ptr<double>();
  check_launch(kOp, ltood_launch_contrastive_rows(&rows, stream));
  return {instance_loss, class_loss, lse, instance_weight, class_weight, cosines, indices};
}

ContrastiveOutputs contrastive_cuda(const Arguments& arguments) {
  const ContrastiveInputs in = contrastive_inputs(arguments);
  check_contrastive(in);
  LTOOD_CHECK_VALUE(!in.decoupled, kOp, "decoupled", "false on CUDA", "true");
  return forward(in);
}

// The arguments of the backward, and the tensors that its launches share.
struct BackwardCall : ContrastiveInputs, ContrastiveSaved {
  OperandTensors u;
  SegmentTensors instances, classes;
  std::optional<PairTensors> pairs;
  ContrastiveBackward p{};
  at::Tensor rows;     // [4, N]: the outputs of RowGradients
  at::Tensor largest;  // 0-d, of float16 only

  at::Tensor row(int which) const { return rows.select(0, which); }
  void* stream() const { return current_stream(z); }
};

void launch_row_gradients(BackwardCall& b) {
  const int n = b.u.view.rows;
  b.rows = at::empty({4, n}, b.u.scale.options());
  float* out = b.rows.mutable_data_ptr<float>();
  RowGradients& rows = b.p.rows;
  rows.n = n;
  rows.grad_instance = b.grad_instance ? b.grad_instance->const_data_ptr<float>() : nullptr;
  rows.grad_class = b.grad_class ? b.grad_class->const_data_ptr<float>() : nullptr;
  rows.grad_lse = b.grad_lse ? b.grad_lse->const_data_ptr<double>() : nullptr;
  rows.lse = b.lse.const_data_ptr<double>();
  rows.instance_weight = b.instance_weight.const_data_ptr<double>();
  rows.class_weight = b.class_weight.const_data_ptr<double>();
  rows.neighbor_weight = static_cast<float>(b.neighbor_weight);
  rows.neighbor_weights = b.neighbor_weights ? b.neighbor_weights->const_data_ptr<double>() : nullptr;
  rows.lse_grad = out;
  rows.instance_positive_grad = out + n;
  rows.neighbor_positive_grad = out + 2 * n;
  rows.class_positive_grad = out + 3 * n;
  check_launch(kOp, ltood_launch_contrastive_row_gradients(&b.p.rows, b.stream()));
}

// Factors of rows [n, 4] from their log-sum-exp and the gradient that arrives at it.
at::Tensor launch_factors(const OperandTensors& u, const Exponents& exponents, const double* lse, const float* weight,
                          const float* largest, const SolePairs& pairs = {}) {
  const at::Tensor factors = at::empty({u.view.rows, 4}, u.scale.options());
  static_assert(sizeof(RowFactors) == 4 * sizeof(float));
  const ContrastiveFactors params{
      u.view, exponents, pairs, lse, weight, largest, reinterpret_cast<RowFactors*>(factors.mutable_data_ptr<float>())};
  check_launch(kOp, ltood_launch_contrastive_factors(&params, current_stream(u.scale)));
  return factors;
}

// The N² work; returns [k_splits, rows, D padded to k_tiles].
at::Tensor launch_lse_bwd(ContrastiveLseBwd& lse_bwd, const at::Tensor& row_factors, const at::Tensor& col_factors) {
  check_launch(kOp, ltood_plan_contrastive_lse_bwd(&lse_bwd));
  lse_bwd.row_factors = reinterpret_cast<const RowFactors*>(row_factors.const_data_ptr<float>());
  lse_bwd.col_factors = reinterpret_cast<const RowFactors*>(col_factors.const_data_ptr<float>());
  const at::Tensor out =
      at::empty({lse_bwd.k_splits, lse_bwd.rows.rows, int64_t(kKTile) * lse_bwd.rows.k_tiles}, row_factors.options());
  lse_bwd.out = out.mutable_data_ptr<float>();
  check_launch(kOp, ltood_launch_contrastive_lse_bwd(&lse_bwd, current_stream(row_factors)));
  return out;
}

void find_positives(BackwardCall& b) {
  const int64_t d = b.z.size(1);
  if (b.grad_instance && b.instance_ids) b.instances = SegmentTensors(*b.instance_ids, b.u, d, b.row(1));
  if (b.grad_class) b.classes = SegmentTensors(*b.labels, b.u, d, b.row(3));
  if (!b.grad_instance && !b.grad_class) return;
  b.pairs.emplace(b.grad_instance ? b.instances : b.classes, b.z);
  b.p.pairs = b.pairs->view;
}

// The rows against themselves.
at::Tensor launch_square_lse_bwd(BackwardCall& b) {
  if (b.u.view.is_half) {
    b.largest = at::amax(at::abs(b.row(0)));
    b.p.largest = b.largest.const_data_ptr<float>();
  }
  b.p.lse_bwd = {b.u.view, b.u.view, b.p.exponents};
  const at::Tensor factors =
      launch_factors(b.u, b.p.exponents, b.p.rows.lse, b.p.rows.lse_grad, b.p.largest, b.p.pairs);
  return launch_lse_bwd(b.p.lse_bwd, factors, factors);
}

// The positives and the normalisation; returns (grad_z, the sum of <u_i, dL/du_i>).
std::tuple<at::Tensor, at::Tensor> launch_epilogue(BackwardCall& b) {
  const int64_t n = b.u.view.rows, d = b.z.size(1);
  at::Tensor chosen_sum;
  OperandTensors bank;
  b.p.k = b.grad_instance ? static_cast<int>(b.indices.size(1)) : 0;
  if (b.p.k > 0 && b.bank) {
    bank = operand("bank", *b.bank, b.z, b.normalize);
    b.p.bank = bank.view;
  } else if (b.p.k > 0) {
    const auto [keys, order] = at::sort(b.indices.view({-1}), /*stable=*/true, /*dim=*/0, /*descending=*/false);
    chosen_sum = segment_sums(b.u, keys, order, b.p.k, b.row(2), d);
    b.p.chosen_sum = chosen_sum.const_data_ptr<float>();
  }
  const at::Tensor grad_z = at::empty({n, d}, b.z.options()), u_dot_du = at::empty({n}, b.u.scale.options());
  b.p.instances = b.instances.view();
  b.p.classes = b.classes.view();
  b.p.has_views = b.grad_instance.has_value();
  b.p.indices = b.indices.const_data_ptr<int64_t>();
  b.p.cosines = b.cosines.const_data_ptr<float>();
  b.p.type = element_type(kOp, "z", b.z);
  b.p.normalize = b.normalize;
  b.p.inv_norm = b.u.inv_norm.const_data_ptr<float>();
  b.p.grad_z = grad_z.mutable_data_ptr();
  b.p.u_dot_du = u_dot_du.mutable_data_ptr<float>();
  check_launch(kOp, ltood_launch_contrastive_epilogue(&b.p, b.stream()));
  return {grad_z, u_dot_du.to(at::kDouble).sum()};
}

std::tuple<at::Tensor, at::Tensor> contrastive_bwd_cuda(const Arguments& arguments) {
  BackwardCall b{contrastive_inputs(arguments), contrastive_saved(arguments)};
  check_contrastive_bwd(b, b);
  const c10::DeviceGuard guard(b.z.device());
  const DeviceTemperature tau(b.temperature, b.normalize);
  b.u = operand("z", b.z, b.bank, b.normalize);
  b.p.u = b.u.view;
  b.p.d = static_cast<int>(b.z.size(1));
  b.p.exponents = tau.exponents;
  launch_row_gradients(b);
  find_positives(b);
  const at::Tensor lse_bwd = launch_square_lse_bwd(b);
  const auto [grad_z, u_dot_du] = launch_epilogue(b);
  const OptionalTensor& learned = b.temperature.tensor;
  const at::Tensor doubled = learned ? u_dot_du.div(learned->to(at::kDouble)) : u_dot_du.div(b.temperature.number);
  return {grad_z, doubled.mul(-0.5).to(at::kFloat)};
}

// The partial form: rows and columns prepared alike.
struct PartialOperands {
  c10::DeviceGuard guard;
  OperandTensors x, y;
  DeviceTemperature tau;
  int diagonal;

  PartialOperands(const char* op, const PartialInputs& in)
      : guard(in.x.device()),
        x(prepare_rows(op, "x", in.x, in.normalize, /*half_splits=*/in.normalize)),
        y(prepare_rows(op, "y", in.y, in.normalize, /*half_splits=*/in.normalize)),
        tau(in.temperature, in.normalize),
        diagonal(static_cast<int>(bounded_diagonal(in))) {}
};

void launch_partial_search(const PartialOperands& operands, const PartialSearch& search, const at::Tensor& cosines,
                           const at::Tensor& indices) {
  TopkParams params{};
  params.x = operands.x.view;
  params.y = operands.y.view;
  params.k = static_cast<int>(search.k);
  params.exclude_self = 1;
  params.diagonal = operands.diagonal;
  params.x_instance = indices_of(search.x_instance);
  params.y_instance = indices_of(search.y_instance);
  params.x_domain = indices_of(search.x_domain);
  params.y_domain = indices_of(search.y_domain);
  params.values = cosines.mutable_data_ptr<float>();
  params.indices = indices.mutable_data_ptr<int64_t>();
  launch_topk("contrastive_partial", params, operands.x.scale);
}

void check_partial_without_exclusion(const char* op, const Arguments& arguments) {
  LTOOD_CHECK_VALUE(!partial_excluded(arguments).x, op, "x_excluded", "none on CUDA", "one");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> contrastive_partial_cuda(const Arguments& arguments) {
  const char* op = "contrastive_partial";
  const PartialInputs in = partial_inputs(arguments);
  const PartialSearch search = partial_search(arguments);
  check_partial_without_exclusion(op, arguments);
  check_contrastive_partial(in, {}, search);
  const PartialOperands operands(op, in);
  const int64_t n = in.x.size(0), k = search.k;
  const auto floats = operands.x.scale.options();
  ContrastivePartialSums sums{operands.x.view, operands.y.view, operands.tau.exponents, operands.diagonal};
  check_launch(op, ltood_plan_contrastive_partial(&sums));
  const at::Tensor range_sums = at::empty({1 + operands.tau.exponents.online, sums.k_splits, n}, floats);
  const at::Tensor lse = at::empty({n}, floats.dtype(at::kDouble));
  sums.sums = range_sums.mutable_data_ptr<float>();
  sums.maxima = sums.sums + (operands.tau.exponents.online ? sums.k_splits * n : 0);
  sums.lse = lse.mutable_data_ptr<double>();
  check_launch(op, ltood_launch_contrastive_partial(&sums, current_stream(in.x)));
  const at::Tensor cosines = at::empty({n, k}, floats), indices = at::empty({n, k}, floats.dtype(at::kLong));
  if (k > 0) launch_partial_search(operands, search, cosines, indices);
  return {lse, cosines, indices};
}

at::Tensor contrastive_partial_bwd_cuda(const Arguments& arguments) {
  const char* op = "contrastive_partial_bwd";
  const PartialInputs in = partial_inputs(arguments);
  const PartialLseGrads weights = partial_lse_grads(arguments);
  check_partial_without_exclusion(op, arguments);
  check_contrastive_partial_bwd(in, {}, weights);
  const PartialOperands operands(op, in);
  const Exponents& exponents = operands.tau.exponents;
  const at::Tensor of_rows = weights.x_weight->to(at::kFloat);
  const at::Tensor of_cols = weights.y_weight ? weights.y_weight->to(at::kFloat) : at::Tensor();
  at::Tensor largest;
  if (operands.x.view.is_half) largest = at::amax(at::abs(weights.y_weight ? at::cat({of_rows, of_cols}) : of_rows));
  const float* unit = largest.defined() ? largest.const_data_ptr<float>() : nullptr;
  const at::Tensor row_factors = launch_factors(operands.x, exponents, weights.x_lse->const_data_ptr<double>(),
                                                of_rows.const_data_ptr<float>(), unit);
  const at::Tensor col_factors =
      launch_factors(operands.y, exponents, weights.y_lse ? weights.y_lse->const_data_ptr<double>() : nullptr,
                     weights.y_lse ? of_cols.const_data_ptr<float>() : nullptr, unit);
  ContrastiveLseBwd lse_bwd{operands.x.view, operands.y.view, exponents, operands.diagonal};
  const at::Tensor splits = launch_lse_bwd(lse_bwd, row_factors, col_factors);  // held: lse_bwd points into it
  const int64_t d = in.x.size(1);
  const at::Tensor out = at::empty({in.x.size(0), d}, operands.x.scale.options());
  const ContrastiveLseBwdCombine sum{lse_bwd, static_cast<int>(d), unit, out.mutable_data_ptr<float>()};
  check_launch(op, ltood_launch_contrastive_lse_bwd_combine(&sum, current_stream(in.x)));
  return out;
}

}  // namespace
}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CUDA, m) {
  m.impl("contrastive", ltood::by_name<ltood::contrastive_cuda>());
  m.impl("contrastive_bwd", ltood::by_name<ltood::contrastive_bwd_cuda>());
  m.impl("contrastive_partial", ltood::by_name<ltood::contrastive_partial_cuda>());
  m.impl("contrastive_partial_bwd", ltood::by_name<ltood::contrastive_partial_bwd_cuda>());
}
