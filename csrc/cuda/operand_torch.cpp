#include "cuda/operand_torch.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include <limits>

#include "common/check.h"
#include "cuda/probe.h"

namespace ltood {

ElementType element_type(const char* op, const char* argument, const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      LTOOD_CHECK_TYPE(false, op, argument, "float32, bfloat16 or float16 on CUDA", x.scalar_type());
  }
}

OperandTensors prepare_rows(const char* op, const char* argument, const at::Tensor& x, bool normalize,
                            bool half_splits) {
  const ElementType type = element_type(op, argument, x);
  LTOOD_CHECK_VALUE(x.size(0) <= std::numeric_limits<int>::max(), op, argument, "of fewer than 2^31 rows", x.size(0));
  const int n = static_cast<int>(x.size(0)), d = static_cast<int>(x.size(1));
  const bool rounded = at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::MEDIUM;
  const bool is_half = (type == kFloat16 && normalize) || (type == kFloat32 && half_splits && !rounded);
  const bool two_splits = (type == kFloat32 && !rounded) || (type == kFloat16 && !normalize);
  const int k_tiles = (d + kKTile - 1) / kKTile, splits = two_splits ? 2 : 1;
  OperandTensors tensors;
  tensors.x = x.contiguous();
  tensors.data =
      at::empty({splits, n, int64_t(kKTile) * k_tiles}, x.options().dtype(is_half ? at::kHalf : at::kBFloat16));
  tensors.scale = at::empty({n}, x.options().dtype(at::kFloat));
  tensors.inv_norm = at::empty({n}, x.options().dtype(at::kFloat));
  tensors.view = {tensors.data.data_ptr(), tensors.scale.const_data_ptr<float>(), n, k_tiles, splits, is_half};
  const PrepareParams params{
      tensors.x.const_data_ptr(), type, n, d, normalize, tensors.view, tensors.inv_norm.mutable_data_ptr<float>()};
  check_launch(op, ltood_launch_prepare_rows(&params, current_stream(x)));
  return tensors;
}

void check_launch(const char* op, int error) {
  TORCH_CHECK(error == 0, op, ": the CUDA kernel was not launched: ", cuda_error_string(error));
}

}  // namespace ltood
