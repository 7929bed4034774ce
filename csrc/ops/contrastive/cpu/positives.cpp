#include "ops/contrastive/cpu/positives.h"

#include <algorithm>
#include <numeric>

#include "common/simd.h"

namespace ltood {
namespace {

template <typename T>
LTOOD_INLINE void add_row(double* __restrict sum, const T* __restrict row, double weight, int64_t d) {
#pragma omp simd
  for (int64_t x = 0; x < d; ++x) sum[x] += weight * row[x];
}

template <typename T>
LTOOD_INLINE void similarities(const RowSegments& segments, int64_t begin, int64_t end, const T* u, int64_t d,
                               double* scratch, double* similarity, double* others) {
  for (int64_t g = begin; g < end; ++g) {
    const int64_t first = segments.offsets[g], last = segments.offsets[g + 1];
    std::fill(scratch, scratch + d, 0.0);
    for (int64_t at = first; at < last; ++at) add_row(scratch, u + segments.order[at] * d, 1.0, d);
    for (int64_t at = first; at < last; ++at) {
      const T* __restrict row = u + segments.order[at] * d;
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t x = 0; x < d; ++x) sum += row[x] * (scratch[x] - row[x]);
      similarity[segments.order[at]] = last - first > 1 ? sum : 0;
      others[segments.order[at]] = static_cast<double>(last - first - 1);
    }
  }
}

template <typename T>
LTOOD_INLINE void gradients(const RowSegments& segments, int64_t begin, int64_t end, const T* u, int64_t d,
                            const double* positive_grad, double scale, double* scratch, T* grad) {
  double* __restrict sum = scratch;           // S = sum of u_j
  double* __restrict grad_sum = scratch + d;  // sum of positive_grad_j u_j
  for (int64_t g = begin; g < end; ++g) {
    const int64_t first = segments.offsets[g], last = segments.offsets[g + 1];
    if (last - first < 2) continue;
    std::fill(scratch, scratch + 2 * d, 0.0);
    for (int64_t at = first; at < last; ++at) {
      const int64_t row = segments.order[at];
      add_row(sum, u + row * d, 1.0, d);
      add_row(grad_sum, u + row * d, positive_grad[row], d);
    }
    for (int64_t at = first; at < last; ++at) {
      const double own = positive_grad[segments.order[at]];
      const T* __restrict row = u + segments.order[at] * d;
      T* __restrict out = grad + segments.order[at] * d;
#pragma omp simd
      for (int64_t x = 0; x < d; ++x) {
        const double attraction = own * (sum[x] - row[x]) + (grad_sum[x] - own * row[x]);
        out[x] -= static_cast<T>(scale * attraction);
      }
    }
  }
}

template <typename T>
LTOOD_INLINE void subtract_row(T* __restrict out, const T* __restrict row, T weight, int64_t d) {
#pragma omp simd
  for (int64_t x = 0; x < d; ++x) out[x] -= weight * row[x];
}

template <typename T>
LTOOD_INLINE void grad_sums(const NeighborPositives<T>& chosen, int64_t begin, int64_t end, const T* u, int64_t d,
                            double scale, T* grad) {
  for (int64_t i = begin; i < end; ++i) {
    T* out = grad + i * d;
    for (int64_t at = i * chosen.k; at < (i + 1) * chosen.k; ++at) {
      const int64_t m = chosen.indices[at];
      if (m >= 0) subtract_row(out, chosen.neighbors + m * d, static_cast<T>(scale * chosen.positive_grad[i]), d);
    }
    if (!chosen.choosers) continue;
    for (int64_t at = chosen.choosers->offsets[i]; at < chosen.choosers->offsets[i + 1]; ++at) {
      const int64_t j = chosen.choosers->choosers[at];
      subtract_row(out, u + j * d, static_cast<T>(scale * chosen.positive_grad[j]), d);
    }
  }
}

}  // namespace

Choosers invert_choices(const int64_t* indices, int64_t n, int64_t k) {
  Choosers inverse;
  inverse.offsets.assign(n + 1, 0);
  for (int64_t at = 0; at < n * k; ++at) {
    if (indices[at] >= 0) ++inverse.offsets[indices[at] + 1];
  }
  std::partial_sum(inverse.offsets.begin(), inverse.offsets.end(), inverse.offsets.begin());
  inverse.choosers.resize(inverse.offsets[n]);
  std::vector<int64_t> next(inverse.offsets.begin(), inverse.offsets.end() - 1);
  for (int64_t at = 0; at < n * k; ++at) {
    if (indices[at] >= 0) inverse.choosers[next[indices[at]]++] = at / k;
  }
  return inverse;
}

LTOOD_CLONES void segment_similarities(const RowSegments& segments, int64_t begin, int64_t end, const float* u,
                                       int64_t d, double* similarity, double* others) {
  std::vector<double> scratch(d);
  similarities(segments, begin, end, u, d, scratch.data(), similarity, others);
}
LTOOD_CLONES void segment_similarities(const RowSegments& segments, int64_t begin, int64_t end, const double* u,
                                       int64_t d, double* similarity, double* others) {
  std::vector<double> scratch(d);
  similarities(segments, begin, end, u, d, scratch.data(), similarity, others);
}

LTOOD_CLONES void segment_gradients(const RowSegments& segments, int64_t begin, int64_t end, const float* u, int64_t d,
                                    const double* positive_grad, double scale, float* grad) {
  std::vector<double> scratch(2 * d);
  gradients(segments, begin, end, u, d, positive_grad, scale, scratch.data(), grad);
}
LTOOD_CLONES void segment_gradients(const RowSegments& segments, int64_t begin, int64_t end, const double* u, int64_t d,
                                    const double* positive_grad, double scale, double* grad) {
  std::vector<double> scratch(2 * d);
  gradients(segments, begin, end, u, d, positive_grad, scale, scratch.data(), grad);
}

LTOOD_CLONES void neighbor_gradients(const NeighborPositives<float>& chosen, int64_t begin, int64_t end, const float* u,
                                     int64_t d, double scale, float* grad) {
  grad_sums(chosen, begin, end, u, d, scale, grad);
}
LTOOD_CLONES void neighbor_gradients(const NeighborPositives<double>& chosen, int64_t begin, int64_t end,
                                     const double* u, int64_t d, double scale, double* grad) {
  grad_sums(chosen, begin, end, u, d, scale, grad);
}

}  // namespace ltood
