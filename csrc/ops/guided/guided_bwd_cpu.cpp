// Backward of the guided family on the CPU. With G_ij = dL/ds_ij, the gradient of the unit row z_i is
//   (1/tau) sum_j H_ij z_j,   H = G + G^T,
// so every tile of rows owns its result: each reads its own negatives, the rows it is a negative of, and the softmaxes
// both ways. Positives are added row by row, the gradient goes back through the normalisation last.
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>
#include <numeric>
#include <tuple>

#include "common/dispatch.h"
#include "ops/guided/guided_rows.h"

namespace ltood {

namespace {

constexpr int64_t kSlice = 16;  // features that one task scatters: a cache line of float32

// GuidedSaved by position, logarithms in base 2. dL/ds_ij = a_i exp(s_ij - lse_i) w_ij - [j in P(i)] b_i w+_ij /
// weight_i, and in distillation a_i q_ij - b_i p_ij.
template <typename T>
struct RowGradients {
  std::vector<T> lse, a, a_fallback, b_over_weight;
  std::vector<T> student_lse, teacher_lse, distill_a, distill_b;

  DistillRow<T> distill(int64_t i) const {
    return {student_lse.data() + i, teacher_lse.data() + i, distill_a.data() + i, distill_b.data() + i};
  }
};

template <typename T>
RowGradients<T> order_gradients(const GuidedSaved& saved, const GuidedTiles<T>& in) {
  const auto gather = [&](const std::optional<at::Tensor>& by_row, double factor) {
    std::vector<T> to(in.order.size(), T(0));
    if (!by_row.has_value()) return to;
    const at::Tensor wide = by_row->to(at::kDouble).contiguous();
    const double* from = wide.const_data_ptr<double>();
    for (int64_t i = 0; i < in.order.size(); ++i) to[i] = static_cast<T>(from[in.order.row_at[i]] * factor);
    return to;
  };
  RowGradients<T> rows;
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
void add_contrast_row(const GuidedTiles<T>& in, const RowGradients<T>& rows, int64_t i, Span columns, const T* s,
                      const T* cos, T* h) {
  const auto as_negative = [&](Span span, const std::vector<T>& a) {
    without(span, i, [&](Span part) {
      const int64_t from = part.begin - columns.begin;
      grad_as_negative(h + from, s + from, cos + from, part.size(), in.force, rows.lse.data() + part.begin,
                       a.data() + part.begin);
    });
  };
  if (!in.order.fallback[i]) {
    without(in.order.out(i).meet(columns), i, [&](Span part) {
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

// grad [N, D] by position, in units of tau: all pairs but the positives and the negatives of rows that fell back.
template <typename T>
void backward_tile(const GuidedTiles<T>& in, const RowGradients<T>& rows_gradients, const int64_t* positions,
                   int64_t rows, Scratch<T>& scratch, T* grad) {
  in.load(positions, rows, scratch);
  std::fill_n(scratch.grad.get(), rows * in.z.width, T(0));
  const auto spans = in.distill ? std::vector<Span>{{0, in.order.size()}} : active_spans(in.order, positions, rows);
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
        without(columns, i, [&](Span part) {
          const int64_t from = part.begin - columns.begin;
          grad_distill(h + from, s + from, cos + from, part.size(), in.teacher_scale, rows_gradients.distill(i),
                       rows_gradients.distill(part.begin));
        });
      }
    }
    in.add_gradient(rows, columns, scratch);
  });
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(scratch.grad.get() + r * in.z.width, in.z.width, grad + positions[r] * in.z.width);
  }
}

// The negatives of rows that fell back on all others, added to their own gradient.
template <typename T>
void fallback_tile(const GuidedTiles<T>& in, const RowGradients<T>& rows_gradients, const int64_t* positions,
                   int64_t rows, Scratch<T>& scratch, T* grad) {
  in.load(positions, rows, scratch);
  std::fill_n(scratch.grad.get(), rows * in.z.width, T(0));
  for_each_column_tile({{0, in.order.size()}}, [&](Span columns) {
    in.student_products(rows, columns, scratch);
    if (in.force.weighted) in.guide_products(rows, columns, scratch);
    std::fill_n(scratch.h.get(), rows * columns.size(), T(0));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = positions[r], row_begin = r * columns.size();
      without(columns, i, [&](Span part) {
        const int64_t from = row_begin + part.begin - columns.begin;
        grad_negatives(scratch.h.get() + from, scratch.s.get() + from, scratch.cos.get() + from, part.size(), in.force,
                       rows_gradients.lse[i], rows_gradients.a[i]);
      });
    }
    in.add_gradient(rows, columns, scratch);
  });
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < in.z.width; ++d) grad[positions[r] * in.z.width + d] += scratch.grad[r * in.z.width + d];
  }
}

// dL/ds_ip of the positive p of i, less what the tiles have counted.
template <typename T>
T positive_gradient(const GuidedTiles<T>& in, const RowGradients<T>& rows, int64_t i, int64_t p,
                    const PositivePair<T>& pair) {
  const double share = pair.missing_share(in, i, p) * std::exp2(static_cast<double>(pair.s) - rows.lse[i]);
  return static_cast<T>(rows.a[i] * share - rows.b_over_weight[i] * static_cast<double>(pair.attract));
}

