// What every launcher needs on the host: sizes of grids, shared memory above 48 KiB, the device's limits.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace ltood::cuda {

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // of one block, when asked for
};

inline cudaError_t device_limits(DeviceLimits& limits) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device)) {
    return error;
  }
  return cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Lets a kernel have more dynamic shared memory than the 48 KiB that need no asking.
inline cudaError_t allow_shared(const void* kernel, int shared) {
  if (shared <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
}

// kernel<<<grid, block, shared>>>(params) on the stream; returns what the launch says. It waits for nothing and is safe
// while a CUDA graph is being captured.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int block, int shared, const Params& params, void* stream) {
  if (const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), shared)) return error;
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

}  // namespace ltood::cuda
