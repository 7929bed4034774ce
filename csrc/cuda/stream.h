// The device guard and the current stream without libc10_cuda, so that the CUDA glue also links against a CPU-only
// torch. Not yet verified on hardware: native_handle() of a CUDA stream is taken to be its cudaStream_t.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace ltood {

// The caller's current stream on the tensor's device, as a cudaStream_t.
inline void* current_stream(const at::Tensor& tensor) {
  return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(tensor.device()).native_handle();
}

}  // namespace ltood
