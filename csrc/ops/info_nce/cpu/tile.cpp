#include "ops/info_nce/cpu/tile.h"

#include <limits>

#include "common/simd.h"

namespace ltood {
namespace {

template <typename T>
constexpr T kExcluded = -std::numeric_limits<T>::infinity();

template <typename T>
LTOOD_INLINE void logits(Tile<T> tile, LogitSums row, LogitSums col) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* __restrict v = tile.values + r * tile.stride;
    double sum = 0, count = 0;
#pragma omp simd reduction(+ : sum, count)
    for (int64_t c = 0; c < tile.cols; ++c) {
      const bool kept = v[c] != kExcluded<T>;
      sum += kept ? double(v[c]) : 0.0;
      count += kept ? 1.0 : 0.0;
    }
    row.sum[r] += sum;
    row.count[r] += count;
    if (!col.sum) continue;
    double* __restrict sums = col.sum;
    double* __restrict counts = col.count;
#pragma omp simd
    for (int64_t c = 0; c < tile.cols; ++c) {
      const bool kept = v[c] != kExcluded<T>;
      sums[c] += kept ? double(v[c]) : 0.0;
      counts[c] += kept ? 1.0 : 0.0;
    }
  }
}

template <typename T>
LTOOD_INLINE void all_slopes(Tile<T> tile, SlopeFactors<T> row, SlopeFactors<T> col) {
  const T* __restrict col_weight = col.weight;
  const T* __restrict col_shift = col.shift;
  const T* __restrict col_constant = col.constant;
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* __restrict v = tile.values + r * tile.stride;
    const T weight = row.weight[r], shift = row.shift[r], constant = row.constant[r];
    if (!col_weight) {
#pragma omp simd
      for (int64_t c = 0; c < tile.cols; ++c) {
        const T slope = weight * exp2_simd((v[c] - shift) * tile.scale) + constant;
        v[c] = v[c] == kExcluded<T> ? T(0) : slope;
      }
      continue;
    }
#pragma omp simd
    for (int64_t c = 0; c < tile.cols; ++c) {
      const T of_row = weight * exp2_simd((v[c] - shift) * tile.scale) + constant;
      const T of_col = col_weight[c] * exp2_simd((v[c] - col_shift[c]) * tile.scale) + col_constant[c];
      v[c] = v[c] == kExcluded<T> ? T(0) : of_row + of_col;
    }
  }
}

template <typename T>
LTOOD_INLINE void products_of(const T* u, const T* k, const int64_t* positive, int64_t begin, int64_t end, int64_t d,
                              double* products) {
  for (int64_t i = begin; i < end; ++i) {
    const T* __restrict row = u + i * d;
    const T* __restrict key = k + (positive ? positive[i] : i) * d;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t x = 0; x < d; ++x) sum += double(row[x]) * key[x];
    products[i] = sum;
  }
}

template <typename T>
LTOOD_INLINE void add(T* __restrict out, const T* __restrict row, T weight, int64_t d) {
#pragma omp simd
  for (int64_t x = 0; x < d; ++x) out[x] += weight * row[x];
}

}  // namespace

LTOOD_CLONES void add_logits(Tile<float> tile, LogitSums row, LogitSums col) { logits(tile, row, col); }
LTOOD_CLONES void add_logits(Tile<double> tile, LogitSums row, LogitSums col) { logits(tile, row, col); }

LTOOD_CLONES void slopes(Tile<float> tile, SlopeFactors<float> row, SlopeFactors<float> col) {
  all_slopes(tile, row, col);
}
LTOOD_CLONES void slopes(Tile<double> tile, SlopeFactors<double> row, SlopeFactors<double> col) {
  all_slopes(tile, row, col);
}

LTOOD_CLONES void positive_products(const float* u, const float* k, const int64_t* positive, int64_t begin, int64_t end,
                                    int64_t d, double* products) {
  products_of(u, k, positive, begin, end, d, products);
}
LTOOD_CLONES void positive_products(const double* u, const double* k, const int64_t* positive, int64_t begin,
                                    int64_t end, int64_t d, double* products) {
  products_of(u, k, positive, begin, end, d, products);
}

LTOOD_CLONES void add_scaled(float* out, const float* row, double weight, int64_t d) {
  add(out, row, static_cast<float>(weight), d);
}
LTOOD_CLONES void add_scaled(double* out, const double* row, double weight, int64_t d) { add(out, row, weight, d); }

}  // namespace ltood
