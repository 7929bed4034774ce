// Tensor cores: wgmma (sm_90a), m64nNk16 on bfloat16 and float16, accumulated in float. The 128 threads of a warpgroup
// issue it together and go on; accumulators, registers of A and shared operands must be left alone until wgmma_wait.
//
// Layout with g = lane / 4, q = lane % 4 (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16"): warp w of the
// warpgroup holds rows 16 w ... 16 w + 15, in them element 4 j + 2 r + h is row g + 8 r, column 8 j + 2 q + h. Two
// fragments of 8 columns are, rounded to 16 bits, the A of m64k16: a product feeds the next one from registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ltood::prim {

// The same value in all lanes of a warp: an address that the compiler knows to be uniform costs a descriptor no more
// than an addition. All 32 lanes take part.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(0xffffffffu, x, 0); }

// Descriptor of an operand in shared memory as the copy engine lays it out: rows of 64 elements, 128 bytes, swizzled,
// eight of them together. The other dimension's further blocks of 64 elements, of operands that are read with K along
// the rows of the tile ("transposed"), are `leading` bytes apart.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared, uint32_t leading = 16) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return uint64_t((shared & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

// No instruction: the compiler must have written these registers before this point and may read them only behind it.
// The fences and waits below say nothing of the accumulators to the compiler, which could move arithmetic over them.
template <int kSize>
__device__ __forceinline__ void wgmma_tie(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kSize>
__device__ __forceinline__ void wgmma_tie(uint32_t (&a)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(a[i])::"memory");
}
template <int kRows, int kSize, typename T>
__device__ __forceinline__ void wgmma_tie(T (&x)[kRows][kSize]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) wgmma_tie(x[i]);
}

// Before the first product, and after other instructions have written accumulators or registers of A: these are the
// arguments.
template <typename... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
  (wgmma_tie(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed groups are in flight. The arguments are the accumulators and registers of A
// that are used or written afterwards.
template <int kPending, typename... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (wgmma_tie(registers), ...);
}

// How far a descriptor moves with its operand.
__device__ constexpr uint64_t descriptor_offset(uint32_t bytes) { return bytes >> 4; }

// d [64, N], N = 2 kSize: 64 or 128. A and B in shared memory, K along the rows; d = A B' (+ d).
template <typename half_t, int kSize>
__device__ __forceinline__ void wgmma_shared(float (&d)[kSize], uint64_t a, uint64_t b, bool accumulate);

// A in registers, B in shared memory with N along the rows; d = A B (+ d).
template <typename half_t, int kSize>
__device__ __forceinline__ void wgmma_registers(float (&d)[kSize], const uint32_t (&a)[4], uint64_t b, bool accumulate);

// clang-format off
#define LTOOD_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LTOOD_F16(d, i) LTOOD_F4(d, i), LTOOD_F4(d, i + 4), LTOOD_F4(d, i + 8), LTOOD_F4(d, i + 12)
#define LTOOD_F32(d, i) LTOOD_F16(d, i), LTOOD_F16(d, i + 16)
#define LTOOD_F64(d, i) LTOOD_F32(d, i), LTOOD_F32(d, i + 32)
#define LTOOD_NAMES32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define LTOOD_NAMES64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, " \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63}"

// Operands behind the accumulators: descriptors (or four registers) and the flag, by number.
#define LTOOD_WGMMA(type, name, columns, size, a0, a1, a2, a3, a4, a5)                                                 \
  template <>                                                                                                          \
  __device__ __forceinline__ void wgmma_shared<type, size>(float (&d)[size], uint64_t a, uint64_t b,                   \
                                                           bool accumulate) {                                          \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #a2 ", 0; wgmma.mma_async.sync.aligned.m64n" #columns               \
                 "k16.f32." name "." name " " LTOOD_NAMES##size ", %" #a0 ", %" #a1 ", p, 1, 1, 0, 0;}"                \
                 : LTOOD_F##size(d, 0) : "l"(a), "l"(b), "r"(int(accumulate)));                                        \
  }                                                                                                                    \
  template <>                                                                                                          \
  __device__ __forceinline__ void wgmma_registers<type, size>(float (&d)[size], const uint32_t (&a)[4], uint64_t b,    \
                                                              bool accumulate) {                                       \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #a5 ", 0; wgmma.mma_async.sync.aligned.m64n" #columns               \
                 "k16.f32." name "." name " " LTOOD_NAMES##size ", {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #a4    \
                 ", p, 1, 1, 1;}"                                                                                      \
                 : LTOOD_F##size(d, 0)                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));                          \
  }

LTOOD_WGMMA(__nv_bfloat16, "bf16", 64, 32, 32, 33, 34, 35, 36, 37)
LTOOD_WGMMA(__nv_bfloat16, "bf16", 128, 64, 64, 65, 66, 67, 68, 69)
LTOOD_WGMMA(__half, "f16", 64, 32, 32, 33, 34, 35, 36, 37)
LTOOD_WGMMA(__half, "f16", 128, 64, 64, 65, 66, 67, 68, 69)

#undef LTOOD_WGMMA
#undef LTOOD_NAMES64
#undef LTOOD_NAMES32
#undef LTOOD_F64
#undef LTOOD_F32
#undef LTOOD_F16
#undef LTOOD_F4
// clang-format on

}  // namespace ltood::prim
