// Forward tiles of the guided family on Hopper: what cuda/fwd.cuh computes, for operands of one split, its
// products by wgmma and the copy engine.
//
//   tile       128 rows × 64 columns, 64 × 64 of a consumer warpgroup: 32 accumulators a thread for the student, 32 for
//              the guide; the rows of both stay in shared memory, columns pass in stages of 64 × 128 features
//   shared     D = Dg = 128: 64 KiB of rows, 6 stages of 16 KiB; D + Dg <= 512
//   FLOP       2 (D + Dg) a pair, N² pairs for distillation, about N² / K for the negatives alone
//   bytes      from L2 a tile's columns, 32 KiB at D = Dg = 128: 15 bytes a clock and multiprocessor at the
//              modelled 2,160 clocks, 22 at 1,472
//   limiter    by benchmarks/results/static_cost.md, a prediction, at D = Dg = 128: issue slots for distillation (1,999
//              clocks a tile of both warpgroups, products 1,024, special functions 1,152; modelled 2,160), L2 for the
//              negatives alone (1,365; modelled 1,472). The warpgroups take turns, one's products under the other's
//              sums. Not yet verified on hardware
#pragma once

#include "ops/guided/cuda/fwd.cuh"
#include "ops/guided/cuda/sm90/tile.cuh"

namespace ltood::guided::sm90 {

// A thread's two rows, and what it adds up of them.
template <bool kContrast, bool kDistill>
class RowPair {
 public:
  __device__ __forceinline__ RowPair(const GuidedParams& p, int first_row) : p_(p), row_(own_row(first_row)) {
    teacher_ = teacher_scale(p);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_ + 8 * half;
      scale_z_[half] = p.fields[size_t(kScaleZ) * p.padded + row] * exponent_scale(p.inv_tau, p.temperature);
      scale_e_[half] = p.fields[size_t(kScaleE) * p.padded + row];
      spans_[half] = kContrast && row < p.n ? p.spans[row] : GuidedSpans{0, 0, 0, 0};
      self_[half] = own_column(p, row);
    }
  }

  __device__ __forceinline__ void add(const Products& products_z, const Products& products_e, int first_column) {
    Fragment s, c;
#pragma unroll
    for (int j = 0; j < kColumnFragments; ++j) {
      const float2 z = column_pair(p_, kScaleZ, first_column + fragment_col(j, 0));
      const float2 e = column_pair(p_, kScaleE, first_column + fragment_col(j, 0));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = 4 * j + 2 * half;
        s[j][2 * half] = products_z[at] * (scale_z_[half] * z.x);
        s[j][2 * half + 1] = products_z[at + 1] * (scale_z_[half] * z.y);
        c[j][2 * half] = products_e[at] * (scale_e_[half] * e.x);
        c[j][2 * half + 1] = products_e[at + 1] * (scale_e_[half] * e.y);
      }
    }
    // Most tiles lie wholly inside what counts: checks for every pair would be a third of their instructions.
    bool inside = kGuidedColumns <= p_.columns - first_column, negatives = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = spans_[half].out_begin - first_column, end = spans_[half].out_end - first_column;
      inside = inside && !in_tile(self_[half] - first_column);
      if (kContrast) inside = inside && first <= 0 && kGuidedColumns <= end;
      negatives = negatives || (first < kGuidedColumns && 0 < end);
    }
    if (__all_sync(prim::kFullWarp, inside)) {
      add_rows<true>(s, c, first_column, true);
    } else {
      add_rows<false>(s, c, first_column, __any_sync(prim::kFullWarp, negatives));
    }
  }

  __device__ __forceinline__ void write(int k_split) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      write_sums<kContrast, kDistill>(sums_[half], p_, k_split, row_ + 8 * half);
    }
  }

 private:
  __device__ __forceinline__ static bool in_tile(int column) {
    return static_cast<unsigned>(column) < static_cast<unsigned>(kGuidedColumns);
  }

  // `negatives`: there are any for a row of the warp.
  template <bool kInside>
  __device__ __forceinline__ void add_rows(Fragment& s, Fragment& c, int first_column, bool negatives) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int self = self_[half] - first_column;
      if (kDistill) add_distill<kInside>(sums_[half], s, c, half, teacher_, self, p_.columns - first_column);
      if (kContrast && negatives) {
        add_negatives<kInside>(sums_[half], p_, s, c, half, self, spans_[half].out_begin - first_column,
                               spans_[half].out_end - spans_[half].out_begin);
      }
    }
  }

  const GuidedParams& p_;
  const int row_;
  int self_[2];
  float teacher_, scale_z_[2], scale_e_[2];
  GuidedSpans spans_[2];
  RowSums sums_[2];
};

template <typename half_t, bool kContrast, bool kDistill>
__global__ void __launch_bounds__(warpgroups::kThreads, 1) guided_forward_sm90_kernel(const __grid_constant__ Sm90 f) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // empty in a compilation for anything else
  extern __shared__ __align__(1024) unsigned char memory[];
  const GuidedParams& p = f.p;
  const int first_row = p.first + blockIdx.x * kGuidedRows;
  const Share share(p, blockIdx.x, blockIdx.y);
  TileList tiles(share.words, share.first);
  const Block block(memory, f);
  if (warpgroups::is_producer()) {
    prim::give_registers<warpgroups::kProducerRegisters>();
    if (threadIdx.x == warpgroups::kConsumerThreads) {
      Producer producer(f, block);
      producer.load_rows(first_row);
      for (int tile = share.first; tile < share.last; ++tile) producer.load_products(tiles.next_column());
    }
  } else {
    prim::take_registers<warpgroups::kConsumerRegisters>();
    RowPair<kContrast, kDistill> rows(p, first_row);
    Stages stages(block.ring);
    const bool turns = stages_of_products(p) <= f.stages;
    prim::mbarrier_wait(block.resident_full, 0);
    warpgroups::begin_turns();
    for (int tile = share.first; tile < share.last; ++tile) {
      Products s, c;
      if (turns) warpgroups::wait_for_turn();
      multiply_tile<half_t>(s, c, stages, block, p);
      if (turns) warpgroups::end_turn();
      finish_tile(s, c, stages, p);
      rows.add(s, c, tiles.next_column());
    }
    warpgroups::end_turns();
    rows.write(blockIdx.y);
  }
#endif
}

}  // namespace ltood::guided::sm90
