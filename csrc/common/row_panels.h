// Rows cut into panels of one size, as the products of a panel by a panel read them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/gemm.h"
#include "common/tile_schedule.h"
#include "common/unit_rows.h"

namespace ltood {

constexpr int64_t kMaxPanel = 256;

inline int64_t count_panels(int64_t rows, int64_t panel) { return (rows + panel - 1) / panel; }

// [panels * panel, D] in `dtype`: x, then zero rows up to a whole panel.
inline at::Tensor pad_rows(const at::Tensor& x, int64_t panel, c10::ScalarType dtype) {
  const int64_t n = x.size(0), padded = count_panels(n, panel) * panel;
  at::Tensor rows = at::empty({padded, x.size(1)}, x.options().dtype(dtype));
  rows.narrow(0, 0, n).copy_(x.detach());
  rows.narrow(0, n, padded - n).zero_();
  return rows;
}

// Rows in a tile. The bits of a result depend on it, so it depends on N alone, never on the number of threads.
// N = 4096 makes 32 panels of 128: 16 independent tiles a round, and the two halves of a diagonal tile, of which one
// would do, cost 3 %. Many rows no longer fit in the cache: tiles of 256 then read each of them half as often. A
// multiple of 16: whole vectors, few shapes.
inline int64_t tile_rows(int64_t n) {
  const int64_t panels = count_panels(n, n >= 8192 ? kMaxPanel : 128);
  return count_panels(count_panels(n, panels), 16) * 16;
}

inline void run_rows(int64_t n, const std::function<void(int64_t, int64_t)>& body) { at::parallel_for(0, n, 64, body); }

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

// The smallest norm whose inverse the dtype of a gradient can hold. Rows below it, a dead unit's, get a gradient of 0:
// g / |x| would be infinite, and one such row makes a gradient scaler skip the step. float16 alone is too narrow for
// 1 / kNormEps.
inline double smallest_invertible_norm(c10::ScalarType dtype) { return dtype == at::kHalf ? 1.0 / 65504 : 0; }

// Above this |s| tiles are computed in double. In float, a product of size s is off by some s * 2^-24, and the softmax
// by that factor: at 128 the gradient keeps 10^-5, a tenth of what it may lose. Unit rows come here for tau < 1/128
// only, unnormalised rows when they are long.
constexpr double kMaxFloatExponent = 128;

// Above this |s| double is off by more than 10^-5 in an exponent: 2^35 * 2^-52.
constexpr double kMaxExponent = 0x1p35;

inline void check_exponents(const char* op, double bound) {
  LTOOD_CHECK_VALUE(!(bound > kMaxExponent), op, "z",
                    "of rows with |z_i| |z_j| / temperature up to 3.4e10, where float64 still carries a softmax", bound,
                    " (normalise the rows, scale them down, or raise the temperature)");
}

// pad_rows, normalised on request in the wider of the two types: rows of float64 need not fit in float.
inline at::Tensor pad_unit_rows(const at::Tensor& x, int64_t panel, c10::ScalarType dtype, bool normalize) {
  const at::Tensor padded = pad_rows(x, panel, x.scalar_type() == at::kDouble ? at::kDouble : dtype);
  const at::Tensor rows = padded.narrow(0, 0, x.size(0));
  if (normalize) normalize_in_place(rows, norms_of_rows(rows));
  return padded.to(dtype);
}

inline at::Tensor wide_rows(const at::Tensor& z) { return z.contiguous().to(wide_dtype(z.scalar_type())); }

// |u| of the longest row, NaN when one is.
inline double longest_norm(const std::vector<double>& norms, bool normalize) {
  double longest = normalize ? 1 : 0;
  for (size_t i = 0; i < norms.size() && !normalize; ++i) {
    longest = norms[i] > longest || std::isnan(norms[i]) ? norms[i] : longest;
  }
  return longest;
}

// -inf where row r of a tile meets column r + offset: such a pair is left out of every sum and search.
template <typename T>
void exclude_diagonal(Matrix<T> tile, int64_t rows, int64_t cols, int64_t offset) {
  const int64_t end = std::min(rows, cols - offset);
  for (int64_t r = std::max<int64_t>(0, -offset); r < end; ++r) {
    tile.data[r * tile.stride + r + offset] = -std::numeric_limits<T>::infinity();
  }
}

// All products are of whole panels, padding included: few shapes occur, and a product has the same bits wherever its
// rows lie. The right operand is read from a copy that is transposed panel by panel; with `keep` false a panel at a
// time, which takes a few per cent longer and half the memory.
template <typename T>
class RowPanels {
 public:
  // padded: from pad_rows
  RowPanels(const at::Tensor& padded, int64_t n, int64_t panel, bool keep = true)
      : n_(n), d_(padded.size(1)), panel_(panel), count_(padded.size(0) / panel), keep_(keep), rows_(padded) {
    transposed_ = at::empty({keep ? count_ : at::get_num_threads(), d_, panel}, rows_.options());
    scratch_ = at::empty({at::get_num_threads(), panel, kMaxPanel}, rows_.options());
    if (keep) run_parallel(count_, [&](int64_t b) { transpose(b, b); });
  }

  int64_t panel() const { return panel_; }
  int64_t count() const { return count_; }
  int64_t start(int64_t b) const { return b * panel_; }
  int64_t size(int64_t b) const { return std::min(panel_, n_ - b * panel_); }  // without padding

  Matrix<const T> rows(int64_t b) const { return {rows_.const_data_ptr<T>() + b * panel_ * d_, d_}; }
  // If not kept, valid until the calling thread's next call.
  Matrix<const T> transposed(int64_t b) const {
    const int64_t place = keep_ ? b : at::get_thread_num();
    if (!keep_) transpose(b, place);
    return {transposed_.const_data_ptr<T>() + place * d_ * panel_, panel_};
  }

  // <row of panel b, column> for columns [D, n_columns], at most kMaxPanel, in the calling thread's scratch [panel,
  // n_columns]; valid until its next call.
  Matrix<T> products(int64_t b, Matrix<const T> columns, int64_t n_columns) const {
    T* scratch = scratch_.mutable_data_ptr<T>() + at::get_thread_num() * panel_ * kMaxPanel;
    multiply(panel_, n_columns, d_, rows(b), columns, {scratch, n_columns}, false);
    return {scratch, n_columns};
  }

  // The same for the rows of panel j, and -inf where a row meets itself.
  Matrix<T> products(int64_t i, int64_t j) const {
    const Matrix<T> tile = products(i, transposed(j), panel_);
    if (i == j) exclude_diagonal(tile, size(i), size(i), 0);
    return tile;
  }

 private:
  void transpose(int64_t b, int64_t place) const {
    transposed_.select(0, place).copy_(rows_.narrow(0, b * panel_, panel_).t());
  }

  int64_t n_, d_, panel_, count_;
  bool keep_;
  at::Tensor rows_;        // [count * panel, D]
  at::Tensor transposed_;  // [count or threads, D, panel]
  at::Tensor scratch_;     // [threads, panel, kMaxPanel]
};

}  // namespace ltood
