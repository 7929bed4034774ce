// The contrastive losses on the CPU, forward. Each similarity is computed once: a tile of the upper triangle feeds the
// sums (and neighbours) of its rows and of its columns. The positives are linear in N; those that are alone are left
// out of the tiles (sole_positives.h).
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <functional>
#include <tuple>

#include "common/excluded_columns.h"
#include "common/neighbors.h"
#include "ops/contrastive/cpu/positives.h"
#include "ops/contrastive/cpu/similarities.h"
#include "ops/contrastive/cpu/sole_positives.h"

namespace ltood {
namespace {

using ContrastiveOutputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The neighbours in the batch that a pass looks for; none: it only sums.
template <typename T>
struct BatchSearch {
  const CandidateRows& candidates;
  Neighbors<T>& neighbors;
};

// One pass over the upper triangle: row log-sum-exp (returned) but for the pairs, and the neighbours in the batch.
template <typename T>
std::vector<double> similarity_pass(const PreparedRows& rows, const RowPanels<T>& panels, const SolePairs& pairs,
                                    const ExcludedColumns& excluded, std::optional<BatchSearch<T>> search) {
  const int64_t n = rows.u.size(0);
  const bool fixed_shift = rows.exponent_bound <= safe_exponent<T>();
  std::vector<double> sum(n, 0.0);
  std::vector<T> largest(fixed_shift ? 0 : n, -std::numeric_limits<T>::infinity());
  for_each_tile(panels.count(), [&](int64_t i, int64_t j) {
    const Tile<T> tile = tile_of(panels.products(i, j), panels.size(i), panels.size(j), rows);
    const int64_t r = panels.start(i), c = panels.start(j);
    double* col_sum = i == j ? nullptr : sum.data() + c;
    if (search) {
      offer_neighbors(tile, r, c, search->candidates.of_rows(r), search->candidates.of_columns(c),
                      search->neighbors.best(r), i == j ? BestK<T>{} : search->neighbors.best(c));
    }
    pairs.exclude(tile, r, c);
    excluded.exclude(tile, r, c);
    if (fixed_shift) {
      add_exp_sums(tile, sum.data() + r, col_sum);
    } else {
      add_exp_sums_online(tile, largest.data() + r, sum.data() + r, largest.data() + c, col_sum);
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    sum[i] = log_sum_exp(sum[i], fixed_shift ? T(0) : largest[i], rows.inv_tau);
  }
  return sum;
}

// The neighbours in a bank: a product with other columns, the bank's rows made ready a panel at a time.
template <typename T>
void search_bank(const ContrastiveInputs& in, const PreparedRows& rows, const RowPanels<T>& panels,
                 const CandidateRows& candidates, Neighbors<T>& neighbors) {
  const at::Tensor bank = in.bank->detach();
  const int64_t q = bank.size(0), panel = panels.panel();
  run_parallel(panels.count(), [&](int64_t i) {
    const int64_t r = panels.start(i);
    at::Tensor transposed = at::empty({bank.size(1), panel}, rows.u.options());
    for (int64_t c = 0; c < q; c += panel) {
      const int64_t size = std::min(panel, q - c);
      const at::Tensor columns = pad_unit_rows(bank.narrow(0, c, size), panel, rows.u.scalar_type(), in.normalize);
      transposed.copy_(columns.t());
      const Matrix<T> values = panels.products(i, {transposed.const_data_ptr<T>(), panel}, panel);
      offer_neighbors(tile_of(values, panels.size(i), size, rows), r, c, candidates.of_rows(r),
                      candidates.of_columns(c), neighbors.best(r), BestK<T>{});
    }
  });
}

// (sum of <u_i, u_j> over the other rows j of i's segment, how many), float64 [N] each.
template <typename T>
std::pair<at::Tensor, at::Tensor> segment_terms(const RowSegments& segments, const at::Tensor& u) {
  const auto options = u.options().dtype(at::kDouble);
  at::Tensor similarity = at::empty({u.size(0)}, options), others = at::empty({u.size(0)}, options);
  at::parallel_for(0, segments.count(), segment_grain(segments, u.size(0)), [&](int64_t begin, int64_t end) {
    segment_similarities(segments, begin, end, u.const_data_ptr<T>(), u.size(1), similarity.mutable_data_ptr<double>(),
                         others.mutable_data_ptr<double>());
  });
  return {similarity, others};
}

// Adds lam_i * (sum of cosines, count) of the neighbours found.
template <typename T>
void add_neighbors(const ContrastiveInputs& in, const Neighbors<T>& neighbors, const at::Tensor& similarity,
                   const at::Tensor& weight) {
  const double* weights = in.neighbor_weights ? in.neighbor_weights->const_data_ptr<double>() : nullptr;
  const T* cosines = neighbors.cosines.template const_data_ptr<T>();
  const int64_t* indices = neighbors.indices.template const_data_ptr<int64_t>();
  for (int64_t i = 0; i < weight.size(0); ++i) {
    double sum = 0, found = 0;
    for (int64_t entry = i * in.k; entry < (i + 1) * in.k; ++entry) {
      if (indices[entry] < 0) continue;
      sum += cosines[entry];
      found += 1;
    }
    const double lam = weights ? weights[i] : in.neighbor_weight;
    similarity.mutable_data_ptr<double>()[i] += lam * sum;
    weight.mutable_data_ptr<double>()[i] += lam * found;
  }
}

// The terms of a row's losses.
struct RowSums {
  std::vector<double> rest;  // the log-sum-exp of the tiles, without the sole pairs
  std::vector<double> lse;
  double inv_tau;

  RowSums(std::vector<double> of_tiles, const SolePairs& pairs, double scale)
      : rest(std::move(of_tiles)), lse(rest.size()), inv_tau(scale) {
    for (size_t i = 0; i < rest.size(); ++i) lse[i] = pairs.add_pairs(i, rest[i], inv_tau, -1);
  }
};

// l_i = lse_i - similarity_i / (tau weight_i), 0 where the weight is 0; where a part of the loss has a sole positive p,
// as (lse_i - s_ip) + (s_ip - similarity_i / (tau weight_i)), whose first term keeps its digits.
at::Tensor row_losses(const RowSums& sums, const SolePairs& pairs, const std::vector<int64_t>& sole,
                      const at::Tensor& similarity, const at::Tensor& weight) {
  at::Tensor losses = at::zeros_like(weight);
  double* out = losses.mutable_data_ptr<double>();
  const double* similarities = similarity.const_data_ptr<double>();
  const double* w = weight.const_data_ptr<double>();
  for (size_t i = 0; i < sums.lse.size(); ++i) {
    if (!(w[i] > 0)) continue;
    const double mean = similarities[i] * sums.inv_tau / w[i];
    if (sole[i] < 0) {
      out[i] = sums.lse[i] - mean;
      continue;
    }
    const double s = pairs.product(i, sole[i]) * sums.inv_tau;
    const bool alone = w[i] == 1 || pairs.is_sole(pairs.neighbor, i, sole[i]);
    out[i] = sole_loss(pairs.add_pairs(i, sums.rest[i], sums.inv_tau, sole[i]), s) + (alone ? 0 : s - mean);
  }
  return losses;
}

// Where a row has a sole positive, its similarity is the pair's product: the same bits as in the log-sum-exp.
void use_products(const SolePairs& pairs, const std::vector<int64_t>& sole, const at::Tensor& similarity) {
  double* out = similarity.mutable_data_ptr<double>();
  for (size_t i = 0; i < sole.size(); ++i) {
    if (sole[i] >= 0) out[i] = pairs.product(i, sole[i]);
  }
}

void ignore_rows_without_negatives(const RowSums& sums, const at::Tensor& weight) {
  double* w = weight.mutable_data_ptr<double>();
  for (size_t i = 0; i < sums.lse.size(); ++i) {
    if (std::isinf(sums.lse[i]) && sums.lse[i] < 0) w[i] = 0;
  }
}

// The rules of the search, of which there may be none; views are an instance rule too.
CandidateRows candidates_of(const ContrastiveInputs& in, int64_t n) {
  if (in.k == 0) return {};
  if (!in.bank) {
    const auto views = [&] { return at::arange(n, in.z.options().dtype(at::kLong)).remainder_(n / 2); };
    return {in.instance_ids ? *in.instance_ids : views(), in.domain};
  }
  return {in.bank_ids ? in.instance_ids : std::nullopt, in.bank_ids, in.bank_domain ? in.domain : std::nullopt,
          in.bank_domain};
}

// The row losses and weights of one part; empty where it is disabled.
struct PartLosses {
  at::Tensor loss, weight;
};

// One forward, in the type of the tiles.
template <typename T>
class Forward {
 public:
  Forward(const ContrastiveInputs& in, const PreparedRows& rows)
      : in_(in),
        rows_(rows),
        n_(in.z.size(0)),
        panels_(row_panels<T>(rows)),
        candidates_(candidates_of(in, n_)),
        neighbors_(n_, in.k, rows.u.options()) {
    if (in.views) views_ = view_segments(in.instance_ids, n_);
    if (in.labels) classes_ = segment_rows(in.labels->const_data_ptr<int64_t>(), n_);
    if (in.views) pairs_.instance = sole_positives(views_);
    if (in.labels) pairs_.same_class = sole_positives(classes_);
    if (in.decoupled) excluded_ = ExcludedColumns(in.views ? views_ : classes_, n_);
    list_pairs();
  }

  ContrastiveOutputs run() {
    const bool in_batch = in_.k > 0 && !in_.bank;
    std::optional<BatchSearch<T>> search;
    if (in_batch) search.emplace(BatchSearch<T>{candidates_, neighbors_});
    RowSums sums(similarity_pass<T>(rows_, panels_, pairs_, excluded_, search), pairs_, rows_.inv_tau);
    if (in_.k > 0 && in_.bank) search_bank(in_, rows_, panels_, candidates_, neighbors_);
    PartLosses instance = instance_part(sums);
    if (in_batch && exclude_neighbors(instance)) {
      sums = RowSums(similarity_pass<T>(rows_, panels_, pairs_, excluded_, std::nullopt), pairs_, rows_.inv_tau);
      instance = instance_part(sums);
    }
    const PartLosses same_class = class_part(sums);
    const at::ScalarType dtype = wide_dtype(in_.z.scalar_type());
    at::Tensor lse = at::empty({n_}, doubles());
    std::copy(sums.lse.begin(), sums.lse.end(), lse.mutable_data_ptr<double>());
    return {instance.loss.to(dtype),      same_class.loss.to(dtype), lse, instance.weight, same_class.weight,
            neighbors_.cosines.to(dtype), neighbors_.indices};
  }

 private:
  at::TensorOptions doubles() const { return rows_.u.options().dtype(at::kDouble); }
  PartLosses disabled() const { return {at::empty({0}, doubles()), at::empty({0}, doubles())}; }

  // Nothing is left to add in double where the positives are no part of the denominator.
  std::vector<int64_t> sole_positives(const RowSegments& segments) const {
    return in_.decoupled ? std::vector<int64_t>(n_, -1) : sole_members(segments, n_);
  }

  void list_pairs() {
    pairs_.list_pairs(n_);
    pairs_.multiply_pairs(rows_.u.template const_data_ptr<T>(), in_.z.size(1));
  }

  PartLosses instance_part(const RowSums& sums) const {
    if (!in_.views) return disabled();
    auto [similarity, weight] = segment_terms<T>(views_, rows_.u);
    use_products(pairs_, pairs_.instance, similarity);
    if (in_.decoupled) ignore_rows_without_negatives(sums, weight);
    if (in_.k > 0) add_neighbors(in_, neighbors_, similarity, weight);
    std::vector<int64_t> sole = pairs_.instance;
    for (size_t i = 0; i < pairs_.neighbor.size(); ++i) sole[i] = sole[i] < 0 ? pairs_.neighbor[i] : sole[i];
    return {row_losses(sums, pairs_, sole, similarity, weight), weight};
  }

  PartLosses class_part(const RowSums& sums) const {
    if (!in_.labels) return disabled();
    const auto [similarity, weight] = segment_terms<T>(classes_, rows_.u);
    use_products(pairs_, pairs_.same_class, similarity);
    if (in_.decoupled) ignore_rows_without_negatives(sums, weight);
    return {row_losses(sums, pairs_, pairs_.same_class, similarity, weight), weight};
  }

  // Rows whose only positive is a neighbour are known after the search alone. Lists them where one of them has a loss
  // that would lose digits; the tiles then have to be summed once more.
  bool exclude_neighbors(const PartLosses& instance) {
    constexpr double kSmallLoss = 0.5;
    std::vector<int64_t> sole =
        sole_neighbors(views_, neighbors_.indices.template const_data_ptr<int64_t>(), n_, in_.k);
    const double* loss = instance.loss.template const_data_ptr<double>();
    const double* weight = instance.weight.template const_data_ptr<double>();
    bool any = false;
    for (int64_t i = 0; i < n_; ++i) any |= sole[i] >= 0 && weight[i] > 0 && loss[i] < kSmallLoss;
    if (!any) return false;
    pairs_.neighbor = std::move(sole);
    list_pairs();
    return true;
  }

  const ContrastiveInputs& in_;
  const PreparedRows& rows_;
  int64_t n_;
  RowPanels<T> panels_;
  CandidateRows candidates_;
  Neighbors<T> neighbors_;
  RowSegments views_, classes_;
  SolePairs pairs_;
  ExcludedColumns excluded_;
};

ContrastiveOutputs contrastive_cpu(const Arguments& arguments) {
  const ContrastiveInputs in = contrastive_inputs(arguments);
  check_contrastive(in);
  const PreparedRows rows = prepare_rows(in);
  return dispatch_wide(rows.u.scalar_type(), [&](auto type) { return Forward<decltype(type)>(in, rows).run(); });
}

}  // namespace
}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) { m.impl("contrastive", ltood::by_name<ltood::contrastive_cpu>()); }
