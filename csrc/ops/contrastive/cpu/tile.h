// What happens to one tile of inner products of the contrastive losses. Torch-free; T is float or double.
//
// A tile holds v_rc = <u_r, u_c> for `rows` rows and `cols` columns of the N×N similarities, `stride` apart, and
// `scale` = log2(e) / tau turns them into exponents: exp(s_rc) = 2^(v_rc * scale). On the diagonal tiles the entries
// v_ii are set to -inf beforehand, so that they count as 0.
#pragma once

#include <cstdint>

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

}  // namespace ltood
