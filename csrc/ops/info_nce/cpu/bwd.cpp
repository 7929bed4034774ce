// info_nce on the CPU, backward.
//
// G_ij = dL/ds_ij of a tile gives dL/du_i = (1/tau) sum_j G_ij k_j and dL/dk_j = (1/tau) sum_i G_ij u_i: one product
// for the tile and one for each side that has a gradient. dL/dtau = -(1/tau) sum_ij G_ij s_ij, which is -(1/tau) times
// the sum of <u_i, dL/du_i>, or of <k_j, dL/dk_j>. The positives, which the tiles leave out, add one row each to both
// sides.
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "common/segments.h"
#include "ops/info_nce/cpu/similarities.h"

namespace ltood {
namespace {

using InfoNceGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// dL/ds of one direction, a number a row: weight exp(s - shift / tau) + constant in its columns, `positive` at p(i).
struct SlopeRows {
  std::vector<double> weight, shift, constant, positive;
  double largest = 0;  // of what arrives at a row, the unit that slopes are carried in

  explicit SlopeRows(int64_t n) : weight(n, 0.0), shift(n, 0.0), constant(n, 0.0), positive(n, 0.0) {}

  // stats: of this direction, [kStats, N].
  SlopeRows(const InfoNceInputs& in, const OptionalTensor& grad_loss, const OptionalTensor& grad_lse,
            const double* stats, const std::vector<double>& s)
      : SlopeRows(static_cast<int64_t>(s.size())) {
    const int64_t n = s.size();
    const double inv_tau = 1 / in.temperature.value();
    const at::Tensor of_loss = grad_loss ? grad_loss->to(at::kDouble) : at::zeros({n}, at::kDouble);
    const double* at_loss = of_loss.const_data_ptr<double>();
    for (int64_t i = 0; i < n; ++i) {
      const double loss = at_loss[i], lse = grad_lse ? grad_lse->const_data_ptr<double>()[i] : 0;
      const double log_sum = stats[kLogSumStat * n + i], columns = 1 + stats[kCountStat * n + i];
      shift[i] = stats[kLargestStat * n + i];
      const bool alone = std::isinf(log_sum) && log_sum < 0;  // no column but the positive
      if (alone && in.decoupled) continue;
      largest = std::max(largest, std::abs(loss) + std::abs(lse));
      // The shares of the positive and of the other columns: each keeps its digits where it is small.
      const double gap = shift[i] * inv_tau - s[i] + log_sum;
      const double of_positive = in.decoupled ? 0 : 1 / (1 + std::exp(gap)),
                   of_others = in.decoupled ? 1 : 1 / (1 + std::exp(-gap));
      if (!alone) weight[i] = (loss + lse) * of_others * std::exp(-log_sum);
      constant[i] = -in.label_smoothing * loss / columns;
      positive[i] = lse * of_positive - loss * of_others + in.label_smoothing * loss * (1 - 1 / columns);
    }
  }
};

// SlopeRows as tiles take them.
template <typename T>
struct SlopeVectors {
  std::vector<T> weight, shift, constant;

  SlopeVectors(const SlopeRows& rows, double unit) : shift(rows.shift.begin(), rows.shift.end()) {
    for (const double w : rows.weight) weight.push_back(static_cast<T>(w / unit));
    for (const double c : rows.constant) constant.push_back(static_cast<T>(c / unit));
  }

