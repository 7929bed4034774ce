// The similarities of the contrastive losses, tile by tile: what forward and backward share.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "common/dispatch.h"
#include "common/simd.h"
#include "common/tile_schedule.h"
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
  at::Tensor u;               // [N, D], the type of the computation: float or double
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

inline PreparedRows prepare_rows(const at::Tensor& z, bool normalize, double temperature) {
  PreparedRows rows;
  rows.u = z.contiguous().to(wide_dtype(z.scalar_type()));
  rows.norms = norms_of_rows(rows.u);
  rows.inv_tau = 1 / temperature;
  double longest = normalize ? 1 : 0;
  for (int64_t i = 0; i < z.size(0) && !normalize; ++i) {
    longest = rows.norms[i] > longest || std::isnan(rows.norms[i]) ? rows.norms[i] : longest;
  }
  rows.exponent_bound = longest * longest * rows.inv_tau;
  if (rows.exponent_bound > kMaxFloatExponent) rows.u = rows.u.to(at::kDouble);
  if (normalize) {
    if (rows.u.is_alias_of(z)) rows.u = rows.u.clone();
    normalize_in_place(rows.u, rows.norms);
  }
  return rows;
}

// Rows in a tile. The bits of a result depend on it, so it depends on N alone, never on the number of threads.
// N = 4096 makes 16 blocks of 256: 8 independent tiles a round, and a tile of floats takes 256 KiB of the second-level
// cache. Small problems get smaller tiles so that two threads have work; one below 64 rows leaves the matrix library
// idling.
inline int64_t tile_rows(int64_t n) {
  const int64_t wanted = n >= 2048 ? 256 : 128;
  const int64_t blocks = (n + wanted - 1) / wanted;
  return (n + blocks - 1) / blocks;
}

template <typename T>
class SimilarityTiles {
 public:
  explicit SimilarityTiles(const PreparedRows& rows)
      : n_(rows.u.size(0)), block_(tile_rows(n_)), scale_(static_cast<T>(rows.inv_tau * kLog2E)) {
    static_assert(256 <= kMaxTile);
    for (int64_t start = 0; start < n_; start += block_) {
      blocks_.push_back(rows.u.narrow(0, start, std::min(block_, n_ - start)));
      transposed_.push_back(blocks_.back().t());
    }
    scratch_ = at::empty({at::get_num_threads(), block_, block_}, rows.u.options());
  }

  int64_t n_blocks() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t block() const { return block_; }
  int64_t start(int64_t i) const { return i * block_; }
  T scale() const { return scale_; }
  const at::Tensor& rows(int64_t i) const { return blocks_[i]; }

  // <u_r, v_c> of block i and any rows v (transposed), in the calling thread's scratch; valid until its next call.
  at::Tensor products(int64_t i, const at::Tensor& transposed) const {
    at::Tensor out = scratch_.select(0, at::get_thread_num());
    out = out.narrow(0, 0, blocks_[i].size(0)).narrow(1, 0, transposed.size(1));
    at::mm_out(out, blocks_[i], transposed);
    return out;
  }

  // The products of blocks i and j; on the diagonal -inf, so that a row does not count itself.
  at::Tensor products(int64_t i, int64_t j) const {
    at::Tensor out = products(i, transposed_[j]);
    if (i == j) {
      T* values = out.mutable_data_ptr<T>();
      for (int64_t r = 0; r < out.size(0); ++r) values[r * (out.stride(0) + 1)] = -std::numeric_limits<T>::infinity();
    }
    return out;
  }

  Tile<T> tile(const at::Tensor& values) const {
    return {values.mutable_data_ptr<T>(), values.stride(0), values.size(0), values.size(1), scale_};
  }

 private:
  int64_t n_, block_;
  T scale_;
  std::vector<at::Tensor> blocks_, transposed_;
  at::Tensor scratch_;  // [threads, block, block]
};

}  // namespace ltood
