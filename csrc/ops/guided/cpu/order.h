// Which pairs of rows the guided contrastive loss reads. Torch-free.
//
// Rows are ordered by cluster, and clusters by their farthest cluster. Then, as spans of positions,
//   out(i) = the rows of far[c_i]                    (whose members are i's negatives, less P(i) and i)
//   in(i)  = the rows of all clusters f, far[f] = c_i (whose rows have i as a negative, but for P(.))
// are both contiguous, and about N²/K of the N² pairs lie in them. "Position" is the place in this order.
//
// In a partial problem, the rows of one process against the columns of others, the columns come first and the rows
// behind them, each in that order: spans are of columns.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace ltood {

// Positions begin, ..., end - 1.
struct Span {
  int64_t begin = 0;
  int64_t end = 0;

  int64_t size() const { return end > begin ? end - begin : 0; }
  bool contains(int64_t i) const { return begin <= i && i < end; }
  Span meet(Span other) const { return {begin > other.begin ? begin : other.begin, end < other.end ? end : other.end}; }
};

// Sorted, disjoint spans; spans less than `gap` apart become one.
std::vector<Span> merge_spans(std::vector<Span> spans, int64_t gap);

// The first `columns` of all rows are columns, the others the rows that meet them; row i of those and column
// i + diagonal are the same embedding.
struct PartialShape {
  int64_t columns;
  int64_t diagonal;
};

class RowOrder {
 public:
  // clusters: [n] in [0, k), or null: the rows stay in their order and have no spans. far: [k] in [0, k).
  // instance_ids: [n], or null: rows i and i + n/2 are the two views of an image.
  // partial: none: all rows are columns too.
  RowOrder(int64_t n, const int64_t* clusters, const int64_t* far, int64_t k, const int64_t* instance_ids,
           std::optional<PartialShape> partial = std::nullopt);

  int64_t size() const { return static_cast<int64_t>(row_at.size()); }
  // Where results go: by position from `first` on, and by row likewise.
  int64_t slot(int64_t position) const { return position - first; }
  int64_t result_row(int64_t position) const { return row_at[position] - first; }
  // The column that is the same embedding, -1 = none.
  int64_t self(int64_t position) const { return own_column[position]; }
  Span everything() const { return {0, columns}; }
  // The rows of the farthest cluster, and the rows whose farthest cluster this row's is.
  Span out(int64_t position) const { return out_of_cluster[cluster[position]]; }
  Span in(int64_t position) const { return in_of_cluster[cluster[position]]; }

  // Where the negatives are: out, or everywhere once the row is marked as fallback.
  Span negatives(int64_t position) const { return fallback[position] ? everything() : out(position); }
  // The same asked of one row, which need not be a column.
  bool may_repel(int64_t position, int64_t other) const {
    return fallback[position] || far_of[cluster[position]] == cluster[other];
  }

  // The positions of the columns of the same image, the row's own one included.
  const int64_t* views_begin(int64_t position) const { return members.data() + image[position].begin; }
  const int64_t* views_end(int64_t position) const { return members.data() + image[position].end; }
  bool same_instance(int64_t a, int64_t b) const { return image[a].begin == image[b].begin; }

  // neighbors: [n, k] rows, -1 = none, by row. Sets what is no neighbour of its own (the row itself, a view, a row that
  // was listed before) to -1, so that views and neighbours together are the set P(i).
  void keep_distinct(int64_t* neighbors, int64_t k) const;

  // Marks the rows whose out(i) holds nothing but P(i) and i: all other rows become their negatives.
  void mark_fallback(const int64_t* neighbors, int64_t k);
  // Marks given rows, by row.
  void mark_fallback(const std::vector<char>& rows);

  std::vector<int64_t> all_positions() const;
  std::vector<int64_t> fallback_positions() const;

  std::vector<int64_t> row_at;       // [n] position -> row
  std::vector<int64_t> position_of;  // [n] row -> position
  std::vector<char> fallback;        // [n] by position
  std::vector<Span> fallback_spans;  // the columns among the positions marked above
  int64_t columns;                   // positions 0, ..., columns - 1
  int64_t first;                     // position of the first row: 0, or `columns` in a partial problem

 private:
  void order_by_cluster(const int64_t* clusters, const int64_t* far, int64_t k);
  void segment_views(const int64_t* instance_ids);

  std::vector<int64_t> cluster;      // [n] by position
  std::vector<int64_t> far_of;       // [k]
  std::vector<int64_t> own_column;   // [n] by position
  std::vector<Span> out_of_cluster;  // [k]
  std::vector<Span> in_of_cluster;   // [k]
  std::vector<int64_t> members;      // [n] positions, views of one image next to each other
  std::vector<Span> image;           // [n] by position: where in members the columns of its image are
};

}  // namespace ltood
