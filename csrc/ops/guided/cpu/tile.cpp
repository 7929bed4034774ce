#include "ops/guided/cpu/tile.h"

#include <algorithm>
#include <cmath>

#include "common/simd_log.h"

namespace ltood {

namespace {

constexpr int64_t kBlock = 64;  // columns that keep_best skips at once

// repulsion for the vector loops. A rounding error can lift cos above 1: no force then.
template <bool kWeighted, bool kLinear, typename T>
LTOOD_INLINE T repel(const T* cos, int64_t j, T gamma) {
  if constexpr (!kWeighted) return T(1);
  const T half = (1 - cos[j]) * T(0.5);
  const T force = half < 0 ? T(0) : half;
  if constexpr (kLinear) return force;
  const T power = exp2_simd(gamma * T(kLog2E) * log_simd(force));
  return force == 0 ? T(0) : power;
}

// 2^x for what a force multiplies: x can be large only where the force is next to nothing, and 0 * 2^x must be 0.
template <typename T>
LTOOD_INLINE T exp2_finite(T x) {
  return exp2_simd(x > 127 ? T(127) : x);
}

// max_j s_j over the columns with a force, so that a mighty s_j with force 0 cannot move the others below the floor.
template <bool kWeighted, typename T>
LTOOD_INLINE T largest(const T* s, const T* cos, int64_t n) {
  T max = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < n; ++j) {
    T x = s[j];
    if constexpr (kWeighted) x = cos[j] < 1 ? x : -std::numeric_limits<T>::infinity();
    max = x > max ? x : max;
  }
  return max;
}

template <bool kWeighted, bool kLinear, typename T>
LTOOD_INLINE void add_negatives_as(ExpSum<T>& acc, const T* s, const T* cos, int64_t n, T gamma) {
  const T max = largest<kWeighted>(s, cos, n);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += repel<kWeighted, kLinear>(cos, j, gamma) * exp2_finite(s[j] - max);
  acc.add(max, sum);
}

// 2^x - 1 for |x| <= 1/2 without the rounding of 1 + small: exp2_simd's polynomial less its constant.
template <typename T>
LTOOD_INLINE T exp2_minus_1(T x) {
  T p = T(0.00015345812);
  p = p * x + T(0.0013399931);
  p = p * x + T(0.0096184890);
  p = p * x + T(0.055503288);
  p = p * x + T(0.24022647);
  p = p * x + T(0.69314721);
  return p * x;
}

template <typename T>
LTOOD_INLINE void add_distill_of(DivergenceSum<T>& acc, const T* s, const T* cos, int64_t n, T scale) {
  const T s_max = largest<false>(s, cos, n);
  const T t_max = largest<false>(cos, cos, n) * scale;
  constexpr bool kNarrow = sizeof(T) == sizeof(float);  // in double the difference of the sums has digits to spare
  T s_sum = 0, t_sum = 0, excess = 0, gap = 0, u_max = 0;
#pragma omp simd reduction(+ : s_sum, t_sum, excess, gap) reduction(max : u_max)
  for (int64_t j = 0; j < n; ++j) {
    const T t = cos[j] * scale;
    const T p = exp2_simd(t - t_max);
    const T u = t - s[j];
    s_sum += exp2_simd(s[j] - s_max);
    t_sum += p;
    excess += p * u;
    if constexpr (kNarrow) gap += p * exp2_minus_1(-u);
    u_max = std::abs(u) > u_max ? std::abs(u) : u_max;
  }
  const double ratio = std::exp2(static_cast<double>(s_max - t_max));
  const double exact_gap = kNarrow && u_max <= T(0.5) ? static_cast<double>(gap) : s_sum * ratio - t_sum;
  acc.student.add(s_max, s_sum);
  const auto scales = acc.teacher.add(t_max, t_sum);
  acc.excess = acc.excess * scales.own + excess * scales.other;
  acc.gap = acc.gap * scales.own + exact_gap * scales.other;
}

// Strides of 0 read the row's own numbers for every column.
template <bool kWeighted, bool kLinear, int kStride, typename T>
LTOOD_INLINE void grad_negatives_as(T* h, const T* s, const T* cos, int64_t n, T gamma, const T* lse, const T* a) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    h[j] += a[kStride * j] * repel<kWeighted, kLinear>(cos, j, gamma) * exp2_finite(s[j] - lse[kStride * j]);
  }
}

template <typename T>
LTOOD_INLINE void grad_distill_of(T* h, const T* s, const T* cos, int64_t n, T scale, DistillRow<T> row,
                                  DistillRow<T> columns) {
  const T student_lse = *row.student_lse, teacher_lse = *row.teacher_lse, a = *row.a, b = *row.b;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const T t = cos[j] * scale;
    h[j] += a * exp2_simd(s[j] - student_lse) + columns.a[j] * exp2_simd(s[j] - columns.student_lse[j]) -
            b * exp2_simd(t - teacher_lse) - columns.b[j] * exp2_simd(t - columns.teacher_lse[j]);
  }
}

