// What the forward and the backward kernel of the guided family share on Hopper: a block's rows of student and guide in
// shared memory, its column tiles of 64 on their way through the ring, and their two products.
#pragma once

#include "cuda/warpgroups.cuh"
#include "ops/guided/cuda/sm90/launch.h"
#include "ops/guided/cuda/tile.cuh"

namespace ltood::guided::sm90 {

using warpgroups::Ring;
using warpgroups::RingPosition;

struct Sm90 {
  CUtensorMap z_rows, e_rows, z_columns, e_columns, v_columns;  // in boxes of a k_tile of 128 rows or 64 columns
  GuidedParams p;
  int stages;
};

constexpr int kStageKTiles = 2;  // a stage of the ring also holds the values of a block's output
constexpr bool is_built(const tile_sizes::TileSize& t) {
  return t.rows == kGuidedRows && t.columns == kGuidedColumns && t.stage_k_tiles == kStageKTiles &&
         tile_sizes::fixed_bytes(t) == t.k_tiles * kRowKTile;
}
static_assert(kStageKTiles == kGuidedOutKTiles && is_built(tile(false)) && is_built(tile(true)));

constexpr int kStageBytes = kStageKTiles * kColumnKTile;

// K tiles of the guide that take part: none where neither force nor distillation asks for its cosines.
__host__ __device__ inline int guide_k_tiles(const GuidedParams& p) {
  return p.distill || p.weighted ? p.e.k_tiles : 0;
}
__host__ __device__ inline int resident_bytes(const GuidedParams& p) {
  return (p.z.k_tiles + guide_k_tiles(p)) * kRowKTile;
}

// Stages that the products of a tile take, and those that a turn of a warpgroup holds before any is given back.
__device__ __forceinline__ int stages_of(int k_tiles) { return (k_tiles + kStageKTiles - 1) / kStageKTiles; }
__device__ __forceinline__ int stages_of_products(const GuidedParams& p) {
  return stages_of(p.z.k_tiles) + stages_of(guide_k_tiles(p));
}

// A block's place in shared memory: rows (student, then guide), ring, barriers.
struct Block {
  uint32_t resident, resident_full;
  Ring ring;

  // By all threads, before the roles part.
  __device__ __forceinline__ Block(const unsigned char* memory, const Sm90& f) {
    resident = prim::shared_address(memory);
    const uint32_t data = resident + resident_bytes(f.p), barriers = data + f.stages * kStageBytes;
    ring = {data, barriers, f.stages, kStageBytes};
    resident_full = barriers + f.stages * warpgroups::kBarrierBytes;
    if (threadIdx.x == 0) {
      ring.init();
      prim::mbarrier_init(resident_full, 1);
      prim::mbarrier_init_fence();
    }
    __syncthreads();
  }
};

// The producer's thread.
class Producer {
 public:
  __device__ __forceinline__ Producer(const Sm90& f, const Block& block) : f_(f), block_(block) {}

  __device__ __forceinline__ void load_rows(int first_row) {
    const int student = f_.p.z.k_tiles, k_tiles = student + guide_k_tiles(f_.p);
    prim::mbarrier_arrive_expect(block_.resident_full, k_tiles * kRowKTile);
    for (int s = 0; s < k_tiles; ++s) {
      const bool guide = s >= student;
      prim::tma_load(block_.resident + s * kRowKTile, guide ? &f_.e_rows : &f_.z_rows, block_.resident_full,
                     (guide ? s - student : s) * kKTile, first_row, 0);
    }
  }

  // K tiles first, ..., first + k_tiles - 1 of a column tile.
  __device__ __forceinline__ void load(const CUtensorMap* map, int first, int k_tiles, int column) {
    for (int from = 0; from < k_tiles; from += kStageKTiles, at_.advance(block_.ring.stages)) {
      const int count = min(kStageKTiles, k_tiles - from);
      block_.ring.claim(at_, count * kColumnKTile);
      for (int i = 0; i < count; ++i) {
        prim::tma_load(block_.ring.at(at_) + i * kColumnKTile, map, block_.ring.full(at_), (first + from + i) * kKTile,
                       column, 0);
      }
    }
  }

