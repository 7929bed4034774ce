// The similarities of queries and keys, tile by tile, as forward and backward share them.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "common/excluded_columns.h"
#include "common/simd.h"
#include "ops/info_nce/cpu/panels.h"
#include "ops/info_nce/cpu/tile.h"
#include "ops/info_nce/info_nce.h"

namespace ltood {

// Norms and scale, the same in forward and backward.
struct PairScale {
  std::vector<double> query, positive, negative;  // norms of the rows
  double inv_tau, exponent_bound;                 // no |s| of finite rows is larger
  c10::ScalarType dtype;                          // of the tiles
  bool broken = false;                            // rows as given that hold NaN or Inf

  explicit PairScale(const InfoNceInputs& in) : inv_tau(1 / in.temperature.value()) {
    query = norms_in_chunks(in.query);
    positive = norms_in_chunks(in.positive_key);
    if (in.negative_keys) negative = norms_in_chunks(*in.negative_keys);
    const double longest_key = std::max(longest(positive, in.normalize), longest(negative, in.normalize));
    exponent_bound = longest(query, in.normalize) * longest_key * inv_tau;
    LTOOD_CHECK_VALUE(
        exponent_bound <= kMaxExponent && (!broken || !is_finite(in)), "info_nce",
        "query, positive_key and negative_keys",
        "of rows with |query_i| |key_j| / temperature up to 3.4e10, where float64 still carries a softmax",
        broken ? std::numeric_limits<double>::infinity() : exponent_bound,
        " (normalise the rows, scale them down, or raise the temperature)");
    dtype = exponent_bound > kMaxFloatExponent ? at::kDouble : in.wide();
  }

  template <typename T>
  bool fixed_shift() const {
    return !broken && exponent_bound <= safe_exponent<T>();
  }

 private:
  // The largest finite norm; 1 of unit rows.
  double longest(const std::vector<double>& norms, bool normalize) {
    double longest = normalize ? 1 : 0;
    for (size_t i = 0; i < norms.size() && !normalize; ++i) {
      broken |= !std::isfinite(norms[i]);
      if (norms[i] > longest && std::isfinite(norms[i])) longest = norms[i];
    }
    return longest;
  }

  static bool is_finite(const InfoNceInputs& in) {
    const auto finite = [](const at::Tensor& x) { return x.isfinite().all().item<bool>(); };
    return finite(in.query) && finite(in.positive_key) && finite(in.columns());
  }

  // Without a wide copy of a long 16-bit queue.
  static std::vector<double> norms_in_chunks(const at::Tensor& x) {
    constexpr int64_t kRows = 4096;
    std::vector<double> norms;
    norms.reserve(x.size(0));
    for (int64_t start = 0; start < x.size(0); start += kRows) {
      const at::Tensor rows = x.detach().narrow(0, start, std::min(kRows, x.size(0) - start));
      const std::vector<double> part = norms_of_rows(wide_rows(rows));
      norms.insert(norms.end(), part.begin(), part.end());
    }
    return norms;
  }
};

template <typename T>
class PairSimilarities {
 public:
  // `key_gradient`: the backward multiplies by the queries as columns too.
  PairSimilarities(const InfoNceInputs& in, const PairScale& scale, bool key_gradient = false)
      : in_(in),
        scale_(scale),
        stream_(in.negative_keys && in.negative_keys->size(0) >= kLongQueue * in.query.size(0)),
        queries_(in.query, in.normalize ? &scale.query : nullptr,
                 {query_panel(in.query.size(0)), key_gradient, scale.broken}),
        keys_(in.columns(), column_norms(in, scale),
              {tile_rows(std::max<int64_t>(in.columns().size(0), 1)), true, scale.broken, stream_}),
        schedule_(queries_.count(), keys_.count(), stream_) {
    if (in.negative_keys) {
      const int64_t panel = tile_rows(in.positive_key.size(0));
      positives_.emplace(in.positive_key, in.normalize ? &scale.positive : nullptr,
                         typename Panels<T>::Layout{panel, false, scale.broken});
    }
    if (in.query_ids) {
      excluded_ = {in.query_ids->const_data_ptr<int64_t>(), in.query.size(0), in.key_ids->const_data_ptr<int64_t>(),
                   in.columns().size(0), /*none=*/std::nullopt};
    }
    scratch_ = at::empty({at::get_num_threads(), queries_.panel(), kMaxPanel}, in.query.options().dtype(scale.dtype));
  }

