// Partial contrastive similarities on the CPU. A task owns a panel of rows and meets the panels of columns
// in their order, so no number of threads changes a bit. Nothing is symmetric here: every product serves its row alone.
//
// cost  n M D multiply-adds and n M exponentials for the sums; twice the products for lse_bwd (S, then G u(y)), and a
//       second exponential an element where the shift is not fixed. Memory: x once more, y twice (rows, transposed)
#include "ops/contrastive/partial.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "common/excluded_columns.h"
#include "common/neighbors.h"
#include "ops/contrastive/cpu/similarities.h"

namespace ltood {
namespace {

// The rows and the columns in panels, and the products of a panel of rows with a panel of columns.
template <typename T>
class RowsAndColumns {
 public:
  RowsAndColumns(const PartialInputs& in, const PartialExcluded& excluded, const PreparedRows& x, const PreparedRows& y)
      : x_(x), rows_(row_panels<T>(x)), cols_(row_panels<T>(y)), diagonal_(bounded_diagonal(in)) {
    if (!excluded.x) return;
    excluded_ = {excluded.x->const_data_ptr<int64_t>(), in.x.size(0), excluded.y->const_data_ptr<int64_t>(),
                 in.y.size(0), /*none=*/-1};
  }

  const RowPanels<T>& rows() const { return rows_; }
  const RowPanels<T>& cols() const { return cols_; }

  Tile<T> tile(int64_t i, int64_t j) const {
    const Matrix<T> values = rows_.products(i, cols_.transposed(j), cols_.panel());
    exclude_diagonal(values, rows_.size(i), cols_.size(j), rows_.start(i) + diagonal_ - cols_.start(j));
    return tile_of(values, rows_.size(i), cols_.size(j), x_);
  }

  void exclude(const Tile<T>& tile, int64_t i, int64_t j) const {
    excluded_.exclude(tile, rows_.start(i), cols_.start(j));
  }

 private:
  const PreparedRows& x_;
  RowPanels<T> rows_, cols_;
  int64_t diagonal_;
  ExcludedColumns excluded_;
};

using PartialOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <typename T>
PartialOutputs forward(const PartialInputs& in, const PartialExcluded& excluded, const PartialSearch& search,
                       const PreparedRows& x, const PreparedRows& y) {
  const int64_t n = in.x.size(0);
  const RowsAndColumns<T> pair(in, excluded, x, y);
  const bool fixed_shift = x.exponent_bound <= safe_exponent<T>();
  const CandidateRows candidates =
      search.k > 0 ? CandidateRows(search.x_instance, search.y_instance, search.x_domain, search.y_domain)
                   : CandidateRows();
  Neighbors<T> neighbors(n, search.k, x.u.options());
  std::vector<double> sum(n, 0.0);
  std::vector<T> largest(n, fixed_shift ? T(0) : -std::numeric_limits<T>::infinity());
  const at::Tensor lse = at::empty({n}, x.u.options().dtype(at::kDouble));
  double* out = lse.mutable_data_ptr<double>();
  run_parallel(pair.rows().count(), [&](int64_t i) {
    const int64_t r = pair.rows().start(i);
    for (int64_t j = 0; j < pair.cols().count(); ++j) {
      const Tile<T> tile = pair.tile(i, j);
      if (search.k > 0) {
        const int64_t c = pair.cols().start(j);
        offer_neighbors(tile, r, c, candidates.of_rows(r), candidates.of_columns(c), neighbors.best(r), BestK<T>{});
      }
      pair.exclude(tile, i, j);
      if (fixed_shift) {
        add_exp_sums(tile, sum.data() + r, nullptr);
      } else {
        add_exp_sums_online(tile, largest.data() + r, sum.data() + r, nullptr, nullptr);
      }
    }
    for (int64_t row = r; row < r + pair.rows().size(i); ++row) {
      out[row] = log_sum_exp(sum[row], largest[row], x.inv_tau);
    }
  });
  return {lse, neighbors.cosines.to(wide_dtype(in.x.scalar_type())), neighbors.indices};
}

PartialOutputs contrastive_partial_cpu(const Arguments& arguments) {
  const PartialInputs in = partial_inputs(arguments);
  const PartialExcluded excluded = partial_excluded(arguments);
  const PartialSearch search = partial_search(arguments);
  check_contrastive_partial(in, excluded, search);
  const auto [rows, cols] = prepare_rows(in.x, in.y, in.normalize, in.temperature.value());
  return dispatch_wide(rows.u.scalar_type(), [&, &rows = rows, &cols = cols](auto type) {
    return forward<decltype(type)>(in, excluded, search, rows, cols);
  });
}

// Weights and log-sum-exp as lse_bwd takes them: the weight is 0 where a row has no column at all, its lse being -inf.
struct LseWeights {
  std::vector<double> weight, lse;
  double largest = 0, largest_lse = 0;  // of the absolute values, lse where there is a weight

