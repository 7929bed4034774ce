// The gradients at queries and keys from dL/ds of every tile: what the losses of info_nce share.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "common/segments.h"
#include "ops/info_nce/cpu/similarities.h"

namespace ltood {

// G_ij = dL/ds_ij gives dL/du_i = (1/tau) sum_j G_ij k_j and dL/dk_j = (1/tau) sum_i G_ij u_i: one product for the tile
// and one for each side that has a gradient. The positives, which the tiles leave out, add one row each to both sides.
template <typename T>
class PairGradients {
 public:
  PairGradients(const InfoNceInputs& in, const PairScale& scale, bool need_query, bool need_columns)
      : in_(in),
        need_query_(need_query),
        need_columns_(need_columns),
        options_(in.query.options().dtype(scale.dtype)),
        pairs_(in, scale, need_columns),
        n_(in.query.size(0)),
        d_(in.query.size(1)) {
    const Panels<T>&queries = pairs_.queries(), &keys = pairs_.keys();
    const PairSchedule& schedule = pairs_.schedule();
    if (need_query_) of_query_ = at::zeros({schedule.row_slots(), queries.count() * queries.panel(), d_}, options_);
    if (need_columns_) of_keys_ = at::zeros({schedule.col_slots(), keys.count(), d_, keys.panel()}, options_);
  }

  const PairSimilarities<T>& pairs() const { return pairs_; }
  at::Tensor none() const { return at::empty({0, d_}, options_); }

  // weigh(tile, row, column, slot of rows) turns a tile of similarities, which starts there, into one of G.
  template <typename Weigh>
  void add_tiles(const Weigh& weigh) {
    const Panels<T>&queries = pairs_.queries(), &keys = pairs_.keys();
    pairs_.schedule().run([&](int64_t i, int64_t j, int64_t row_slot, int64_t col_slot) {
      const Tile<T> tile = pairs_.tile(i, j);
      weigh(tile, queries.start(i), keys.start(j), row_slot);
      const Matrix<const T> g{tile.values, tile.stride};
      if (need_query_) {
        T* to = of_query_.template mutable_data_ptr<T>() + (row_slot * queries.count() + i) * queries.panel() * d_;
        multiply(queries.panel(), d_, keys.panel(), g, keys.rows(j), {to, d_}, true);
      }
      if (need_columns_) {  // u^T G: both factors are read as they lie
        T* to = of_keys_.template mutable_data_ptr<T>() + (col_slot * keys.count() + j) * keys.panel() * d_;
        multiply(d_, keys.panel(), queries.panel(), queries.transposed(i), g, {to, keys.panel()}, true);
      }
    });
  }

  // [N, D], without the factor 1 / tau; `positive`: G at the positives, [N].
  at::Tensor query_gradient(const std::vector<double>& positive) {
    const at::Tensor grad = of_query_.select(0, 0);
    for (int64_t slot = 1; slot < of_query_.size(0); ++slot) grad.add_(of_query_.select(0, slot));
    const T* keys = pairs_.positives().all_rows();
    const int64_t* target = pairs_.target();
    run_rows(n_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        add_scaled(grad.template mutable_data_ptr<T>() + i * d_, keys + (target ? target[i] : i) * d_, positive[i], d_);
      }
    });
    return grad.narrow(0, 0, n_);
  }

  // [C, D], without that factor and the positives.
  at::Tensor column_gradient() {
    const Panels<T>& keys = pairs_.keys();
    for (int64_t slot = 1; slot < of_keys_.size(0); ++slot) of_keys_.select(0, 0).add_(of_keys_.select(0, slot));
    const at::Tensor grad = at::empty({in_.columns().size(0), d_}, options_);
    run_parallel(keys.count(), [&](int64_t j) {
      grad.narrow(0, keys.start(j), keys.size(j))
          .copy_(of_keys_.select(0, 0).select(0, j).narrow(1, 0, keys.size(j)).t());
    });
    of_keys_.reset();
    return grad;
  }

  // Adds the positives to the gradient of positive_key [M, D]. Several queries may have one of them: one task then.
  void add_to_positives(const std::vector<double>& positive, const at::Tensor& to) const {
    const T* queries = pairs_.queries().all_rows();
    T* grad = to.template mutable_data_ptr<T>();
    const auto add = [&](int64_t i, int64_t p) { add_scaled(grad + p * d_, queries + i * d_, positive[i], d_); };
    if (!in_.target) {
      run_rows(n_, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) add(i, i);
      });
      return;
    }
    const RowSegments segments = segment_rows(pairs_.target(), n_);
    run_rows(segments.count(), [&](int64_t begin, int64_t end) {
      for (int64_t at = segments.offsets[begin]; at < segments.offsets[end]; ++at) {
        add(segments.order[at], pairs_.target()[segments.order[at]]);
      }
    });
  }

  // Multiplies by the factor and goes through the normalisation, in place; returns the sum of <u, dL/du>.
  double finish(const at::Tensor& grad, const Panels<T>& panels, const at::Tensor& x, const std::vector<double>& norms,
                double factor) const {
    std::vector<double> radial(x.size(0));
    run_parallel(panels.count(), [&](int64_t b) {
      const int64_t start = panels.start(b);
      normalize_rows_bwd(panels.rows(b).data, grad.template mutable_data_ptr<T>() + start * d_, panels.size(b), d_,
                         in_.normalize ? norms.data() + start : nullptr, factor,
                         smallest_invertible_norm(x.scalar_type()), radial.data() + start);
    });
    double sum = 0;
    for (const double value : radial) sum += value;
    return sum;
  }

 private:
  const InfoNceInputs& in_;
  bool need_query_, need_columns_;
  at::TensorOptions options_;
  PairSimilarities<T> pairs_;
  int64_t n_, d_;
  at::Tensor of_query_;  // [slots, panels * panel, D]
  at::Tensor of_keys_;   // [slots, panels, D, panel]
};

}  // namespace ltood
