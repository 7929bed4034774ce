// info_nce on the CPU, backward.
//
// gradients.h turns dL/ds into the gradients of the rows. dL/dtau = -(1/tau) sum_ij G_ij s_ij, which is -(1/tau) times
// the sum of <u_i, dL/du_i>, or of <k_j, dL/dk_j>.
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "ops/info_nce/cpu/gradients.h"

namespace ltood {
namespace {

using InfoNceGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// dL/ds of one direction, a number a row: weight exp(s - shift / tau) + constant in its columns, `positive` at p(i).
struct SlopeRows {
  std::vector<double> weight, shift, constant, positive;
  double largest = 0;  // gradient of a row, the unit that slopes are carried in

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
        gradients_(in, scale, need_query_, need_columns_),
        positive_s_(gradients_.pairs().positive_similarities()),
        rows_(in, saved.grad_loss, saved.grad_lse, saved.stats.const_data_ptr<double>(), positive_s_),
        cols_(in.symmetric ? SlopeRows(in, saved.grad_key_loss, saved.grad_key_lse,
                                       saved.stats.const_data_ptr<double>() + kStats * in.query.size(0), positive_s_)
                           : SlopeRows(in.columns().size(0))) {
    const double largest = std::max(rows_.largest, cols_.largest);
    unit_ = largest > 0 ? largest : 1;
    positive_ = rows_.positive;
    for (size_t i = 0; i < positive_.size(); ++i) {
      positive_[i] = (positive_[i] + (in.symmetric ? cols_.positive[i] : 0)) / unit_;
    }
  }

  InfoNceGradients run() {
    if (need_query_ || need_columns_) add_tiles();
    const auto& pairs = gradients_.pairs();
    const double factor = unit_ * scale_.inv_tau;
    const at::Tensor query = need_query_ ? gradients_.query_gradient(positive_) : gradients_.none();
    at::Tensor columns = need_columns_ ? gradients_.column_gradient() : gradients_.none(), positive = columns;
    if (in_.negative_keys) {
      positive = need_positive_ ? at::zeros(in_.positive_key.sizes(), query.options()) : gradients_.none();
    }
    if (need_positive_) gradients_.add_to_positives(positive_, positive);
    double radial = 0;
    if (need_query_) radial = gradients_.finish(query, pairs.queries(), in_.query, scale_.query, factor);
    if (need_columns_) {
      const std::vector<double>& norms = in_.negative_keys ? scale_.negative : scale_.positive;
      const double of_columns = gradients_.finish(columns, pairs.keys(), in_.columns(), norms, factor);
      if (!need_query_) radial = of_columns;
    }
    if (in_.negative_keys && need_positive_) {
      gradients_.finish(positive, pairs.positives(), in_.positive_key, scale_.positive, factor);
    }
    return {(return_query_ ? query : gradients_.none()).to(in_.query.scalar_type()),
            positive.to(in_.positive_key.scalar_type()),
            in_.negative_keys ? columns.to(in_.negative_keys->scalar_type())
                              : gradients_.none().to(in_.query.scalar_type()),
            at::scalar_tensor(-scale_.inv_tau * radial, query.options().dtype(at::kDouble)).to(in_.wide())};
  }

 private:
  void add_tiles() {
    // Without a shift and a constant one exponential serves both directions.
    const bool one_exponential = scale_.fixed_shift<T>() && in_.label_smoothing == 0;
    const SlopeVectors<T> row(rows_, unit_), col(cols_, unit_);
    gradients_.add_tiles([&](const Tile<T>& tile, int64_t r, int64_t c, int64_t) {
      if (one_exponential) {
        weight_by_softmax(tile, row.from(r).weight, col.from(c).weight);
      } else {
        slopes(tile, row.from(r), in_.symmetric ? col.from(c) : SlopeFactors<T>{});
      }
    });
  }

  const InfoNceInputs& in_;
  const PairScale& scale_;
  bool need_columns_, need_positive_, return_query_, need_query_;
  PairGradients<T> gradients_;
  std::vector<double> positive_s_;
  SlopeRows rows_, cols_;
  double unit_;
  std::vector<double> positive_;  // G at the positives, in that unit
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
