// Operands of the tensor cores from tensors, and the few things that every CUDA op here does with torch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

#include "cuda/operand.h"
#include "cuda/stream.h"

namespace ltood {

// The tensors behind an Operand; they live as long as the launches that are enqueued with it need them.
struct OperandTensors {
  at::Tensor x;         // the rows, contiguous
  at::Tensor data;      // [splits, N, 64 * k_tiles]
  at::Tensor scale;     // [N] float32
  at::Tensor inv_norm;  // [N] float32
  Operand view;
};

// Element type of a kernel's input; TypeError for what the CUDA kernels do not take (float64).
ElementType element_type(const char* op, const char* argument, const at::Tensor& x);

// Makes the rows [N, D] ready, on the current stream of their device. Precision: float16 and bfloat16 rows are taken as
// they are; float32 rows in two splits unless torch.get_float32_matmul_precision() is "medium"; float16 rows that are
// not normalised as two bfloat16 splits, as their products do not fit float16. half_splits: the two splits of float32
// rows are float16.
OperandTensors prepare_rows(const char* op, const char* argument, const at::Tensor& x, bool normalize,
                            bool half_splits = false);

// RuntimeError with the device's message when a launcher returned an error.
void check_launch(const char* op, int error);

}  // namespace ltood
