#include "common/unit_rows.h"

#include <algorithm>
#include <cmath>

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

template <typename T>
LTOOD_INLINE void norms_of(const T* x, int64_t n, int64_t d, double* norms) {
  for (int64_t i = 0; i < n; ++i) norms[i] = std::sqrt(dot(x + i * d, x + i * d, d));
}

template <typename T>
LTOOD_INLINE void normalize(T* x, int64_t n, int64_t d, const double* norms) {
  for (int64_t i = 0; i < n; ++i) {
    const double length = norms[i] < kNormEps ? kNormEps : norms[i], inverse = 1 / length;
    T* __restrict row = x + i * d;
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
                                double* radial) {
  for (int64_t i = 0; i < n; ++i) {
    const T* __restrict row = u + i * d;
    T* __restrict g = grad + i * d;
    const double u_dot_du = dot(row, g, d);
    radial[i] = u_dot_du * factor;
    const bool flat = norms && norms[i] < kNormEps;
    const double removed = norms && !flat ? u_dot_du : 0;
    const double scale = norms ? factor / (flat ? kNormEps : norms[i]) : factor;
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
                                     double factor, double* radial) {
  normalize_bwd(u, grad, n, d, norms, factor, radial);
}
LTOOD_CLONES void normalize_rows_bwd(const double* u, double* grad, int64_t n, int64_t d, const double* norms,
                                     double factor, double* radial) {
  normalize_bwd(u, grad, n, d, norms, factor, radial);
}

}  // namespace ltood
