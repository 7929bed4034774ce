#include "ops/cluster_kl/cpu/tile.h"

#include <limits>

#include "common/simd_log.h"

namespace ltood::cluster_kl {
namespace {

// A distance is summed again when nu + distance is below this share of the squared norms it came from: what is left of
// the rounding of the norms is then below 1e-6 of what the kernel sees.
constexpr double kCancellation = 1.0 / 16;

template <typename T>
LTOOD_INLINE void center_rows_body(T* x, const T* origin, T* norms, int64_t rows, int64_t d) {
  for (int64_t r = 0; r < rows; ++r, x += d) {
    T norm = 0;
#pragma omp simd reduction(+ : norm)
    for (int64_t c = 0; c < d; ++c) {
      const T centered = x[c] - origin[c];
      x[c] = centered;
      norm += centered * centered;
    }
    norms[r] = norm + (norm - norm);  // infinity becomes NaN: no finite number comes of it
  }
}

template <typename T>
LTOOD_INLINE T distance_from_differences(const T* x, const T* mu, int64_t d) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < d; ++c) {
    const T difference = x[c] - mu[c];
    sum += difference * difference;
  }
  return sum;
}

template <typename T>
LTOOD_INLINE void squared_distances_body(T* tile, const T* x, const T* norms, const T* mu, const T* mu_norms,
                                         int64_t rows, int64_t k, int64_t d, T nu) {
  const T share = static_cast<T>(kCancellation);
  for (int64_t r = 0; r < rows; ++r, tile += k, x += d) {
    const T norm = norms[r];
    int32_t cancelled = 0;
#pragma omp simd reduction(+ : cancelled)
    for (int64_t j = 0; j < k; ++j) {
      const T norm_sum = norm + mu_norms[j];
      const T distance = norm_sum - 2 * tile[j];
      tile[j] = distance < 0 ? 0 : distance;
      cancelled += nu + distance < share * norm_sum ? 1 : 0;
    }
    for (int64_t j = 0; cancelled > 0 && j < k; ++j) {
      if (nu + tile[j] < share * (norm + mu_norms[j])) tile[j] = distance_from_differences(x, mu + j * d, d);
    }
  }
}

// log (1 + v), v >= 0: the second term gives back what 1 + v lost of v.
template <typename T>
LTOOD_INLINE T log1p_simd(T v) {
  const T w = 1 + v;
  return log_simd(w) + (v - (w - 1)) / w;
}

template <typename T>
LTOOD_INLINE T exp_simd(T v) {
  return exp2_simd(v * static_cast<T>(kLog2E));
}

// The weights of a row, relative to that of its nearest centroid at distance m: their logarithm is
// -h log(1 + (d - m)/(nu + m)), in which the large common part that could underflow, or round, has gone.
// kUnit: nu = 1, where a reciprocal does, and m stays 0.
template <bool kUnit, typename T>
struct StudentT {
  T nu, nearest;
  T inverse = 1 / (nu + nearest);
  T h = (nu + 1) / 2;

  LTOOD_INLINE T weight(T distance) const {
    if constexpr (kUnit) {
      return 1 / (1 + distance);
    } else {
      return exp_simd(-h * log1p_simd((distance - nearest) * inverse));
    }
  }

  // h / (nu + distance), given the weight of that distance.
  LTOOD_INLINE T slope(T distance, T weight) const { return kUnit ? weight : h / (nu + distance); }
};

template <typename T>
LTOOD_INLINE T smallest_of(const T* distances, int64_t k) {
  T smallest = std::numeric_limits<T>::infinity();
#pragma omp simd reduction(min : smallest)
  for (int64_t j = 0; j < k; ++j) smallest = distances[j] < smallest ? distances[j] : smallest;
  return smallest;
}

