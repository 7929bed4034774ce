// Best-k lists fed with tiles of similarities; torch-free. T is float or double.
//
// A list is ordered by (similarity descending, column ascending), NaN before every number, and starts as k times
// (-inf, -1). It depends on what was offered to it, not on the order of the offers.
#pragma once

#include <cstdint>

namespace ltood::knn {

// The lists of consecutive rows, whose numbers begin at `first`.
template <typename T>
struct Lists {
  int64_t first;
  int64_t k;
  T* values;         // [rows, k]
  int64_t* columns;  // [rows, k]
  T* thresholds;     // [rows] the last value of each list
};

// x_r /= max(|x_r|, eps). The norm is summed in float64, so that no finite row overflows.
void normalize_rows(float* x, int64_t rows, int64_t d);
void normalize_rows(double* x, int64_t rows, int64_t d);

// Offers every tile[r, c], the similarity of row r and column c, to the list of row r and, where `columns` is not null,
// to the list of column c. tile [n_rows, stride], of which n_columns columns count.
void offer(const float* tile, int64_t stride, int64_t n_rows, int64_t n_columns, int64_t first_column,
           const Lists<float>& rows, const Lists<float>* columns);
void offer(const double* tile, int64_t stride, int64_t n_rows, int64_t n_columns, int64_t first_column,
           const Lists<double>& rows, const Lists<double>* columns);

}  // namespace ltood::knn
