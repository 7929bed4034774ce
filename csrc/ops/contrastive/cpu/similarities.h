// The similarities of the contrastive losses, tile by tile: what forward and backward share.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "common/dispatch.h"
#include "common/row_panels.h"
#include "common/simd.h"
#include "common/softmax_tile.h"
#include "common/unit_rows.h"
#include "ops/contrastive/contrastive.h"
#include "ops/contrastive/cpu/positives.h"

namespace ltood {

// The rows as tiles take them, the same in forward and backward.
struct PreparedRows {
  at::Tensor padded;          // [panels * panel, D], the type of the computation: float or double
  at::Tensor u;               // [N, D], the rows of `padded` before the padding
  std::vector<double> norms;  // [N]
  double inv_tau;
  double exponent_bound;  // no |s| is larger; NaN when a row is not finite
};

inline RowSegments view_segments(const OptionalTensor& instance_ids, int64_t n) {
  return instance_ids ? segment_rows(instance_ids->const_data_ptr<int64_t>(), n) : pair_views(n);
}

// Segments that a task should take, so that it has about a thousand rows.
inline int64_t segment_grain(const RowSegments& segments, int64_t n) {
  return std::max<int64_t>(1, 1024 * segments.count() / n);
}

inline PreparedRows pad_prepared(const at::Tensor& wide, std::vector<double> norms, bool normalize, double inv_tau,
                                 double exponent_bound) {
  const int64_t n = wide.size(0);
  PreparedRows rows{{}, {}, std::move(norms), inv_tau, exponent_bound};
  rows.padded = pad_rows(wide, tile_rows(n), exponent_bound > kMaxFloatExponent ? at::kDouble : wide.scalar_type());
  rows.u = rows.padded.narrow(0, 0, n);
  if (normalize) normalize_in_place(rows.u, rows.norms);
  return rows;
}

inline PreparedRows prepare_rows(const ContrastiveInputs& in) {
  const at::Tensor wide = wide_rows(in.z);
  std::vector<double> norms = norms_of_rows(wide);
  const double longest = longest_norm(norms, in.normalize), inv_tau = 1 / in.temperature.value();
  double bound = longest * longest * inv_tau;
  if (std::isfinite(longest)) check_exponents("contrastive", bound);
  if (in.bank && !in.normalize) {
    bound = std::max(bound, longest * longest_norm(norms_of_rows(wide_rows(in.bank->detach())), false) * inv_tau);
  }
  return pad_prepared(wide, std::move(norms), in.normalize, inv_tau, bound);
}

// Rows and the columns that they meet, of one type and under one bound.
inline std::pair<PreparedRows, PreparedRows> prepare_rows(const at::Tensor& x, const at::Tensor& y, bool normalize,
                                                          double temperature) {
  const at::Tensor wide_x = wide_rows(x), wide_y = wide_rows(y);
  std::vector<double> x_norms = norms_of_rows(wide_x), y_norms = norms_of_rows(wide_y);
  const double inv_tau = 1 / temperature;
  const double x_longest = longest_norm(x_norms, normalize), y_longest = longest_norm(y_norms, normalize);
  const double bound = x_longest * y_longest * inv_tau;
  if (std::isfinite(x_longest) && std::isfinite(y_longest)) check_exponents("contrastive", bound);
  return {pad_prepared(wide_x, std::move(x_norms), normalize, inv_tau, bound),
          pad_prepared(wide_y, std::move(y_norms), normalize, inv_tau, bound)};
}

template <typename T>
RowPanels<T> row_panels(const PreparedRows& rows) {
  return {rows.padded, rows.u.size(0), tile_rows(rows.u.size(0))};
}

// `rows` and `cols` of what a product left in the scratch.
template <typename T>
Tile<T> tile_of(Matrix<T> values, int64_t rows, int64_t cols, const PreparedRows& prepared) {
  return {values.data, values.stride, rows, cols, static_cast<T>(prepared.inv_tau * kLog2E)};
}

}  // namespace ltood
