// Blocks take 128 consecutive positions each. A segment that lies in one block is summed there; one that crosses blocks
// leaves a piece in every block's edges (its first piece as the tail of a block, the others as heads), which the block
// where it starts adds up in a second launch, in order. Reads `count` rows once; bound by memory, O(N D).
#include "cuda/launch.cuh"
#include "cuda/operand.cuh"
#include "cuda/segment_sums.h"

namespace ltood {
namespace {

constexpr int kPositions = 128;
constexpr int kThreads = 128;

// Edges of block b: row 2 b is its head (a segment that began before), row 2 b + 1 its tail (one that goes on behind).
template <typename half_t>
__global__ void sum_pieces_kernel(SegmentSumsParams p) {
  const int64_t begin = int64_t(blockIdx.x) * kPositions, end = min(begin + kPositions, p.count);
  for (int j = threadIdx.x; j < p.d; j += kThreads) {
    float* head = p.edges + (2 * int64_t(blockIdx.x)) * p.d + j;
    float sum = 0;
    bool starts_here = begin == 0 || p.keys[begin - 1] != p.keys[begin];
    for (int64_t at = begin; at < end; ++at) {
      const int64_t key = p.keys[at], row = p.order[at] / p.entries_per_row;
      if (key >= 0) sum += (p.weight ? p.weight[row] : 1.f) * element<half_t>(p.x, row, j);
      const bool ends = at + 1 == p.count || p.keys[at + 1] != key;
      if (!ends && at + 1 < end) continue;
      if (starts_here && ends && key >= 0) p.sums[key * p.d + j] = sum;
      if (!starts_here) head[0] = sum;
      if (starts_here && !ends) head[p.d] = sum;
      starts_here = true;
      sum = 0;
    }
  }
}

__global__ void join_pieces_kernel(SegmentSumsParams p) {
  const int64_t block = blockIdx.x, next = (block + 1) * kPositions;
  if (next >= p.count) return;
  const int64_t key = p.keys[next - 1];
  const bool starts_here = block == 0 || p.keys[block * kPositions] != key || p.keys[block * kPositions - 1] != key;
  if (key < 0 || !starts_here || p.keys[next] != key) return;
  for (int j = threadIdx.x; j < p.d; j += kThreads) {
    float sum = p.edges[(2 * block + 1) * p.d + j];
    for (int64_t b = block + 1; b * kPositions < p.count && p.keys[b * kPositions] == key; ++b) {
      sum += p.edges[2 * b * p.d + j];
    }
    p.sums[key * p.d + j] = sum;
  }
}

}  // namespace

extern "C" int64_t ltood_segment_edges(int64_t count) { return 2 * cuda::ceil_div<int64_t>(count, kPositions); }

extern "C" int ltood_launch_segment_sums(const SegmentSumsParams* params, void* stream) {
  const SegmentSumsParams& p = *params;
  const int blocks = static_cast<int>(cuda::ceil_div<int64_t>(p.count, kPositions));
  const auto pieces = p.x.is_half ? sum_pieces_kernel<__half> : sum_pieces_kernel<__nv_bfloat16>;
  if (const cudaError_t error = cuda::launch(pieces, blocks, kThreads, 0, p, stream)) return error;
  return cuda::launch(join_pieces_kernel, blocks, kThreads, 0, p, stream);
}

}  // namespace ltood
