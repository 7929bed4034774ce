// Backward of the guided family on the CPU. With G_ij = dL/ds_ij, the gradient of the unit row z_i is
//   (1/tau) sum_j H_ij z_j,   H = G + G^T,
// so every tile of rows owns its result: each reads its own negatives and the rows it is a negative of. The softmaxes
// of all pairs come first, both ways at once (in a partial problem with the tiles), positives are added row by row, and
// the gradient goes back through the normalisation last.
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <numeric>
#include <tuple>

#include "common/dispatch.h"
#include "common/row_panels.h"
#include "common/undefined.h"
#include "ops/guided/cpu/pairs.h"
#include "ops/guided/cpu/rows.h"

namespace ltood {

namespace {

constexpr int64_t kSlice = 16;  // features that one task scatters: a cache line of float32

// GuidedSaved by position, logarithms in base 2. dL/ds_ij = a_i exp(s_ij - lse_i) w_ij - [j in P(i)] b_i w+_ij /
// weight_i, and in distillation a_i q_ij - b_i p_ij.
template <typename T>
struct PositionGradients {
  std::vector<T> lse, a, a_fallback, b_over_weight;
  std::vector<T> student_lse, teacher_lse, distill_a, distill_b;

  DistillRow<T> distill(int64_t i) const {
    return {student_lse.data() + i, teacher_lse.data() + i, distill_a.data() + i, distill_b.data() + i};
  }
};

template <typename T>
PositionGradients<T> order_gradients(const GuidedSaved& saved, const GuidedTiles<T>& in) {
  const auto gather = [&](const OptionalTensor& by_row, double factor) {
    std::vector<T> to(in.order.size(), T(0));
    if (!by_row.has_value()) return to;
    const at::Tensor wide = by_row->to(at::kDouble).contiguous();
    const double* from = wide.const_data_ptr<double>();
    for (int64_t i = 0; i < in.order.size(); ++i) to[i] = static_cast<T>(from[in.order.row_at[i]] * factor);
    return to;
  };
  PositionGradients<T> rows;
  if (in.contrast) {
    rows.lse = gather(saved.lse, kLog2E);
    rows.a = gather(saved.grad_lse, 1);
    rows.b_over_weight = gather(saved.grad_loss, 1);
    const std::vector<T> weight = gather(saved.weight, 1);
    rows.a_fallback.assign(in.order.size(), 0);
    for (int64_t i = 0; i < in.order.size(); ++i) {
      const bool has_positive = weight[i] != 0;
      rows.a[i] += has_positive ? rows.b_over_weight[i] : T(0);
      rows.b_over_weight[i] = has_positive ? rows.b_over_weight[i] / weight[i] : T(0);
      if (in.order.fallback[i]) rows.a_fallback[i] = rows.a[i];
    }
  }
  if (in.distill) {
    rows.student_lse = gather(saved.student_lse, kLog2E);
    rows.teacher_lse = gather(saved.teacher_lse, kLog2E);
    rows.distill_b = gather(saved.grad_kl, 1);
    rows.distill_a = gather(saved.grad_student_lse, 1);
    for (int64_t i = 0; i < in.order.size(); ++i) rows.distill_a[i] += rows.distill_b[i];
  }
  return rows;
}

// The same of a partial problem's columns and rows.
template <typename T>
PositionGradients<T> order_states(const GuidedStates& states, const GuidedTiles<T>& in) {
  const auto gather = [&](const at::Tensor& by_row, int64_t column, double factor) {
    std::vector<T> to(in.order.size());
    const double* from = by_row.const_data_ptr<double>();
    for (int64_t i = 0; i < in.order.size(); ++i) {
      to[i] = static_cast<T>(from[in.order.row_at[i] * kStateColumns + column] * factor);
    }
    return to;
  };
  PositionGradients<T> rows;
  if (in.contrast) {
    const at::Tensor contrast = *both("contrast", states.x_contrast, states.y_contrast);
    rows.lse = gather(contrast, kContrastLse, kLog2E);
    rows.a = gather(contrast, kContrastGradLse, 1);
    rows.b_over_weight = gather(contrast, kContrastAttract, 1);
    rows.a_fallback = rows.a;
    for (int64_t i = 0; i < in.order.size(); ++i) {
      if (!in.order.fallback[i]) rows.a_fallback[i] = 0;
    }
  }
  if (in.distill) {
    const at::Tensor distill = *both("distill", states.x_distill, states.y_distill);
    rows.student_lse = gather(distill, kDistillStudentLse, kLog2E);
    rows.teacher_lse = gather(distill, kDistillTeacherLse, kLog2E);
    rows.distill_a = gather(distill, kDistillGradLse, 1);
    rows.distill_b = gather(distill, kDistillAttract, 1);
  }
  return rows;
}

// The columns that any of a tile's rows reads: its negatives, the rows it is a negative of, all rows that fell back.
std::vector<Span> active_spans(const RowOrder& order, const int64_t* positions, int64_t rows) {
  std::vector<Span> spans = order.fallback_spans;
  for (int64_t r = 0; r < rows; ++r) {
    if (!order.fallback[positions[r]]) spans.push_back(order.out(positions[r]));
    spans.push_back(order.in(positions[r]));
  }
  return merge_spans(std::move(spans), kSpanGap);
}

// h of the negatives of one row against a span of columns.
template <typename T>
void add_contrast_row(const GuidedTiles<T>& in, const PositionGradients<T>& rows, int64_t i, Span columns, const T* s,
                      const T* cos, T* h) {
  const int64_t self = in.order.self(i);
  const auto as_negative = [&](Span span, const std::vector<T>& a) {
    without(span, self, [&](Span part) {
      const int64_t from = part.begin - columns.begin;
      grad_as_negative(h + from, s + from, cos + from, part.size(), in.force, rows.lse.data() + part.begin,
                       a.data() + part.begin);
    });
  };
  if (!in.order.fallback[i]) {
    without(in.order.out(i).meet(columns), self, [&](Span part) {
      const int64_t from = part.begin - columns.begin;
      grad_negatives(h + from, s + from, cos + from, part.size(), in.force, rows.lse[i], rows.a[i]);
    });
  }
  const Span callers = in.order.in(i).meet(columns);
  if (in.order.fallback_spans.empty()) {
    as_negative(callers, rows.a);
  } else if (callers.size() == 0) {
    as_negative(columns, rows.a_fallback);
  } else {
    as_negative({columns.begin, callers.begin}, rows.a_fallback);
    as_negative(callers, rows.a);
    as_negative({callers.end, columns.end}, rows.a_fallback);
  }
}

// grad [N, D] by slot, in units of tau, += all pairs but the positives and the negatives of rows that fell back.
template <typename T>
void backward_tile(const GuidedTiles<T>& in, const PositionGradients<T>& rows_gradients, const int64_t* positions,
                   int64_t rows, Scratch<T>& scratch, T* grad) {
  in.load(positions, rows, scratch);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(grad + in.order.slot(positions[r]) * in.z.width, in.z.width, scratch.grad.get() + r * in.z.width);
  }
  const auto spans = in.distill ? std::vector<Span>{in.order.everything()} : active_spans(in.order, positions, rows);
  for_each_column_tile(spans, [&](Span columns) {
    in.student_products(rows, columns, scratch);
    if (in.distill || in.force.weighted) in.guide_products(rows, columns, scratch);
    std::fill_n(scratch.h.get(), rows * columns.size(), T(0));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = positions[r];
      const T* s = scratch.s.get() + r * columns.size();
      const T* cos = scratch.cos.get() + r * columns.size();
      T* h = scratch.h.get() + r * columns.size();
      if (in.contrast) add_contrast_row(in, rows_gradients, i, columns, s, cos, h);
      if (in.distill) {
        without(columns, in.order.self(i), [&](Span part) {
          const int64_t from = part.begin - columns.begin;
          grad_distill(h + from, s + from, cos + from, part.size(), in.teacher_scale, rows_gradients.distill(i),
                       rows_gradients.distill(part.begin));
        });
      }
    }
    in.add_gradient(rows, columns, scratch);
  });
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(scratch.grad.get() + r * in.z.width, in.z.width, grad + in.order.slot(positions[r]) * in.z.width);
  }
}

