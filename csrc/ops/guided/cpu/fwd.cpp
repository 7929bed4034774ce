// Forward of the guided family on the CPU: one pass over all pairs finds the guide's neighbours and sums both
// softmaxes, one over tiles of (rows x columns) sums the negatives, a third serves the few rows that fall back on all
// others; positives come last. A partial problem does the first two in one.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/dispatch.h"
#include "ops/guided/cpu/pairs.h"
#include "ops/guided/cpu/rows.h"

namespace ltood {

namespace {

using GuidedOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Rounding makes no loss negative; NaN stays.
double not_negative(double loss) { return loss < 0 ? 0 : loss; }

template <typename T>
struct ForwardState {
  std::vector<ExpSum<T>> negatives;          // [N] by slot
  std::vector<DivergenceSum<T>> divergence;  // [N] by result row
  int64_t k = 0;                             // neighbours to search for; 0: they are given
  std::unique_ptr<T[]> best;                 // [N, k] by row
  int64_t* best_row = nullptr;               // [N, k] by row

  void search(int64_t n, int64_t neighbors, int64_t* rows) {
    k = neighbors;
    best.reset(new T[n * k]);
    std::fill_n(best.get(), n * k, -std::numeric_limits<T>::infinity());
    best_row = rows;
  }
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
  for_each_column_tile(everything ? std::vector<Span>{in.order.everything()} : negatives, [&](Span columns) {
    const Span students = distill ? columns : hull(negatives, columns);
    if (students.size() > 0) in.student_products(rows, students, scratch);
    if (everything || in.force.weighted) in.guide_products(rows, columns, scratch);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = positions[r], self = in.order.self(i), slot = in.order.slot(i);
      const T* s = scratch.s.get() + r * students.size();
      const T* cos = scratch.cos.get() + r * columns.size();
      if (k > 0) {
        const NeighborSearch<T> search{state.best.get() + in.order.result_row(i) * k,
                                       state.best_row + in.order.result_row(i) * k,
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
        without(in.order.negatives(i).meet(students), self, [&](Span part) {
          add_negatives(state.negatives[slot], s + (part.begin - students.begin), cos + (part.begin - columns.begin),
                        part.size(), in.force);
        });
      }
      if (distill) {
        without(columns, self, [&](Span part) {
          const int64_t from = part.begin - columns.begin;
          add_distill(state.divergence[in.order.result_row(i)], s + from, cos + from, part.size(), in.teacher_scale);
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

// The row at a position: its sum, and the running totals over its positives.
template <typename T>
struct PositionSums {
  ExpSum<T> sum;
  double weight = 0, positive_logit = 0;  // of the attractions, and of what they multiply, in base 2

  void add(const GuidedTiles<T>& in, int64_t i, int64_t p) {
    const PositivePair<T> pair(in, i, p);
    sum.add(pair.s, pair.missing_share(in, i, p));
    weight += pair.attract;
    positive_logit += static_cast<double>(pair.attract) * pair.s;
  }
  void add_views(const GuidedTiles<T>& in, int64_t i) {
    for (const int64_t* v = in.order.views_begin(i); v != in.order.views_end(i); ++v) {
      if (*v != in.order.self(i)) add(in, i, *v);
    }
  }
};

// Adds the positives of the row at a position, and writes its loss.
template <typename T>
void row_epilogue(const GuidedTiles<T>& in, int64_t i, const int64_t* neighbors, int64_t k, ExpSum<T> sum,
                  ContrastOutputs<T> out) {
  const int64_t row = in.order.row_at[i];
  PositionSums<T> sums{sum};
  sums.add_views(in, i);
  for (int64_t s = 0; s < k; ++s) {
    const int64_t j = neighbors[row * k + s];
    if (j >= 0) sums.add(in, i, in.order.position_of[j]);
  }
  const double lse = sums.sum.log2();
  out.loss[row] =
      sums.weight == 0 ? T(0) : static_cast<T>(not_negative((lse - sums.positive_logit / sums.weight) * kLn2));
  out.weight[row] = sums.weight;
  out.lse[row] = lse * kLn2;
}

// The divergences and both log-sums, by row; a row alone has divergence 0.
template <typename T>
void write_distill(const ForwardState<T>& state, T* kl, double* student_lse, double* teacher_lse) {
  const size_t n = state.divergence.size();
  for (size_t row = 0; row < n; ++row) {
    const DivergenceSum<T>& sums = state.divergence[row];
    kl[row] = n == 1 ? T(0) : static_cast<T>(not_negative(sums.nats()));
    student_lse[row] = sums.student.log2() * kLn2;
    teacher_lse[row] = sums.teacher.log2() * kLn2;
  }
}

// A cosine that is NaN leaves open who is near: the losses of such rows are NaN.
template <typename T>
void mark_unknown_neighbors(const GuidedTiles<T>& in, ContrastOutputs<T> out) {
  const int64_t n = in.order.size();
  const auto is_broken = [&](int64_t i) { return !std::isfinite(in.e.norms[i]); };
  int64_t broken = 0;
  for (int64_t i = 0; i < n; ++i) broken += is_broken(i);
  for (int64_t i = 0; broken > 0 && i < n; ++i) {
    const int64_t *views = in.order.views_begin(i), *end = in.order.views_end(i);
    const int64_t other_rows = n - (end - views), other_broken = broken - std::count_if(views, end, is_broken);
    if (other_broken == 0 && (!is_broken(i) || other_rows == 0)) continue;
    const int64_t row = in.order.row_at[i];
    out.loss[row] = out.weight[row] = out.lse[row] = NAN;
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
    for (int64_t i = begin; i < end; ++i) row_epilogue(in, i, neighbors, k, state.negatives[i], out);
  });
}

template <typename T>
GuidedOutputs forward(const GuidedArguments& arguments, int64_t k) {
  const int64_t n = arguments.n();
  const bool has_contrast = arguments.clusters.has_value(), has_distill = arguments.distill;
  const bool search = has_contrast && !arguments.neighbors.has_value();
  const bool paired = has_distill && pairs_serve<T>(arguments);

  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  const auto rows_of = [&](bool used, at::ScalarType dtype) { return at::empty({used ? n : 0}, options.dtype(dtype)); };
  const auto dtype = options.dtype().toScalarType();
  at::Tensor loss = rows_of(has_contrast, dtype), kl = rows_of(has_distill, dtype);
  at::Tensor weight = rows_of(has_contrast, at::kDouble), lse = rows_of(has_contrast, at::kDouble);
  at::Tensor student_lse = rows_of(has_distill, at::kDouble), teacher_lse = rows_of(has_distill, at::kDouble);
  at::Tensor neighbors =
      has_contrast && !search ? arguments.neighbors->clone() : at::empty({n, 0}, options.dtype(at::kLong));
  ForwardState<T> state;
  state.negatives.resize(has_contrast ? n : 0);
  state.divergence.resize(has_distill ? n : 0);
  if (search || paired) {
    const at::Tensor found = forward_pairs<T>(arguments, search ? k : 0, paired ? &state.divergence : nullptr);
    if (search) neighbors = found;
  }
  if (has_contrast || (has_distill && !paired)) {
    RowOrder order = order_rows(arguments);
    GuidedTiles<T> in(arguments, order);
    in.distill = has_distill && !paired;
    in.for_each_row_tile(order.all_positions(), [&](const int64_t* positions, int64_t rows, Scratch<T>& scratch) {
      forward_tile(in, positions, rows, false, scratch, state);
    });
    if (has_contrast) {
      const ContrastOutputs<T> out{loss.mutable_data_ptr<T>(), weight.mutable_data_ptr<double>(),
                                   lse.mutable_data_ptr<double>()};
      contrast(in, order, neighbors.mutable_data_ptr<int64_t>(), neighbors.size(1), state, out);
      if (search) mark_unknown_neighbors<T>(in, out);
    }
  }
  if (has_distill) {
    write_distill(state, kl.mutable_data_ptr<T>(), student_lse.mutable_data_ptr<double>(),
                  teacher_lse.mutable_data_ptr<double>());
  }
  const auto wide = wide_dtype(arguments.z.scalar_type());
  return {loss.to(wide), weight, lse, neighbors, kl.to(wide), student_lse, teacher_lse};
}

using GuidedPartialOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                        at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The log-sum-exp of the rows at some positions, and the logits of their views.
template <typename T>
void partial_epilogue(const GuidedTiles<T>& in, const std::vector<int64_t>& positions, const ForwardState<T>& state,
                      double* weight, double* positive_logit, double* lse) {
  at::parallel_for(0, static_cast<int64_t>(positions.size()), 64, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = positions[at], row = in.order.result_row(i);
      PositionSums<T> sums{state.negatives[in.order.slot(i)]};
      sums.add_views(in, i);
      weight[row] = sums.weight;
      positive_logit[row] = sums.positive_logit * kLn2;
      lse[row] = sums.sum.log2() * kLn2;
    }
  });
}

// excess and gap as shares of the teacher's sum, in nats: with the log-sums they combine with those of other columns.
template <typename T>
void write_partial_distill(const RowOrder& order, const ForwardState<T>& state, double* student_lse,
                           double* teacher_lse, double* excess, double* gap) {
  for (const int64_t i : order.all_positions()) {
    const int64_t row = order.result_row(i);
    const DivergenceSum<T>& sums = state.divergence[row];
    const bool empty = sums.teacher.sum == 0;
    student_lse[row] = sums.student.log2() * kLn2;
    teacher_lse[row] = sums.teacher.log2() * kLn2;
    excess[row] = empty ? 0 : sums.excess / sums.teacher.sum * kLn2;
    gap[row] = empty ? 0 : sums.gap / sums.teacher.sum;
  }
}

template <typename T>
GuidedPartialOutputs forward_partial(const GuidedArguments& arguments, const OptionalTensor& x_every, int64_t k) {
  const int64_t n = arguments.rows->z.size(0);
  RowOrder order = order_rows(arguments);
  const GuidedTiles<T> in(arguments, order);
  const auto doubles = [&](bool used) { return at::full({used ? n : 0}, -INFINITY, at::kDouble); };
  at::Tensor lse = doubles(in.contrast), lse_every = doubles(in.contrast);
  at::Tensor weight = doubles(in.contrast), positive_logit = doubles(in.contrast);
  at::Tensor student_lse = doubles(in.distill), teacher_lse = doubles(in.distill);
  at::Tensor excess = doubles(in.distill), gap = doubles(in.distill);
  at::Tensor indices = at::full({n, k}, -1, at::kLong);
  ForwardState<T> state;
  state.negatives.resize(in.contrast ? n : 0);
  state.divergence.resize(in.distill ? n : 0);
  state.search(n, k, indices.mutable_data_ptr<int64_t>());
  const auto pass = [&](const std::vector<int64_t>& rows_at, bool negatives_only) {
    in.for_each_row_tile(rows_at, [&](const int64_t* positions, int64_t rows, Scratch<T>& scratch) {
      forward_tile(in, positions, rows, negatives_only, scratch, state);
    });
  };
  pass(order.all_positions(), false);
  if (in.contrast) {
    double* of_views[] = {weight.mutable_data_ptr<double>(), positive_logit.mutable_data_ptr<double>()};
    partial_epilogue(in, order.all_positions(), state, of_views[0], of_views[1], lse.mutable_data_ptr<double>());
    if (x_every.has_value()) {
      std::vector<char> marked(order.size());
      std::copy_n(x_every->const_data_ptr<bool>(), n, marked.begin() + order.first);
      order.mark_fallback(marked);
      for (const int64_t i : order.fallback_positions()) state.negatives[order.slot(i)] = {};
      pass(order.fallback_positions(), true);
      partial_epilogue(in, order.fallback_positions(), state, of_views[0], of_views[1],
                       lse_every.mutable_data_ptr<double>());
    }
  }
  if (in.distill) {
    write_partial_distill(order, state, student_lse.mutable_data_ptr<double>(), teacher_lse.mutable_data_ptr<double>(),
                          excess.mutable_data_ptr<double>(), gap.mutable_data_ptr<double>());
  }
  at::Tensor cosines = at::empty({n, k}, c10::CppTypeToScalarType<T>::value);
  std::copy_n(state.best.get(), n * k, cosines.mutable_data_ptr<T>());
  const auto wide = wide_dtype(arguments.rows->z.scalar_type());
  return {lse, lse_every, weight, positive_logit, cosines.to(wide), indices, student_lse, teacher_lse, excess, gap};
}

GuidedOutputs guided_cpu(const Arguments& arguments) {
  const GuidedArguments in = guided_arguments(arguments);
  const int64_t k = arguments.integer("k");
  check_guided(in, k);
  return dispatch_wide(compute_dtype(in), [&](auto zero) { return forward<decltype(zero)>(in, k); });
}

GuidedPartialOutputs guided_partial_cpu(const Arguments& arguments) {
  GuidedArguments in = guided_partial_arguments(arguments);
  in.distill = arguments.flag("distill");
  const OptionalTensor x_every = arguments.optional("x_every");
  const int64_t k = arguments.integer("k");
  check_guided_partial(in, x_every, k);
  return dispatch_wide(compute_dtype(in), [&](auto zero) { return forward_partial<decltype(zero)>(in, x_every, k); });
}

}  // namespace

}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) {
  m.impl("guided", ltood::by_name<ltood::guided_cpu>());
  m.impl("guided_partial", ltood::by_name<ltood::guided_partial_cpu>());
}
