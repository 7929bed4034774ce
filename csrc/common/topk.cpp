#include "common/topk.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/simd.h"

namespace ltood {
namespace {

template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();

template <typename T>
inline bool is_better(T value, int64_t index, T than_value, int64_t than_index) {
  if (std::isnan(value)) return !std::isnan(than_value) || index < than_index;
  return value > than_value || (value == than_value && index < than_index);
}

template <typename T>
inline void offer(BestK<T> best, int64_t row, T value, int64_t index) {
  T* values = best.values + row * best.k;
  int64_t* indices = best.indices + row * best.k;
  int64_t place = best.k;
  if (value == -kInf<T> || !is_better(value, index, values[place - 1], indices[place - 1])) return;
  for (--place; place > 0 && is_better(value, index, values[place - 1], indices[place - 1]); --place) {
    values[place] = values[place - 1];
    indices[place] = indices[place - 1];
  }
  values[place] = value;
  indices[place] = index;
  best.worst[row] = values[best.k - 1];
}

// Offers the entries of one row in columns [from, to); they passed the filter together, so most are turned down.
template <typename T>
void offer_passed(Tile<T> tile, int64_t r, int64_t from, int64_t to, int64_t row_start, int64_t col_start,
                  Candidates row, Candidates col, BestK<T> row_best, BestK<T> col_best) {
  const T* v = tile.values + r * tile.stride;
  for (int64_t c = from; c < to; ++c) {
    const bool for_row = !(v[c] < row_best.worst[r]);
    const bool for_col = col_best.values && !(v[c] < col_best.worst[c]);
    if (!for_row && !for_col) continue;
    if (row.instance && row.instance[r] == col.instance[c]) continue;
    if (row.domain && row.domain[r] != col.domain[c]) continue;
    if (for_row) offer(row_best, r, v[c], col_start + c);
    if (for_col) offer(col_best, c, v[c], row_start + r);
  }
}

// Once some rows are seen, hardly an entry beats the k-th best of its row or column: runs of kFilter entries
// are compared at once and dropped. `!(a < b)` lets ties and NaN through to the exact rule.
template <typename T>
LTOOD_INLINE void neighbors(Tile<T> tile, int64_t row_start, int64_t col_start, Candidates row, Candidates col,
                            BestK<T> row_best, BestK<T> col_best) {
  constexpr int64_t kFilter = 32;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* __restrict v = tile.values + r * tile.stride;
    for (int64_t from = 0; from < tile.cols; from += kFilter) {
      const int64_t to = std::min(from + kFilter, tile.cols);
      const T worst = row_best.worst[r];
      const T* __restrict col_worst = col_best.values ? col_best.worst : nullptr;
      int any = 0;
      if (row.domain && col_worst) {
        const int32_t domain = row.domain[r];
#pragma omp simd reduction(| : any)
        for (int64_t c = from; c < to; ++c)
          any |= (int(!(v[c] < worst)) | int(!(v[c] < col_worst[c]))) & int(domain == col.domain[c]);
      } else if (col_worst) {
#pragma omp simd reduction(| : any)
        for (int64_t c = from; c < to; ++c) any |= int(!(v[c] < worst)) | int(!(v[c] < col_worst[c]));
      } else {
#pragma omp simd reduction(| : any)
        for (int64_t c = from; c < to; ++c) any |= int(!(v[c] < worst));
      }
      if (any) offer_passed(tile, r, from, to, row_start, col_start, row, col, row_best, col_best);
    }
  }
}

}  // namespace

LTOOD_CLONES void offer_neighbors(Tile<float> tile, int64_t row_start, int64_t col_start, Candidates row,
                                  Candidates col, BestK<float> row_best, BestK<float> col_best) {
  neighbors(tile, row_start, col_start, row, col, row_best, col_best);
}
LTOOD_CLONES void offer_neighbors(Tile<double> tile, int64_t row_start, int64_t col_start, Candidates row,
                                  Candidates col, BestK<double> row_best, BestK<double> col_best) {
  neighbors(tile, row_start, col_start, row, col, row_best, col_best);
}

}  // namespace ltood
