// The contrastive losses on the CPU, backward.
//
// With w_i the gradient that arrives at lse_i, dL/ds_ij = w_i P_ij, P_ij = exp(s_ij - lse_i), and s_ij = s_ji make
//   dL/du_i = (1/tau) sum_j G_ij u_j,  G_ij = (w_i exp(-lse_i) + w_j exp(-lse_j)) exp(s_ij) = G_ji,
// so one exponential and one tile of G serve the rows i (G u_j) and the rows j (G^T u_i). The positives are linear.
// tau: s = <u, u> / tau, hence dL/dtau = -(1/tau) sum_ij dL/ds_ij s_ij = -(1/2 tau) sum_i <u_i, dL/du_i>; similarities
// to a bank count only once in the sum on the right, as its rows get no gradient.
#include <ATen/ops/arange.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "common/excluded_columns.h"
#include "common/undefined.h"
#include "ops/contrastive/cpu/similarities.h"
#include "ops/contrastive/cpu/sole_positives.h"

namespace ltood {
namespace {

// The arguments of the backward.
struct BackwardInputs : ContrastiveInputs, ContrastiveSaved {};

// The gradients of each row: at its log-sum-exp, and at the mean over its positives, already divided by their weight.
struct LossGradients {
  std::vector<double> lse, instance_positive_grad, class_positive_grad;
  bool undefined = false;  // a row's softmax is, and a gradient arrives at it
  double largest = 0;  // |w_i|, the unit that weights are carried in so that exp(-lse) cannot move them out of range
};

// Adds a part's gradient to that of the log-sum-exp; returns gradient / weight, 0 for rows without positives.
std::vector<double> part_gradient(const OptionalTensor& gradient, const at::Tensor& weight, std::vector<double>& lse) {
  std::vector<double> positive_grad(lse.size(), 0.0);
  if (!gradient) return positive_grad;
  const at::Tensor dense = gradient->to(at::kDouble).contiguous();
  const double* g = dense.const_data_ptr<double>();
  const double* w = weight.const_data_ptr<double>();
  for (size_t i = 0; i < lse.size(); ++i) {
    if (!(w[i] > 0)) continue;
    lse[i] += g[i];
    positive_grad[i] = g[i] / w[i];
  }
  return positive_grad;
}

LossGradients row_gradients(const BackwardInputs& in, int64_t n) {
  LossGradients rows;
  rows.lse.assign(n, 0.0);
  if (in.grad_lse) {
    const at::Tensor dense = in.grad_lse->to(at::kDouble).contiguous();
    std::copy_n(dense.const_data_ptr<double>(), n, rows.lse.data());
  }
  rows.instance_positive_grad = part_gradient(in.grad_instance, in.instance_weight, rows.lse);
  rows.class_positive_grad = part_gradient(in.grad_class, in.class_weight, rows.lse);
  const double* lse = in.lse.const_data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) {
    if (std::isinf(lse[i]) && lse[i] < 0) rows.lse[i] = 0;  // no other row: nothing to repel
    rows.largest = std::max(rows.largest, std::abs(rows.lse[i]));
    rows.undefined |= rows.lse[i] != 0 && is_undefined(lse[i]);
  }
  if (rows.largest == 0) rows.largest = 1;
  return rows;
}

// The gradient at the positives of each row, times the weight of its neighbour term.
std::vector<double> neighbor_positive_grad(const BackwardInputs& in, std::vector<double> positive_grad) {
  const double* weights = in.neighbor_weights ? in.neighbor_weights->const_data_ptr<double>() : nullptr;
  for (size_t i = 0; i < positive_grad.size(); ++i) positive_grad[i] *= weights ? weights[i] : in.neighbor_weight;
  return positive_grad;
}

// The positives as the backward treats them.
struct Positives {
  RowSegments views, classes;
  SolePairs pairs;
  ExcludedColumns excluded;
  std::vector<double> neighbor_grad;  // [N]

  Positives(const BackwardInputs& in, const LossGradients& row, int64_t n) {
    if (in.grad_instance || (in.decoupled && in.views)) views = view_segments(in.instance_ids, n);
    if (in.grad_class || (in.decoupled && !in.views)) classes = segment_rows(in.labels->const_data_ptr<int64_t>(), n);
    if (in.decoupled) {
      excluded = ExcludedColumns(in.views ? views : classes, n);
    } else {
      list_pairs(in, n);
    }
    if (in.grad_instance && in.indices.size(1) > 0)
      neighbor_grad = neighbor_positive_grad(in, row.instance_positive_grad);
    pairs.list_pairs(n);
  }

  template <typename T>
  void exclude(const Tile<T>& tile, int64_t row_start, int64_t col_start) const {
    pairs.exclude(tile, row_start, col_start);
    excluded.exclude(tile, row_start, col_start);
  }

