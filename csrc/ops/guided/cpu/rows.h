// What the forward and the backward kernel of the guided family share: rows in order, scratch space, tile products.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "common/simd.h"
#include "common/tile_schedule.h"
#include "ops/guided/cpu/order.h"
#include "ops/guided/cpu/tile.h"
#include "ops/guided/guided.h"

namespace ltood {

// A tile is 128 rows by 512 columns: at D = 128 its two products take 2 x 16.8 MFLOP, about 0.3 ms of one core, against
// some 5 us to call the matrix library; s, cos and h in float32 are 3 x 256 KiB and stay in a 1 MiB L2 cache.
constexpr int64_t kTileRows = 128;
constexpr int64_t kTileColumns = 512;
constexpr int64_t kSpanGap = 64;  // spans of columns this close are worked on as one

constexpr double kNormEps = 1e-12;  // torch.nn.functional.normalize

// The order of the rows; theirs as they came where there are no clusters.
RowOrder order_rows(const GuidedArguments& arguments);

// Rows in the order of the plan, unit length on request: those of x, and behind them those of `more`.
template <typename T>
struct OrderedRows {
  OrderedRows(const at::Tensor& x, const OptionalTensor& more, const RowOrder& order, bool normalize);

  const T* at(int64_t position) const { return rows + position * width; }

  int64_t width;
  at::Tensor data, lengths;  // tensors, so that torch counts their memory
  const T* rows;             // [N, width]
  const T* norms;            // [N]; 1 where rows are used as they are
};

template <typename T>
struct Scratch {
  Scratch(int64_t d, int64_t dg)
      : z(new T[kTileRows * d]),
        e(new T[kTileRows * dg]),
        s(new T[kTileRows * kTileColumns]),
        cos(new T[kTileRows * kTileColumns]),
        h(new T[kTileRows * kTileColumns]),
        grad(new T[kTileRows * d]) {}

  std::unique_ptr<T[]> z, e;       // rows of the tile; z carries the factor log2(e) / tau
  std::unique_ptr<T[]> s, cos, h;  // [rows, columns]
  std::unique_ptr<T[]> grad;       // [rows, D]
};

// The problem as tiles see it.
template <typename T>
struct GuidedTiles {
  GuidedTiles(const GuidedArguments& arguments, const RowOrder& order);

  // Copies rows into the scratch; positions: [rows].
  void load(const int64_t* positions, int64_t rows, Scratch<T>& scratch) const;
  // s and cos of the loaded rows against a span of positions.
  void student_products(int64_t rows, Span columns, Scratch<T>& scratch) const;
  void guide_products(int64_t rows, Span columns, Scratch<T>& scratch) const;
  // grad += h z of a span of positions.
  void add_gradient(int64_t rows, Span columns, Scratch<T>& scratch) const;

  // body(positions, rows, scratch) for tiles of the listed positions. Whoever is free takes the next tile: each owns
  // its rows' results, so that the order does not matter.
  template <typename Body>
  void for_each_row_tile(const std::vector<int64_t>& positions, const Body& body) const {
    const int64_t count = (static_cast<int64_t>(positions.size()) + kTileRows - 1) / kTileRows;
    std::atomic<int64_t> next{0};
    run_parallel(at::get_num_threads(), [&](int64_t) {
      if (next >= count) return;
      Scratch<T> scratch(z.width, e.width);
      for (int64_t tile = next++; tile < count; tile = next++) {
        const int64_t begin = tile * kTileRows;
        const int64_t rows = std::min<int64_t>(kTileRows, positions.size() - begin);
        body(positions.data() + begin, rows, scratch);
      }
    });
  }

  const RowOrder& order;
  OrderedRows<T> z, e;
  T scale;          // log2(e) / tau
  T teacher_scale;  // log2(e) / teacher temperature
  Force force;
  bool contrast, distill;
};

// body(columns) for the spans, cut to the width of a tile.
template <typename Body>
void for_each_column_tile(const std::vector<Span>& spans, const Body& body) {
  for (const Span span : spans) {
    for (int64_t begin = span.begin; begin < span.end; begin += kTileColumns) {
      body(Span{begin, std::min(begin + kTileColumns, span.end)});
    }
  }
}

// body(part) for a span less one position.
template <typename Body>
void without(Span span, int64_t position, const Body& body) {
  if (!span.contains(position)) {
    if (span.size() > 0) body(span);
    return;
  }
  if (span.begin < position) body(Span{span.begin, position});
  if (position + 1 < span.end) body(Span{position + 1, span.end});
}

// What draws row i to its positive p, and where the tiles have already counted p among the negatives.
template <typename T>
struct PositivePair {
  PositivePair(const GuidedTiles<T>& in, int64_t i, int64_t p)
      : s(dot(in.z.at(i), in.z.at(p), in.z.width) * in.scale),
        cos(in.force.weighted ? dot(in.e.at(i), in.e.at(p), in.e.width) : T(0)),
        attract(attraction(in.force, cos)) {}

  // The share of exp(s_ip) that the tiles have left out of row i's sum: all of it, or, where p lies among i's negatives
  // and was added with its repulsion, the rest. Both parts are positive: nothing cancels.
  double missing_share(const GuidedTiles<T>& in, int64_t i, int64_t p) const {
    return in.order.may_repel(i, p) ? 1.0 - repulsion(in.force, cos) : 1.0;
  }

  T s, cos, attract;
};

}  // namespace ltood
