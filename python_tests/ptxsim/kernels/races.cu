// One defect each, and what its correct form looks like: kind = defect, fixed = 1 removes it.
#include <cuda_runtime.h>

constexpr int kThreads = 64;

// The last block to arrive sums what all blocks left in partial.
// kFence: 1 by the thread that arrives, 2 by every thread after its writes, 0 by none.
template <int kFence, bool kSecondFence, bool kBarrier>
__global__ void last_block_sums_kernel(const float* x, float* partial, unsigned* arrived, float* sum) {
  __shared__ bool last;
  partial[blockIdx.x * kThreads + threadIdx.x] = x[blockIdx.x * kThreads + threadIdx.x];
  if (kFence == 2) __threadfence();
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (kFence == 1) __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    if (kSecondFence) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float total = 0;
  for (int i = threadIdx.x; i < gridDim.x * kThreads; i += kThreads) total += partial[i];
  atomicAdd(sum, total);
}

extern "C" int launch_last_block(int fence, int second, int barrier, const float* x, float* partial, unsigned* arrived,
                                 float* sum, int blocks) {
  auto kernel = last_block_sums_kernel<1, true, true>;
  if (!fence) kernel = last_block_sums_kernel<0, true, true>;
  if (!second) kernel = last_block_sums_kernel<1, false, true>;
  if (!barrier) kernel = last_block_sums_kernel<1, true, false>;
  if (fence == 2) kernel = barrier ? last_block_sums_kernel<2, true, true> : last_block_sums_kernel<2, true, false>;
  kernel<<<blocks, kThreads>>>(x, partial, arrived, sum);
  return cudaGetLastError();
}

// Lanes of one warp pass values through shared memory.
template <bool kSync>
__global__ void lane_exchange_kernel(const float* x, float* y) {
  __shared__ float row[kThreads];
  row[threadIdx.x] = x[threadIdx.x];
  if (kSync) __syncwarp();
  y[threadIdx.x] = row[threadIdx.x ^ 1];
}

extern "C" int launch_lane_exchange(int fixed, const float* x, float* y) {
  auto kernel = fixed ? lane_exchange_kernel<true> : lane_exchange_kernel<false>;
  kernel<<<1, kThreads>>>(x, y);
  return cudaGetLastError();
}

// A second exchange over the same words: what was synchronised once says nothing about later accesses.
template <bool kSync>
__global__ void second_exchange_kernel(const float* x, float* y) {
  __shared__ float row[kThreads];
  row[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  const float first = row[threadIdx.x ^ 1];
  if (kSync) __syncwarp();
  row[threadIdx.x] = 2 * first;
  __syncwarp();
  y[threadIdx.x] = row[threadIdx.x ^ 2];
}

extern "C" int launch_second_exchange(int fixed, const float* x, float* y) {
  auto kernel = fixed ? second_exchange_kernel<true> : second_exchange_kernel<false>;
  kernel<<<1, kThreads>>>(x, y);
  return cudaGetLastError();
}

// Every thread adds to one word of shared memory.
template <bool kAtomic>
__global__ void count_kernel(int* total) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (kAtomic) {
    atomicAdd(&count, 1);
  } else {
    count = threadIdx.x;
  }
  __syncthreads();
  if (threadIdx.x == 0) *total = count;
}

extern "C" int launch_count(int fixed, int* total) {
  auto kernel = fixed ? count_kernel<true> : count_kernel<false>;
  kernel<<<1, kThreads>>>(total);
  return cudaGetLastError();
}

// Neighbouring blocks write overlapping ranges of y, with one value.
template <int kOverlap>
__global__ void overlap_kernel(float* y) {
  y[blockIdx.x * (kThreads - kOverlap) + threadIdx.x] = 1;
}

extern "C" int launch_overlap(int fixed, float* y, int blocks) {
  auto kernel = fixed ? overlap_kernel<0> : overlap_kernel<8>;
  kernel<<<blocks, kThreads>>>(y);
  return cudaGetLastError();
}

// Warp 0 fills, warp 1 reads, ordered by a named barrier; warp 2 goes its own way.
template <bool kBarrier>
__global__ void named_barrier_kernel(const float* x, float* y) {
  __shared__ float row[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 2) return;
  if (warp == 0) {
    row[lane] = x[lane];
    if (kBarrier) asm volatile("bar.arrive 3, 64;" ::: "memory");
  } else {
    if (kBarrier) asm volatile("bar.sync 3, 64;" ::: "memory");
    y[lane] = row[31 - lane];
  }
}

extern "C" int launch_named_barrier(int fixed, const float* x, float* y) {
  auto kernel = fixed ? named_barrier_kernel<true> : named_barrier_kernel<false>;
  kernel<<<1, 96>>>(x, y);
  return cudaGetLastError();
}

// A barrier that only some warps reach: the others wait at another one, or have nothing to wait for.
template <int kKind>
__global__ void barrier_kernel(int* y) {
  const int warp = threadIdx.x / 32;
  if (kKind == 1) {
    if (warp == 0) {
      __syncthreads();
      y[kThreads] = 1;
    } else {
      __syncthreads();
      y[kThreads + threadIdx.x] = 2;
    }
  } else if (kKind == 2) {
    if (warp == 0) asm volatile("bar.sync 1, 64;" ::: "memory");
  } else if (kKind == 3) {
    if (threadIdx.x % 2) __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = warp;
}

extern "C" int launch_barrier(int kind, int* y) {
  auto kernel = barrier_kernel<0>;
  if (kind == 1) kernel = barrier_kernel<1>;
  if (kind == 2) kernel = barrier_kernel<2>;
  if (kind == 3) kernel = barrier_kernel<3>;
  kernel<<<1, kThreads>>>(y);
  return cudaGetLastError();
}
