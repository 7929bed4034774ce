// Forward of the guided family on the CPU: one pass over tiles of (rows x columns) finds the guide's neighbours and
// sums the negatives and both softmaxes; a second one serves the few rows that fall back on all others; positives come
// last.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "common/dispatch.h"
#include "ops/guided/guided_rows.h"

namespace ltood {

namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <typename T>
struct ForwardState {
  std::vector<ExpSum<T>> negatives;          // [N] by position
  std::vector<DivergenceSum<T>> divergence;  // [N] by position
  int64_t k = 0;                             // neighbours to search for; 0: they are given
  std::unique_ptr<T[]> best;                 // [N, k] by position
  int64_t* best_row = nullptr;               // [N, k] by row
};

// Which columns of a tile's rows hold negatives.
std::vector<Span> negative_spans(const RowOrder& order, const int64_t* positions, int64_t rows) {
  std::vector<Span> spans;
  for (int64_t r = 0; r < rows; ++r) spans.push_back(order.negatives(positions[r]));
  return merge_spans(std::move(spans), kSpanGap);
}

// The smallest span that holds what the columns share with the spans.
Span hull(const std::vector<Span>& spans, Span columns) {
  Span result{columns.end, columns.begin};
  for (const Span span : spans) {
    const Span shared = span.meet(columns);
    if (shared.size() == 0) continue;
    result = {std::min(result.begin, shared.begin), std::max(result.end, shared.end)};
  }
  return result;
}

// The sums of some rows: all that is asked for, or, in the second pass, the negatives alone.
template <typename T>
void forward_tile(const GuidedTiles<T>& in, const int64_t* positions, int64_t rows, bool negatives_only,
                  Scratch<T>& scratch, ForwardState<T>& state) {
  const int64_t k = negatives_only ? 0 : state.k;
  const bool distill = in.distill && !negatives_only;
  const T margin = static_cast<T>(2 * in.e.width) * std::numeric_limits<T>::epsilon();  // of two products of unit rows
  in.load(positions, rows, scratch);
  const auto negatives = in.contrast ? negative_spans(in.order, positions, rows) : std::vector<Span>{};
  const bool everything = k > 0 || distill;
  for_each_column_tile(everything ? std::vector<Span>{{0, in.order.size()}} : negatives, [&](Span columns) {
    const Span students = distill ? columns : hull(negatives, columns);
    if (students.size() > 0) in.student_products(rows, students, scratch);
    if (everything || in.force.weighted) in.guide_products(rows, columns, scratch);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = positions[r];
      const T* s = scratch.s.get() + r * students.size();
      const T* cos = scratch.cos.get() + r * columns.size();
      if (k > 0) {
        const NeighborSearch<T> search{state.best.get() + i * k,
                                       state.best_row + in.order.row_at[i] * k,
                                       k,
                                       in.e.at(i),
                                       in.e.width,
                                       margin,
                                       in.order.views_begin(i),
                                       in.order.views_end(i)};
        keep_best(search, cos, in.order.row_at.data() + columns.begin, in.e.at(columns.begin), columns.size(),
                  columns.begin);
      }
      if (in.contrast) {
        without(in.order.negatives(i).meet(students), i, [&](Span part) {
          add_negatives(state.negatives[i], s + (part.begin - students.begin), cos + (part.begin - columns.begin),
                        part.size(), in.force);
        });
      }
      if (distill) {
        without(columns, i, [&](Span part) {
          const int64_t from = part.begin - columns.begin;
          add_distill(state.divergence[i], s + from, cos + from, part.size(), in.teacher_scale);
        });
      }
    }
  });
}

template <typename T>
struct ContrastOutputs {
  T* loss;         // [N] by row
  double* weight;  // [N] sum of the attractions, 0 for a row without positives
  double* lse;     // [N]
};

// Adds the positives of the row at a position, and writes its loss.
template <typename T>
void finish_row(const GuidedTiles<T>& in, int64_t i, const int64_t* neighbors, int64_t k, ExpSum<T> sum,
                ContrastOutputs<T> out) {
  const int64_t row = in.order.row_at[i];
  double weight = 0, pulled = 0;
  const auto add = [&](int64_t p) {
    const PositivePair<T> pair(in, i, p);
    sum.add(pair.s, pair.missing_share(in, i, p));
    weight += pair.attract;
    pulled += static_cast<double>(pair.attract) * pair.s;
  };
  for (const int64_t* v = in.order.views_begin(i); v != in.order.views_end(i); ++v) {
    if (*v != i) add(*v);
  }
  for (int64_t s = 0; s < k; ++s) {
    const int64_t j = neighbors[row * k + s];
    if (j >= 0) add(in.order.position_of[j]);
  }
  const double lse = sum.log2();
  out.loss[row] = weight == 0 ? T(0) : static_cast<T>((lse - pulled / weight) * kLn2);
  out.weight[row] = weight;
  out.lse[row] = lse * kLn2;
}

