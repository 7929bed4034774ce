// Exact k nearest rows by inner product, without the N × Q matrix. Not yet verified on hardware.
//
//   s_ij = scale_i scale_j <x_i, y_j>;   row i keeps the k largest admissible s_ij, ties to the lower j
//
// A block owns 128 rows of x and goes through the columns, or its share of them, tile by tile; a warp owns 32 rows of
// every tile, so that no list is shared between warps.
//
//   tile       128 × 64, 4 warps of 32 × 64, k_tiles of 64 features, 3 stages
//   shared     24 KiB of stages, 16 KiB of candidates, and the block's rows of x, 16 KiB a k_tile and split, where they
//              fit; else they are streamed beside y, 16 KiB more a stage
//   FLOP       2 N Q D (three times that in two splits)
//   bytes      (N / 128) Q D halves of y through L2, N k keys
//   limiter    tensor cores from D = 128 on; below, the filter: three instructions an element
#pragma once

#include "cuda/topk/lists.cuh"

namespace ltood::knn {

using mainloop_sm80::kBlockM;
using mainloop_sm80::kBlockN;
using mainloop_sm80::kThreads;

constexpr int kCombineWarps = 4;
constexpr int kPendingBytes = kBlockM * kPending * static_cast<int>(sizeof(Key));

template <typename half_t, bool kResident>
__global__ void __launch_bounds__(kThreads, 2) topk_kernel(TopkKernelParams params) {
  extern __shared__ __align__(128) char shared[];
  const TopkParams& p = params.topk;
  const int row_block = blockIdx.x % params.row_blocks, k_split = blockIdx.x / params.row_blocks;
  const int first_row = row_block * kBlockM + mainloop_sm80::warp_row();
  const int tile_count = (p.y.rows - 1) / kBlockN + 1, begin = k_split * params.k_split_tiles;

  Key* pending = reinterpret_cast<Key*>(shared) + mainloop_sm80::warp_row() * kPending;
  RowLists lists(p, pending, first_row + threadIdx.x % 32, params.keys + size_t(k_split) * p.x.rows * p.k);
  float scale[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int row = first_row + mainloop_sm80::slot_row(s);
    scale[s] = row < p.x.rows ? p.x.scale[row] : 0;
  }
  const auto use_tile = [&](Fragments& c, int first_column) {
    scale_products(c, scale, p.y, first_column);
    lists.offer(c, first_column);
  };
  mainloop_sm80::run<half_t, kResident>(p.x, p.y, row_block * kBlockM, begin,
                                        min(begin + params.k_split_tiles, tile_count),
                                        prim::shared_address(shared + kPendingBytes), use_tile);

  lists.epilogue();
  if (params.k_splits == 1) write_lists(p, params.keys, first_row, first_row + 32);
}

// A warp combines the sorted lists of one row: lane l looks after the lists l, l + 32, ...
__global__ void __launch_bounds__(32 * kCombineWarps) combine_kernel(TopkKernelParams params) {
  const TopkParams& p = params.topk;
  const int row = blockIdx.x * kCombineWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.x.rows) return;
  const auto entry = [&](int k_split, int at) {
    return k_split < params.k_splits && at < p.k ? params.keys[(size_t(k_split) * p.x.rows + row) * p.k + at] : kNoKey;
  };
  constexpr int kLists = cuda::kMaxColumnSplits / 32;
  int taken[kLists] = {};
  Key head[kLists];
#pragma unroll
  for (int l = 0; l < kLists; ++l) head[l] = entry(l * 32 + lane, 0);
  for (int at = 0; at < p.k; ++at) {
    Key best = head[0];
#pragma unroll
    for (int l = 1; l < kLists; ++l) best = max(best, head[l]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) best = max(best, __shfl_xor_sync(prim::kFullWarp, best, offset));
    if (lane == 0) write_entry(p, size_t(row) * p.k + at, best);
#pragma unroll
    for (int l = 0; l < kLists; ++l) {
      if (head[l] == best && best != kNoKey) head[l] = entry(l * 32 + lane, ++taken[l]);
    }
  }
}

}  // namespace ltood::knn
