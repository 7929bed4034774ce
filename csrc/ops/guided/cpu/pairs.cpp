#include "ops/guided/cpu/pairs.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "common/neighbors.h"
#include "common/row_panels.h"
#include "common/simd.h"

namespace ltood {

namespace {

template <typename T>
RowPanels<T> unit_panels(const at::Tensor& x, bool normalize, bool keep = true) {
  const int64_t n = x.size(0), panel = tile_rows(n);
  return {pad_unit_rows(x, panel, c10::CppTypeToScalarType<T>::value, normalize), n, panel, keep};
}

// Both embeddings of the rows, in the same panels.
template <typename T>
struct PairPanels {
  explicit PairPanels(const GuidedArguments& arguments)
      : student(unit_panels<T>(arguments.z, arguments.normalize)),
        guide(unit_panels<T>(arguments.guide, true, false)),
        student_scale(static_cast<T>(kLog2E / arguments.temperature)),
        teacher_scale(static_cast<T>(kLog2E / arguments.teacher())) {}

  PairTile<T> tile(int64_t i, int64_t j, const T* cosines) const {
    const Matrix<T> products = student.products(i, student.transposed(j), student.panel());
    return {products.data,   cosines,       products.stride, student.size(i),
            student.size(j), student_scale, teacher_scale,   i == j};
  }

  RowPanels<T> student, guide;
  T student_scale, teacher_scale;
};

template <typename T>
const T* cosines_of(const RowPanels<T>& guide, int64_t i, int64_t j) {
  return guide.products(i, guide.transposed(j), guide.panel()).data;
}

// The nearest rows of the guide among those of other images.
template <typename T>
struct GuideSearch {
  GuideSearch(const GuidedArguments& arguments, int64_t k)
      : neighbors(arguments.n(), k, arguments.guide.options().dtype(c10::CppTypeToScalarType<T>::value)) {
    const int64_t n = arguments.n();
    const auto views = [&] {
      return at::arange(n, neighbors.indices.options()).remainder_(std::max<int64_t>(n / 2, 1));
    };
    candidates = {arguments.instance_ids ? *arguments.instance_ids : views(), std::nullopt};
  }

  void offer(const RowPanels<T>& guide, int64_t i, int64_t j, const T* cosines) {
    const Tile<T> tile{const_cast<T*>(cosines), guide.panel(), guide.size(i), guide.size(j), 1};
    const int64_t r = guide.start(i), c = guide.start(j);
    offer_neighbors(tile, r, c, candidates.of_rows(r), candidates.of_columns(c), neighbors.best(r),
                    i == j ? BestK<T>{} : neighbors.best(c));
  }

  Neighbors<T> neighbors;
  CandidateRows candidates;
};

// The gradients at the divergences, weights times exp(-lse) in units of the largest weight, which the result is in too.
template <typename T>
struct PairGradients {
  explicit PairGradients(const GuidedSaved& saved) : student(saved.student_lse.numel()), teacher(student.size()) {
    const auto values = [&](const OptionalTensor& x) {
      std::vector<double> to(student.size(), 0.0);
      if (!x.has_value()) return to;
      const at::Tensor wide = x->to(at::kDouble).contiguous();
      std::copy_n(wide.const_data_ptr<double>(), to.size(), to.begin());
      return to;
    };
    const std::vector<double> kl = values(saved.grad_kl), lse = values(saved.grad_student_lse);
    const std::vector<double> student_lse = values(saved.student_lse), teacher_lse = values(saved.teacher_lse);
    for (size_t i = 0; i < kl.size(); ++i) largest = std::max({largest, std::abs(kl[i]), std::abs(lse[i] + kl[i])});
    if (largest == 0) largest = 1;
    const auto factor = [&](double weight, double log_sum) {
      return static_cast<T>(weight == 0 ? 0 : weight / largest * std::exp(-log_sum));
    };
    for (size_t i = 0; i < kl.size(); ++i) {
      student[i] = factor(lse[i] + kl[i], student_lse[i]);
      teacher[i] = factor(kl[i], teacher_lse[i]);
    }
  }