// The divergences and both log-sums, by row; a row alone has divergence 0.
template <typename T>
void write_distill(const RowOrder& order, const ForwardState<T>& state, T* kl, double* student_lse,
                   double* teacher_lse) {
  for (int64_t i = 0; i < order.size(); ++i) {
    const int64_t row = order.row_at[i];
    const DivergenceSum<T>& sums = state.divergence[i];
    kl[row] = order.size() == 1 ? T(0) : static_cast<T>(sums.nats());
    student_lse[row] = sums.student.log2() * kLn2;
    teacher_lse[row] = sums.teacher.log2() * kLn2;
  }
}

// The neighbours that the guide names, and the losses of the contrastive part.
template <typename T>
void contrast(const GuidedTiles<T>& in, RowOrder& order, int64_t* neighbors, int64_t k, ForwardState<T>& state,
              ContrastOutputs<T> out) {
  order.keep_distinct(neighbors, k);
  order.mark_fallback(neighbors, k);
  const std::vector<int64_t> fallback = order.fallback_positions();
  for (const int64_t i : fallback) state.negatives[i] = {};
  in.for_each_row_tile(fallback, [&](const int64_t* positions, int64_t rows, Scratch<T>& scratch) {
    forward_tile(in, positions, rows, true, scratch, state);
  });
  at::parallel_for(0, order.size(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) finish_row(in, i, neighbors, k, state.negatives[i], out);
  });
}

template <typename T>
Outputs forward(const GuidedArguments& arguments, int64_t k) {
  const int64_t n = arguments.n();
  const bool has_contrast = arguments.clusters.has_value();
  RowOrder order = order_rows(arguments);
  const GuidedTiles<T> in(arguments, order);

  const bool search = has_contrast && !arguments.neighbors.has_value();
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  const auto rows_of = [&](bool used, at::ScalarType dtype) { return at::empty({used ? n : 0}, options.dtype(dtype)); };
  const auto dtype = options.dtype().toScalarType();
  at::Tensor loss = rows_of(has_contrast, dtype), kl = rows_of(in.distill, dtype);
  at::Tensor weight = rows_of(has_contrast, at::kDouble), lse = rows_of(has_contrast, at::kDouble);
  at::Tensor student_lse = rows_of(in.distill, at::kDouble), teacher_lse = rows_of(in.distill, at::kDouble);
  at::Tensor neighbors = !has_contrast ? at::empty({n, 0}, options.dtype(at::kLong))
                         : search      ? at::full({n, k}, -1, options.dtype(at::kLong))
                                       : arguments.neighbors->clone();
  ForwardState<T> state;
  state.negatives.resize(has_contrast ? n : 0);
  state.divergence.resize(in.distill ? n : 0);
  state.best_row = neighbors.mutable_data_ptr<int64_t>();
  if (search) {
    state.k = k;
    state.best.reset(new T[n * k]);
    std::fill_n(state.best.get(), n * k, -std::numeric_limits<T>::infinity());
  }
  in.for_each_row_tile(order.all_positions(), [&](const int64_t* positions, int64_t rows, Scratch<T>& scratch) {
    forward_tile(in, positions, rows, false, scratch, state);
  });
  if (has_contrast) {
    contrast(in, order, state.best_row, neighbors.size(1), state,
             {loss.mutable_data_ptr<T>(), weight.mutable_data_ptr<double>(), lse.mutable_data_ptr<double>()});
  }
  if (in.distill) {
    write_distill(order, state, kl.mutable_data_ptr<T>(), student_lse.mutable_data_ptr<double>(),
                  teacher_lse.mutable_data_ptr<double>());
  }
  const auto wide = wide_dtype(arguments.z.scalar_type());
  return {loss.to(wide), weight, lse, neighbors, kl.to(wide), student_lse, teacher_lse};
}

Outputs guided_cpu(const at::Tensor& z,                            // [N, D]
                   const at::Tensor& guide,                        // [N, Dg]
                   const std::optional<at::Tensor>& clusters,      // [N]
                   const std::optional<at::Tensor>& far,           // [K]
                   const std::optional<at::Tensor>& instance_ids,  // [N]
                   const std::optional<at::Tensor>& pos_idx,       // [N, k]
                   double temperature, const std::optional<at::Tensor>& temperature_tensor,
                   std::optional<double> teacher_temperature, int64_t k, bool weighted, double gamma, bool normalize,
                   bool distill) {
  const double tau = temperature_value(temperature, temperature_tensor);
  const GuidedArguments arguments{z,
                                  guide,
                                  clusters,
                                  far,
                                  instance_ids,
                                  pos_idx,
                                  tau,
                                  teacher_temperature.value_or(tau),
                                  {weighted && gamma != 0, gamma},
                                  normalize,
                                  distill};
  check_guided(arguments);
  return dispatch_wide(compute_dtype(arguments), [&](auto zero) { return forward<decltype(zero)>(arguments, k); });
}

}  // namespace

}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) { m.impl("guided", &ltood::guided_cpu); }