// Of the columns of a tile, on the stack.
template <typename T>
struct ColumnSums {
  alignas(64) T student[kMaxPairs] = {}, teacher[kMaxPairs] = {}, excess[kMaxPairs] = {}, gap[kMaxPairs] = {};
};

template <typename T>
LTOOD_INLINE void add_row_of_pairs(const PairTile<T>& tile, int64_t r, int64_t begin, int64_t end, PairSums rows,
                                   ColumnSums<T>& columns) {
  constexpr bool kNarrow = sizeof(T) == sizeof(float);  // as in add_distill_of
  const T* __restrict v = tile.student + r * tile.stride;
  const T* __restrict w = tile.guide + r * tile.stride;
  T student = 0, teacher = 0, excess = 0, gap = 0;
#pragma omp simd reduction(+ : student, teacher, excess, gap)
  for (int64_t c = begin; c < end; ++c) {
    const T s = v[c] * tile.student_scale, t = w[c] * tile.teacher_scale, u = t - s;
    const T q = exp2_simd(s), p = exp2_simd(t);
    T difference = q - p;
    if constexpr (kNarrow) difference = std::abs(u) <= T(0.5) ? p * exp2_minus_1(-u) : difference;
    student += q;
    teacher += p;
    excess += p * u;
    gap += difference;
    columns.student[c] += q;
    columns.teacher[c] += p;
    columns.excess[c] += p * u;
    columns.gap[c] += difference;
  }
  rows.student[r] += student;
  rows.teacher[r] += teacher;
  rows.excess[r] += excess;
  rows.gap[r] += gap;
}

template <typename T>
LTOOD_INLINE void add_pairs_of(const PairTile<T>& tile, PairSums rows, PairSums columns) {
  ColumnSums<T> sums;
  for (int64_t r = 0; r < tile.rows; ++r) {
    add_row_of_pairs(tile, r, 0, tile.diagonal ? r : tile.cols, rows, sums);
    if (tile.diagonal) add_row_of_pairs(tile, r, r + 1, tile.cols, rows, sums);
  }
  if (tile.diagonal) return;
  for (int64_t c = 0; c < tile.cols; ++c) {
    columns.student[c] += sums.student[c];
    columns.teacher[c] += sums.teacher[c];
    columns.excess[c] += sums.excess[c];
    columns.gap[c] += sums.gap[c];
  }
}

template <typename T>
LTOOD_INLINE void weigh_pairs_of(const PairTile<T>& tile, PairFactors<T> rows, PairFactors<T> columns) {
  const T* __restrict student = columns.student;
  const T* __restrict teacher = columns.teacher;
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* __restrict v = tile.student + r * tile.stride;
    const T* __restrict w = tile.guide + r * tile.stride;
    const T a = rows.student[r], b = rows.teacher[r];
#pragma omp simd
    for (int64_t c = 0; c < tile.cols; ++c) {
      v[c] = (a + student[c]) * exp2_simd(v[c] * tile.student_scale) -
             (b + teacher[c]) * exp2_simd(w[c] * tile.teacher_scale);
    }
    if (tile.diagonal) v[r] = 0;
  }
}

template <typename T>
LTOOD_INLINE bool any_reaches(const T* cos, int64_t n, T floor) {
  int any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t j = 0; j < n; ++j) any |= !(cos[j] < floor);
  return any != 0;
}

template <typename T>
LTOOD_INLINE T dot_of(const T* x, const T* y, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < n; ++d) sum += x[d] * y[d];
  return sum;
}

template <typename T>
LTOOD_INLINE void keep_best_of(NeighborSearch<T> search, const T* cos, const int64_t* rows, const T* guide, int64_t n,
                               int64_t first) {
  const int64_t last = search.k - 1;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    if (!any_reaches(cos + begin, end - begin, search.best[last] - search.margin)) continue;
    for (int64_t j = begin; j < end; ++j) {
      if (cos[j] < search.best[last] - search.margin) continue;
      if (std::binary_search(search.own_begin, search.own_end, first + j)) continue;
      const T exact = dot_of(search.guide, guide + j * search.width, search.width);
      const T value = std::isnan(exact) ? std::numeric_limits<T>::infinity() : exact;
      const auto better = [&](int64_t slot) {
        return value > search.best[slot] || (value == search.best[slot] && rows[j] < search.row[slot]);
      };
      if (!better(last)) continue;
      int64_t slot = last;
      for (; slot > 0 && better(slot - 1); --slot) {
        search.best[slot] = search.best[slot - 1];
        search.row[slot] = search.row[slot - 1];
      }
      search.best[slot] = value;
      search.row[slot] = rows[j];
    }
  }
}

template <typename T>
T force_of(Force force, T signed_cos) {
  if (!force.weighted) return 1;
  const T half = (1 + signed_cos) * T(0.5);
  const T base = half < 0 ? T(0) : half;
  return force.gamma == 1 ? base : std::pow(base, static_cast<T>(force.gamma));
}

}  // namespace

