#include "common/segments.h"

#include <algorithm>
#include <numeric>

namespace ltood {

RowSegments segment_rows(const int64_t* ids, int64_t n) {
  RowSegments segments;
  segments.order.resize(n);
  std::iota(segments.order.begin(), segments.order.end(), 0);
  std::sort(segments.order.begin(), segments.order.end(),
            [ids](int64_t a, int64_t b) { return ids[a] != ids[b] ? ids[a] < ids[b] : a < b; });
  for (int64_t at = 0; at < n; ++at) {
    if (at == 0 || ids[segments.order[at]] != ids[segments.order[at - 1]]) segments.offsets.push_back(at);
  }
  segments.offsets.push_back(n);
  return segments;
}

RowSegments pair_views(int64_t n) {
  RowSegments segments;
  for (int64_t i = 0; i < n / 2; ++i) {
    segments.offsets.push_back(2 * i);
    segments.order.push_back(i);
    segments.order.push_back(i + n / 2);
  }
  segments.offsets.push_back(n);
  return segments;
}

RowSegments without_pairs(const RowSegments& segments) {
  RowSegments kept;
  kept.offsets.push_back(0);
  for (int64_t g = 0; g < segments.count(); ++g) {
    const auto first = segments.order.begin() + segments.offsets[g],
               last = segments.order.begin() + segments.offsets[g + 1];
    if (last - first < 3) continue;
    kept.order.insert(kept.order.end(), first, last);
    kept.offsets.push_back(static_cast<int64_t>(kept.order.size()));
  }
  return kept;
}

}  // namespace ltood
