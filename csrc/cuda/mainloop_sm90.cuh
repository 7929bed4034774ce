// The loop of mainloop_sm80.cuh on Hopper: a block owns 256 rows of x, 128 of each consumer warpgroup, and goes through
// the rows of y, its columns, tile by tile of 128. The block's rows stay in shared memory, k_tiles of columns pass
// through the ring. A warp owns 16 rows of either half of its warpgroup's, so that nothing about a row is shared
// between warps; a tile is used in two halves of 64 columns, with the fragments of mainloop_sm80.cuh.
#pragma once

#include "cuda/mainloop_sm80.cuh"
#include "cuda/warpgroups.cuh"

namespace ltood::mainloop_sm90 {

using warpgroups::Ring;
using warpgroups::RingPosition;

constexpr int kBlockM = 256, kBlockN = 128;
constexpr int kHalves = 2;  // of a warpgroup's rows
constexpr int kKTileBytes = tiles::k_tile_bytes<128>();

// Rows of a warp's list l: 16 of either half. A lane holds four of them, slot s is list mainloop_sm80::slot_row(s).
__device__ __forceinline__ int list_row(int l) {
  return warpgroups::consumer() * 128 + l / 16 * 64 + threadIdx.x / 32 % 4 * 16 + l % 16;
}

using mainloop_sm80::Fragments;

struct Maps {
  CUtensorMap x, y;  // in boxes of a k_tile of 128 rows
};

constexpr int resident_bytes(const Operand& x) { return 2 * x.splits * x.k_tiles * kKTileBytes; }

// A block's place in shared memory: resident rows, ring, barriers.
struct Shared {
  uint32_t resident, resident_full;
  Ring ring;

  // By all threads, before the roles part.
  __device__ Shared(uint32_t memory, uint32_t barriers, const Operand& x, int stages)
      : resident(memory),
        resident_full(barriers + stages * warpgroups::kBarrierBytes),
        ring{memory + 2 * x.splits * x.k_tiles * kKTileBytes, barriers, stages, kKTileBytes} {
    if (threadIdx.x == 0) {
      ring.init();
      prim::mbarrier_init(resident_full, 1);
      prim::mbarrier_init_fence();
    }
    __syncthreads();
  }
};

// The producer's thread: column tiles begin ... end - 1.
__device__ __forceinline__ void produce(const Maps& maps, const Operand& x, const Shared& shared, int first_row,
                                        int begin, int end) {
  const tiles::Steps steps{x.k_tiles, x.splits};
  const int k_tiles = x.splits * x.k_tiles;
  prim::mbarrier_arrive_expect(shared.resident_full, 2 * k_tiles * kKTileBytes);
  for (int s = 0; s < 2 * k_tiles; ++s) {
    const int row = first_row + s / k_tiles * 128, split = s / x.k_tiles % x.splits;
    prim::tma_load(shared.resident + s * kKTileBytes, &maps.x, shared.resident_full, s % x.k_tiles * kKTile, row,
                   split);
  }
  RingPosition at;
  for (int tile = begin; tile < end; ++tile) {
    for (int step = 0; step < steps.count(); ++step, at.advance(shared.ring.stages)) {
      shared.ring.claim(at, kKTileBytes);
      const int column = steps.k_tile(step) * kKTile;
      prim::tma_load(shared.ring.at(at), &maps.y, shared.ring.full(at), column, tile * kBlockN, steps.split_b(step));
    }
  }
}

// The consumers: calls use_tile(c, first_column) for the halves of the column tiles begin ... end - 1, in order, with c
// the products of the operands' data: scales are left to it. It may overwrite c.
template <typename half_t, typename UseTile>
__device__ __forceinline__ void consume(const Operand& x, const Shared& shared, int begin, int end, UseTile use_tile) {
  const tiles::Steps steps{x.k_tiles, x.splits};
  const uint32_t rows = shared.resident + warpgroups::consumer() * x.splits * x.k_tiles * kKTileBytes;
  RingPosition at, left;
  warpgroups::begin_turns();
  prim::mbarrier_wait(shared.resident_full, 0);
  for (int tile = begin; tile < end; ++tile) {
    float products[kHalves][kBlockN / 2];
    warpgroups::multiply_tile<half_t>(products, steps.count(), shared.ring, at, left, [&](int step, uint32_t stage) {
      return make_uint2(rows + (steps.split_a(step) * x.k_tiles + steps.k_tile(step)) * kKTileBytes, stage);
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Fragments c;
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) c[i / 32][i % 32 / 4][i % 4] = products[i / 32][half * 32 + i % 32];
      use_tile(c, tile * kBlockN + half * 64);
    }
  }
  warpgroups::end_turns();
}

}  // namespace ltood::mainloop_sm90
