#include "ops/guided/cpu/rows.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <cmath>

#include "common/row_panels.h"

namespace ltood {

namespace {

template <typename T>
at::Tensor matrix(const T* data, int64_t rows, int64_t columns) {
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  return at::from_blob(const_cast<T*>(data), {rows, columns}, options);
}

// out [rows, columns] = a [rows, d] b [columns, d]^T
template <typename T>
void multiply_transposed(T* out, const T* a, int64_t rows, const T* b, int64_t columns, int64_t d) {
  at::Tensor result = matrix(out, rows, columns);
  at::mm_out(result, matrix(a, rows, d), matrix(b, columns, d).t());
}

}  // namespace

RowOrder order_rows(const GuidedArguments& arguments) {
  const auto values = [](const OptionalTensor& x) { return x.has_value() ? x->const_data_ptr<int64_t>() : nullptr; };
  const int64_t k = arguments.far.has_value() ? arguments.far->numel() : 0;
  std::optional<PartialShape> partial;
  if (arguments.rows.has_value()) partial = {arguments.z.size(0), arguments.rows->diagonal};
  return {arguments.n(), values(arguments.clusters), values(arguments.far), k, values(arguments.instance_ids), partial};
}

template <typename T>
OrderedRows<T>::OrderedRows(const at::Tensor& x, const OptionalTensor& more, const RowOrder& order, bool normalize)
    : width(x.size(1)),
      data(at::empty({order.size(), width}, c10::CppTypeToScalarType<T>::value)),
      rows(data.const_data_ptr<T>()),
      norms(normalize ? order.size() : 0) {
  T* to_rows = data.mutable_data_ptr<T>();
  int64_t first = 0;
  for (const at::Tensor& from : {x, more.value_or(at::Tensor())}) {
    if (!from.defined()) continue;
    const at::Tensor wide = wide_rows(from);
    const std::vector<double> lengths = normalize ? norms_of_rows(wide) : std::vector<double>();
    const at::Tensor unit = pad_unit_rows(wide, 1, c10::CppTypeToScalarType<T>::value, normalize);
    const T* of_unit = unit.template const_data_ptr<T>();
    run_rows(from.size(0), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t position = order.position_of[first + i];
        std::copy_n(of_unit + i * width, width, to_rows + position * width);
        if (normalize) norms[position] = lengths[i];
      }
    });
    first += from.size(0);
  }
}

template <typename T>
GuidedTiles<T>::GuidedTiles(const GuidedArguments& arguments, const RowOrder& row_order)
    : order(row_order),
      z(arguments.z, arguments.rows ? std::optional(arguments.rows->z) : std::nullopt, row_order, arguments.normalize),
      e(arguments.guide, arguments.rows ? std::optional(arguments.rows->guide) : std::nullopt, row_order, true),
      scale(static_cast<T>(kLog2E / arguments.temperature)),
      teacher_scale(static_cast<T>(kLog2E / arguments.teacher())),
      force(arguments.force),
      contrast(arguments.clusters.has_value()),
      distill(arguments.distill) {}

template <typename T>
void GuidedTiles<T>::load(const int64_t* positions, int64_t rows, Scratch<T>& scratch) const {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = z.at(positions[r]);
    for (int64_t d = 0; d < z.width; ++d) scratch.z[r * z.width + d] = row[d] * scale;
    std::copy_n(e.at(positions[r]), e.width, scratch.e.get() + r * e.width);
  }
}

template <typename T>
void GuidedTiles<T>::student_products(int64_t rows, Span columns, Scratch<T>& scratch) const {
  multiply_transposed(scratch.s.get(), scratch.z.get(), rows, z.at(columns.begin), columns.size(), z.width);
}

template <typename T>
void GuidedTiles<T>::guide_products(int64_t rows, Span columns, Scratch<T>& scratch) const {
  multiply_transposed(scratch.cos.get(), scratch.e.get(), rows, e.at(columns.begin), columns.size(), e.width);
}

template <typename T>
void GuidedTiles<T>::add_gradient(int64_t rows, Span columns, Scratch<T>& scratch) const {
  at::Tensor grad = matrix(scratch.grad.get(), rows, z.width);
  const at::Tensor h = matrix(scratch.h.get(), rows, columns.size());
  at::addmm_out(grad, grad, h, matrix(z.at(columns.begin), columns.size(), z.width));
}

template struct OrderedRows<float>;
template struct OrderedRows<double>;
template struct GuidedTiles<float>;
template struct GuidedTiles<double>;

}  // namespace ltood
