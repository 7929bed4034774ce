#include "ops/contrastive/cpu/sole_positives.h"

#include <algorithm>
#include <numeric>

#include "common/simd.h"

namespace ltood {
namespace {

template <typename T>
LTOOD_INLINE void products_of(const std::vector<int64_t>& offsets, const std::vector<int64_t>& columns, const T* u,
                              int64_t d, double* products) {
  for (size_t i = 0; i + 1 < offsets.size(); ++i) {
    const T* __restrict row = u + i * d;
    for (int64_t entry = offsets[i]; entry < offsets[i + 1]; ++entry) {
      const T* __restrict column = u + columns[entry] * d;
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t x = 0; x < d; ++x) sum += double(row[x]) * column[x];
      products[entry] = sum;
    }
  }
}

template <typename T>
LTOOD_INLINE void add_gradients(const SolePairs& pairs, const SoleGradients& rows, int64_t begin, int64_t end,
                                const T* u, int64_t d, double inv_tau, double scale, T* grad) {
  for (int64_t i = begin; i < end; ++i) {
    T* __restrict out = grad + i * d;
    for (int64_t entry = pairs.offsets[i]; entry < pairs.offsets[i + 1]; ++entry) {
      const int64_t j = pairs.columns[entry];
      const double s = pairs.products[entry] * inv_tau;
      const double both_ways = sole_gradient(pairs, rows, i, j, s) + sole_gradient(pairs, rows, j, i, s);
      const T weight = static_cast<T>(scale * both_ways);
      const T* __restrict row = u + j * d;
#pragma omp simd
      for (int64_t x = 0; x < d; ++x) out[x] += weight * row[x];
    }
  }
}

}  // namespace

void SolePairs::list_pairs(int64_t n) {
  std::vector<int64_t> ends(n + 1, 0);
  const auto for_each_choice = [&](const auto& body) {
    for (int64_t i = 0; i < static_cast<int64_t>(instance.size()); ++i) {
      if (instance[i] >= 0) body(i, instance[i]);
    }
    for (int64_t i = 0; i < static_cast<int64_t>(same_class.size()); ++i) {
      if (same_class[i] >= 0 && !is_sole(instance, i, same_class[i])) body(i, same_class[i]);
    }
    for (int64_t i = 0; i < static_cast<int64_t>(neighbor.size()); ++i) {
      const int64_t j = neighbor[i];
      if (j < 0 || is_sole(same_class, i, j)) continue;
      body(i, j);
      if (neighbor[j] != i) body(j, i);
    }
  };
  for_each_choice([&](int64_t i, int64_t) { ++ends[i + 1]; });
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  offsets = ends;
  columns.resize(offsets[n]);
  for_each_choice([&](int64_t i, int64_t j) { columns[ends[i]++] = j; });
}

LTOOD_CLONES void SolePairs::multiply_pairs(const float* u, int64_t d) {
  products.resize(columns.size());
  products_of(offsets, columns, u, d, products.data());
}
LTOOD_CLONES void SolePairs::multiply_pairs(const double* u, int64_t d) {
  products.resize(columns.size());
  products_of(offsets, columns, u, d, products.data());
}

std::vector<int64_t> sole_members(const RowSegments& segments, int64_t n) {
  std::vector<int64_t> other(n, -1);
  for (int64_t g = 0; g < segments.count(); ++g) {
    const int64_t first = segments.offsets[g];
    if (segments.offsets[g + 1] - first != 2) continue;
    other[segments.order[first]] = segments.order[first + 1];
    other[segments.order[first + 1]] = segments.order[first];
  }
  return other;
}

std::vector<int64_t> sole_neighbors(const RowSegments& views, const int64_t* indices, int64_t n, int64_t k) {
  std::vector<int64_t> sole(n, -1);
  for (int64_t g = 0; g < views.count(); ++g) {
    if (views.offsets[g + 1] - views.offsets[g] != 1) continue;
    const int64_t i = views.order[views.offsets[g]];
    const bool one = k == 1 || (k > 1 && indices[i * k + 1] < 0);  // the places without a neighbour come last
    if (one) sole[i] = indices[i * k];
  }
  return sole;
}

double sole_gradient(const SolePairs& pairs, const SoleGradients& rows, int64_t i, int64_t j, double s) {
  double g = 0;
  if (pairs.is_sole(pairs.instance, i, j)) g += rows.instance[i];
  if (pairs.is_sole(pairs.same_class, i, j)) g += rows.same_class[i];
  if (pairs.is_sole(pairs.neighbor, i, j)) g += rows.neighbor[i];
  const double w = rows.grad_lse[i];
  if (w == 0 && g == 0) return 0;
  const double log_share = s - rows.lse[i];
  return g * std::expm1(log_share) + (w - g) * std::exp(log_share);
}

LTOOD_CLONES void sole_positive_bwd(const SolePairs& pairs, const SoleGradients& rows, int64_t begin, int64_t end,
                                    const float* u, int64_t d, double inv_tau, double scale, float* grad) {
  add_gradients(pairs, rows, begin, end, u, d, inv_tau, scale, grad);
}
LTOOD_CLONES void sole_positive_bwd(const SolePairs& pairs, const SoleGradients& rows, int64_t begin, int64_t end,
                                    const double* u, int64_t d, double inv_tau, double scale, double* grad) {
  add_gradients(pairs, rows, begin, end, u, d, inv_tau, scale, grad);
}

}  // namespace ltood
