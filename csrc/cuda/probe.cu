#include <cuda_runtime.h>

#include "cuda/launch.cuh"
#include "cuda/probe.h"

namespace ltood {

namespace {

__global__ void probe_kernel(int* out) {
#ifdef __CUDA_ARCH__
  *out = __CUDA_ARCH__;
#endif
}

}  // namespace

int cuda_runtime_version() { return CUDART_VERSION; }

int launch_probe(int* out, void* stream) { return cuda::launch(probe_kernel, 1, 1, 0, out, stream); }

const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace ltood
