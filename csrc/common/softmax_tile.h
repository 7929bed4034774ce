// The softmax of one tile of inner products: sums of exponentials, and their weights in a gradient. Torch-free; T is
// float or double.
//
// A tile holds v_rc = <u_r, u_c> for `rows` rows and `cols` columns of the similarities, `stride` apart, and
// `scale` = log2(e) / tau turns them into exponents: exp(s_rc) = 2^(v_rc * scale). On the diagonal tiles the entries
// v_ii are set to -inf beforehand, so that they count as 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/simd.h"
#include "common/topk.h"

namespace ltood {

constexpr int64_t kMaxTile = 512;  // rows and columns of a tile, so that vectors of a tile fit on the stack

// Sums of exp(s), not shifted: for |s| <= safe_exponent<T>() only. `col_sum` null: rows only (diagonal tiles).
void add_exp_sums(Tile<float> tile, double* row_sum, double* col_sum);
void add_exp_sums(Tile<double> tile, double* row_sum, double* col_sum);

// The online form for s of any size: (max, sum) with sum = sum of exp(s - max / tau), both carried over tiles.
void add_exp_sums_online(Tile<float> tile, float* row_max, double* row_sum, float* col_max, double* col_sum);
void add_exp_sums_online(Tile<double> tile, double* row_max, double* row_sum, double* col_max, double* col_sum);

// v_rc <- (row_factor_r + col_factor_c) exp(s_rc): one exponential an element. Factors are weight * exp(-lse).
void weight_by_softmax(Tile<float> tile, const float* row_factor, const float* col_factor);
void weight_by_softmax(Tile<double> tile, const double* row_factor, const double* col_factor);

// v_rc <- row_weight_r exp(s_rc - lse_r) + col_weight_c exp(s_rc - lse_c), for s of any size; lse in units of log2.
template <typename T>
struct SoftmaxRows {
  const T* weight;
  const T* lse2;
};
void weight_by_softmax_online(Tile<float> tile, SoftmaxRows<float> row, SoftmaxRows<float> col);
void weight_by_softmax_online(Tile<double> tile, SoftmaxRows<double> row, SoftmaxRows<double> col);

// log sum exp(s) of a row from its (max, sum). The fixed shift is that of a maximum of 0; an infinite one shifts by
// nothing.
template <typename T>
double log_sum_exp(double sum, T largest, double inv_tau) {
  return std::log(sum) + (std::isinf(largest) ? 0.0 : double(largest) * inv_tau);
}

// Weights and log-sum-exp of rows (or columns) for weight_by_softmax and its online form, in units of `unit`.
template <typename T>
struct SoftmaxFactors {
  std::vector<T> weight, lse2;

  SoftmaxFactors(const double* weights, const double* lse, int64_t n, double unit, bool fixed_shift)
      : weight(n), lse2(n) {
    for (int64_t i = 0; i < n; ++i) {
      const double w = weights[i] / unit;
      lse2[i] = static_cast<T>(w == 0 ? std::numeric_limits<double>::infinity() : lse[i] * kLog2E);
      weight[i] = static_cast<T>(fixed_shift && w != 0 ? w * std::exp(-lse[i]) : w);
    }
  }

  SoftmaxRows<T> from(int64_t start) const { return {weight.data() + start, lse2.data() + start}; }
};

// A tile of similarities becomes the tile of G.
template <typename T>
void weight_tile(const Tile<T>& tile, bool fixed_shift, SoftmaxRows<T> row, SoftmaxRows<T> col) {
  fixed_shift ? weight_by_softmax(tile, row.weight, col.weight) : weight_by_softmax_online(tile, row, col);
}

// log(e^a + e^b).
inline double log_add(double a, double b) {
  const double high = a < b ? b : a, low = a < b ? a : b;
  if (std::isnan(a) || std::isnan(b)) return a + b;
  return std::isinf(low) || std::isinf(high) ? high : high + std::log1p(std::exp(low - high));
}

// The loss of a row with one positive s, whose other columns have log-sum-exp `rest`: log(e^rest + e^s) - s, never
// negative; NaN for an infinite s, as the difference is.
inline double sole_loss(double rest, double s) {
  const double gap = rest - s;
  if (std::isinf(s) && s > 0) return std::numeric_limits<double>::quiet_NaN();
  return (gap > 0 ? gap : 0) + std::log1p(std::exp(-std::abs(gap)));
}

}  // namespace ltood
