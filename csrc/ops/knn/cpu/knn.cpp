// knn on the CPU: tiles of similarities, of which only those that reach a row's k-th best leave the vector loop.
//
// Rows that search themselves: every unordered pair of panels is multiplied once, its tile offered to the rows and to
// the columns. Panels are padded to one size, and all tiles with them: a product then has the same bits wherever its
// rows lie, and equal rows tie exactly.
#include "ops/knn/knn.h"

#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "common/dispatch.h"
#include "common/neighbors.h"
#include "common/row_panels.h"
#include "common/topk.h"

namespace ltood::knn {
namespace {

// A tile of 256 x 256 in fp32 takes 256 KiB, a quarter of an L2 of 1 MiB; a sixteenth of the rows leaves few rows'
// worth of panels to many threads.
int64_t panel_rows(int64_t rows) { return std::clamp<int64_t>((rows + 15) / 16 / 16 * 16, 32, kMaxPanel); }

// The rows in the wide dtype, of unit length on request.
template <typename T>
RowPanels<T> make_panels(const at::Tensor& x, bool normalize) {
  const int64_t panel = panel_rows(x.size(0));
  return {pad_unit_rows(x, panel, c10::CppTypeToScalarType<T>::value, normalize), x.size(0), panel};
}

template <typename T>
void search_itself(const RowPanels<T>& x, Neighbors<T>& result) {
  for_each_tile(x.count(), [&](int64_t i, int64_t j) {
    const Tile<T> tile{x.products(i, j).data, x.panel(), x.size(i), x.size(j), 1};
    offer_neighbors(tile, x.start(i), x.start(j), {}, {}, result.best(x.start(i)),
                    i == j ? BestK<T>{} : result.best(x.start(j)));
  });
}

template <typename T>
void search(const RowPanels<T>& x, const RowPanels<T>& y, Neighbors<T>& result) {
  run_parallel(x.count(), [&](int64_t i) {
    for (int64_t j = 0; j < y.count(); ++j) {
      const Tile<T> tile{x.products(i, y.transposed(j), y.panel()).data, y.panel(), x.size(i), y.size(j), 1};
      offer_neighbors(tile, x.start(i), y.start(j), {}, {}, result.best(x.start(i)), {});
    }
  });
}

std::tuple<at::Tensor, at::Tensor> knn_cpu(const Arguments& arguments) {
  const KnnInputs in = knn_inputs(arguments);
  const at::Tensor& x = in.x;
  const OptionalTensor& y = in.y;
  const int64_t k = in.k;
  const bool normalize = in.normalize;
  const KnnSizes sizes = check_knn(in);
  const at::ScalarType dtype = y.has_value() ? c10::promoteTypes(x.scalar_type(), y->scalar_type()) : x.scalar_type();
  return dispatch_wide(dtype, [&](auto zero) -> std::tuple<at::Tensor, at::Tensor> {
    using T = decltype(zero);
    const RowPanels<T> queries = make_panels<T>(x, normalize);
    Neighbors<T> result(sizes.n, k, x.options().dtype(wide_dtype(dtype)));
    if (y.has_value()) {
      search(queries, make_panels<T>(*y, normalize), result);
    } else {
      search_itself(queries, result);
    }
    return {result.cosines, result.indices};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) { m.impl("knn", by_name<knn_cpu>()); }

}  // namespace ltood::knn
