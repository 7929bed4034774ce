// Exponentials in units of log2, and sums and maxima over the lanes of a warp. A butterfly gives every lane the same
// bits, and its order is fixed.
#pragma once

namespace ltood::prim {

constexpr float kLog2E = 1.4426950408889634f;
constexpr double kLn2 = 0.69314718055994530942;
constexpr unsigned kFullWarp = 0xffffffffu;

// 2^x: relative error 2^-22 (PTX ISA, ex2.approx); 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Over kLanes lanes that lie kStride apart: <4, 1> a quad, <8, 4> the lanes of equal lane % 4, <32, 1> the warp.
template <int kLanes = 32, int kStride = 1, typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kStride * kLanes / 2; offset >= kStride; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

template <int kLanes = 32, int kStride = 1>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kStride * kLanes / 2; offset >= kStride; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  }
  return x;
}

}  // namespace ltood::prim