  const Panels<T>& queries() const { return queries_; }
  const Panels<T>& keys() const { return keys_; }
  const Panels<T>& positives() const { return positives_ ? *positives_ : keys_; }
  const PairSchedule& schedule() const { return schedule_; }
  const int64_t* target() const { return in_.target ? in_.target->const_data_ptr<int64_t>() : nullptr; }

  // The inner products of two panels in the calling thread's scratch, without positives and excluded pairs.
  Tile<T> tile(int64_t i, int64_t j) const {
    const int64_t r = queries_.start(i), c = keys_.start(j), panel = keys_.panel();
    T* to = scratch_.mutable_data_ptr<T>() + at::get_thread_num() * queries_.panel() * kMaxPanel;
    multiply(queries_.panel(), panel, in_.query.size(1), queries_.rows(i), keys_.transposed(j), {to, panel}, false);
    const Tile<T> tile{to, panel, queries_.size(i), keys_.size(j), static_cast<T>(scale_.inv_tau * kLog2E)};
    if (!in_.negative_keys) exclude_positives(tile, r, c);
    excluded_.exclude(tile, r, c);
    return tile;
  }

  // s of every query and its positive, [N].
  std::vector<double> positive_similarities() const {
    std::vector<double> s(in_.query.size(0));
    run_rows(in_.query.size(0), [&](int64_t begin, int64_t end) {
      positive_products(queries_.all_rows(), positives().all_rows(), target(), begin, end, in_.query.size(1), s.data());
    });
    for (double& value : s) value *= scale_.inv_tau;
    return s;
  }

 private:
  // A queue of so many times the queries is read panel by panel; a shorter one is copied, as it takes no more memory
  // than the work on the queries does.
  static constexpr int64_t kLongQueue = 8;

  // A batch of up to 256 queries is one panel, so that a long queue passes once.
  static int64_t query_panel(int64_t n) { return n <= kMaxPanel ? count_panels(n, 16) * 16 : tile_rows(n); }

  static const std::vector<double>* column_norms(const InfoNceInputs& in, const PairScale& scale) {
    if (!in.normalize) return nullptr;
    return in.negative_keys ? &scale.negative : &scale.positive;
  }

  void exclude_positives(const Tile<T>& tile, int64_t r, int64_t c) const {
    if (!in_.target) {
      exclude_diagonal(Matrix<T>{tile.values, tile.stride}, tile.rows, tile.cols, r - c);
      return;
    }
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t column = target()[r + row] - c;
      if (column < 0 || column >= tile.cols) continue;
      tile.values[row * tile.stride + column] = -std::numeric_limits<T>::infinity();
    }
  }

  const InfoNceInputs& in_;
  const PairScale& scale_;
  bool stream_;
  Panels<T> queries_, keys_;
  std::optional<Panels<T>> positives_;
  PairSchedule schedule_;
  ExcludedColumns excluded_;
  at::Tensor scratch_;  // [threads, query panel, kMaxPanel]
};

// Target names rows of positive_key; read on the host.
inline void check_target_range(const InfoNceInputs& in) {
  if (!in.target) return;
  const int64_t* target = in.target->const_data_ptr<int64_t>();
  const int64_t m = in.positive_key.size(0);
  for (int64_t i = 0; i < in.target->size(0); ++i) {
    LTOOD_CHECK_VALUE(target[i] >= 0 && target[i] < m, "info_nce", "target", c10::str("in [0, ", m, ")"), target[i]);
  }
}

}  // namespace ltood