  PairFactors<T> from(int64_t i) const { return PairFactors<T>{student.data(), teacher.data()}.from(i); }

  std::vector<T> student, teacher;
  double largest = 0;
};

}  // namespace

template <typename T>
bool pairs_serve(const GuidedArguments& arguments) {
  if (arguments.rows.has_value()) return false;
  const double longest = arguments.normalize ? 1 : longest_norm(norms_of_rows(wide_rows(arguments.z)), false);
  return longest * longest / arguments.temperature <= safe_exponent<T>() &&
         1 / arguments.teacher() <= safe_exponent<T>();
}

template <typename T>
at::Tensor forward_pairs(const GuidedArguments& arguments, int64_t k, std::vector<DivergenceSum<T>>* divergence) {
  const int64_t n = arguments.n();
  GuideSearch<T> search(arguments, k);
  if (divergence == nullptr) {
    const RowPanels<T> guide = unit_panels<T>(arguments.guide, true);
    for_each_tile(guide.count(), [&](int64_t i, int64_t j) { search.offer(guide, i, j, cosines_of(guide, i, j)); });
    return search.neighbors.indices;
  }
  const PairPanels<T> panels(arguments);
  std::vector<double> of_rows(4 * n, 0.0);
  double* sums = of_rows.data();
  const PairSums all{sums, sums + n, sums + 2 * n, sums + 3 * n};
  for_each_tile(panels.guide.count(), [&](int64_t i, int64_t j) {
    const T* cosines = cosines_of(panels.guide, i, j);
    if (k > 0) search.offer(panels.guide, i, j, cosines);
    add_pairs(panels.tile(i, j, cosines), all.from(panels.guide.start(i)), all.from(panels.guide.start(j)));
  });
  for (int64_t i = 0; i < n; ++i) {
    (*divergence)[i] = {{0, all.student[i]}, {0, all.teacher[i]}, all.excess[i], all.gap[i]};
  }
  return search.neighbors.indices;
}

template <typename T>
at::Tensor backward_pairs(const GuidedArguments& arguments, const GuidedSaved& saved) {
  const PairPanels<T> panels(arguments);
  const RowPanels<T>& student = panels.student;
  const PairGradients<T> gradients(saved);
  const int64_t n = arguments.n(), d = arguments.z.size(1), panel = student.panel();
  const auto options = arguments.z.options().dtype(c10::CppTypeToScalarType<T>::value);
  const at::Tensor grad = at::zeros({student.count() * panel, d}, options);
  const at::Tensor of_columns = at::zeros({student.count(), d, panel}, options);  // transposed: u' H reads H as it lies
  for_each_tile(student.count(), [&](int64_t i, int64_t j) {
    const int64_t r = student.start(i), c = student.start(j);
    const PairTile<T> tile = panels.tile(i, j, cosines_of(panels.guide, i, j));
    weigh_pairs(tile, gradients.from(r), gradients.from(c));
    const Matrix<const T> h{tile.student, tile.stride};
    multiply(panel, d, panel, h, student.rows(j), {grad.mutable_data_ptr<T>() + r * d, d}, true);
    if (i == j) return;
    multiply(d, panel, panel, student.transposed(i), h, {of_columns.mutable_data_ptr<T>() + c * d, panel}, true);
  });
  run_parallel(student.count(), [&](int64_t b) {
    grad.narrow(0, student.start(b), panel).add_(of_columns.select(0, b).t().contiguous()).mul_(gradients.largest);
  });
  return grad.narrow(0, 0, n);
}

template bool pairs_serve<float>(const GuidedArguments&);
template bool pairs_serve<double>(const GuidedArguments&);
template at::Tensor forward_pairs(const GuidedArguments&, int64_t, std::vector<DivergenceSum<float>>*);
template at::Tensor forward_pairs(const GuidedArguments&, int64_t, std::vector<DivergenceSum<double>>*);
template at::Tensor backward_pairs<float>(const GuidedArguments&, const GuidedSaved&);
template at::Tensor backward_pairs<double>(const GuidedArguments&, const GuidedSaved&);

}  // namespace ltood