// The negatives of rows that fell back on all others, added to their own gradient.
template <typename T>
void fallback_tile(const GuidedTiles<T>& in, const PositionGradients<T>& rows_gradients, const int64_t* positions,
                   int64_t rows, Scratch<T>& scratch, T* grad) {
  in.load(positions, rows, scratch);
  std::fill_n(scratch.grad.get(), rows * in.z.width, T(0));
  for_each_column_tile({in.order.everything()}, [&](Span columns) {
    in.student_products(rows, columns, scratch);
    if (in.force.weighted) in.guide_products(rows, columns, scratch);
    std::fill_n(scratch.h.get(), rows * columns.size(), T(0));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = positions[r], row_begin = r * columns.size();
      without(columns, in.order.self(i), [&](Span part) {
        const int64_t from = row_begin + part.begin - columns.begin;
        grad_negatives(scratch.h.get() + from, scratch.s.get() + from, scratch.cos.get() + from, part.size(), in.force,
                       rows_gradients.lse[i], rows_gradients.a[i]);
      });
    }
    in.add_gradient(rows, columns, scratch);
  });
  for (int64_t r = 0; r < rows; ++r) {
    T* row = grad + in.order.slot(positions[r]) * in.z.width;
    for (int64_t d = 0; d < in.z.width; ++d) row[d] += scratch.grad[r * in.z.width + d];
  }
}

