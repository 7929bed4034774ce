// Where a row's log-sum-exp is NaN or +Inf its softmax has no value, and so has no gradient that it reaches.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>

#include "common/optional_tensor.h"

namespace ltood {

inline bool is_undefined(double lse) { return std::isnan(lse) || (std::isinf(lse) && lse > 0); }

// Whether a gradient other than 0 arrives at a row whose softmax is undefined. gradient [N], none = 0; lse [N] float64.
inline bool reaches_undefined(const OptionalTensor& gradient, const at::Tensor& lse) {
  if (!gradient) return false;
  const at::Tensor wide = gradient->to(at::kDouble).contiguous(), sums = lse.contiguous();
  const double* g = wide.const_data_ptr<double>();
  const double* x = sums.const_data_ptr<double>();
  for (int64_t i = 0; i < wide.numel(); ++i) {
    if (g[i] != 0 && is_undefined(x[i])) return true;
  }
  return false;
}

}  // namespace ltood