template <bool kUnit, typename T>
LTOOD_INLINE void assign_rows_body(const T* tile, RowStats<T> stats, T* mass, T* scratch, int64_t rows, int64_t k,
                                   T nu) {
  for (int64_t r = 0; r < rows; ++r, tile += k) {
    const StudentT<kUnit, T> kernel{nu, kUnit ? 0 : smallest_of(tile, k)};
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < k; ++j) {
      const T e = kernel.weight(tile[j]);
      scratch[j] = e;
      total += e;
    }
    const T inverse_total = 1 / total;
#pragma omp simd
    for (int64_t j = 0; j < k; ++j) mass[j] += scratch[j] * inverse_total;
    stats.nearest[r] = kernel.nearest;
    stats.total[r] = total;
  }
}

template <bool kUnit, typename T>
LTOOD_INLINE void row_losses_body(const T* tile, RowStats<T> stats, const T* inverse_mass, T* loss, T* q,
                                  int64_t q_stride, int64_t rows, int64_t k, T nu) {
  const T tiny = std::numeric_limits<T>::min();
  for (int64_t r = 0; r < rows; ++r, tile += k, q += q_stride) {
    const StudentT<kUnit, T> kernel{nu, stats.nearest[r]};
    const T inverse_total = 1 / stats.total[r];
    T target = 0;
#pragma omp simd reduction(+ : target)
    for (int64_t j = 0; j < k; ++j) {
      const T assigned = kernel.weight(tile[j]) * inverse_total;
      q[j] = assigned;
      target += assigned * (assigned * inverse_mass[j]);
    }
    const T inverse_target = 1 / target;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < k; ++j) {
      const T ratio = q[j] * inverse_mass[j] * inverse_target;
      sum += q[j] * (ratio * log_simd(ratio < tiny ? tiny : ratio) - (ratio - 1));
    }
    stats.target[r] = target;
    loss[r] = sum;
  }
}

// r_ij - 1 = (q_ij / f_j - t_i) / t_i where q_ij is nearly 1, and so is r_ij: from what is left for the other clusters,
// (q_ij / f_j) (1 - q_ij) - sum_{l != j} q_il^2 / f_l, which does not cancel.
template <bool kUnit, typename T>
LTOOD_INLINE T ratio_less_one(const StudentT<kUnit, T>& kernel, const T* distances, const T* inverse_mass, int64_t j,
                              int64_t k, T inverse_total, T inverse_target) {
  T rest = 0, rest_target = 0;
#pragma omp simd reduction(+ : rest, rest_target)
  for (int64_t l = 0; l < k; ++l) {
    const T q = l == j ? 0 : kernel.weight(distances[l]) * inverse_total;
    rest += q;
    rest_target += q * (q * inverse_mass[l]);
  }
  const T own = kernel.weight(distances[j]) * inverse_total * inverse_mass[j];
  return (own * rest - rest_target) * inverse_target;
}

template <bool kUnit, typename T>
LTOOD_INLINE void descent_weights_body(T* weights, const T* tile, RowStats<T> stats, const T* inverse_mass,
                                       const T* grad_loss, T* row_sums, T* column_sums, int64_t rows, int64_t k, T nu) {
  for (int64_t r = 0; r < rows; ++r, tile += k, weights += k) {
    const StudentT<kUnit, T> kernel{nu, stats.nearest[r]};
    const T inverse_total = 1 / stats.total[r], inverse_target = 1 / stats.target[r];
    const T scale = -2 * inverse_total * grad_loss[r], inverse = inverse_total * inverse_target;
    const T dominant = T(0.9) / inverse_total;
    T row_sum = 0;
    int32_t found = 0;
#pragma omp simd reduction(+ : row_sum, found)
    for (int64_t j = 0; j < k; ++j) {
      const T e = kernel.weight(tile[j]);
      const T ratio = e * inverse_mass[j] * inverse;
      const T weight = scale * e * (ratio - 1) * kernel.slope(tile[j], e);
      weights[j] = weight;
      row_sum += weight;
      column_sums[j] += weight;
      found += e > dominant ? 1 : 0;
    }
    for (int64_t j = 0; found > 0 && j < k; ++j) {
      const T e = kernel.weight(tile[j]);
      if (!(e > dominant)) continue;
      const T less_one = ratio_less_one(kernel, tile, inverse_mass, j, k, inverse_total, 1 / stats.target[r]);
      const T correction = scale * e * less_one * kernel.slope(tile[j], e) - weights[j];
      weights[j] += correction;
      row_sum += correction;
      column_sums[j] += correction;
      found = 0;
    }
    row_sums[r] = row_sum;
  }
}