// dL/ds_ip of the positive p of i, less what the tiles have counted.
template <typename T>
T positive_gradient(const GuidedTiles<T>& in, const PositionGradients<T>& rows, int64_t i, int64_t p,
                    const PositivePair<T>& pair) {
  const double share = pair.missing_share(in, i, p) * std::exp2(static_cast<double>(pair.s) - rows.lse[i]);
  return static_cast<T>(rows.a[i] * share - rows.b_over_weight[i] * static_cast<double>(pair.attract));
}

// The views of the row at a position, both ways.
template <typename T>
void add_views(const GuidedTiles<T>& in, const PositionGradients<T>& rows, int64_t i, T* grad) {
  for (const int64_t* v = in.order.views_begin(i); v != in.order.views_end(i); ++v) {
    if (*v == in.order.self(i)) continue;
    const PositivePair<T> pair(in, i, *v);
    const T both_ways = positive_gradient(in, rows, i, *v, pair) + positive_gradient(in, rows, *v, i, pair);
    T* row = grad + in.order.slot(i) * in.z.width;
    for (int64_t d = 0; d < in.z.width; ++d) row[d] += both_ways * in.z.at(*v)[d];
  }
}

// Views row by row; neighbours in two steps, as their other side belongs to another row: the coefficients
// first, then slices of features, each of which one task adds in the order of the rows.
template <typename T>
void add_positives(const GuidedTiles<T>& in, const PositionGradients<T>& rows, const at::Tensor& neighbors, T* grad) {
  const int64_t n = in.order.size(), k = neighbors.size(1), width = in.z.width;
  const int64_t* neighbor = neighbors.const_data_ptr<int64_t>();
  const std::unique_ptr<T[]> coefficients(new T[n * k]);
  at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      add_views(in, rows, i, grad);
      for (int64_t s = 0; s < k; ++s) {
        const int64_t j = neighbor[in.order.row_at[i] * k + s];
        if (j < 0) continue;
        const int64_t p = in.order.position_of[j];
        coefficients[i * k + s] = positive_gradient(in, rows, i, p, PositivePair<T>(in, i, p));
      }
    }
  });
  run_parallel((width + kSlice - 1) / kSlice, [&](int64_t slice) {
    const int64_t begin = slice * kSlice, end = std::min(begin + kSlice, width);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t s = 0; s < k; ++s) {
        const int64_t j = neighbor[in.order.row_at[i] * k + s];
        if (j < 0) continue;
        const int64_t p = in.order.position_of[j];
        const T coefficient = coefficients[i * k + s];
        for (int64_t d = begin; d < end; ++d) {
          grad[i * width + d] += coefficient * in.z.at(p)[d];
          grad[p * width + d] += coefficient * in.z.at(i)[d];
        }
      }
    }
  });
}

// From the gradient of the unit rows to that of the rows as they came, in place. Returns sum_i <z_i, grad z_i>, which
// is 2 sum_ij G_ij s_ij, as the loss reads z through the products s_ij alone.
template <typename T>
double through_normalisation(const GuidedTiles<T>& in, const GuidedArguments& arguments, T* grad) {
  const int64_t n = in.order.size(), width = in.z.width;
  const double* norms = arguments.normalize ? in.z.norms.data() : nullptr;
  const double smallest = smallest_invertible_norm(arguments.z.scalar_type());
  std::vector<double> u_dot_du(n);
  run_rows(n, [&](int64_t begin, int64_t end) {
    normalize_rows_bwd(in.z.at(begin), grad + begin * width, end - begin, width, norms ? norms + begin : nullptr,
                       1 / arguments.temperature, smallest, u_dot_du.data() + begin);
  });
  return std::accumulate(u_dot_du.begin(), u_dot_du.end(), 0.0);
}

// grad += everything but the positives.
template <typename T>
void add_tiles(const GuidedTiles<T>& in, const PositionGradients<T>& rows_gradients, T* grad) {
  in.for_each_row_tile(in.order.all_positions(), [&](const int64_t* positions, int64_t rows, Scratch<T>& scratch) {
    backward_tile(in, rows_gradients, positions, rows, scratch, grad);
  });
  in.for_each_row_tile(in.order.fallback_positions(), [&](const int64_t* positions, int64_t rows, Scratch<T>& scratch) {
    fallback_tile(in, rows_gradients, positions, rows, scratch, grad);
  });
}

