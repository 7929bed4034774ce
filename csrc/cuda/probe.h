// A probe that asks a device which of our compiled architectures it runs. Torch-free.
#pragma once

namespace ltood {

// CUDART_VERSION this file was compiled with, e.g. 13000.
int cuda_runtime_version();

// Writes the __CUDA_ARCH__ of the code that the device picked (e.g. 900) to out[0].
// out: device pointer to one int; stream: cudaStream_t. Returns a cudaError_t.
int launch_probe(int* out, void* stream);

// cudaGetErrorString of a code returned by a launcher.
const char* cuda_error_string(int error);

}  // namespace ltood
