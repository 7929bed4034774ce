// What every launcher needs on the host: sizes of grids, shared memory above 48 KiB, the device's limits.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace ltood::cuda {

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

constexpr int kMaxColumnSplits = 256;

// Ranges of the columns of a search or of sums, for problems with too few blocks of rows to fill the device.
struct ColumnSplit {
  int tiles;  // of a range
  int count;  // of ranges
};

// A range of fewer than 8 tiles spends more on its rows and lists than on products, and 256 ranges make 256 partial
// results a row that a second launch combines. 1,024 rows are 8 blocks for 264 places: 33 ranges fill them.
inline ColumnSplit split_columns(int tiles, int row_blocks, int places) {
  constexpr int kLeastTiles = 8;
  const int wanted = std::min(ceil_div(places, row_blocks), kMaxColumnSplits);
  const int each = ceil_div(tiles, std::clamp(wanted, 1, std::max(tiles / kLeastTiles, 1)));
  return {each, ceil_div(tiles, each)};
}

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // of one block, on request
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

// Whether to take the Hopper kernels: LTOOD_CUDA_PATH=sm90 asks for them, the device has compute capability 9.0, and
// this build has code for sm_90a (LTOOD_SM90A). Not yet verified on hardware, hence never by themselves.
inline bool use_sm90() {
#ifdef LTOOD_SM90A
  const char* path = std::getenv("LTOOD_CUDA_PATH");
  int device = 0, major = 0, minor = 0;
  return path && std::strcmp(path, "sm90") == 0 && !cudaGetDevice(&device) &&
         !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) &&
         !cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) && major == 9 && minor == 0;
#else
  return false;
#endif
}

// Clears the runtime's last error: a later cudaGetLastError does not report an error that was returned already.
inline cudaError_t returned(cudaError_t error) {
  if (error) (void)cudaGetLastError();
  return error;
}

// Lets a kernel have more dynamic shared memory than the 48 KiB that need no asking.
inline cudaError_t allow_shared(const void* kernel, int shared) {
  if (shared <= 48 * 1024) return cudaSuccess;
  return returned(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
}

// kernel<<<grid, block, shared>>>(params) on the stream; returns the status of this launch alone, where
// cudaGetLastError would also report the error of an earlier call. It waits for nothing and is safe while a CUDA
// graph is captured.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int block, int shared, const Params& params, void* stream) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t error = allow_shared(function, shared)) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  void* arguments[] = {const_cast<Params*>(&params)};
  return returned(cudaLaunchKernelExC(&config, function, arguments));
}

}  // namespace ltood::cuda