template <typename T>
T attraction(Force force, T cos) {
  return force_of(force, cos);
}

template <typename T>
T repulsion(Force force, T cos) {
  return force_of(force, -cos);
}

template <typename T>
typename ExpSum<T>::Scales ExpSum<T>::add(T other_max, double other_sum) {
  const bool grows = other_max > max;
  const Scales scales{grows ? std::exp2(static_cast<double>(max - other_max)) : 1,
                      grows || other_max == max ? 1 : std::exp2(static_cast<double>(other_max - max))};
  sum = sum * scales.own + other_sum * scales.other;
  max = grows ? other_max : max;
  return scales;
}

template <typename T>
double ExpSum<T>::log2() const {
  return sum == 0 ? -std::numeric_limits<double>::infinity() : max + std::log2(sum);
}

template <typename T>
double DivergenceSum<T>::nats() const {
  const double ratio = gap / teacher.sum;
  const double difference = std::abs(ratio) < 0.5 ? std::log1p(ratio) : (student.log2() - teacher.log2()) * kLn2;
  return excess / teacher.sum * kLn2 + difference;
}

// The public functions of one type. Function multi-versioning takes no templates, hence one set for each.
#define LTOOD_GUIDED_TILE(T)                                                                                          \
  template T attraction(Force, T);                                                                                    \
  template T repulsion(Force, T);                                                                                     \
  template struct ExpSum<T>;                                                                                          \
  LTOOD_CLONES void add_negatives(ExpSum<T>& acc, const T* s, const T* cos, int64_t n, Force force) {                 \
    const T gamma = static_cast<T>(force.gamma);                                                                      \
    if (!force.weighted) return add_negatives_as<false, true>(acc, s, cos, n, gamma);                                 \
    if (force.gamma == 1) return add_negatives_as<true, true>(acc, s, cos, n, gamma);                                 \
    add_negatives_as<true, false>(acc, s, cos, n, gamma);                                                             \
  }                                                                                                                   \
  template struct DivergenceSum<T>;                                                                                   \
  LTOOD_CLONES void add_distill(DivergenceSum<T>& acc, const T* s, const T* cos, int64_t n, T scale) {                \
    add_distill_of(acc, s, cos, n, scale);                                                                            \
  }                                                                                                                   \
  LTOOD_CLONES void grad_negatives(T* h, const T* s, const T* cos, int64_t n, Force force, T lse, T a) {              \
    const T gamma = static_cast<T>(force.gamma);                                                                      \
    if (!force.weighted) return grad_negatives_as<false, true, 0>(h, s, cos, n, gamma, &lse, &a);                     \
    if (force.gamma == 1) return grad_negatives_as<true, true, 0>(h, s, cos, n, gamma, &lse, &a);                     \
    grad_negatives_as<true, false, 0>(h, s, cos, n, gamma, &lse, &a);                                                 \
  }                                                                                                                   \
  LTOOD_CLONES void grad_as_negative(T* h, const T* s, const T* cos, int64_t n, Force force, const T* lse,            \
                                     const T* a) {                                                                    \
    const T gamma = static_cast<T>(force.gamma);                                                                      \
    if (!force.weighted) return grad_negatives_as<false, true, 1>(h, s, cos, n, gamma, lse, a);                       \
    if (force.gamma == 1) return grad_negatives_as<true, true, 1>(h, s, cos, n, gamma, lse, a);                       \
    grad_negatives_as<true, false, 1>(h, s, cos, n, gamma, lse, a);                                                   \
  }                                                                                                                   \
  LTOOD_CLONES void grad_distill(T* h, const T* s, const T* cos, int64_t n, T scale, DistillRow<T> row,               \
                                 DistillRow<T> columns) {                                                             \
    grad_distill_of(h, s, cos, n, scale, row, columns);                                                               \
  }                                                                                                                   \
  LTOOD_CLONES void add_pairs(PairTile<T> tile, PairSums rows, PairSums columns) {                                    \
    add_pairs_of(tile, rows, columns);                                                                                \
  }                                                                                                                   \
  LTOOD_CLONES void weigh_pairs(PairTile<T> tile, PairFactors<T> rows, PairFactors<T> columns) {                      \
    weigh_pairs_of(tile, rows, columns);                                                                              \
  }                                                                                                                   \
  LTOOD_CLONES void keep_best(NeighborSearch<T> search, const T* cos, const int64_t* rows, const T* guide, int64_t n, \
                              int64_t first) {                                                                        \
    keep_best_of(search, cos, rows, guide, n, first);                                                                 \
  }                                                                                                                   \
  LTOOD_CLONES T dot(const T* x, const T* y, int64_t n) { return dot_of(x, y, n); }

LTOOD_GUIDED_TILE(float)
LTOOD_GUIDED_TILE(double)

}  // namespace ltood
