// What happens to one tile of inner products of the contrastive losses. Torch-free; T is float or double.
//
// A tile holds v_rc = <u_r, u_c> for `rows` rows and `cols` columns of the N×N similarities, `stride` apart, and
// `scale` = log2(e) / tau turns them into exponents: exp(s_rc) = 2^(v_rc * scale). On the diagonal tiles the entries
// v_ii are set to -inf beforehand, so that they count as 0.
#pragma once

#include <cstdint>

namespace ltood {

template <typename T>
struct Tile {
  T* values;  // [rows, stride]
  int64_t stride, rows, cols;
  T scale;
};

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

// The k best columns of every row so far, best first. A column is better when its value is larger (NaN is largest, as
// in torch.sort), or equal and its index lower. Empty places hold -inf and -1.
template <typename T>
struct BestK {
  T* values;         // [n, k]
  int64_t* indices;  // [n, k]
  T* worst;          // [n]: values[:, k - 1], contiguous for the filter
  int64_t k;
};

// Who may be whose neighbour: entries of equal instance id never, entries of different domain never. Null: no rule.
struct Candidates {
  const int64_t* instance;
  const int32_t* domain;
};

// Offers every admissible entry to the best of its row and, unless `col_best.values` is null, of its column.
// `row_start` and `col_start` are the indices of the tile's first row and column; pointers are to the tile's first.
void offer_neighbors(Tile<float> tile, int64_t row_start, int64_t col_start, Candidates row, Candidates col,
                     BestK<float> row_best, BestK<float> col_best);
void offer_neighbors(Tile<double> tile, int64_t row_start, int64_t col_start, Candidates row, Candidates col,
                     BestK<double> row_best, BestK<double> col_best);

// |s| up to here needs no shift: N exp(s) and exp(-s) stay inside the type's normal range for N < 2^36 (float:
// e^60 = 1.1e26), and so does the product of two such factors that the backward forms, exp(s) * exp(-lse) <= 1.
template <typename T>
constexpr double safe_exponent() {
  return sizeof(T) == 4 ? 60.0 : 600.0;
}

}  // namespace ltood
