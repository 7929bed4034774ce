#include "ops/contrastive/contrastive_positives.h"

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
LTOOD_INLINE void similarities(const RowGroups& groups, int64_t begin, int64_t end, const T* u, int64_t d,
                               double* scratch, double* similarity, double* others) {
  for (int64_t g = begin; g < end; ++g) {
    const int64_t first = groups.offsets[g], last = groups.offsets[g + 1];
    std::fill(scratch, scratch + d, 0.0);
    for (int64_t at = first; at < last; ++at) add_row(scratch, u + groups.order[at] * d, 1.0, d);
    for (int64_t at = first; at < last; ++at) {
      const T* __restrict row = u + groups.order[at] * d;
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t x = 0; x < d; ++x) sum += row[x] * (scratch[x] - row[x]);
      similarity[groups.order[at]] = last - first > 1 ? sum : 0;
      others[groups.order[at]] = static_cast<double>(last - first - 1);
    }
  }
}

template <typename T>
LTOOD_INLINE void gradients(const RowGroups& groups, int64_t begin, int64_t end, const T* u, int64_t d,
                            const double* positive_grad, double scale, double* scratch, T* grad) {
  double* __restrict sum = scratch;           // S = sum of u_j
  double* __restrict grad_sum = scratch + d;  // sum of positive_grad_j u_j
  for (int64_t g = begin; g < end; ++g) {
    const int64_t first = groups.offsets[g], last = groups.offsets[g + 1];
    if (last - first < 2) continue;
    std::fill(scratch, scratch + 2 * d, 0.0);
    for (int64_t at = first; at < last; ++at) {
      const int64_t row = groups.order[at];
      add_row(sum, u + row * d, 1.0, d);
      add_row(grad_sum, u + row * d, positive_grad[row], d);
    }
    for (int64_t at = first; at < last; ++at) {
      const double own = positive_grad[groups.order[at]];
      const T* __restrict row = u + groups.order[at] * d;
      T* __restrict out = grad + groups.order[at] * d;
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

RowGroups group_rows(const int64_t* ids, int64_t n) {
  RowGroups groups;
  groups.order.resize(n);
  std::iota(groups.order.begin(), groups.order.end(), 0);
  std::sort(groups.order.begin(), groups.order.end(),
            [ids](int64_t a, int64_t b) { return ids[a] != ids[b] ? ids[a] < ids[b] : a < b; });
  for (int64_t at = 0; at < n; ++at) {
    if (at == 0 || ids[groups.order[at]] != ids[groups.order[at - 1]]) groups.offsets.push_back(at);
  }
  groups.offsets.push_back(n);
  return groups;
}

RowGroups pair_views(int64_t n) {
  RowGroups groups;
  for (int64_t i = 0; i < n / 2; ++i) {
    groups.offsets.push_back(2 * i);
    groups.order.push_back(i);
    groups.order.push_back(i + n / 2);
  }
  groups.offsets.push_back(n);
  return groups;
}

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

LTOOD_CLONES void group_similarities(const RowGroups& groups, int64_t begin, int64_t end, const float* u, int64_t d,
                                     double* similarity, double* others) {
  std::vector<double> scratch(d);
  similarities(groups, begin, end, u, d, scratch.data(), similarity, others);
}
LTOOD_CLONES void group_similarities(const RowGroups& groups, int64_t begin, int64_t end, const double* u, int64_t d,
                                     double* similarity, double* others) {
  std::vector<double> scratch(d);
  similarities(groups, begin, end, u, d, scratch.data(), similarity, others);
}

LTOOD_CLONES void group_gradients(const RowGroups& groups, int64_t begin, int64_t end, const float* u, int64_t d,
                                  const double* positive_grad, double scale, float* grad) {
  std::vector<double> scratch(2 * d);
  gradients(groups, begin, end, u, d, positive_grad, scale, scratch.data(), grad);
}
LTOOD_CLONES void group_gradients(const RowGroups& groups, int64_t begin, int64_t end, const double* u, int64_t d,
                                  const double* positive_grad, double scale, double* grad) {
  std::vector<double> scratch(2 * d);
  gradients(groups, begin, end, u, d, positive_grad, scale, scratch.data(), grad);
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
