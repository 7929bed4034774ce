// Exact k nearest rows on Hopper: what topk/kernel.cuh computes, its lists fed by wgmma and the copy engine.
//
//   tile       256 × 128, a consumer warpgroup 128 rows, 128 accumulators a thread; k_tiles of 64 features
//   shared     D = 128, bf16: 64 KiB of rows, 6 stages of 16 KiB, 32 KiB of candidates
//   FLOP       2 N Q D (three times that in two splits)
//   bytes      (N / 256) Q D halves of y through L2, N k keys
//   limiter    tensor cores while lists hardly change; the filter, one warpgroup's under the other's products, is three
//              instructions an element: 1,536 clocks a tile against 2,048 of products at D = 128. Not yet verified on
//              hardware.
#pragma once

#include "cuda/mainloop_sm90.cuh"
#include "cuda/topk/lists.cuh"

namespace ltood::knn::sm90 {

namespace mainloop = mainloop_sm90;

struct TopkSm90 {
  mainloop::Maps maps;
  TopkKernelParams params;
  int stages;
};

constexpr int kPendingBytes = mainloop::kBlockM * kPending * static_cast<int>(sizeof(Key));

// Outside the ring.
constexpr int fixed_bytes(const Operand& x) { return mainloop::resident_bytes(x) + kPendingBytes; }

template <typename half_t>
__global__ void __launch_bounds__(warpgroups::kThreads, 1) topk_sm90_kernel(const __grid_constant__ TopkSm90 f) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // empty in a compilation for anything else
  extern __shared__ __align__(1024) unsigned char memory[];
  const TopkKernelParams& params = f.params;
  const TopkParams& p = params.topk;
  const int row_block = blockIdx.x % params.row_blocks, k_split = blockIdx.x / params.row_blocks;
  const int first_row = row_block * mainloop::kBlockM, begin = k_split * params.k_split_tiles;
  const int end = min(begin + params.k_split_tiles, (p.y.rows - 1) / mainloop::kBlockN + 1);
  unsigned char* const candidates =
      memory + 2 * p.x.splits * p.x.k_tiles * mainloop::kKTileBytes + f.stages * mainloop::kKTileBytes;
  const uint32_t barriers = prim::shared_address(candidates + kPendingBytes);
  const mainloop::Shared shared(prim::shared_address(memory), barriers, p.x, f.stages);
  if (warpgroups::is_producer()) {
    prim::give_registers<warpgroups::kProducerRegisters>();
    if (threadIdx.x == warpgroups::kConsumerThreads) mainloop::produce(f.maps, p.x, shared, first_row, begin, end);
  } else {
    prim::take_registers<warpgroups::kConsumerRegisters>();
    Key* pending = reinterpret_cast<Key*>(candidates) + threadIdx.x / 32 * 32 * kPending;
    RowLists lists(p, pending, first_row + mainloop::list_row(threadIdx.x % 32),
                   params.keys + size_t(k_split) * p.x.rows * p.k);
    float scale[kSlots];
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int row = first_row + mainloop::list_row(mainloop_sm80::slot_row(s));
      scale[s] = row < p.x.rows ? p.x.scale[row] : 0;
    }
    mainloop::consume<half_t>(p.x, shared, begin, end, [&](mainloop::Fragments& c, int first_column) {
      scale_products(c, scale, p.y, first_column);
      lists.offer(c, first_column);
    });
    lists.epilogue();
    for (int l = 0; l < 32 && params.k_splits == 1; l += 16) {
      const int row = first_row + mainloop::list_row(l);
      write_lists(p, params.keys, row, row + 16);
    }
  }
#endif
}

}  // namespace ltood::knn::sm90
