// Blocks take kPositions consecutive positions each. A segment that lies in one block is summed there; one that crosses
// blocks leaves a piece in every block's edges (its first piece as the tail of a block, the others as heads), which the
// block where it starts adds up in a second launch. The order of additions depends on the keys alone.
//
//   limiter  the latency of dependent loads: key and order, then row. 16 positions a block make 1,024 blocks of 16,384
//            rows, which all run at once, and eight rows of a thread are on their way together. Beyond 65,536 rows
//            memory is the limit, and 128 positions leave fewer pieces. Not yet verified on hardware
//   bytes    count * 2 D splits of rows, once
#include <climits>

#include "cuda/launch.cuh"
#include "cuda/operand.cuh"
#include "cuda/primitives/math.cuh"
#include "cuda/segment_sums.h"

namespace ltood {
namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 8;  // rows of a thread that are on their way
constexpr int kJoinWarps = 8, kJoinFeatures = 32;
constexpr int64_t kNoKey = LLONG_MIN;  // beyond the first and the last position

#ifndef LTOOD_FEW_POSITIONS  // the tests set it
#define LTOOD_FEW_POSITIONS 65536
#endif
constexpr int positions_of(int64_t count) { return count <= LTOOD_FEW_POSITIONS ? 16 : 128; }

// The block's positions, shared by its threads.
template <int kPositions>
struct Positions {
  int64_t keys[kPositions + 2];  // with the position before and the one behind
  int64_t rows[kPositions];
  float weights[kPositions];

  template <bool kOneEntry>
  __device__ __forceinline__ void load(const SegmentSumsParams& p, int64_t begin) {
    for (int i = threadIdx.x; i < kPositions + 2; i += kThreads) {
      const int64_t at = begin - 1 + i;
      keys[i] = at >= 0 && at < p.count ? p.keys[at] : kNoKey;
    }
    for (int i = threadIdx.x; i < kPositions; i += kThreads) {
      const bool inside = begin + i < p.count;
      const int64_t order = inside ? p.order[begin + i] : 0;
      rows[i] = kOneEntry ? order : order / p.entries_per_row;
      weights[i] = inside && p.weight ? p.weight[rows[i]] : 1.f;
    }
    __syncthreads();
  }
};

// Edges of block b: row 2 b is its head (a segment that began before), row 2 b + 1 its tail (one that goes on behind).
template <typename half_t, bool kOneEntry, int kPositions>
__global__ void __launch_bounds__(kThreads) sum_pieces_kernel(SegmentSumsParams p) {
  __shared__ Positions<kPositions> at;
  const int64_t begin = int64_t(blockIdx.x) * kPositions;
  const int here = static_cast<int>(min(int64_t(kPositions), p.count - begin));
  at.template load<kOneEntry>(p, begin);
  for (int j = threadIdx.x; j < p.d; j += kThreads) {
    float* head = p.edges + 2 * int64_t(blockIdx.x) * p.d + j;
    bool starts_here = at.keys[0] != at.keys[1];
    float sum = 0;
    for (int from = 0; from < here; from += kAhead) {
      float values[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) values[i] = element<half_t>(p.x, at.rows[from + i], j);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int position = from + i;
        if (position >= here) break;
        const int64_t key = at.keys[position + 1];
        if (key >= 0) sum += at.weights[position] * values[i];
        const bool ends = at.keys[position + 2] != key;
        if (!ends && position + 1 < here) continue;
        if (starts_here && ends && key >= 0) p.sums[key * p.d + j] = sum;
        if (!starts_here) head[0] = sum;
        if (starts_here && !ends) head[p.d] = sum;
        starts_here = true;
        sum = 0;
      }
    }
  }
}

// How many blocks behind `block` begin with the key. They follow each other: every round leaves a 32nd of the range.
template <int kPositions>
__device__ __forceinline__ int64_t blocks_behind(const SegmentSumsParams& p, int64_t block, int64_t key) {
  int64_t low = 0, high = gridDim.x - block - 1;
  while (low < high) {
    const int64_t step = (high - low + 31) / 32, probe = low + threadIdx.x % 32 * step;
    const bool begins = probe < high && p.keys[(block + 1 + probe) * kPositions] == key;
    const int found = __popc(__ballot_sync(prim::kFullWarp, begins));
    high = min(high, low + found * step);
    if (found > 0) low += (found - 1) * step + 1;
  }
  return low;
}

// The block where a segment starts adds its pieces, 32 features of them: warp w takes every kJoinWarps-th head.
template <int kPositions>
__global__ void __launch_bounds__(kJoinWarps * 32) join_pieces_kernel(SegmentSumsParams p) {
  const int64_t block = blockIdx.x, next = (block + 1) * kPositions;
  if (next >= p.count) return;
  const int64_t key = p.keys[next - 1];
  const bool starts_here = block == 0 || p.keys[block * kPositions] != key || p.keys[block * kPositions - 1] != key;
  if (key < 0 || !starts_here || p.keys[next] != key) return;
  __shared__ float of_warp[kJoinWarps][kJoinFeatures];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, j = blockIdx.y * kJoinFeatures + lane;
  const int64_t heads = blocks_behind<kPositions>(p, block, key);
  const float* from = p.edges + 2 * (block + 1) * p.d + min(j, p.d - 1);
  float sum = 0;
#pragma unroll 8
  for (int64_t b = warp; b < heads; b += kJoinWarps) sum += from[2 * b * p.d];
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || j >= p.d) return;
  sum = from[-p.d];  // the tail of this block
#pragma unroll
  for (int w = 0; w < kJoinWarps; ++w) sum += of_warp[w][lane];
  p.sums[key * p.d + j] = sum;
}

template <int kPositions>
cudaError_t launch(const SegmentSumsParams& p, void* stream) {
  const int blocks = static_cast<int>(cuda::ceil_div<int64_t>(p.count, kPositions));
  const auto pieces = [&](auto half) {
    using half_t = decltype(half);
    return p.entries_per_row == 1 ? sum_pieces_kernel<half_t, true, kPositions>
                                  : sum_pieces_kernel<half_t, false, kPositions>;
  };
  const auto kernel = p.x.is_half ? pieces(__half()) : pieces(__nv_bfloat16());
  if (const cudaError_t error = cuda::launch(kernel, blocks, kThreads, 0, p, stream)) return error;
  const dim3 grid(blocks, cuda::ceil_div(p.d, kJoinFeatures));
  return cuda::launch(join_pieces_kernel<kPositions>, grid, kJoinWarps * 32, 0, p, stream);
}

}  // namespace

extern "C" int64_t ltood_segment_edges(int64_t count) {
  return 2 * cuda::ceil_div<int64_t>(count, positions_of(count));
}

extern "C" int ltood_launch_segment_sums(const SegmentSumsParams* params, void* stream) {
  return positions_of(params->count) == 16 ? launch<16>(*params, stream) : launch<128>(*params, stream);
}

}  // namespace ltood
