// info_nce on the CPU, forward. One product a tile serves both directions: sums over its rows and over its columns.
// The positives, which the tiles leave out, are inner products in double: a small loss keeps its digits.
//
// cost    N C D multiply-adds and (symmetric: twice where no fixed shift serves) N C exponentials, C columns
// memory  queries once, keys twice (rows, transposed); of a long queue a panel a thread
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/info_nce/cpu/similarities.h"

namespace ltood {
namespace {

using InfoNceOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Sums over the tiles of every row of one side, in slots of their own.
template <typename T>
struct SideSums {
  int64_t n, slots;
  std::vector<double> sum, logits, count;  // [slots, n], the last two with label smoothing
  std::vector<T> largest;

  SideSums(int64_t rows, int64_t places, bool fixed_shift, bool smooth)
      : n(rows),
        slots(places),
        sum(slots * n, 0.0),
        logits(smooth ? slots * n : 0, 0.0),
        count(logits),
        largest(slots * n, fixed_shift ? T(0) : -std::numeric_limits<T>::infinity()) {}

  LogitSums logit_sums(int64_t at) { return {logits.data() + at, count.data() + at}; }

  // Over all slots: (largest v, log sum exp(s - largest / tau)), a largest of 0 where the shift is fixed.
  std::pair<double, double> log_sum(int64_t i, double inv_tau) const {
    const auto shift_of = [](T m) { return std::isinf(m) ? T(0) : m; };  // as add_exp_sums_online shifts
    T top = largest[i];
    for (int64_t at = i; at < slots * n; at += n) top = std::max(top, largest[at]);
    double total = 0;
    for (int64_t at = i; at < slots * n; at += n) {
      if (sum[at] != 0) total += sum[at] * std::exp((double(shift_of(largest[at])) - shift_of(top)) * inv_tau);
    }
    return {shift_of(top), std::log(total)};
  }

  double total(const std::vector<double>& of, int64_t i) const {
    double total = 0;
    for (int64_t at = i; at < static_cast<int64_t>(of.size()); at += n) total += of[at];
    return total;
  }
};

template <typename T>
class Forward {
 public:
  Forward(const InfoNceInputs& in, const PairScale& scale)
      : in_(in),
        scale_(scale),
        pairs_(in, scale),
        n_(in.query.size(0)),
        fixed_shift_(scale.fixed_shift<T>()),
        rows_(n_, pairs_.schedule().row_slots(), fixed_shift_, smooth()),
        cols_(in.symmetric ? n_ : 0, pairs_.schedule().col_slots(), fixed_shift_, smooth()) {}

  InfoNceOutputs run() {
    pairs_.schedule().run([&](int64_t i, int64_t j, int64_t row_slot, int64_t col_slot) {
      add_tile(pairs_.tile(i, j), row_slot * n_ + pairs_.queries().start(i), col_slot * n_ + pairs_.keys().start(j));
    });
    const std::vector<double> positive = pairs_.positive_similarities();
    const int64_t directions = in_.symmetric ? 2 : 1;
    const at::TensorOptions doubles = in_.query.options().dtype(at::kDouble);
    const at::Tensor loss = at::empty({directions, n_}, doubles), lse = at::empty({directions, n_}, doubles);
    const at::Tensor stats = at::empty({kStats * directions, n_}, doubles);
    for (int64_t side = 0; side < directions; ++side) {
      finish(side ? cols_ : rows_, positive, loss.mutable_data_ptr<double>() + side * n_,
             lse.mutable_data_ptr<double>() + side * n_, stats.mutable_data_ptr<double>() + kStats * side * n_);
    }
    const at::Tensor none = at::empty({0}, doubles), wide = loss.to(in_.wide());
    const auto of = [&](const at::Tensor& x, int64_t side) {
      return side < directions ? x.select(0, side).clone() : none.to(x.scalar_type(), false, true);
    };
    return {of(wide, 0), of(wide, 1), of(lse, 0), of(lse, 1), stats};
  }

 private:
  bool smooth() const { return in_.label_smoothing > 0; }

  void add_tile(const Tile<T>& tile, int64_t r, int64_t c) {
    double* col_sum = in_.symmetric ? cols_.sum.data() + c : nullptr;
    if (fixed_shift_) {
      add_exp_sums(tile, rows_.sum.data() + r, col_sum);
    } else {
      add_exp_sums_online(tile, rows_.largest.data() + r, rows_.sum.data() + r,
                          in_.symmetric ? cols_.largest.data() + c : nullptr, col_sum);
    }
    if (smooth())
      add_logits(tile, rows_.logit_sums(r), in_.symmetric ? cols_.logit_sums(c) : LogitSums{nullptr, nullptr});
  }

  void finish(const SideSums<T>& sums, const std::vector<double>& positive, double* loss, double* lse, double* stats) {
    for (int64_t i = 0; i < n_; ++i) {
      const auto [largest, log_sum] = sums.log_sum(i, scale_.inv_tau);
      const double count = sums.total(sums.count, i), s = positive[i], rest = largest * scale_.inv_tau + log_sum;
      stats[kLargestStat * n_ + i] = largest;
      stats[kLogSumStat * n_ + i] = log_sum;
      stats[kCountStat * n_ + i] = count;
      if (in_.decoupled) {
        lse[i] = rest;
        loss[i] = std::isinf(rest) && rest < 0 ? 0 * s : rest - s;  // no column at all
        continue;
      }
      lse[i] = log_add(rest, s);
      loss[i] = sole_loss(rest, s);
      if (!smooth()) continue;
      const double mean = (s + sums.total(sums.logits, i) * scale_.inv_tau) / (1 + count);
      loss[i] = (1 - in_.label_smoothing) * loss[i] + in_.label_smoothing * (lse[i] - mean);
    }
  }

  const InfoNceInputs& in_;
  const PairScale& scale_;
  PairSimilarities<T> pairs_;
  int64_t n_;
  bool fixed_shift_;
  SideSums<T> rows_, cols_;
};

InfoNceOutputs info_nce_cpu(const Arguments& arguments) {
  const InfoNceInputs in = info_nce_inputs(arguments);
  check_info_nce(in);
  check_target_range(in);
  const PairScale scale(in);
  return dispatch_wide(scale.dtype, [&](auto type) { return Forward<decltype(type)>(in, scale).run(); });
}

}  // namespace
}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) { m.impl("info_nce", ltood::by_name<ltood::info_nce_cpu>()); }
