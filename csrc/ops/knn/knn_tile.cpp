#include "ops/knn/knn_tile.h"

#include <cmath>

#include "common/simd.h"

namespace ltood::knn {
namespace {

constexpr double kEps = 1e-12;  // as torch.nn.functional.normalize
constexpr int64_t kChunk = 64;  // columns that are compared before a branch: few enough that most chunks hold no hit

template <typename T>
LTOOD_INLINE void normalize_rows_body(T* x, int64_t rows, int64_t d) {
  for (int64_t r = 0; r < rows; ++r, x += d) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < d; ++c) sum += static_cast<double>(x[c]) * static_cast<double>(x[c]);
    const double norm = std::sqrt(sum);
    const double scale = 1 / (norm < kEps ? kEps : norm);  // a NaN norm stays NaN
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) x[c] = static_cast<T>(x[c] * scale);
  }
}

template <typename T>
LTOOD_INLINE bool ranks_before(T a, int64_t a_column, T b, int64_t b_column) {
  if (a > b) return true;
  if (a < b) return false;
  const bool a_nan = a != a, b_nan = b != b;
  return a_nan == b_nan ? a_column < b_column : a_nan;
}

// Inserts (value, column) into the list of a row, if it ranks before the last entry.
template <typename T>
LTOOD_INLINE void insert(const Lists<T>& lists, int64_t row, T value, int64_t column) {
  T* values = lists.values + row * lists.k;
  int64_t* columns = lists.columns + row * lists.k;
  int64_t place = lists.k - 1;
  if (!ranks_before(value, column, values[place], columns[place])) return;
  for (; place > 0 && ranks_before(value, column, values[place - 1], columns[place - 1]); --place) {
    values[place] = values[place - 1];
    columns[place] = columns[place - 1];
  }
  values[place] = value;
  columns[place] = column;
  lists.thresholds[row] = values[lists.k - 1];
}

// Whether one of the values reaches its row's threshold or its column's; equal ones may win by their index, NaN always.
template <bool kBoth, typename T>
LTOOD_INLINE bool any_reaches(const T* values, T row_threshold, const T* column_thresholds, int64_t n) {
  int32_t hits = 0;
#pragma omp simd reduction(+ : hits)
  for (int64_t c = 0; c < n; ++c) {
    const T floor = kBoth && column_thresholds[c] < row_threshold ? column_thresholds[c] : row_threshold;
    hits += values[c] < floor ? 0 : 1;
  }
  return hits > 0;
}

template <bool kBoth, typename T>
LTOOD_INLINE void offer_body(const T* tile, int64_t stride, int64_t n_rows, int64_t n_columns, int64_t first_column,
                             const Lists<T>& rows, const Lists<T>* columns) {
  for (int64_t r = 0; r < n_rows; ++r, tile += stride) {
    for (int64_t start = 0; start < n_columns; start += kChunk) {
      const int64_t end = start + kChunk < n_columns ? start + kChunk : n_columns;
      const T* column_thresholds = kBoth ? columns->thresholds + start : nullptr;
      const bool hit = end - start == kChunk  // a constant length lets the loop unroll
                           ? any_reaches<kBoth>(tile + start, rows.thresholds[r], column_thresholds, kChunk)
                           : any_reaches<kBoth>(tile + start, rows.thresholds[r], column_thresholds, end - start);
      if (!hit) continue;
      for (int64_t c = start; c < end; ++c) {
        const T value = tile[c];
        if (!(value < rows.thresholds[r])) insert(rows, r, value, first_column + c);
        if (kBoth && !(value < columns->thresholds[c])) insert(*columns, c, value, rows.first + r);
      }
    }
  }
}

}  // namespace

// One clone per instruction set and type of every body above.
#define LTOOD_DEFINE_LOOPS(T)                                                                                     \
  LTOOD_CLONES void normalize_rows(T* x, int64_t rows, int64_t d) { normalize_rows_body(x, rows, d); }            \
  LTOOD_CLONES void offer(const T* tile, int64_t stride, int64_t n_rows, int64_t n_columns, int64_t first_column, \
                          const Lists<T>& rows, const Lists<T>* columns) {                                        \
    columns == nullptr ? offer_body<false>(tile, stride, n_rows, n_columns, first_column, rows, columns)          \
                       : offer_body<true>(tile, stride, n_rows, n_columns, first_column, rows, columns);          \
  }

LTOOD_DEFINE_LOOPS(float)
LTOOD_DEFINE_LOOPS(double)

}  // namespace ltood::knn
