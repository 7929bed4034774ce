// What the contrastive kernels take for 2^x, over an array.
#include <cuda_runtime.h>

#include "cuda/primitives/math.cuh"
#include "cuda/tile_sizes_sm90.h"

namespace {

constexpr int kThreads = 128;

__global__ void exponentials_kernel(const float* x, int n, float* polynomial, float* shared) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= n) return;
  polynomial[i] = ltood::prim::exp2_polynomial(x[i]);
  shared[i] = ltood::prim::exp2_shared<ltood::tile_sizes::kPolynomialEighths>(x[i], i);
}

}  // namespace

extern "C" int launch_exponentials(const float* x, int n, float* polynomial, float* shared) {
  exponentials_kernel<<<(n + kThreads - 1) / kThreads, kThreads>>>(x, n, polynomial, shared);
  return cudaGetLastError();
}