template <typename T>
std::tuple<at::Tensor, at::Tensor> backward(const GuidedArguments& arguments, const GuidedSaved& saved) {
  const int64_t n = arguments.n(), width = arguments.z.size(1);
  const bool has_contrast = arguments.clusters.has_value();
  const bool paired = arguments.distill && pairs_serve<T>(arguments);
  RowOrder order = order_rows(arguments);
  if (has_contrast) order.mark_fallback(saved.neighbors.const_data_ptr<int64_t>(), saved.neighbors.size(1));
  at::Tensor of_pairs = paired ? backward_pairs<T>(arguments, saved) : at::Tensor();
  const std::unique_ptr<T[]> grad(new T[n * width]());  // by position
  for (int64_t i = 0; paired && i < n; ++i) {
    std::copy_n(of_pairs.const_data_ptr<T>() + order.row_at[i] * width, width, grad.get() + i * width);
  }
  of_pairs.reset();
  GuidedTiles<T> in(arguments, order);
  in.distill = arguments.distill && !paired;
  const PositionGradients<T> rows_gradients = order_gradients(saved, in);
  if (in.contrast || in.distill) add_tiles(in, rows_gradients, grad.get());
  if (has_contrast) add_positives(in, rows_gradients, saved.neighbors, grad.get());
  const double u_dot_du = through_normalisation(in, arguments, grad.get());

  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  at::Tensor grad_z = at::empty({n, width}, options);
  T* out = grad_z.mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i) std::copy_n(grad.get() + i * width, width, out + order.row_at[i] * width);
  const auto dtype = arguments.z.scalar_type();
  return {grad_z.to(dtype),
          at::scalar_tensor(-u_dot_du / (2 * arguments.temperature), options.dtype(at::kDouble)).to(wide_dtype(dtype))};
}

template <typename T>
at::Tensor partial_bwd(const GuidedArguments& arguments, const GuidedStates& states) {
  RowOrder order = order_rows(arguments);
  if (states.x_contrast.has_value()) {
    const at::Tensor flags = both("contrast", states.x_contrast, states.y_contrast)->select(1, kContrastFallback);
    std::vector<char> marked(order.size());
    for (int64_t i = 0; i < order.size(); ++i) marked[i] = flags.const_data_ptr<double>()[i * kStateColumns] != 0;
    order.mark_fallback(marked);
  }
  const GuidedTiles<T> in(arguments, order);
  const PositionGradients<T> rows_gradients = order_states(states, in);
  const int64_t n = arguments.rows->z.size(0), width = in.z.width;
  const auto type = c10::CppTypeToScalarType<T>::value;
  at::Tensor by_slot = at::zeros({n, width}, type), grad_unit = at::empty({n, width}, type);
  T *grad = by_slot.mutable_data_ptr<T>(), *out = grad_unit.mutable_data_ptr<T>();
  add_tiles(in, rows_gradients, grad);
  at::parallel_for(order.first, order.size(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (in.contrast) add_views(in, rows_gradients, i, grad);
      const T* row = grad + order.slot(i) * width;
      T* to = out + order.result_row(i) * width;
      for (int64_t d = 0; d < width; ++d) to[d] = static_cast<T>(row[d] / arguments.temperature);
    }
  });
  return grad_unit.to(wide_dtype(arguments.rows->z.scalar_type()));
}

at::Tensor guided_partial_bwd_cpu(const Arguments& arguments) {
  GuidedArguments in = guided_partial_arguments(arguments);
  const GuidedStates states = guided_states(arguments);
  in.distill = states.x_distill.has_value();
  check_guided_partial_bwd(in, states);
  return dispatch_wide(compute_dtype(in), [&](auto zero) { return partial_bwd<decltype(zero)>(in, states); });
}

bool is_undefined(const GuidedArguments& in, const GuidedSaved& saved) {
  const bool contrast = in.clusters.has_value() &&
                        (reaches_undefined(saved.grad_loss, saved.lse) || reaches_undefined(saved.grad_lse, saved.lse));
  return contrast || (in.distill && (reaches_undefined(saved.grad_kl, saved.student_lse) ||
                                     reaches_undefined(saved.grad_kl, saved.teacher_lse) ||
                                     reaches_undefined(saved.grad_student_lse, saved.student_lse)));
}

std::tuple<at::Tensor, at::Tensor> guided_bwd_cpu(const Arguments& arguments) {
  GuidedArguments in = guided_arguments(arguments);
  const GuidedSaved saved = guided_saved(arguments);
  in.neighbors = saved.neighbors;
  check_guided_bwd(in, saved);
  if (is_undefined(in, saved)) {
    const auto wide = wide_dtype(in.z.scalar_type());
    return {at::full_like(in.z, NAN), at::scalar_tensor(NAN, in.z.options().dtype(wide))};
  }
  return dispatch_wide(compute_dtype(in), [&](auto zero) { return backward<decltype(zero)>(in, saved); });
}

}  // namespace

}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) {
  m.impl("guided_bwd", ltood::by_name<ltood::guided_bwd_cpu>());
  m.impl("guided_partial_bwd", ltood::by_name<ltood::guided_partial_bwd_cpu>());
}