 private:
  // The segments of two rows become pairs.
  void list_pairs(const BackwardInputs& in, int64_t n) {
    if (in.grad_instance) {
      pairs.instance = sole_members(views, n);
      const int64_t k = in.indices.size(1);
      if (k > 0 && !in.bank) pairs.neighbor = sole_neighbors(views, in.indices.const_data_ptr<int64_t>(), n, k);
      views = without_pairs(views);
    }
    if (in.grad_class) {
      pairs.same_class = sole_members(classes, n);
      classes = without_pairs(classes);
    }
  }
};

// G u [N, D] over the upper triangle, in units of row.largest / tau. What a tile gives the rows of its columns, G^T
// u_i, is summed transposed, u_i^T G: both products then read G as it lies.
template <typename T>
at::Tensor lse_gradient(const PreparedRows& rows, const LossGradients& row, const at::Tensor& lse,
                        const Positives& positives) {
  const RowPanels<T> panels = row_panels<T>(rows);
  const int64_t n = rows.u.size(0), d = rows.u.size(1), panel = panels.panel();
  const bool fixed_shift = rows.exponent_bound <= safe_exponent<T>();
  const SoftmaxFactors<T> factors(row.lse.data(), lse.const_data_ptr<double>(), n, row.largest, fixed_shift);
  const at::Tensor grad = at::zeros_like(rows.padded);
  const at::Tensor of_columns = at::zeros({panels.count(), d, panel}, grad.options());
  for_each_tile(panels.count(), [&](int64_t i, int64_t j) {
    const Matrix<T> values = panels.products(i, j);
    const Tile<T> tile = tile_of(values, panels.size(i), panels.size(j), rows);
    const int64_t r = panels.start(i), c = panels.start(j);
    positives.exclude(tile, r, c);
    weight_tile(tile, fixed_shift, factors.from(r), factors.from(c));
    const Matrix<const T> g{values.data, values.stride};
    multiply(panel, d, panel, g, panels.rows(j), {grad.mutable_data_ptr<T>() + r * d, d}, true);
    if (i == j) return;
    multiply(d, panel, panel, panels.transposed(i), g, {of_columns.mutable_data_ptr<T>() + c * d, panel}, true);
  });
  run_parallel(panels.count(), [&](int64_t b) {
    grad.narrow(0, panels.start(b), panel).add_(of_columns.select(0, b).t().contiguous());
  });
  return grad.narrow(0, 0, n);
}

void check_index_range(const at::Tensor& indices, int64_t end) {
  const int64_t* data = indices.const_data_ptr<int64_t>();
  for (int64_t entry = 0; entry < indices.numel(); ++entry) {
    LTOOD_CHECK_VALUE(data[entry] >= -1 && data[entry] < end, "contrastive_bwd", "indices",
                      c10::str("in [-1, ", end, ")"), data[entry]);
  }
}

template <typename T>
void segment_positive_bwd(const RowSegments& segments, const at::Tensor& u, const std::vector<double>& positive_grad,
                          double scale, const at::Tensor& grad) {
  at::parallel_for(0, segments.count(), segment_grain(segments, u.size(0)), [&](int64_t begin, int64_t end) {
    segment_gradients(segments, begin, end, u.const_data_ptr<T>(), u.size(1), positive_grad.data(), scale,
                      grad.mutable_data_ptr<T>());
  });
}

// grad_i -= positive_grad_i * (the neighbours of i) for rows of a bank, which are made ready a few rows at a time.
// Returns what sum_i <u_i, dL/du_i> lacks for the temperature.
template <typename T>
double bank_positive_bwd(const BackwardInputs& in, const PreparedRows& rows, bool normalize,
                         const std::vector<double>& positive_grad, double scale, const at::Tensor& grad) {
  constexpr int64_t kRows = 64;
  const int64_t n = rows.u.size(0), d = rows.u.size(1), k = in.indices.size(1);
  run_parallel((n + kRows - 1) / kRows, [&](int64_t chunk) {
    const int64_t begin = chunk * kRows, count = std::min(kRows, n - begin);
    const at::Tensor indices = in.indices.narrow(0, begin, count);
    const at::Tensor picked = in.bank->index_select(0, indices.clamp_min(0).view({-1}));
    const at::Tensor chosen = pad_unit_rows(picked, 1, rows.u.scalar_type(), normalize);
    const at::Tensor places = at::arange(count * k, indices.options()).view({count, k}).masked_fill_(indices.lt(0), -1);
    const NeighborPositives<T> to_chosen{places.const_data_ptr<int64_t>(), k, chosen.const_data_ptr<T>(), nullptr,
                                         positive_grad.data() + begin};
    neighbor_gradients(to_chosen, 0, count, nullptr, d, scale, grad.mutable_data_ptr<T>() + begin * d);
  });
  const at::Tensor cosines = in.cosines.to(at::kDouble);
  const double* cosine = cosines.const_data_ptr<double>();
  const int64_t* indices = in.indices.const_data_ptr<int64_t>();
  double missing = 0;
  for (int64_t entry = 0; entry < n * k; ++entry) {
    if (indices[entry] >= 0) missing -= positive_grad[entry / k] * cosine[entry] * rows.inv_tau;
  }
  return missing;
}

// The same for neighbours in the batch, which also get a gradient from the rows that chose them.
template <typename T>
void batch_positive_bwd(const at::Tensor& indices, const at::Tensor& u, const std::vector<double>& positive_grad,
                        double scale, const at::Tensor& grad) {
  const int64_t n = u.size(0), k = indices.size(1);
  const Choosers choosers = invert_choices(indices.const_data_ptr<int64_t>(), n, k);
  const NeighborPositives<T> chosen{indices.const_data_ptr<int64_t>(), k, u.const_data_ptr<T>(), &choosers,
                                    positive_grad.data()};
  run_rows(n, [&](int64_t begin, int64_t end) {
    neighbor_gradients(chosen, begin, end, u.const_data_ptr<T>(), u.size(1), scale, grad.mutable_data_ptr<T>());
  });
}

template <typename T>
double neighbor_positive_bwd(const BackwardInputs& in, const PreparedRows& rows, bool normalize,
                             const std::vector<double>& positive_grad, double scale, const at::Tensor& grad) {
  if (in.indices.size(1) == 0) return 0;
  if (in.bank) return bank_positive_bwd<T>(in, rows, normalize, positive_grad, scale, grad);
  batch_positive_bwd<T>(in.indices, rows.u, positive_grad, scale, grad);
  return 0;
}

// grad -= all positives, in units of row.largest / tau. Returns what bank_positive_bwd does.
template <typename T>
double positive_bwd(const BackwardInputs& in, const PreparedRows& rows, bool normalize, const LossGradients& row,
                    const Positives& positives, const at::Tensor& grad) {
  const double scale = 1 / row.largest;
  const int64_t n = rows.u.size(0), d = rows.u.size(1);
  const SoleGradients arrived{in.lse.const_data_ptr<double>(), row.lse.data(), row.instance_positive_grad.data(),
                              row.class_positive_grad.data(), positives.neighbor_grad.data()};
  run_rows(n, [&](int64_t begin, int64_t end) {
    sole_positive_bwd(positives.pairs, arrived, begin, end, rows.u.const_data_ptr<T>(), d, rows.inv_tau, scale,
                      grad.mutable_data_ptr<T>());
  });
  double to_bank = 0;
  if (in.grad_instance) {
    segment_positive_bwd<T>(positives.views, rows.u, row.instance_positive_grad, scale, grad);
    std::vector<double> others = positives.neighbor_grad;  // without those that are alone
    for (size_t i = 0; i < positives.pairs.neighbor.size(); ++i) {
      if (positives.pairs.neighbor[i] >= 0) others[i] = 0;
    }
    to_bank = neighbor_positive_bwd<T>(in, rows, normalize, others, scale, grad);
  }
  if (in.grad_class) segment_positive_bwd<T>(positives.classes, rows.u, row.class_positive_grad, scale, grad);
  return to_bank;
}

template <typename T>
std::tuple<at::Tensor, at::Tensor> backward(const BackwardInputs& in, const at::Tensor& z, const PreparedRows& rows,
                                            bool normalize) {
  const int64_t n = z.size(0), d = z.size(1);
  const at::ScalarType wide = wide_dtype(z.scalar_type());
  const LossGradients row = row_gradients(in, n);
  if (row.undefined) return {at::full_like(z, NAN), at::scalar_tensor(NAN, z.options().dtype(wide))};
  Positives positives(in, row, n);
  positives.pairs.multiply_pairs(rows.u.const_data_ptr<T>(), d);
  const at::Tensor grad = lse_gradient<T>(rows, row, in.lse, positives);
  double u_dot_du = positive_bwd<T>(in, rows, normalize, row, positives, grad);
  std::vector<double> radial(n);
  run_rows(n, [&](int64_t begin, int64_t end) {
    normalize_rows_bwd(rows.u.const_data_ptr<T>() + begin * d, grad.mutable_data_ptr<T>() + begin * d, end - begin, d,
                       normalize ? rows.norms.data() + begin : nullptr, row.largest * rows.inv_tau,
                       smallest_invertible_norm(z.scalar_type()), radial.data() + begin);
  });
  for (const double value : radial) u_dot_du += value;
  return {grad.to(z.scalar_type()),
          at::scalar_tensor(-0.5 * rows.inv_tau * u_dot_du, z.options().dtype(at::kDouble)).to(wide)};
}

std::tuple<at::Tensor, at::Tensor> contrastive_bwd_cpu(const Arguments& arguments) {
  const BackwardInputs in{contrastive_inputs(arguments), contrastive_saved(arguments)};
  check_contrastive_bwd(in, in);
  check_index_range(in.indices, in.bank ? in.bank->size(0) : in.z.size(0));
  const PreparedRows rows = prepare_rows(in);
  return dispatch_wide(rows.u.scalar_type(),
                       [&](auto type) { return backward<decltype(type)>(in, in.z, rows, in.normalize); });
}

}  // namespace
}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) { m.impl("contrastive_bwd", ltood::by_name<ltood::contrastive_bwd_cpu>()); }