// Views both ways row by row; neighbours in two steps, as their other side belongs to another row: the coefficients
// first, then slices of features, each of which one task adds in the order of the rows.
template <typename T>
void add_positives(const GuidedTiles<T>& in, const RowGradients<T>& rows, const at::Tensor& neighbors, T* grad) {
  const int64_t n = in.order.size(), k = neighbors.size(1), width = in.z.width;
  const int64_t* neighbor = neighbors.const_data_ptr<int64_t>();
  const std::unique_ptr<T[]> coefficients(new T[n * k]);
  at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (const int64_t* v = in.order.views_begin(i); v != in.order.views_end(i); ++v) {
        if (*v == i) continue;
        const PositivePair<T> pair(in, i, *v);
        const T both = positive_gradient(in, rows, i, *v, pair) + positive_gradient(in, rows, *v, i, pair);
        for (int64_t d = 0; d < width; ++d) grad[i * width + d] += both * in.z.at(*v)[d];
      }
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
double through_normalisation(const GuidedTiles<T>& in, bool normalize, double temperature, T* grad) {
  const int64_t n = in.order.size(), width = in.z.width;
  std::vector<double> along(n);
  at::parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* g = grad + i * width;
      const T* z = in.z.at(i);
      for (int64_t d = 0; d < width; ++d) g[d] = static_cast<T>(g[d] / temperature);
      along[i] = dot(g, z, width);
      if (!normalize) continue;
      const T radial = in.z.norms[i] >= static_cast<T>(kNormEps) ? static_cast<T>(along[i]) : T(0);
      const T scale = T(1) / std::max(in.z.norms[i], static_cast<T>(kNormEps));
      for (int64_t d = 0; d < width; ++d) g[d] = (g[d] - radial * z[d]) * scale;
    }
  });
  return std::accumulate(along.begin(), along.end(), 0.0);
}

template <typename T>
std::tuple<at::Tensor, at::Tensor> backward(const GuidedArguments& arguments, const GuidedSaved& saved) {
  const int64_t n = arguments.n(), width = arguments.z.size(1);
  const bool has_contrast = arguments.clusters.has_value();
  RowOrder order = order_rows(arguments);
  if (has_contrast) order.mark_fallback(saved.neighbors.const_data_ptr<int64_t>(), saved.neighbors.size(1));
  const GuidedTiles<T> in(arguments, order);
  const RowGradients<T> rows_gradients = order_gradients(saved, in);

  const std::unique_ptr<T[]> grad(new T[n * width]);  // by position
  in.for_each_row_tile(order.all_positions(), [&](const int64_t* positions, int64_t rows, Scratch<T>& scratch) {
    backward_tile(in, rows_gradients, positions, rows, scratch, grad.get());
  });
  in.for_each_row_tile(order.fallback_positions(), [&](const int64_t* positions, int64_t rows, Scratch<T>& scratch) {
    fallback_tile(in, rows_gradients, positions, rows, scratch, grad.get());
  });
  if (has_contrast) add_positives(in, rows_gradients, saved.neighbors, grad.get());
  const double along = through_normalisation(in, arguments.normalize, arguments.temperature, grad.get());

  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  at::Tensor grad_z = at::empty({n, width}, options);
  T* out = grad_z.mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i) std::copy_n(grad.get() + i * width, width, out + order.row_at[i] * width);
  const auto dtype = arguments.z.scalar_type();
  return {grad_z.to(dtype), at::scalar_tensor(-along / (2 * arguments.temperature), options.dtype(wide_dtype(dtype)))};
}

std::tuple<at::Tensor, at::Tensor> guided_bwd_cpu(
    const std::optional<at::Tensor>& grad_loss, const std::optional<at::Tensor>& grad_lse,  // [N], none = 0
    const std::optional<at::Tensor>& grad_kl, const std::optional<at::Tensor>& grad_student_lse,
    const at::Tensor& z,                            // [N, D]
    const at::Tensor& guide,                        // [N, Dg]
    const std::optional<at::Tensor>& clusters,      // [N]
    const std::optional<at::Tensor>& far,           // [K]
    const std::optional<at::Tensor>& instance_ids,  // [N]
    const at::Tensor& weight, const at::Tensor& lse, const at::Tensor& neighbors, const at::Tensor& student_lse,
    const at::Tensor& teacher_lse, double temperature, const std::optional<at::Tensor>& temperature_tensor,
    std::optional<double> teacher_temperature, bool weighted, double gamma, bool normalize, bool distill) {
  const double tau = temperature_value(temperature, temperature_tensor);
  const GuidedArguments arguments{z,
                                  guide,
                                  clusters,
                                  far,
                                  instance_ids,
                                  neighbors,
                                  tau,
                                  teacher_temperature.value_or(tau),
                                  {weighted && gamma != 0, gamma},
                                  normalize,
                                  distill};
  const GuidedSaved saved{grad_loss, grad_lse,         weight,      lse,        neighbors,
                          grad_kl,   grad_student_lse, student_lse, teacher_lse};
  check_guided(arguments, saved);
  return dispatch_wide(compute_dtype(arguments), [&](auto zero) { return backward<decltype(zero)>(arguments, saved); });
}

}  // namespace

}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) { m.impl("guided_bwd", &ltood::guided_bwd_cpu); }
