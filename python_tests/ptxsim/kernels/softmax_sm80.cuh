// A worked kernel in the Ampere style: rows of softmax(S) Z and log-sum-exp of S = scale Z Zᵀ without its diagonal.
// cp.async double buffering, XOR-swizzled bf16 tiles, ldmatrix(.trans), mma.sync, shuffles over the quad of a row.
// Bug plants one defect, each of a class that the simulator has to find.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/primitives/math.cuh"
#include "cuda/primitives/memory.cuh"
#include "cuda/primitives/mma.cuh"

namespace worked {

using namespace ltood::prim;

enum class Bug {
  kNone,
  kNoTrailingBarrier,  // a tile is overwritten while other warps read it
  kNoLeadingBarrier,   // a tile is read before other threads' copies have arrived
  kWaitsForTooFew,     // the last tile is read in flight
  kReadsPastTheEnd,    // the last tile copies rows behind the array
  kNoZeroFill,         // the last tile leaves its tail unwritten
  kCopiesTooFar,       // a copy behind the end of shared memory
  kNoBarrierForSum,    // warps add up a shared word too early
  kBarrierSkipped,     // one warp leaves out a barrier
  kSumNotAtomic,       // blocks add to one word without an atomic
  kWrongSwizzle,       // reads what was stored elsewhere: the result is wrong
  kShuffleDiverged,    // some lanes leave out a shuffle
};

constexpr int kRows = 64, kThreads = 128;

template <int kWidth>
constexpr int kTileBytes = kRows * kWidth * 2;
template <int kWidth>
constexpr int kSharedBytes = 3 * kTileBytes<kWidth>;

// Byte offset of 16-byte chunk `chunk` of row `row`.
template <int kWidth>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return uint32_t(row * kWidth * 2 + ((chunk ^ (row & 7)) << 4));
}

template <int kWidth, Bug kBug>
__device__ __forceinline__ void copy_tile(uint32_t to, const __nv_bfloat16* z, int row0, int n) {
  constexpr int kChunks = kWidth / 8;
  for (int c = threadIdx.x; c < kRows * kChunks; c += kThreads) {
    const int row = c / kChunks, chunk = c % kChunks;
    const bool inside = row0 + row < n || kBug == Bug::kReadsPastTheEnd;
    if (kBug == Bug::kNoZeroFill && row0 + row >= n) continue;
    uint32_t offset = swizzled<kWidth>(row, chunk);
    if (kBug == Bug::kCopiesTooFar && row == kRows - 1) offset += kTileBytes<kWidth>;
    cp_async16(to + offset, z + size_t(inside ? row0 + row : 0) * kWidth + chunk * 8, inside);
  }
}

// s = Q Kᵀ for the 16 rows of this warp; k_tile holds 64 rows of Z.
template <int kWidth, Bug kBug>
__device__ __forceinline__ void scores(float (&s)[kRows / 8][4], const uint32_t (&q)[kWidth / 16][4], uint32_t k_tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
#pragma unroll
    for (int j = 0; j < kRows / 16; ++j) {
      const int row = j * 16 + (lane & 7) + ((lane >> 4) << 3), chunk = k * 2 + ((lane >> 3) & 1);
      const uint32_t wrong = row * kWidth * 2 + ((chunk ^ (row & 3)) << 4);
      uint32_t b[4];
      ldmatrix_x4(b, k_tile + (kBug == Bug::kWrongSwizzle ? wrong : swizzled<kWidth>(row, chunk)));
      mma_m16n8k16<__nv_bfloat16>(s[2 * j], q[k], b[0], b[1]);
      mma_m16n8k16<__nv_bfloat16>(s[2 * j + 1], q[k], b[2], b[3]);
    }
  }
}

// out += P Z: P is packed from the accumulators, Z comes transposed out of the same tile.
template <int kWidth>
__device__ __forceinline__ void add_rows(float (&out)[kWidth / 8][4], const float (&p)[kRows / 8][4], uint32_t z_tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    const float (&left)[4] = p[2 * k], (&right)[4] = p[2 * k + 1];
    const uint32_t a[4] = {pack<__nv_bfloat16>(left[0], left[1]), pack<__nv_bfloat16>(left[2], left[3]),
                           pack<__nv_bfloat16>(right[0], right[1]), pack<__nv_bfloat16>(right[2], right[3])};
#pragma unroll
    for (int d = 0; d < kWidth / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, z_tile + swizzled<kWidth>(k * 16 + (lane & 15), d * 2 + (lane >> 4)));
      mma_m16n8k16<__nv_bfloat16>(out[2 * d], a, b[0], b[1]);
      mma_m16n8k16<__nv_bfloat16>(out[2 * d + 1], a, b[2], b[3]);
    }
  }
}

