// Rows whose loss has exactly one positive p: l_i = lse_i - s_ip = log(1 + exp(rest_i - s_ip)), where rest_i is the
// log-sum-exp over all rows other than i and p.
//
// In a converged batch l_i is a small difference of two large numbers: at tau = 0.07 and l = 5e-3, rounding the two in
// float leaves a relative error of 1e-4, and negative losses at 0.05. The tiles therefore leave such pairs out, as they
// leave out the diagonal, and the positive's term is added in double. Rows with two or more positives have l >= log 2.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/segments.h"
#include "common/softmax_tile.h"
#include "common/topk.h"

namespace ltood {

// The pairs that the tiles leave out, each listed at both of its rows.
struct SolePairs {
  // [N] or empty: the sole positive of row i in a part of the loss, -1 where it has none or several. Views and classes
  // are mutual, neighbours need not be.
  std::vector<int64_t> instance, same_class, neighbor;
  std::vector<int64_t> offsets, columns;  // the pairs of row i: columns[offsets[i]] ... columns[offsets[i + 1] - 1]
  std::vector<double> products;           // <u_i, u_column>

  // Lists the pairs of the three parts.
  void list_pairs(int64_t n);
  // The products of the pairs. u [N, d].
  void multiply_pairs(const float* u, int64_t d);
  void multiply_pairs(const double* u, int64_t d);

  bool is_sole(const std::vector<int64_t>& part, int64_t i, int64_t column) const {
    return !part.empty() && part[i] == column;
  }

  // The product of a pair that is listed.
  double product(int64_t i, int64_t column) const {
    int64_t entry = offsets[i];
    while (columns[entry] != column) ++entry;
    return products[entry];
  }

  // log_add of `rest`, the log-sum-exp of the tiles, and the pairs of row i but one column (-1: of all).
  double add_pairs(int64_t i, double rest, double inv_tau, int64_t except) const {
    for (int64_t entry = offsets[i]; entry < offsets[i + 1]; ++entry) {
      if (columns[entry] != except) rest = log_add(rest, products[entry] * inv_tau);
    }
    return rest;
  }

  // -inf where the tile of rows from `row_start` and columns from `col_start` holds a pair.
  template <typename T>
  void exclude(const Tile<T>& tile, int64_t row_start, int64_t col_start) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t entry = offsets[row_start + r]; entry < offsets[row_start + r + 1]; ++entry) {
        const int64_t c = columns[entry] - col_start;
        if (c >= 0 && c < tile.cols) tile.values[r * tile.stride + c] = -std::numeric_limits<T>::infinity();
      }
    }
  }
};

// [N]: the other row of every segment of two, -1 elsewhere.
std::vector<int64_t> sole_members(const RowSegments& segments, int64_t n);

// [N]: the neighbour of every row that has no other view and found one neighbour. indices [n, k], -1 = none.
std::vector<int64_t> sole_neighbors(const RowSegments& views, const int64_t* indices, int64_t n, int64_t k);

// The gradients of a row's log-sum-exp and of its sole positives.
struct SoleGradients {
  const double* lse;                               // [N]
  const double* grad_lse;                          // [N] w_i, the parts counted in
  const double *instance, *same_class, *neighbor;  // [N] each
};

// dL_i/ds_ij of row i's own loss for a pair: w_i P_ij - g = g (P_ij - 1) + (w_i - g) P_ij, where 1 - P_ij keeps its
// digits; g is the gradient at the positive j.
double sole_gradient(const SolePairs& pairs, const SoleGradients& rows, int64_t i, int64_t j, double s);

// grad_i += scale sum_j (dL_i/ds_ij + dL_j/ds_ij) u_j over the pairs of rows [begin, end).
void sole_positive_bwd(const SolePairs& pairs, const SoleGradients& rows, int64_t begin, int64_t end, const float* u,
                       int64_t d, double inv_tau, double scale, float* grad);
void sole_positive_bwd(const SolePairs& pairs, const SoleGradients& rows, int64_t begin, int64_t end, const double* u,
                       int64_t d, double inv_tau, double scale, double* grad);

}  // namespace ltood
