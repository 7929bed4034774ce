// Columns that leave the denominators of some rows, as the diagonal does: positives of decoupled losses, sole positives
// of rows of a process group, keys that carry the id of a query. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "common/segments.h"
#include "common/topk.h"

namespace ltood {

class ExcludedColumns {
 public:
  ExcludedColumns() = default;  // none

  // For every row, the rows of its segment.
  ExcludedColumns(const RowSegments& segments, int64_t n) : columns_(segments), segment_(n) {
    for (int64_t g = 0; g < segments.count(); ++g) {
      for (int64_t at = segments.offsets[g]; at < segments.offsets[g + 1]; ++at) segment_[segments.order[at]] = g;
    }
  }

  // For every row, the columns of its id, unless it is `none`. x_ids [n], y_ids [m].
  ExcludedColumns(const int64_t* x_ids, int64_t n, const int64_t* y_ids, int64_t m, std::optional<int64_t> none)
      : columns_(segment_rows(y_ids, m)), segment_(n, -1) {
    std::vector<int64_t> ids;  // of the segments, ascending
    for (int64_t g = 0; g < columns_.count(); ++g) ids.push_back(y_ids[columns_.order[columns_.offsets[g]]]);
    for (int64_t i = 0; i < n; ++i) {
      const auto found = std::lower_bound(ids.begin(), ids.end(), x_ids[i]);
      if (x_ids[i] != none && found < ids.end() && *found == x_ids[i]) segment_[i] = found - ids.begin();
    }
  }

  // Sets them to -inf in the tile of rows from `row_start` and columns from `col_start`.
  template <typename T>
  void exclude(const Tile<T>& tile, int64_t row_start, int64_t col_start) const {
    if (segment_.empty()) return;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t g = segment_[row_start + r];
      if (g < 0) continue;
      const auto end = columns_.order.begin() + columns_.offsets[g + 1];
      auto column = std::lower_bound(columns_.order.begin() + columns_.offsets[g], end, col_start);
      for (; column < end && *column < col_start + tile.cols; ++column) {
        tile.values[r * tile.stride + *column - col_start] = -std::numeric_limits<T>::infinity();
      }
    }
  }

 private:
  RowSegments columns_;           // the columns by segment
  std::vector<int64_t> segment_;  // [n] of the rows, -1 = none
};

}  // namespace ltood
