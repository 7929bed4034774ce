// knn on the CPU: tiles of similarities, of which only those that reach a row's k-th best leave the vector loop.
//
// Rows that search themselves: every unordered pair of blocks is multiplied once, its tile offered to the rows and to
// the columns. Blocks are padded to one size, and all tiles with them: a product then has the same bits wherever its
// rows lie, and equal rows tie exactly.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/tile_schedule.h"
#include "ops/contrastive/contrastive_rows.h"
#include "ops/contrastive/contrastive_tile.h"
#include "ops/knn/knn.h"

namespace ltood::knn {
namespace {

// A tile of 256 x 256 in fp32 takes 256 KiB, a quarter of an L2 of 1 MiB; a sixteenth of the rows leaves few rows'
// worth of blocks to many threads.
int64_t block_size(int64_t rows) { return std::clamp<int64_t>((rows + 15) / 16 / 16 * 16, 32, 256); }

int64_t count_blocks(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

template <typename T>
T* data(const at::Tensor& x) {
  return x.mutable_data_ptr<T>();
}

// Rows in the wide dtype, normalised on request, padded with zero rows to whole blocks.
template <typename T>
struct Blocks {
  int64_t n, block, count;
  at::Tensor rows;  // [count * block, D]

  Blocks(const at::Tensor& x, int64_t block_rows, bool normalize)
      : n(x.size(0)), block(block_rows), count(count_blocks(n, block)) {
    const int64_t d = x.size(1);
    rows = at::zeros({count * block, d}, x.options().dtype(c10::CppTypeToScalarType<T>::value));
    rows.narrow(0, 0, n).copy_(x.detach());
    if (!normalize) return;
    run_parallel(count, [&](int64_t b) {
      std::vector<double> norms(block);
      T* first = data<T>(rows) + b * block * d;
      row_norms(first, size(b), d, norms.data());
      normalize_rows(first, size(b), d, norms.data());
    });
  }

  at::Tensor at(int64_t b) const { return rows.narrow(0, b * block, block); }
  int64_t size(int64_t b) const { return std::min(block, n - b * block); }
};

// The result, filled with empty lists.
template <typename T>
struct Result {
  int64_t k;
  at::Tensor values, columns, thresholds;

  Result(int64_t n, int64_t k, const at::TensorOptions& wide)
      : k(k),
        values(at::full({n, k}, -std::numeric_limits<double>::infinity(), wide)),
        columns(at::full({n, k}, -1, wide.dtype(at::kLong))),
        thresholds(at::full({n}, -std::numeric_limits<double>::infinity(), wide)) {}

  // The lists of the rows from `first` on.
  BestK<T> from(int64_t first) const {
    return {data<T>(values) + first * k, data<int64_t>(columns) + first * k, data<T>(thresholds) + first, k};
  }
};

template <typename T>
void search_itself(const Blocks<T>& x, const Result<T>& result) {
  const int64_t block = x.block;
  for_each_tile(x.count, [&](int64_t i, int64_t j) {
    at::Tensor tile = at::empty({block, block}, x.rows.options());
    at::mm_out(tile, x.at(i), x.at(j).t());
    if (i == j) {
      for (int64_t r = 0; r < block; ++r) data<T>(tile)[r * (block + 1)] = -std::numeric_limits<T>::infinity();
    }
    offer_neighbors(Tile<T>{data<T>(tile), block, x.size(i), x.size(j), 1}, i * block, j * block, {}, {},
                    result.from(i * block), i == j ? BestK<T>{} : result.from(j * block));
  });
}

template <typename T>
void search(const Blocks<T>& x, const Blocks<T>& y, const Result<T>& result) {
  run_parallel(x.count, [&](int64_t i) {
    at::Tensor tile = at::empty({x.block, y.block}, x.rows.options());
    for (int64_t j = 0; j < y.count; ++j) {
      at::mm_out(tile, x.at(i), y.at(j).t());
      offer_neighbors(Tile<T>{data<T>(tile), y.block, x.size(i), y.size(j), 1}, i * x.block, j * y.block, {}, {},
                      result.from(i * x.block), {});
    }
  });
}

std::tuple<at::Tensor, at::Tensor> knn_cpu(const at::Tensor& x, const std::optional<at::Tensor>& y, int64_t k,
                                           bool normalize) {
  const Sizes sizes = check_knn(x, y, k);
  const at::ScalarType dtype = y.has_value() ? c10::promoteTypes(x.scalar_type(), y->scalar_type()) : x.scalar_type();
  return dispatch_wide(dtype, [&](auto zero) -> std::tuple<at::Tensor, at::Tensor> {
    using T = decltype(zero);
    const Blocks<T> queries(x, block_size(sizes.n), normalize);
    const Result<T> result(sizes.n, k, queries.rows.options());
    if (y.has_value()) {
      search(queries, Blocks<T>(*y, block_size(sizes.q), normalize), result);
    } else {
      search_itself(queries, result);
    }
    return {result.values, result.columns};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) { m.impl("knn", &knn_cpu); }

}  // namespace ltood::knn
