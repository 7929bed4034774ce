#include "common/softmax_tile.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/simd.h"

namespace ltood {
namespace {

template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();

template <typename T>
LTOOD_INLINE void exp_sums(Tile<T> tile, double* row_sum, double* col_sum) {
  alignas(64) T columns[kMaxTile] = {};
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* __restrict v = tile.values + r * tile.stride;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < tile.cols; ++c) {
      const T e = exp2_simd(v[c] * tile.scale);
      sum += e;
      columns[c] += e;
    }
    row_sum[r] += sum;
  }
  if (col_sum) {
    for (int64_t c = 0; c < tile.cols; ++c) col_sum[c] += columns[c];
  }
}

// The shift of a row whose maximum is m: an infinite maximum shifts by nothing, as torch.logsumexp has it.
template <typename T>
LTOOD_INLINE T shift_of(T m) {
  return m == kInf<T> || m == -kInf<T> ? T(0) : m;
}

// Brings a sum from the shift of `old_max` to that of `new_max`.
template <typename T>
LTOOD_INLINE double rescaled(double sum, T old_max, T new_max, T scale) {
  return sum == 0 ? 0 : sum * std::exp2((double(shift_of(old_max)) - shift_of(new_max)) * scale);
}

template <typename T>
LTOOD_INLINE void online_rows(Tile<T> tile, T* row_max, double* row_sum) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* __restrict v = tile.values + r * tile.stride;
    T largest = row_max[r];
#pragma omp simd reduction(max : largest)
    for (int64_t c = 0; c < tile.cols; ++c) largest = v[c] > largest ? v[c] : largest;
    const T shift = shift_of(largest);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < tile.cols; ++c) sum += exp2_simd((v[c] - shift) * tile.scale);
    row_sum[r] = rescaled(row_sum[r], row_max[r], largest, tile.scale) + sum;
    row_max[r] = largest;
  }
}

template <typename T>
LTOOD_INLINE void online_columns(Tile<T> tile, T* col_max, double* col_sum) {
  alignas(64) T largest[kMaxTile], shift[kMaxTile], sum[kMaxTile] = {};
  std::copy(col_max, col_max + tile.cols, largest);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* __restrict v = tile.values + r * tile.stride;
#pragma omp simd
    for (int64_t c = 0; c < tile.cols; ++c) largest[c] = v[c] > largest[c] ? v[c] : largest[c];
  }
  for (int64_t c = 0; c < tile.cols; ++c) shift[c] = shift_of(largest[c]);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* __restrict v = tile.values + r * tile.stride;
#pragma omp simd
    for (int64_t c = 0; c < tile.cols; ++c) sum[c] += exp2_simd((v[c] - shift[c]) * tile.scale);
  }
  for (int64_t c = 0; c < tile.cols; ++c) {
    col_sum[c] = rescaled(col_sum[c], col_max[c], largest[c], tile.scale) + sum[c];
    col_max[c] = largest[c];
  }
}

template <typename T>
LTOOD_INLINE void exp_sums_online(Tile<T> tile, T* row_max, double* row_sum, T* col_max, double* col_sum) {
  online_rows(tile, row_max, row_sum);
  if (col_sum) online_columns(tile, col_max, col_sum);
}

template <typename T>
LTOOD_INLINE void softmax_weights(Tile<T> tile, const T* row_factor, const T* __restrict col_factor) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* __restrict v = tile.values + r * tile.stride;
    const T factor = row_factor[r];
#pragma omp simd
    for (int64_t c = 0; c < tile.cols; ++c) v[c] = (factor + col_factor[c]) * exp2_simd(v[c] * tile.scale);
  }
}

template <typename T>
LTOOD_INLINE void softmax_weights_online(Tile<T> tile, SoftmaxRows<T> row, SoftmaxRows<T> col) {
  const T* __restrict col_weight = col.weight;
  const T* __restrict col_lse2 = col.lse2;
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* __restrict v = tile.values + r * tile.stride;
    const T weight = row.weight[r], lse2 = row.lse2[r];
#pragma omp simd
    for (int64_t c = 0; c < tile.cols; ++c) {
      const T y = v[c] * tile.scale;
      v[c] = weight * exp2_simd(y - lse2) + col_weight[c] * exp2_simd(y - col_lse2[c]);
    }
  }
}

}  // namespace

LTOOD_CLONES void add_exp_sums(Tile<float> tile, double* row_sum, double* col_sum) { exp_sums(tile, row_sum, col_sum); }
LTOOD_CLONES void add_exp_sums(Tile<double> tile, double* row_sum, double* col_sum) {
  exp_sums(tile, row_sum, col_sum);
}

LTOOD_CLONES void add_exp_sums_online(Tile<float> tile, float* row_max, double* row_sum, float* col_max,
                                      double* col_sum) {
  exp_sums_online(tile, row_max, row_sum, col_max, col_sum);
}
LTOOD_CLONES void add_exp_sums_online(Tile<double> tile, double* row_max, double* row_sum, double* col_max,
                                      double* col_sum) {
  exp_sums_online(tile, row_max, row_sum, col_max, col_sum);
}

LTOOD_CLONES void weight_by_softmax(Tile<float> tile, const float* row_factor, const float* col_factor) {
  softmax_weights(tile, row_factor, col_factor);
}
LTOOD_CLONES void weight_by_softmax(Tile<double> tile, const double* row_factor, const double* col_factor) {
  softmax_weights(tile, row_factor, col_factor);
}

LTOOD_CLONES void weight_by_softmax_online(Tile<float> tile, SoftmaxRows<float> row, SoftmaxRows<float> col) {
  softmax_weights_online(tile, row, col);
}
LTOOD_CLONES void weight_by_softmax_online(Tile<double> tile, SoftmaxRows<double> row, SoftmaxRows<double> col) {
  softmax_weights_online(tile, row, col);
}

}  // namespace ltood