template <typename T>
LTOOD_INLINE void nearest_columns_body(const T* tile, int64_t* nearest, int64_t rows, int64_t k) {
  for (int64_t r = 0; r < rows; ++r, tile += k) {
    const T smallest = smallest_of(tile, k);
    int64_t column = 0;
    while (column < k - 1 && tile[column] != smallest) ++column;
    nearest[r] = tile[column] == smallest ? column : 0;  // a row of NaN has no nearest: 0, as argmax
  }
}

template <typename T>
LTOOD_INLINE void subtract_scaled_rows_body(T* out, const T* scale, const T* x, int64_t rows, int64_t d) {
  for (int64_t r = 0; r < rows; ++r, out += d, x += d) {
    const T factor = scale[r];
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) out[c] -= factor * x[c];
  }
}

}  // namespace

// One clone per instruction set and type of every body above.
#define LTOOD_DEFINE_LOOPS(T)                                                                                         \
  LTOOD_CLONES void center_rows(T* x, const T* origin, T* norms, int64_t rows, int64_t d) {                           \
    center_rows_body(x, origin, norms, rows, d);                                                                      \
  }                                                                                                                   \
  LTOOD_CLONES void squared_distances(T* tile, const T* x, const T* norms, const T* mu, const T* mu_norms,            \
                                      int64_t rows, int64_t k, int64_t d, double nu) {                                \
    squared_distances_body(tile, x, norms, mu, mu_norms, rows, k, d, static_cast<T>(nu));                             \
  }                                                                                                                   \
  LTOOD_CLONES void assign_rows(const T* tile, RowStats<T> stats, T* mass, T* scratch, int64_t rows, int64_t k,       \
                                double nu) {                                                                          \
    nu == 1 ? assign_rows_body<true>(tile, stats, mass, scratch, rows, k, T(1))                                       \
            : assign_rows_body<false>(tile, stats, mass, scratch, rows, k, static_cast<T>(nu));                       \
  }                                                                                                                   \
  LTOOD_CLONES void row_losses(const T* tile, RowStats<T> stats, const T* inverse_mass, T* loss, T* q,                \
                               int64_t q_stride, int64_t rows, int64_t k, double nu) {                                \
    nu == 1 ? row_losses_body<true>(tile, stats, inverse_mass, loss, q, q_stride, rows, k, T(1))                      \
            : row_losses_body<false>(tile, stats, inverse_mass, loss, q, q_stride, rows, k, static_cast<T>(nu));      \
  }                                                                                                                   \
  LTOOD_CLONES void descent_weights(T* weights, const T* tile, RowStats<T> stats, const T* inverse_mass,              \
                                    const T* grad_loss, T* row_sums, T* column_sums, int64_t rows, int64_t k,         \
                                    double nu) {                                                                      \
    nu == 1 ? descent_weights_body<true>(weights, tile, stats, inverse_mass, grad_loss, row_sums, column_sums, rows,  \
                                         k, T(1))                                                                     \
            : descent_weights_body<false>(weights, tile, stats, inverse_mass, grad_loss, row_sums, column_sums, rows, \
                                          k, static_cast<T>(nu));                                                     \
  }                                                                                                                   \
  LTOOD_CLONES void nearest_columns(const T* tile, int64_t* nearest, int64_t rows, int64_t k) {                       \
    nearest_columns_body(tile, nearest, rows, k);                                                                     \
  }                                                                                                                   \
  LTOOD_CLONES void subtract_scaled_rows(T* out, const T* scale, const T* x, int64_t rows, int64_t d) {               \
    subtract_scaled_rows_body(out, scale, x, rows, d);                                                                \
  }

LTOOD_DEFINE_LOOPS(float)
LTOOD_DEFINE_LOOPS(double)

}  // namespace ltood::cluster_kl