  SlopeFactors<T> from(int64_t start) const {
    return {weight.data() + start, shift.data() + start, constant.data() + start};
  }
};

template <typename T>
class Backward {
 public:
  Backward(const InfoNceInputs& in, const InfoNceSaved& saved, const PairScale& scale)
      : in_(in),
        scale_(scale),
        need_columns_(in.negative_keys ? saved.need_negative_keys : saved.need_positive_key),
        need_positive_(saved.need_positive_key),
        return_query_(saved.need_query),
        // The temperature takes its gradient from a side that is complete.
        need_query_(saved.need_query || (saved.need_temperature && (in.negative_keys || !need_columns_))),
        pairs_(in, scale, need_columns_),
        n_(in.query.size(0)),
        m_(in.columns().size(0)),
        d_(in.query.size(1)),
        s_(pairs_.positive_similarities()),
        rows_(in, saved.grad_loss, saved.grad_lse, saved.stats.const_data_ptr<double>(), s_),
        cols_(in.symmetric ? SlopeRows(in, saved.grad_key_loss, saved.grad_key_lse,
                                       saved.stats.const_data_ptr<double>() + kStats * n_, s_)
                           : SlopeRows(m_)) {
    const double largest = std::max(rows_.largest, cols_.largest);
    unit_ = largest > 0 ? largest : 1;
  }

  InfoNceGradients run() {
    const auto options = in_.query.options().dtype(scale_.dtype);
    const PairSchedule& schedule = pairs_.schedule();
    const Panels<T>&queries = pairs_.queries(), &keys = pairs_.keys();
    if (need_query_) of_query_ = at::zeros({schedule.row_slots(), queries.count() * queries.panel(), d_}, options);
    if (need_columns_) of_keys_ = at::zeros({schedule.col_slots(), keys.count(), d_, keys.panel()}, options);
    if (need_query_ || need_columns_) add_tiles();
    const auto none = [&] { return at::empty({0, d_}, options); };
    const at::Tensor query = need_query_ ? query_gradient() : none();
    at::Tensor columns = need_columns_ ? column_gradient() : none();
    at::Tensor positive;
    if (in_.negative_keys) positive = need_positive_ ? at::zeros({in_.positive_key.size(0), d_}, options) : none();
    at::Tensor& of_positive = in_.negative_keys ? positive : columns;
    if (need_positive_) add_to_positives(of_positive.mutable_data_ptr<T>());
    double radial = 0;
    if (need_query_) radial = finish(query, queries, in_.query, scale_.query);
    if (need_columns_) {
      const std::vector<double>& norms = in_.negative_keys ? scale_.negative : scale_.positive;
      const double of_columns = finish(columns, keys, in_.columns(), norms);
      if (!need_query_) radial = of_columns;
    }
    if (in_.negative_keys && need_positive_) finish(positive, pairs_.positives(), in_.positive_key, scale_.positive);
    return {return_query_ ? query.to(in_.query.scalar_type()) : none().to(in_.query.scalar_type()),
            of_positive.to(in_.positive_key.scalar_type()),
            in_.negative_keys ? columns.to(in_.negative_keys->scalar_type()) : none().to(in_.query.scalar_type()),
            at::scalar_tensor(-scale_.inv_tau * radial, options.dtype(at::kDouble)).to(in_.wide())};
  }

 private:
  // G of every tile, times the keys and times the queries.
  void add_tiles() {
    // Without a shift and a constant one exponential serves both directions.
    const bool one_exponential = scale_.fixed_shift<T>() && in_.label_smoothing == 0;
    const SlopeVectors<T> row(rows_, unit_), col(cols_, unit_);
    const Panels<T>&queries = pairs_.queries(), &keys = pairs_.keys();
    pairs_.schedule().run([&](int64_t i, int64_t j, int64_t row_slot, int64_t col_slot) {
      const Tile<T> tile = pairs_.tile(i, j);
      const SlopeFactors<T> of_row = row.from(queries.start(i)), of_col = col.from(keys.start(j));
      if (one_exponential) {
        weight_by_softmax(tile, of_row.weight, of_col.weight);
      } else {
        slopes(tile, of_row, in_.symmetric ? of_col : SlopeFactors<T>{});
      }
      const Matrix<const T> g{tile.values, tile.stride};
      if (need_query_) {
        T* to = of_query_.mutable_data_ptr<T>() + (row_slot * queries.count() + i) * queries.panel() * d_;
        multiply(queries.panel(), d_, keys.panel(), g, keys.rows(j), {to, d_}, true);
      }
      if (need_columns_) {  // u^T G: both factors are read as they lie
        T* to = of_keys_.mutable_data_ptr<T>() + (col_slot * keys.count() + j) * keys.panel() * d_;
        multiply(d_, keys.panel(), queries.panel(), queries.transposed(i), g, {to, keys.panel()}, true);
      }
    });
  }

