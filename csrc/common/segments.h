// Rows of equal id. Torch-free.
#pragma once

#include <cstdint>
#include <vector>

namespace ltood {

// Rows by segment: segment g holds order[offsets[g]] ... order[offsets[g + 1] - 1], ascending.
struct RowSegments {
  std::vector<int64_t> order, offsets;
  int64_t count() const { return static_cast<int64_t>(offsets.size()) - 1; }
};

RowSegments segment_rows(const int64_t* ids, int64_t n);  // rows of equal id
RowSegments pair_views(int64_t n);                        // row i and row i + n / 2
RowSegments without_pairs(const RowSegments& segments);   // those of three rows and more

}  // namespace ltood
