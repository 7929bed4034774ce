// The contrastive losses on the CPU, forward. Each similarity is computed once: a tile of the upper triangle feeds the
// sums (and neighbours) of its rows and of its columns. The positives are linear in N.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <functional>
#include <tuple>

#include "common/neighbors.h"
#include "ops/contrastive/cpu/positives.h"
#include "ops/contrastive/cpu/similarities.h"

namespace ltood {
namespace {

using ContrastiveOutputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// One pass over the upper triangle: row log-sum-exp (returned), and the neighbours in the batch when k > 0.
template <typename T>
std::vector<double> similarity_pass(const PreparedRows& rows, const RowPanels<T>& panels, bool search,
                                    const CandidateRows& candidates, Neighbors<T>& neighbors) {
  const int64_t n = rows.u.size(0);
  const bool fixed_shift = rows.exponent_bound <= safe_exponent<T>();
  std::vector<double> sum(n, 0.0);
  std::vector<T> largest(fixed_shift ? 0 : n, -std::numeric_limits<T>::infinity());
  for_each_tile(panels.count(), [&](int64_t i, int64_t j) {
    const Tile<T> tile = tile_of(panels.products(i, j), panels.size(i), panels.size(j), rows);
    const int64_t r = panels.start(i), c = panels.start(j);
    double* col_sum = i == j ? nullptr : sum.data() + c;
    if (fixed_shift) {
      add_exp_sums(tile, sum.data() + r, col_sum);
    } else {
      add_exp_sums_online(tile, largest.data() + r, sum.data() + r, largest.data() + c, col_sum);
    }
    if (search) {
      offer_neighbors(tile, r, c, candidates.of_rows(r), candidates.of_columns(c), neighbors.best(r),
                      i == j ? BestK<T>{} : neighbors.best(c));
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
      const at::Tensor columns = pad_rows(bank.narrow(0, c, size), panel, rows.u.scalar_type());
      if (in.normalize) normalize_in_place(columns, norms_of_rows(columns));
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

// l_i = lse_i - similarity_i / (tau weight_i), 0 where the weight is 0.
at::Tensor row_losses(const std::vector<double>& lse, const at::Tensor& similarity, const at::Tensor& weight,
                      double inv_tau, at::ScalarType dtype) {
  at::Tensor losses = at::zeros_like(weight);
  double* out = losses.mutable_data_ptr<double>();
  const double* s = similarity.const_data_ptr<double>();
  const double* w = weight.const_data_ptr<double>();
  for (size_t i = 0; i < lse.size(); ++i) {
    if (w[i] > 0) out[i] = lse[i] - s[i] * inv_tau / w[i];
  }
  return losses.to(dtype);
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

template <typename T>
ContrastiveOutputs forward(const ContrastiveInputs& in, const PreparedRows& rows) {
  const int64_t n = in.z.size(0);
  const at::ScalarType dtype = wide_dtype(in.z.scalar_type());
  const auto doubles = rows.u.options().dtype(at::kDouble);
  Neighbors<T> neighbors(n, in.k, rows.u.options());
  const CandidateRows candidates = candidates_of(in, n);
  const RowPanels<T> panels = row_panels<T>(rows);
  const std::vector<double> lse = similarity_pass(rows, panels, in.k > 0 && !in.bank, candidates, neighbors);
  if (in.k > 0 && in.bank) search_bank(in, rows, panels, candidates, neighbors);

  at::Tensor instance_loss = at::empty({0}, doubles.dtype(dtype)), instance_weight = at::empty({0}, doubles);
  at::Tensor class_loss = instance_loss.clone(), class_weight = instance_weight.clone();
  if (in.views) {
    at::Tensor similarity;
    std::tie(similarity, instance_weight) = segment_terms<T>(view_segments(in.instance_ids, n), rows.u);
    if (in.k > 0) add_neighbors(in, neighbors, similarity, instance_weight);
    instance_loss = row_losses(lse, similarity, instance_weight, rows.inv_tau, dtype);
  }
  if (in.labels) {
    at::Tensor similarity;
    std::tie(similarity, class_weight) =
        segment_terms<T>(segment_rows(in.labels->const_data_ptr<int64_t>(), n), rows.u);
    class_loss = row_losses(lse, similarity, class_weight, rows.inv_tau, dtype);
  }
  at::Tensor lse_out = at::empty({n}, doubles);
  std::copy(lse.begin(), lse.end(), lse_out.mutable_data_ptr<double>());
  return {instance_loss,    class_loss, lse_out, instance_weight, class_weight, neighbors.cosines.to(dtype),
          neighbors.indices};
}

ContrastiveOutputs contrastive_cpu(const Arguments& arguments) {
  const ContrastiveInputs in = contrastive_inputs(arguments);
  check_contrastive(in);
  const PreparedRows rows = prepare_rows(in.z, in.normalize, in.temperature.value());
  return dispatch_wide(rows.u.scalar_type(), [&](auto type) { return forward<decltype(type)>(in, rows); });
}

}  // namespace
}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) { m.impl("contrastive", ltood::by_name<ltood::contrastive_cpu>()); }
