// Tensors that a caller may leave out, and the check of one that holds a number a row.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

#include <optional>

#include "common/check.h"

namespace ltood {

using OptionalTensor = std::optional<at::Tensor>;

inline OptionalTensor dense(const OptionalTensor& x) { return x ? OptionalTensor(x->contiguous()) : std::nullopt; }

inline void check_vector(const char* op, const OptionalTensor& x, const char* name, c10::ScalarType dtype,
                         int64_t length, const at::Tensor& rows, const char* name_of_rows) {
  if (!x) return;
  LTOOD_CHECK_TYPE(x->scalar_type() == dtype, op, name, dtype, x->scalar_type());
  LTOOD_CHECK_VALUE(x->dim() == 1 && x->size(0) == length, op, name, c10::str("of shape [", length, "]"), "shape ",
                    x->sizes());
  LTOOD_CHECK_VALUE(x->device() == rows.device(), op, name, c10::str("on ", rows.device(), " as ", name_of_rows, " is"),
                    x->device());
}

}  // namespace ltood