  double positive_slope(int64_t i) const {
    return (rows_.positive[i] + (in_.symmetric ? cols_.positive[i] : 0)) / unit_;
  }

  // [N, D], without the factor unit / tau.
  at::Tensor query_gradient() {
    const at::Tensor grad = of_query_.select(0, 0);
    for (int64_t slot = 1; slot < of_query_.size(0); ++slot) grad.add_(of_query_.select(0, slot));
    const T* keys = pairs_.positives().all_rows();
    const int64_t* target = pairs_.target();
    run_rows(n_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        add_scaled(grad.mutable_data_ptr<T>() + i * d_, keys + (target ? target[i] : i) * d_, positive_slope(i), d_);
      }
    });
    return grad.narrow(0, 0, n_);
  }

  // [C, D], without that factor and the positives.
  at::Tensor column_gradient() {
    const Panels<T>& keys = pairs_.keys();
    for (int64_t slot = 1; slot < of_keys_.size(0); ++slot) of_keys_.select(0, 0).add_(of_keys_.select(0, slot));
    const at::Tensor grad = at::empty({m_, d_}, of_keys_.options());
    run_parallel(keys.count(), [&](int64_t j) {
      grad.narrow(0, keys.start(j), keys.size(j))
          .copy_(of_keys_.select(0, 0).select(0, j).narrow(1, 0, keys.size(j)).t());
    });
    of_keys_.reset();
    return grad;
  }

  // Several queries may have one positive: each of them is one task.
  void add_to_positives(T* grad) const {
    const T* queries = pairs_.queries().all_rows();
    const auto add = [&](int64_t i, int64_t p) { add_scaled(grad + p * d_, queries + i * d_, positive_slope(i), d_); };
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

  // The gradient through the normalisation, in place; returns the sum of <u, dL/du>.
  double finish(const at::Tensor& grad, const Panels<T>& panels, const at::Tensor& x,
                const std::vector<double>& norms) {
    std::vector<double> radial(x.size(0));
    run_parallel(panels.count(), [&](int64_t b) {
      const int64_t start = panels.start(b);
      normalize_rows_bwd(panels.rows(b).data, grad.mutable_data_ptr<T>() + start * d_, panels.size(b), d_,
                         in_.normalize ? norms.data() + start : nullptr, unit_ * scale_.inv_tau,
                         smallest_invertible_norm(x.scalar_type()), radial.data() + start);
    });
    double sum = 0;
    for (const double value : radial) sum += value;
    return sum;
  }

  const InfoNceInputs& in_;
  const PairScale& scale_;
  bool need_columns_, need_positive_, return_query_, need_query_;
  PairSimilarities<T> pairs_;
  int64_t n_, m_, d_;
  std::vector<double> s_;
  SlopeRows rows_, cols_;
  double unit_;
  at::Tensor of_query_;  // [slots, panels * panel, D]
  at::Tensor of_keys_;   // [slots, panels, D, panel]
};

InfoNceGradients info_nce_bwd_cpu(const Arguments& arguments) {
  const InfoNceInputs in = info_nce_inputs(arguments);
  const InfoNceSaved saved = info_nce_saved(arguments);
  check_info_nce_bwd(in, saved);
  check_target_range(in);
  const PairScale scale(in);
  return dispatch_wide(scale.dtype, [&](auto type) { return Backward<decltype(type)>(in, saved, scale).run(); });
}

}  // namespace
}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) { m.impl("info_nce_bwd", ltood::by_name<ltood::info_nce_bwd_cpu>()); }