  __device__ __forceinline__ void load_products(int column) {
    load(&f_.z_columns, 0, f_.p.z.k_tiles, column);
    load(&f_.e_columns, 0, guide_k_tiles(f_.p), column);
  }

 private:
  const Sm90& f_;
  const Block& block_;
  RingPosition at_;
};

using Products = float[kGuidedColumns / 2];

// A consumer's way through the ring: while the products of one stage are issued those of the one before are in flight.
class Stages {
 public:
  __device__ __forceinline__ explicit Stages(const Ring& ring) : ring_(ring) {}

  __device__ __forceinline__ uint32_t take() {
    const uint32_t stage = ring_.at(at_);
    ring_.wait(at_);
    at_.advance(ring_.stages);
    return stage;
  }

  // The arguments of both are the registers of the products that may be in flight.
  template <typename... Registers>
  __device__ __forceinline__ void commit(Registers&... registers) {
    prim::wgmma_commit();
    if (flying_) {
      prim::wgmma_wait<1>(registers...);
      release();
    }
    flying_ = true;
  }

  // All products have ended.
  template <typename... Registers>
  __device__ __forceinline__ void settle(Registers&... registers) {
    prim::wgmma_wait<0>(registers...);
    if (flying_) release();
    flying_ = false;
  }

 private:
  __device__ __forceinline__ void release() {
    ring_.release(left_);
    left_.advance(ring_.stages);
  }

  const Ring& ring_;
  RingPosition at_, left_;
  bool flying_ = false;
};

// d = the warpgroup's 64 rows, whose k_tiles are kRowKTile apart, times the columns in the ring's next stages.
template <typename half_t>
__device__ __forceinline__ void multiply(Products& d, Stages& stages, uint32_t rows, int k_tiles) {
  for (int from = 0; from < k_tiles; from += kStageKTiles) {
    const uint64_t a = prim::matrix_descriptor(prim::uniform(rows + from * kRowKTile));
    const uint64_t b = prim::matrix_descriptor(prim::uniform(stages.take()));
    prim::wgmma_fence(d);
#pragma unroll
    for (int i = 0; i < kStageKTiles; ++i) {
      if (from + i >= k_tiles) continue;
#pragma unroll
      for (int k = 0; k < kKTile / 16; ++k) {
        prim::wgmma_shared<half_t>(d, a + prim::descriptor_offset(i * kRowKTile + k * 32),
                                   b + prim::descriptor_offset(i * kColumnKTile + k * 32), from > 0 || i > 0 || k > 0);
      }
    }
    stages.commit(d);
  }
}

// s and c of the next tile, one fragment of 16 rows a warp in the layout of cuda/tile.cuh: element 4 j + 2 half + e.
// finish_tile waits for them.
template <typename half_t>
__device__ __forceinline__ void multiply_tile(Products& s, Products& c, Stages& stages, const Block& block,
                                              const GuidedParams& p) {
  const uint32_t rows = block.resident + warpgroups::consumer() * kRowKTile / 2;
  multiply<half_t>(s, stages, rows, p.z.k_tiles);
  multiply<half_t>(c, stages, rows + p.z.k_tiles * kRowKTile, guide_k_tiles(p));
}

// Without a guide there is no second product, and c is 0. It is cleared here and not before: a register that anything
// but wgmma defines while products are in flight makes ptxas wait for every single one of them (C7515).
__device__ __forceinline__ void finish_tile(Products& s, Products& c, Stages& stages, const GuidedParams& p) {
  stages.settle(s, c);
  if (guide_k_tiles(p) > 0) return;
#pragma unroll
  for (float& x : c) x = 0;
}

// A thread's first row; the other is 8 below.
__device__ __forceinline__ int own_row(int first_row) {
  return first_row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
}

// Two neighbouring columns' values of a field.
__device__ __forceinline__ float2 column_pair(const GuidedParams& p, int field, int column) {
  return __ldg(reinterpret_cast<const float2*>(p.fields + size_t(field) * p.padded + column));
}

}  // namespace ltood::guided::sm90
