#include "ops/guided/cpu/order.h"

#include <algorithm>
#include <numeric>

namespace ltood {

std::vector<Span> merge_spans(std::vector<Span> spans, int64_t gap) {
  std::sort(spans.begin(), spans.end(), [](Span a, Span b) { return a.begin < b.begin; });
  std::vector<Span> merged;
  for (const Span span : spans) {
    if (span.size() == 0) continue;
    if (!merged.empty() && span.begin <= merged.back().end + gap) {
      merged.back().end = std::max(merged.back().end, span.end);
    } else {
      merged.push_back(span);
    }
  }
  return merged;
}

RowOrder::RowOrder(int64_t n, const int64_t* clusters, const int64_t* far, int64_t k, const int64_t* instance_ids,
                   std::optional<PartialShape> partial)
    : row_at(n),
      position_of(n),
      fallback(n, 0),
      columns(partial ? partial->columns : n),
      first(partial ? columns : 0),
      cluster(n, 0),
      far_of(far, far + k),
      own_column(n),
      out_of_cluster(1),
      in_of_cluster(1),
      image(n) {
  if (clusters != nullptr) {
    order_by_cluster(clusters, far, k);
  } else {
    std::iota(row_at.begin(), row_at.end(), 0);
  }
  for (int64_t p = 0; p < n; ++p) position_of[row_at[p]] = p;
  for (int64_t p = 0; p < n; ++p) {
    const int64_t row = row_at[p], same = row < first || !partial ? row : row - first + partial->diagonal;
    own_column[p] = 0 <= same && same < columns ? position_of[same] : -1;
  }
  segment_views(instance_ids);
}

// Two stable counting sorts: clusters by far[c], then rows by the rank of their cluster.
void RowOrder::order_by_cluster(const int64_t* clusters, const int64_t* far, int64_t k) {
  std::vector<int64_t> first_rank(k + 1, 0), rank(k);
  for (int64_t c = 0; c < k; ++c) ++first_rank[far[c] + 1];
  std::partial_sum(first_rank.begin(), first_rank.end(), first_rank.begin());
  std::vector<int64_t> next(first_rank.begin(), first_rank.end() - 1);
  for (int64_t c = 0; c < k; ++c) rank[c] = next[far[c]]++;

  const auto order = [&](int64_t from, int64_t to) {  // rows and positions from, ..., to - 1
    std::vector<int64_t> begin(k + 1, 0);
    for (int64_t i = from; i < to; ++i) ++begin[rank[clusters[i]] + 1];
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    next.assign(begin.begin(), begin.end() - 1);
    for (int64_t i = from; i < to; ++i) {
      const int64_t position = from + next[rank[clusters[i]]]++;
      row_at[position] = i;
      cluster[position] = clusters[i];
    }
    return begin;
  };
  order(columns, size());
  const std::vector<int64_t> begin = order(0, columns);
  out_of_cluster.resize(k);
  in_of_cluster.resize(k);
  for (int64_t c = 0; c < k; ++c) {
    out_of_cluster[c] = {begin[rank[far[c]]], begin[rank[far[c]] + 1]};
    in_of_cluster[c] = {begin[first_rank[c]], begin[first_rank[c + 1]]};
  }
}

void RowOrder::segment_views(const int64_t* instance_ids) {
  const int64_t n = size();
  std::vector<std::pair<int64_t, int64_t>> keyed(n);  // (image, position)
  for (int64_t p = 0; p < n; ++p) {
    keyed[p] = {instance_ids != nullptr ? instance_ids[row_at[p]] : row_at[p] % std::max<int64_t>(n / 2, 1), p};
  }
  std::sort(keyed.begin(), keyed.end());
  members.resize(n);
  for (int64_t begin = 0, end = 0; begin < n; begin = end) {
    while (end < n && keyed[end].first == keyed[begin].first) ++end;
    int64_t columns_end = end;  // behind the columns come the rows of a partial problem
    while (columns_end > begin && keyed[columns_end - 1].second >= columns) --columns_end;
    for (int64_t m = begin; m < end; ++m) {
      members[m] = keyed[m].second;
      image[keyed[m].second] = {begin, columns_end};
    }
  }
}

void RowOrder::keep_distinct(int64_t* neighbors, int64_t k) const {
  std::vector<int64_t> seen_by(size(), -1);
  for (int64_t i = 0; i < size(); ++i) {
    for (int64_t s = 0; s < k; ++s) {
      int64_t& j = neighbors[i * k + s];
      if (j < 0) continue;
      const bool distinct = !same_instance(position_of[i], position_of[j]) && seen_by[j] != i;
      seen_by[j] = i;
      if (!distinct) j = -1;
    }
  }
}

void RowOrder::mark_fallback(const int64_t* neighbors, int64_t k) {
  std::vector<char> marked(size());
  for (int64_t p = 0; p < size(); ++p) {
    const Span far_rows = out_of_cluster[cluster[p]];
    int64_t left = far_rows.size();
    for (const int64_t* v = views_begin(p); v != views_end(p); ++v) left -= far_rows.contains(*v);
    for (int64_t s = 0; s < k; ++s) {
      const int64_t j = neighbors[row_at[p] * k + s];
      left -= j >= 0 && far_rows.contains(position_of[j]);
    }
    marked[row_at[p]] = left == 0;
  }
  mark_fallback(marked);
}

void RowOrder::mark_fallback(const std::vector<char>& rows) {
  std::vector<Span> marked;
  for (int64_t p = 0; p < size(); ++p) {
    fallback[p] = rows[row_at[p]];
    if (fallback[p] && p < columns) marked.push_back({p, p + 1});
  }
  fallback_spans = merge_spans(std::move(marked), 0);
}

std::vector<int64_t> RowOrder::all_positions() const {
  std::vector<int64_t> positions(size() - first);
  std::iota(positions.begin(), positions.end(), first);
  return positions;
}

std::vector<int64_t> RowOrder::fallback_positions() const {
  std::vector<int64_t> positions;
  for (int64_t p = first; p < size(); ++p) {
    if (fallback[p]) positions.push_back(p);
  }
  return positions;
}

}  // namespace ltood
