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

// 2^x without the special-function unit, for -126 <= x <= 127: relative error 2^-22. x = n + f with |f| <= 1/2, a
// polynomial of 2^f (minimax of the relative error, degree 5), and n added to its exponent. NaN stays NaN.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const float rounded = x + kRound, f = x - (rounded - kRound);
  float p = 0.0013276444f;
  p = fmaf(p, f, 0.0096755377f);
  p = fmaf(p, f, 0.055507133f);
  p = fmaf(p, f, 0.24022120f);
  p = fmaf(p, f, 0.69314697f);
  p = fmaf(p, f, 1.0000001f);
  return fmaf(x, 0.f, __int_as_float(__float_as_int(p) + (__float_as_int(rounded) << 23)));
}

// The i-th of many exponentials, kPolynomial of eight by the polynomial: two pipes share the work.
template <int kPolynomial>
__device__ __forceinline__ float exp2_shared(float x, int i) {
  return i % 8 < kPolynomial ? exp2_polynomial(x) : exp2_fast(x);
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

// The place of the first of ascending numbers that is no less than `key`; `count` where there is none.
__device__ __forceinline__ int64_t lower_bound(const int64_t* ascending, int64_t count, int64_t key) {
  int64_t begin = 0, end = count;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (ascending[middle] < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

}  // namespace ltood::prim
