#include "common/unit_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/simd.h"

namespace ltood {
namespace {

template <typename T>
LTOOD_INLINE double dot(const T* __restrict a, const T* __restrict b, int64_t d) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t x = 0; x < d; ++x) sum += double(a[x]) * b[x];
  return sum;
}

// |x| of a row whose sum of squares leaves the range of double: scaled by its largest element first. Not inlined: the
// loops that call it stay vectors.
template <typename T>
__attribute__((noinline)) double scaled_norm(const T* __restrict row, int64_t d) {
  double largest = 0;
  for (int64_t c = 0; c < d; ++c) largest = std::max(largest, std::abs(double(row[c])));
  if (largest == 0 || std::isinf(largest)) return largest;
  double sum = 0;
  for (int64_t c = 0; c < d; ++c) sum += (row[c] / largest) * (row[c] / largest);
  return largest * std::sqrt(sum);
}

template <typename T>
LTOOD_INLINE double norm_of(const T* row, int64_t d) {
  constexpr double kTiny = 1e-280, kHuge = 1e300;
  const double sum = dot(row, row, d);
  return sum < kTiny || sum > kHuge ? scaled_norm(row, d) : std::sqrt(sum);
}

constexpr double kLargest = std::numeric_limits<double>::max();

// Finite rows of float64 can be longer than the largest number. Scales such a row and returns its norm then.
template <typename T>
__attribute__((noinline)) double shorten(T* row, int64_t d) {
  for (int64_t c = 0; c < d; ++c) row[c] *= T(0x1p-64);
  return scaled_norm(row, d);
}

template <typename T>
LTOOD_INLINE void norms_of(const T* x, int64_t n, int64_t d, double* norms) {
  for (int64_t i = 0; i < n; ++i) norms[i] = norm_of(x + i * d, d);
}

template <typename T>
LTOOD_INLINE void normalize(T* x, int64_t n, int64_t d, const double* norms) {
  for (int64_t i = 0; i < n; ++i) {
    T* __restrict row = x + i * d;
    const double norm = norms[i] <= kLargest ? norms[i] : shorten(row, d);
    const double length = norm < kNormEps ? kNormEps : norm, inverse = 1 / length;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) {
      if constexpr (sizeof(T) == sizeof(double)) {  // as the definition rounds it: what ties there ties here
        row[c] = row[c] / length;
      } else {
        row[c] = static_cast<T>(row[c] * inverse);
      }
    }
  }
}

template <typename T>
LTOOD_INLINE void normalize_bwd(const T* u, T* grad, int64_t n, int64_t d, const double* norms, double factor,
                                double smallest_norm, double* radial) {
  for (int64_t i = 0; i < n; ++i) {
    const T* __restrict row = u + i * d;
    T* __restrict g = grad + i * d;
    const double u_dot_du = dot(row, g, d);
    radial[i] = u_dot_du * factor;
    const bool flat = norms && norms[i] < kNormEps;
    const double removed = norms && !flat ? u_dot_du : 0;
    const bool dead = norms && norms[i] < smallest_norm;
    const double scale = dead ? 0 : norms ? factor / (flat ? kNormEps : norms[i]) : factor;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) g[c] = static_cast<T>(scale * (g[c] - removed * row[c]));
  }
}

}  // namespace

LTOOD_CLONES void row_norms(const float* x, int64_t n, int64_t d, double* norms) { norms_of(x, n, d, norms); }
LTOOD_CLONES void row_norms(const double* x, int64_t n, int64_t d, double* norms) { norms_of(x, n, d, norms); }

LTOOD_CLONES void normalize_rows(float* x, int64_t n, int64_t d, const double* norms) { normalize(x, n, d, norms); }
LTOOD_CLONES void normalize_rows(double* x, int64_t n, int64_t d, const double* norms) { normalize(x, n, d, norms); }

LTOOD_CLONES void normalize_rows_bwd(const float* u, float* grad, int64_t n, int64_t d, const double* norms,
                                     double factor, double smallest_norm, double* radial) {
  normalize_bwd(u, grad, n, d, norms, factor, smallest_norm, radial);
}
LTOOD_CLONES void normalize_rows_bwd(const double* u, double* grad, int64_t n, int64_t d, const double* norms,
                                     double factor, double smallest_norm, double* radial) {
  normalize_bwd(u, grad, n, d, norms, factor, smallest_norm, radial);
}

}  // namespace ltood
