// The one switch from a tensor's dtype to the type that its sums are carried in.
#pragma once

#include <c10/core/ScalarType.h>

#include <type_traits>

namespace ltood {

// The dtype an op accumulates and answers in: float64 for float64, float32 for all others.
inline c10::ScalarType wide_dtype(c10::ScalarType dtype) {
  return dtype == c10::ScalarType::Double ? c10::ScalarType::Double : c10::ScalarType::Float;
}

// Calls body(T{}) with T = double or float, the types that kernels on the CPU compute in.
template <typename Body>
auto dispatch_wide(c10::ScalarType dtype, Body&& body) {
  return dtype == c10::ScalarType::Double ? body(double{}) : body(float{});
}

}  // namespace ltood
