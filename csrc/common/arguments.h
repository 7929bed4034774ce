// The arguments of an operator, read by the names of its schema, so that a schema is written once: in bindings.cpp.
//
//   ContrastiveInputs contrastive_inputs(const Arguments& arguments) { in.labels = arguments.optional("labels"); ... }
//   Outputs contrastive_cpu(const Arguments& arguments);
//   m.impl("contrastive", by_name<contrastive_cpu>());
//
// Python calls an operator boxed already, so this costs the comparison of some names: 0.3 us of a call with 14
// arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <utility>

#include "common/optional_tensor.h"

namespace ltood {

// A number, or a 0-d float tensor on the device of the rows, which wins.
struct Temperature {
  double number = 1;
  OptionalTensor tensor;

  // Waits for the device that holds the tensor.
  double value() const { return tensor ? tensor->item<double>() : number; }
};

// A value that a CUDA device holds is not read.
inline void check_temperature(const char* op, const Temperature& temperature, const at::Tensor& rows,
                              const char* name_of_rows) {
  const OptionalTensor& tau = temperature.tensor;
  if (!tau) {
    LTOOD_CHECK_VALUE(temperature.number > 0, op, "temperature", "positive", temperature.number);
    return;
  }
  LTOOD_CHECK_VALUE(tau->dim() == 0, op, "temperature", "a float or a 0-d float tensor", "shape ", tau->sizes());
  LTOOD_CHECK_VALUE(tau->device() == rows.device(), op, "temperature",
                    c10::str("on ", rows.device(), " as ", name_of_rows, " is"), tau->device());
}

class Arguments {
 public:
  Arguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack)
      : schema_(op.schema()), values_(torch::jit::last(stack, op.schema().arguments().size())) {}

  const at::Tensor& tensor(const char* name) const { return value(name).toTensor(); }
  OptionalTensor optional(const char* name) const { return value(name).to<OptionalTensor>(); }
  // Contiguous, as kernels read vectors.
  OptionalTensor dense(const char* name) const { return ltood::dense(optional(name)); }
  double number(const char* name) const { return value(name).toDouble(); }
  std::optional<double> optional_number(const char* name) const { return value(name).to<std::optional<double>>(); }
  int64_t integer(const char* name) const { return value(name).toInt(); }
  bool flag(const char* name) const { return value(name).toBool(); }
  Temperature temperature() const { return {number("temperature"), optional("temperature_tensor")}; }

 private:
  const c10::IValue& value(const char* name) const {
    const auto index = schema_.argumentIndexWithName(name);
    TORCH_INTERNAL_ASSERT(index.has_value(), schema_.name(), " has no argument ", name);
    return values_[*index];
  }

  const c10::FunctionSchema& schema_;
  at::ArrayRef<c10::IValue> values_;
};

namespace detail {

inline void push_outputs(torch::jit::Stack& stack, at::Tensor&& output) { stack.emplace_back(std::move(output)); }

template <typename... Tensors>
void push_outputs(torch::jit::Stack& stack, std::tuple<Tensors...>&& outputs) {
  std::apply([&](auto&... output) { (stack.emplace_back(std::move(output)), ...); }, outputs);
}

template <auto kFunction>
void call_by_name(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto outputs = kFunction(Arguments(op, *stack));
  torch::jit::drop(*stack, op.schema().arguments().size());
  push_outputs(*stack, std::move(outputs));
}

}  // namespace detail

// The kernel of an operator, from a function of its Arguments that returns a tensor or a tuple of tensors.
template <auto kFunction>
torch::CppFunction by_name() {
  return torch::CppFunction::makeFromBoxedFunction<&detail::call_by_name<kFunction>>();
}

}  // namespace ltood
