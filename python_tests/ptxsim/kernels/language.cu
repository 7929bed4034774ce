// What nvcc makes of the plainer parts of the language: calls, local arrays, constants, module variables, atomics,
// grids of three dimensions, doubles, small integers, divergent loops, dynamic beside static shared memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

__constant__ float kWeights[4] = {0.5f, -1.f, 2.f, 0.25f};
__device__ const int kPrimes[8] = {2, 3, 5, 7, 11, 13, 17, 19};

__device__ __noinline__ int collatz(int n) {
  int steps = 0;
  while (n != 1) {
    n = n % 2 ? 3 * n + 1 : n / 2;
    ++steps;
  }
  return steps;
}

__global__ void calls_kernel(const int* n, int* steps) {
  const int i = threadIdx.x;
  steps[i] = collatz(n[i]) * 1000 + collatz(n[i] + 1);
}

__global__ void local_array_kernel(const int* picks, float* y, int rounds) {
  float table[8];
  for (int i = 0; i < 8; ++i) table[i] = kWeights[i % 4] * kPrimes[i];
  for (int r = 0; r < rounds; ++r) table[(picks[threadIdx.x] + r) % 8] += 1;
  y[threadIdx.x] = table[picks[threadIdx.x] % 8];
}

__global__ void grid_kernel(int* seen) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  seen[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

__global__ void types_kernel(const double* x, const uint8_t* bytes, double* y, int8_t* out, __half* h,
                             __nv_bfloat16* b) {
  const int i = threadIdx.x;
  y[i] = sqrt(x[i]) / 3 + exp(-x[i]);
  out[i] = static_cast<int8_t>(bytes[i] - 128);
  h[i] = __float2half(static_cast<float>(x[i])) * __float2half(2.f);
  b[i] = __float2bfloat16(static_cast<float>(x[i])) + __float2bfloat16(1.f);
}

__global__ void atomics_kernel(const int* x, int* sums, unsigned long long* best, float* total, unsigned* locks) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(sums, x[i]);
  atomicMin(sums + 1, x[i]);
  atomicMax(sums + 2, x[i]);
  atomicOr(sums + 3, 1 << (x[i] & 7));
  atomicMax(best, static_cast<unsigned long long>(x[i] + 1000) << 32 | i);
  atomicAdd(total, 0.5f * x[i]);
  unsigned old = *static_cast<volatile unsigned*>(locks);
  while (true) {  // a compare-and-swap loop: the largest value
    if (old >= static_cast<unsigned>(x[i] + 1000)) break;
    const unsigned found = atomicCAS(locks, old, x[i] + 1000);
    if (found == old) break;
    old = found;
  }
}

__global__ void shared_kernel(const float* x, float* y, int n) {
  extern __shared__ float dynamic[];
  __shared__ float fixed[32];
  dynamic[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 32) fixed[threadIdx.x] = -x[threadIdx.x];
  __syncthreads();
  float sum = 0;
  for (int i = 0; i <= static_cast<int>(threadIdx.x) % n; ++i) sum += dynamic[i] + fixed[i % 32];
  y[threadIdx.x] = sum;
}

struct Table {
  float values[16];
  int n;
};

__global__ void parameter_kernel(const Table table, float* y) {
  const Table* at = &table;  // indexed by thread: the address of a parameter
  y[threadIdx.x] = at->values[threadIdx.x % at->n];
}

extern "C" {

int launch_parameter(const Table* table, float* y) {
  parameter_kernel<<<1, 32>>>(*table, y);
  return cudaGetLastError();
}

int launch_calls(const int* n, int* steps) {
  calls_kernel<<<1, 64>>>(n, steps);
  return cudaGetLastError();
}

int launch_local_array(const int* picks, float* y, int rounds) {
  local_array_kernel<<<1, 64>>>(picks, y, rounds);
  return cudaGetLastError();
}

int launch_grid(int* seen) {
  grid_kernel<<<dim3(3, 2, 2), dim3(8, 2, 3)>>>(seen);
  return cudaGetLastError();
}

int launch_types(const double* x, const uint8_t* bytes, double* y, int8_t* out, __half* h, __nv_bfloat16* b) {
  types_kernel<<<1, 50>>>(x, bytes, y, out, h, b);
  return cudaGetLastError();
}

int launch_atomics(const int* x, int* sums, unsigned long long* best, float* total, unsigned* locks) {
  cudaMemsetAsync(sums, 0, 4 * sizeof(int), nullptr);
  cudaMemsetAsync(best, 0, sizeof(*best), nullptr);
  cudaMemcpyAsync(locks, sums, sizeof(*locks), cudaMemcpyDeviceToDevice, nullptr);
  atomics_kernel<<<2, 96>>>(x, sums, best, total, locks);
  return cudaGetLastError();
}

int launch_shared(const float* x, float* y, int threads, int bytes, int asks_for) {
  if (asks_for) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const auto error = cudaFuncSetAttribute(shared_kernel, attribute, asks_for)) return error;
  }
  shared_kernel<<<1, threads, bytes>>>(x, y, 8);
  return cudaGetLastError();
}

int device_properties(int* values) {
  cudaDeviceGetAttribute(values, cudaDevAttrMultiProcessorCount, 0);
  cudaDeviceGetAttribute(values + 1, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  cudaDeviceGetAttribute(values + 2, cudaDevAttrComputeCapabilityMajor, 0);
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(values + 3, shared_kernel, 64, 0);
}

}  // extern "C"
