// The k largest entries of the rows and columns of a matrix that comes tile by tile. Torch-free; T is float or double.
#pragma once

#include <cstdint>

namespace ltood {

// v_rc = <u_r, u_c> for `rows` rows and `cols` columns, `stride` apart; v_rc * scale is an exponent in base 2.
template <typename T>
struct Tile {
  T* values;  // [rows, stride]
  int64_t stride, rows, cols;
  T scale;
};

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

}  // namespace ltood
