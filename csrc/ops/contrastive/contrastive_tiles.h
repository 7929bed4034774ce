// The similarities of the contrastive losses, tile by tile: what forward and backward share.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "common/dispatch.h"
#include "common/row_blocks.h"
#include "common/simd.h"
#include "ops/contrastive/contrastive.h"
#include "ops/contrastive/contrastive_positives.h"
#include "ops/contrastive/contrastive_rows.h"
#include "ops/contrastive/contrastive_tile.h"

namespace ltood {

// Above this |s| the tiles are computed in double. In float, a product of size s is off by some s * 2^-24, and the
// softmax by that factor: at 128 the gradient keeps 10^-5, a tenth of what it may lose. Unit rows come here for
// tau < 1/128 only, rows that are used as they are when they are long.
constexpr double kMaxFloatExponent = 128;

// The rows as tiles take them, the same in forward and backward.
struct PreparedRows {
  at::Tensor padded;          // [blocks * block, D], the type of the computation: float or double
  at::Tensor u;               // [N, D], the rows of `padded` before the padding
  std::vector<double> norms;  // [N]
  double inv_tau;
  double exponent_bound;  // no |s| is larger; NaN when a row is not finite
};

inline double read_temperature(double temperature, const OptionalTensor& tensor) {
  return tensor ? tensor->item<double>() : temperature;
}

inline void run_rows(int64_t n, const std::function<void(int64_t, int64_t)>& body) { at::parallel_for(0, n, 64, body); }

inline RowGroups view_groups(const OptionalTensor& instance_ids, int64_t n) {
  return instance_ids ? group_rows(instance_ids->const_data_ptr<int64_t>(), n) : pair_views(n);
}

// Groups that a task should take, so that it has about a thousand rows.
inline int64_t group_grain(const RowGroups& groups, int64_t n) {
  return std::max<int64_t>(1, 1024 * groups.count() / n);
}

inline std::vector<double> norms_of_rows(const at::Tensor& x) {
  std::vector<double> norms(x.size(0));
  const int64_t d = x.size(1);
  dispatch_wide(x.scalar_type(), [&](auto type) {
    const auto* data = x.const_data_ptr<decltype(type)>();
    run_rows(x.size(0),
             [&](int64_t begin, int64_t end) { row_norms(data + begin * d, end - begin, d, norms.data() + begin); });
  });
  return norms;
}

inline void normalize_in_place(const at::Tensor& x, const std::vector<double>& norms) {
  const int64_t d = x.size(1);
  dispatch_wide(x.scalar_type(), [&](auto type) {
    auto* data = x.mutable_data_ptr<decltype(type)>();
    run_rows(x.size(0), [&](int64_t begin, int64_t end) {
      normalize_rows(data + begin * d, end - begin, d, norms.data() + begin);
    });
  });
}

// Rows in a tile. The bits of a result depend on it, so it depends on N alone, never on the number of threads.
// N = 4096 makes 32 blocks of 128: 16 independent tiles a round, and the two halves of a diagonal tile, of which one
// would do, cost 3 %. Many rows no longer fit in the cache: tiles of 256 then read each of them half as often. A
// multiple of 16: whole vectors, few shapes.
inline int64_t tile_rows(int64_t n) {
  const int64_t blocks = count_blocks(n, n >= 8192 ? kMaxBlock : 128);
  return count_blocks(count_blocks(n, blocks), 16) * 16;
}

inline PreparedRows prepare_rows(const at::Tensor& z, bool normalize, double temperature) {
  const int64_t n = z.size(0);
  const at::Tensor wide = z.contiguous().to(wide_dtype(z.scalar_type()));
  PreparedRows rows;
  rows.norms = norms_of_rows(wide);
  rows.inv_tau = 1 / temperature;
  double longest = normalize ? 1 : 0;
  for (int64_t i = 0; i < n && !normalize; ++i) {
    longest = rows.norms[i] > longest || std::isnan(rows.norms[i]) ? rows.norms[i] : longest;
  }
  rows.exponent_bound = longest * longest * rows.inv_tau;
  rows.padded =
      pad_rows(wide, tile_rows(n), rows.exponent_bound > kMaxFloatExponent ? at::kDouble : wide.scalar_type());
  rows.u = rows.padded.narrow(0, 0, n);
  if (normalize) normalize_in_place(rows.u, rows.norms);
  return rows;
}

template <typename T>
RowBlocks<T> row_blocks(const PreparedRows& rows) {
  return {rows.padded, rows.u.size(0), tile_rows(rows.u.size(0))};
}

// `rows` and `cols` of what a product left in the scratch.
template <typename T>
Tile<T> tile_of(Matrix<T> values, int64_t rows, int64_t cols, const PreparedRows& prepared) {
  return {values.data, values.stride, rows, cols, static_cast<T>(prepared.inv_tau * kLog2E)};
}

}  // namespace ltood
