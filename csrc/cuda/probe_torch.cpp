#include <torch/library.h>

#include "common/check.h"
#include "cuda/probe.h"
#include "cuda/stream.h"

namespace {

void cuda_probe(at::Tensor out) {  // [1] int32
  LTOOD_CHECK_TYPE(out.scalar_type() == at::kInt, "cuda_probe", "out", "an int32 tensor", out.scalar_type());
  LTOOD_CHECK_VALUE(out.numel() == 1, "cuda_probe", "out", "one element", out.sizes());
  const c10::DeviceGuard guard(out.device());
  const int error = ltood::launch_probe(out.data_ptr<int>(), ltood::current_stream(out));
  TORCH_CHECK(error == 0, "cuda_probe: the probe kernel was not launched: ", ltood::cuda_error_string(error));
}

}  // namespace

TORCH_LIBRARY_IMPL(ltood_fast, CUDA, m) { m.impl("cuda_probe", &cuda_probe); }