  LseWeights(const OptionalTensor& weights, const OptionalTensor& lses, int64_t n) : weight(n, 0.0), lse(n, 0.0) {
    if (!weights) return;
    std::copy_n(weights->const_data_ptr<double>(), n, weight.data());
    std::copy_n(lses->const_data_ptr<double>(), n, lse.data());
    for (int64_t i = 0; i < n; ++i) {
      if (std::isinf(lse[i]) && lse[i] < 0) weight[i] = 0;
      if (weight[i] == 0) continue;
      largest = std::max(largest, std::abs(weight[i]));
      largest_lse = std::max(largest_lse, std::abs(lse[i]));
    }
  }
};

// The log-sum-exp is over more columns than these. Where it is finite but far from these exponents, exp(-lse) would
// leave the range that the fixed shift counts on; log M <= 26 of it come from the number of columns.
template <typename T>
bool has_fixed_shift(const PreparedRows& x, const LseWeights& row, const LseWeights& col) {
  return x.exponent_bound <= safe_exponent<T>() &&
         std::max(row.largest_lse, col.largest_lse) <= safe_exponent<T>() + 26;
}

template <typename T>
at::Tensor lse_bwd(const PartialInputs& in, const PartialExcluded& excluded, const PartialLseGrads& weights,
                   const PreparedRows& x, const PreparedRows& y) {
  const int64_t n = in.x.size(0), m = in.y.size(0), d = in.x.size(1);
  const LseWeights row(weights.x_weight, weights.x_lse, n), col(weights.y_weight, weights.y_lse, m);
  const double largest = std::max(row.largest, col.largest), unit = largest > 0 ? largest : 1;
  const bool fixed_shift = has_fixed_shift<T>(x, row, col);
  const SoftmaxFactors<T> of_rows(row.weight.data(), row.lse.data(), n, unit, fixed_shift);
  const SoftmaxFactors<T> of_cols(col.weight.data(), col.lse.data(), m, unit, fixed_shift);
  const RowsAndColumns<T> pair(in, excluded, x, y);
  const RowPanels<T>&rows = pair.rows(), &cols = pair.cols();
  const at::Tensor out = at::zeros_like(x.padded);
  run_parallel(rows.count(), [&](int64_t i) {
    T* panel = out.mutable_data_ptr<T>() + rows.start(i) * d;
    for (int64_t j = 0; j < cols.count(); ++j) {
      const Tile<T> tile = pair.tile(i, j);
      pair.exclude(tile, i, j);
      weight_tile(tile, fixed_shift, of_rows.from(rows.start(i)), of_cols.from(cols.start(j)));
      const Matrix<const T> g{tile.values, tile.stride};
      multiply(rows.panel(), d, cols.panel(), g, cols.rows(j), {panel, d}, true);
    }
  });
  return out.narrow(0, 0, n).mul_(unit * x.inv_tau).to(wide_dtype(in.x.scalar_type())).contiguous();
}

at::Tensor contrastive_partial_bwd_cpu(const Arguments& arguments) {
  const PartialInputs in = partial_inputs(arguments);
  const PartialExcluded excluded = partial_excluded(arguments);
  const PartialLseGrads weights = partial_lse_grads(arguments);
  check_contrastive_partial_bwd(in, excluded, weights);
  const auto [rows, cols] = prepare_rows(in.x, in.y, in.normalize, in.temperature.value());
  return dispatch_wide(rows.u.scalar_type(), [&, &rows = rows, &cols = cols](auto type) {
    return lse_bwd<decltype(type)>(in, excluded, weights, rows, cols);
  });
}

}  // namespace
}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) {
  m.impl("contrastive_partial", ltood::by_name<ltood::contrastive_partial_cpu>());
  m.impl("contrastive_partial_bwd", ltood::by_name<ltood::contrastive_partial_bwd_cpu>());
}
