// A block of the sm_90a kernels: two consumer warpgroups multiply, and one thread of a third keeps a ring of stages in
// shared memory full by the copy engine. A stage is handed over by two mbarriers: `full` once its bytes have landed,
// `empty` once every consumer warp has left it.
#pragma once

#include "cuda/operand.h"
#include "cuda/primitives/mbarrier.cuh"
#include "cuda/primitives/memory.cuh"
#include "cuda/primitives/tma.cuh"
#include "cuda/primitives/wgmma.cuh"
#include "cuda/tile_sizes_sm90.h"
#include "cuda/tiles.cuh"

namespace ltood::warpgroups {

constexpr int kWarpgroup = 128;
using tile_sizes::kBarrierBytes;
using tile_sizes::kConsumerRegisters;
using tile_sizes::kConsumerThreads;
using tile_sizes::kInFlight;
using tile_sizes::kProducerRegisters;
constexpr int kConsumerWarps = kConsumerThreads / 32;
constexpr int kThreads = kConsumerThreads + kWarpgroup;

__device__ __forceinline__ bool is_producer() { return threadIdx.x >= kConsumerThreads; }
__device__ __forceinline__ int consumer() { return threadIdx.x / kWarpgroup; }

// Named barriers: 0 is __syncthreads, 1 all consumers, 2 + c the turn of consumer c.
__device__ __forceinline__ void sync_consumers() { prim::named_barrier_sync(1, kConsumerThreads); }

// The consumers take turns at the tensor cores, so that one's exponentials run under the other's products. Consumer 0
// begins.
__device__ __forceinline__ void begin_turns() {
  if (consumer() == 1) prim::named_barrier_arrive(2, kConsumerThreads);
}
__device__ __forceinline__ void wait_for_turn() { prim::named_barrier_sync(2 + consumer(), kConsumerThreads); }
__device__ __forceinline__ void end_turn() { prim::named_barrier_arrive(3 - consumer(), kConsumerThreads); }
// After the last turn: takes the turn that nobody needs, so that no barrier is left half full.
__device__ __forceinline__ void end_turns() {
  if (consumer() == 0) prim::named_barrier_sync(2, kConsumerThreads);
}

// Map of an operand's splits in boxes of one k_tile of box_rows rows.
inline cudaError_t make_map(CUtensorMap* map, const Operand& x, int box_rows) {
  return prim::make_tensor_map(map, x.data, x.is_half, x.splits, x.rows, kKTile * x.k_tiles, box_rows);
}

// One of a ring's stages, and the parity of the phase in which it is used.
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

struct Ring {
  uint32_t data, barriers;  // shared addresses
  int stages, stage_bytes;

  __device__ __forceinline__ uint32_t at(RingPosition p) const { return data + p.stage * stage_bytes; }
  __device__ __forceinline__ uint32_t full(RingPosition p) const { return barriers + p.stage * kBarrierBytes; }
  __device__ __forceinline__ uint32_t empty(RingPosition p) const { return full(p) + 8; }

  // By one thread, before anybody uses the ring.
  __device__ void init() const {
    for (RingPosition p; p.phase == 0; p.advance(stages)) {
      prim::mbarrier_init(full(p), 1);
      prim::mbarrier_init(empty(p), kConsumerWarps);
    }
  }

  // The producer: waits for the stage to be free and announces its bytes.
  __device__ __forceinline__ void claim(RingPosition p, int bytes) const {
    prim::mbarrier_wait(empty(p), p.phase ^ 1);
    prim::mbarrier_arrive_expect(full(p), bytes);
  }

  // A consumer: waits for the bytes; says that its warp has read them.
  __device__ __forceinline__ void wait(RingPosition p) const { prim::mbarrier_wait(full(p), p.phase); }
  __device__ __forceinline__ void release(RingPosition p) const {
    if (threadIdx.x % 32 == 0) prim::mbarrier_arrive(empty(p));
  }
};

// c = the products of a tile: 64 kHalves rows of A with 2 kSize of B, a k_tile a step from the ring's next stages,
// which are given back. operands(step, stage) gives the addresses of both k_tiles.
template <typename half_t, int kHalves, int kSize, typename Operands>
__device__ __forceinline__ void multiply_tile(float (&c)[kHalves][kSize], int steps, const Ring& ring, RingPosition& at,
                                              RingPosition& left, Operands operands) {
  // A turn lasts a tile: the other warpgroup gives no stage back meanwhile, so a longer tile would wait for ever.
  const bool turns = steps <= ring.stages;
  if (turns) wait_for_turn();
  for (int step = 0; step < steps; ++step, at.advance(ring.stages)) {
    ring.wait(at);
    const uint2 k_tiles = operands(step, ring.at(at));
    const uint64_t a = prim::matrix_descriptor(prim::uniform(k_tiles.x));
    const uint64_t b = prim::matrix_descriptor(prim::uniform(k_tiles.y));
    prim::wgmma_fence(c);
#pragma unroll
    for (int k = 0; k < kKTile / 16; ++k) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        prim::wgmma_shared<half_t>(c[half], a + prim::descriptor_offset(half * 64 * tiles::kRowBytes + k * 32),
                                   b + prim::descriptor_offset(k * 32), step > 0 || k > 0);
      }
    }
    prim::wgmma_commit();
    if (step < kInFlight) continue;
    prim::wgmma_wait<kInFlight>(c);
    ring.release(left);
    left.advance(ring.stages);
  }
  if (turns) end_turn();
  prim::wgmma_wait<0>(c);
  for (int step = max(0, steps - kInFlight); step < steps; ++step, left.advance(ring.stages)) ring.release(left);
}

}  // namespace ltood::warpgroups
