// Steps on one tile of similarities that info_nce alone has; the softmax itself is in common/softmax_tile.h.
// Torch-free.
#pragma once

#include <cstdint>

#include "common/softmax_tile.h"

namespace ltood {

// Adds the sum of v_rc over the entries that are not -inf, and their number, of rows and (unless null) of columns.
struct LogitSums {
  double *sum, *count;
};
void add_logits(Tile<float> tile, LogitSums row, LogitSums col);
void add_logits(Tile<double> tile, LogitSums row, LogitSums col);

// dL/ds of rows or columns, a number each: weight exp(s - shift / tau) + constant. With the largest v of a row as its
// shift, exp(0) is exact for that v: at large s, exp(s - lse) would be off by the rounding of lse.
template <typename T>
struct SlopeFactors {
  const T *weight, *shift, *constant;
};

// v_rc <- the slopes of its row and (unless null) of its column, and 0 where v_rc is -inf.
void slopes(Tile<float> tile, SlopeFactors<float> row, SlopeFactors<float> col);
void slopes(Tile<double> tile, SlopeFactors<double> row, SlopeFactors<double> col);

// products[i] = <u_i, k_p> in double, p = positive[i] or i where `positive` is null; rows [begin, end).
void positive_products(const float* u, const float* k, const int64_t* positive, int64_t begin, int64_t end, int64_t d,
                       double* products);
void positive_products(const double* u, const double* k, const int64_t* positive, int64_t begin, int64_t end, int64_t d,
                       double* products);

// out += weight * row, over d numbers.
void add_scaled(float* out, const float* row, double weight, int64_t d);
void add_scaled(double* out, const double* row, double weight, int64_t d);

}  // namespace ltood
