// The worked kernel of softmax_sm80.cuh in the Hopper style, 128 columns: one warp copies tiles with TMA into a ring of
// two, a warpgroup multiplies them with wgmma, mbarriers hand the tiles over.
#include "cuda/launch.cuh"
#include "cuda/primitives/math.cuh"
#include "cuda/primitives/mbarrier.cuh"
#include "cuda/primitives/memory.cuh"
#include "cuda/primitives/mma.cuh"
#include "cuda/primitives/tma.cuh"
#include "cuda/primitives/wgmma.cuh"

namespace worked {

using namespace ltood::prim;

enum class Bug {
  kNone,
  kReleasesEarly,     // the ring's slot is given back before wgmma has read it
  kNoWaitForTile,     // a tile is read before it has landed
  kWrongParity,       // the copier waits for the wrong phase
  kNoWaitForProduct,  // accumulators are read in flight
  kWrongByteCount,    // an mbarrier waits for bytes that never come
  kWrongStride,       // the descriptor's stride: wrong numbers
  kWrongStep,         // the descriptor's step along K: wrong numbers
  kNoFence,           // wgmma without wgmma.fence
  kOverwrites,        // the thread that issued a wgmma writes to its operand
};

constexpr int kWidth = 128, kRows = 64, kStages = 2, kHalf = kRows * 128, kTile = 2 * kHalf;

template <Bug kBug>
__device__ void copy_tiles(uint32_t shared, const CUtensorMap& map, uint32_t first, uint32_t full, uint32_t empty,
                           int row0, int count) {
  mbarrier_arrive_expect(first, kTile);
  for (int h = 0; h < 2; ++h) tma_load(shared + h * kHalf, &map, first, h * 64, row0, 0);
  for (int t = 0; t < count; ++t) {
    const int stage = t % kStages, phase = t / kStages & 1;
    mbarrier_wait(empty + 8 * stage, kBug == Bug::kWrongParity ? phase : phase ^ 1);
    mbarrier_arrive_expect(full + 8 * stage, kBug == Bug::kWrongByteCount ? kTile + 16 : kTile);
    for (int h = 0; h < 2; ++h) {
      tma_load(shared + kTile * (1 + stage) + h * kHalf, &map, full + 8 * stage, h * 64, t * kRows, 0);
    }
  }
}

template <Bug kBug>
__global__ void __launch_bounds__(160)
    softmax_kernel(const __grid_constant__ CUtensorMap map, int n, float scale, float* lse, float* out) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ uint64_t barriers[1 + 2 * kStages];
  const uint32_t first = shared_address(barriers), full = first + 8, empty = full + 8 * kStages;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int count = (n + kRows - 1) / kRows, row0 = blockIdx.x * kRows;
  if (threadIdx.x == 0) {
    mbarrier_init(first, 1);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + 8 * i, 1);
      mbarrier_init(empty + 8 * i, 128);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp == 4) {
    if (lane == 0) copy_tiles<kBug>(shared_address(shared), map, first, full, empty, row0, count);
    return;
  }

  float o[2][32] = {};
  float high[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  const uint32_t rows = shared_address(shared);
  const uint64_t too_far = kBug == Bug::kWrongStride ? uint64_t(512 >> 4) << 32 : 0;  // of the descriptors' stride
  mbarrier_wait(first, 0);
  for (int t = 0; t < count; ++t) {
    const int stage = t % kStages, phase = t / kStages & 1;
    const uint32_t tile = rows + kTile * (1 + stage);
    if (kBug != Bug::kNoWaitForTile) mbarrier_wait(full + 8 * stage, phase);
    float s[32];
    if (kBug != Bug::kNoFence) wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint32_t offset = k / 4 * kHalf + k % 4 * (kBug == Bug::kWrongStep ? 16 : 32);
      wgmma_shared<__nv_bfloat16>(s, matrix_descriptor(rows + offset) - too_far,
                                  matrix_descriptor(tile + offset) - too_far, k > 0);
    }
    wgmma_commit();
    if (kBug == Bug::kOverwrites && threadIdx.x == 0) shared[0] ^= 1;
    if (kBug != Bug::kNoWaitForProduct) wgmma_wait<0>();
    float highest[2] = {high[0], high[1]};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int r = i / 2 & 1, row = row0 + warp * 16 + g + 8 * r, column = t * kRows + i / 4 * 8 + q * 2 + (i & 1);
      s[i] = row == column || column >= n ? -INFINITY : s[i] * scale;
      highest[r] = fmaxf(highest[r], s[i]);
    }
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = warp_max<4>(highest[r]);
      factor[r] = exp2_fast(high[r] - (highest[r] == -INFINITY ? 0.f : highest[r]));
      sum[r] *= factor[r];
      high[r] = highest[r];
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int r = i / 2 & 1;
      o[0][i] *= factor[r];
      o[1][i] *= factor[r];
      s[i] = exp2_fast(s[i] - (high[r] == -INFINITY ? 0.f : high[r]));
      sum[r] += s[i];
    }
    uint32_t p[4][4];
#pragma unroll
    for (int i = 0; i < 16; ++i) p[i / 4][i % 4] = pack<__nv_bfloat16>(s[2 * i], s[2 * i + 1]);
    if (kBug != Bug::kNoFence) wgmma_fence();
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma_registers<__nv_bfloat16>(o[h], p[k], matrix_descriptor(tile + h * kHalf + k * 2048, 8192), true);
      }
    wgmma_commit();
    if (kBug == Bug::kReleasesEarly) mbarrier_arrive(empty + 8 * stage);
    wgmma_wait<0>();
    if (kBug != Bug::kReleasesEarly) mbarrier_arrive(empty + 8 * stage);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] = warp_sum<4>(sum[r]);
    const int row = row0 + warp * 16 + g + 8 * r;
    if (row >= n) continue;
    if (q == 0) lse[row] = (high[r] + log2f(sum[r])) * float(kLn2);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if ((i / 2 & 1) != r) continue;
      out[size_t(row) * kWidth + i / 4 * 8 + q * 2 + (i & 1)] = o[i / 32][i % 32] / sum[r];
    }
  }
}

template <int kBug>
int pick(int bug, const CUtensorMap& map, int n, float scale, float* lse, float* out) {
  if constexpr (kBug > static_cast<int>(Bug::kOverwrites)) {
    return cudaErrorInvalidValue;
  } else {
    if (bug != kBug) return pick<kBug + 1>(bug, map, n, scale, lse, out);
    const auto kernel = softmax_kernel<static_cast<Bug>(kBug)>;
    const int bytes = (1 + kStages) * kTile;
    if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
    kernel<<<(n + kRows - 1) / kRows, 160, bytes>>>(map, n, scale, lse, out);
    return cudaGetLastError();
  }
}

}  // namespace worked

extern "C" int launch_softmax_sm90(int bug, const void* z, int n, float scale, float* lse, float* out) {
  CUtensorMap map;
  if (auto error = ltood::prim::make_tensor_map(&map, z, false, 1, n, worked::kWidth, worked::kRows)) return error;
  return worked::pick<0>(bug, map, n, scale, lse, out);
}