template <Bug kBug>
__device__ __forceinline__ float quad_max(float x) {
  if (kBug == Bug::kShuffleDiverged && threadIdx.x % 32 / 4 == 3) return x;
  return warp_max<4>(x);
}

struct Problem {
  const __nv_bfloat16* z;  // [N, kWidth]
  int n;
  float scale;               // in units of log2
  float *lse, *out, *total;  // [N], [N, kWidth], [1] (the sum of lse)
};

template <int kWidth, Bug kBug>
__global__ void __launch_bounds__(kThreads) softmax_kernel(Problem p) {
  extern __shared__ __align__(128) unsigned char tiles[];
  __shared__ float sums[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, quad = lane % 4;
  const uint32_t q_tile = shared_address(tiles), k_tiles = q_tile + kTileBytes<kWidth>;
  const int row0 = blockIdx.x * kRows, count = (p.n + kRows - 1) / kRows;
  copy_tile<kWidth, Bug::kNone>(q_tile, p.z, row0, p.n);
  copy_tile<kWidth, kBug>(k_tiles, p.z, 0, p.n);
  cp_async_commit();

  uint32_t q[kWidth / 16][4];
  float out[kWidth / 8][4] = {};
  float high[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  for (int t = 0; t < count; ++t) {
    const uint32_t tile = k_tiles + (t & 1) * kTileBytes<kWidth>;
    if (t + 1 < count) {
      copy_tile<kWidth, kBug>(k_tiles + ((t + 1) & 1) * kTileBytes<kWidth>, p.z, (t + 1) * kRows, p.n);
      cp_async_commit();
    }
    if (t + 1 < count || kBug == Bug::kWaitsForTooFew) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    const bool skips = kBug == Bug::kNoLeadingBarrier || (kBug == Bug::kBarrierSkipped && warp == 3 && t == 1);
    if (!skips) __syncthreads();
    if (t == 0) {
#pragma unroll
      for (int k = 0; k < kWidth / 16; ++k) {
        ldmatrix_x4(q[k], q_tile + swizzled<kWidth>(warp * 16 + (lane & 15), k * 2 + (lane >> 4)));
      }
    }
    float s[kRows / 8][4] = {};
    scores<kWidth, kBug>(s, q, tile);
    float highest[2] = {high[0], high[1]};
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row0 + warp * 16 + g + 8 * (i / 2), column = t * kRows + j * 8 + quad * 2 + (i & 1);
        s[j][i] = row == column || column >= p.n ? -INFINITY : s[j][i] * p.scale;
        highest[i / 2] = fmaxf(highest[i / 2], s[j][i]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      highest[h] = quad_max<kBug>(highest[h]);
      const float factor = exp2_fast(high[h] - (highest[h] == -INFINITY ? 0.f : highest[h]));
      sum[h] *= factor;
      high[h] = highest[h];
#pragma unroll
      for (int d = 0; d < kWidth / 8; ++d) {
        out[d][2 * h] *= factor;
        out[d][2 * h + 1] *= factor;
      }
    }
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[j][i] = exp2_fast(s[j][i] - (high[i / 2] == -INFINITY ? 0.f : high[i / 2]));
        sum[i / 2] += s[j][i];
      }
    }
    add_rows<kWidth>(out, s, tile);
    if (kBug != Bug::kNoTrailingBarrier) __syncthreads();
  }

  float part = 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] = warp_sum<4>(sum[h]);
    const int row = row0 + warp * 16 + g + 8 * h;
    if (row >= p.n) continue;
    const float lse = (high[h] + log2f(sum[h])) * float(kLn2);
    if (quad == 0) p.lse[row] = lse;
    if (quad == 0) part += lse;
#pragma unroll
    for (int d = 0; d < kWidth / 8; ++d) {
      float* to = p.out + size_t(row) * kWidth + d * 8 + quad * 2;
      to[0] = out[d][2 * h] / sum[h];
      to[1] = out[d][2 * h + 1] / sum[h];
    }
  }
  part = warp_sum(part);
  if (lane == 0) sums[warp] = part;
  if (kBug != Bug::kNoBarrierForSum) __syncthreads();
  if (threadIdx.x != 0) return;
  const float all = sums[0] + sums[1] + sums[2] + sums[3];
  if (kBug == Bug::kSumNotAtomic) {
    *p.total += all;
  } else {
    atomicAdd(p.total, all);
  }
}

}  // namespace worked
