// Backward tiles of the guided family on Hopper: what cuda/bwd.cuh computes, for operands of one split. H is
// formed from both products in registers, rounded to bfloat16, and is A of the second product, which reads it there.
//
//   tile       128 rows × 64 columns, 64 × 64 of a consumer warpgroup; 128 features of the output a block
//   registers  32 of S, 32 of the guide's product, 16 of H, 64 of the output
//   shared     as forward; the columns come once for the products and, in bfloat16, once more for the output
//   FLOP       2 (D + Dg) ceil(D / 128) + 2 D a pair
//   limiter    by benchmarks/results/static_cost.md, a prediction, at D = Dg = 128: issue slots (2,263 clocks a tile of
//              both warpgroups for distillation, special functions 2,048, products 1,536; modelled 2,440). A turn is
//              the output's product of one tile and S and C of the next. Not yet verified on hardware
#pragma once

#include "ops/guided/cuda/bwd.cuh"
#include "ops/guided/cuda/sm90/tile.cuh"

namespace ltood::guided::sm90 {

using value_t = __nv_bfloat16;  // H spans more powers of two than float16 has

// Which of the output a block computes: its features, and its share of the columns.
struct Part {
  int k_split, first_k_tile;
  __device__ __forceinline__ explicit Part(const GuidedParams& p)
      : k_split(blockIdx.y % p.k_splits), first_k_tile(blockIdx.y / p.k_splits * kGuidedOutKTiles) {}
};

// The products of the first tile, then in turns the values of a tile and the products of the next one.
__device__ __forceinline__ void produce(const Sm90& f, const Block& block, const Share& share, int first_row,
                                        int first_k_tile) {
  TileList tiles(share.words, share.first);
  Producer producer(f, block);
  producer.load_rows(first_row);
  int column = 0;
  for (int tile = share.first; tile <= share.last; ++tile) {
    if (tile > share.first) producer.load(&f.v_columns, first_k_tile, kGuidedOutKTiles, column);
    if (tile == share.last) break;
    column = tiles.next_column();
    producer.load_products(column);
  }
}

// What a consumer warpgroup does with its 64 rows.
template <typename half_t, bool kContrast, bool kDistill>
class GuidedConsumer {
 public:
  __device__ __forceinline__ GuidedConsumer(const Sm90& f, const Block& block)
      : p_(f.p),
        block_(block),
        stages_(block.ring),
        turns_(stages_of_products(f.p) + 1 <= f.stages),
        teacher_(teacher_scale(f.p)) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      read_row_fields<kContrast>(rows_[half], p_, position(half), exponent_scale(p_.inv_tau, p_.temperature));
    }
#pragma unroll
    for (float& value : out_) value = 0;
  }

  __device__ __forceinline__ void run(const Share& share) {
    TileList tiles(share.words, share.first);
    prim::mbarrier_wait(block_.resident_full, 0);
    warpgroups::begin_turns();
    if (share.first < share.last) multiply_tile<half_t>(s_, c_, stages_, block_, p_);
    finish_tile(s_, c_, stages_, p_);
    for (int tile = share.first; tile < share.last; ++tile) {
      form_gradient(tiles.next_column());
      if (turns_) warpgroups::wait_for_turn();
      multiply_values();
      if (tile + 1 < share.last) multiply_tile<half_t>(s_, c_, stages_, block_, p_);
      if (turns_) warpgroups::end_turn();
      finish_tile(s_, c_, stages_, p_);
      prim::wgmma_tie(out_);
      prim::wgmma_tie(h_);
    }
    warpgroups::end_turns();
  }

  __device__ __forceinline__ void store(const Part& part) const {
    const int width = kKTile * p_.v.k_tiles;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (position(half) >= p_.n) continue;
      float* to = gradient_at(p_, part.k_split, position(half));
#pragma unroll
      for (int j = 0; j < kGuidedOutKTiles * kKTile / 8; ++j) {
        const int feature = part.first_k_tile * kKTile + fragment_col(j, 0);
        if (feature >= width) continue;
        *reinterpret_cast<float2*>(to + feature) = {out_[4 * j + 2 * half], out_[4 * j + 2 * half + 1]};
      }
    }
  }

 private:
  // H of the tile times the columns' scales, as the A operand of the second product.
  __device__ __forceinline__ void form_gradient(int first_column) {
#pragma unroll
    for (int j = 0; j < kColumnFragments; ++j) {
      const int column = first_column + fragment_col(j, 0);
      float of_column[2][kGuidedTileFields];
#pragma unroll
      for (int f = 0; f < kGuidedTileFields; ++f) {
        const float2 pair = column_pair(p_, f, column);
        of_column[0][f] = pair.x, of_column[1][f] = pair.y;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float h[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          h[e] = weighted_gradient<kContrast, kDistill, true>(
              p_, rows_[half], column + e, of_column[e], s_[4 * j + 2 * half + e], c_[4 * j + 2 * half + e], teacher_);
        }
        h_[j / 2][j % 2 * 2 + half] = prim::pack<value_t>(h[0], h[1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int self = own_column(p_, position(half)) - first_column;
      if (self >= 0 && self < kGuidedColumns) clear_columns(half, self, self + 1);
      if (p_.columns - first_column < kGuidedColumns) clear_columns(half, p_.columns - first_column, kGuidedColumns);
    }
  }

  // Few tiles hold a row's own column or columns that do not exist: found here, they take no registers and no
  // instructions above.
  __device__ __forceinline__ void clear_columns(int half, int from, int to) {
#pragma unroll
    for (int j = 0; j < kColumnFragments; ++j) {
      uint32_t& pair = h_[j / 2][j % 2 * 2 + half];
      if (from <= fragment_col(j, 0) && fragment_col(j, 0) < to) pair &= 0xffff0000u;
      if (from <= fragment_col(j, 1) && fragment_col(j, 1) < to) pair &= 0x0000ffffu;
    }
  }

  // Of a thread's first or second row.
  __device__ __forceinline__ int position(int half) const {
    return own_row(p_.first + blockIdx.x * kGuidedRows) + 8 * half;
  }

  // output += H V, V in the ring's next stage: beyond the last feature it holds zeros.
  __device__ __forceinline__ void multiply_values() {
    const uint64_t values = prim::matrix_descriptor(prim::uniform(stages_.take()), kColumnKTile);
    prim::wgmma_fence(out_, h_);
#pragma unroll
    for (int k = 0; k < kGuidedColumns / 16; ++k) {
      prim::wgmma_registers<value_t>(out_, h_[k], values + prim::descriptor_offset(k * 16 * tiles::kRowBytes), true);
    }
    stages_.commit(out_, h_);
  }

  const GuidedParams& p_;
  const Block& block_;
  Stages stages_;
  const bool turns_;
  const float teacher_;
  RowFields rows_[2];
  Products s_, c_;
  float out_[kGuidedOutKTiles * kKTile / 2];
  uint32_t h_[kGuidedColumns / 16][4];
};

template <typename half_t, bool kContrast, bool kDistill>
__global__ void __launch_bounds__(warpgroups::kThreads, 1) guided_backward_sm90_kernel(const __grid_constant__ Sm90 f) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // empty in a compilation for anything else
  extern __shared__ __align__(1024) unsigned char memory[];
  const int first_row = f.p.first + blockIdx.x * kGuidedRows;
  const Part part(f.p);
  const Share share(f.p, blockIdx.x, part.k_split);
  const Block block(memory, f);
  if (warpgroups::is_producer()) {
    prim::give_registers<warpgroups::kProducerRegisters>();
    if (threadIdx.x == warpgroups::kConsumerThreads) produce(f, block, share, first_row, part.first_k_tile);
  } else {
    prim::take_registers<warpgroups::kConsumerRegisters>();
    GuidedConsumer<half_t, kContrast, kDistill> consumer(f, block);
    consumer.run(share);
    consumer.store(part);
  }
#endif
}

}  // namespace ltood::guided::sm90
