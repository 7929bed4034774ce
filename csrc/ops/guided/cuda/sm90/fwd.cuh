// Forward tiles of the guided family on Hopper: what cuda/fwd.cuh computes, for operands of one split, its
// products by wgmma and the copy engine.
//
//   tile       128 rows × 64 columns, 64 × 64 of a consumer warpgroup: 32 accumulators a thread for the student, 32 for
//              the guide; the rows of both stay in shared memory, columns pass in stages of 64 × 128 features
//   shared     D = Dg = 128: 64 KiB of rows, 6 stages of 16 KiB; D + Dg <= 512
//   FLOP       2 (D + Dg) a pair, N² pairs for distillation, about N² / K for the negatives alone
//   bytes      from L2 a tile's columns, 32 KiB at D = Dg = 128: 21 bytes a clock and multiprocessor at the rate below
//   limiter    exponentials: 3 a pair for distillation are 1,536 clocks a tile against 1,024 of products at D = Dg =
//              128; the warpgroups take turns, one's products under the other's sums. Not yet verified on hardware
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
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int self = self_[half] - first_column;
      if (kDistill) add_distill(sums_[half], s, c, half, teacher_, self, p_.columns - first_column);
      if (kContrast) {
        add_negatives(sums_[half], p_, s, c, half, self, spans_[half].out_begin - first_column,
                      spans_[half].out_end - spans_[half].out_begin);
      }
    }
  }

  __device__ __forceinline__ void write(int k_split) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      write_sums<kContrast, kDistill>(sums_[half], p_, k_split, row_ + 8 * half);
    }
  }

 private:
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
      Products s, c = {};
      if (turns) warpgroups::wait_for_turn();
      multiply_tile<half_t>(s, c, stages, block, p);
      if (turns) warpgroups::end_turn();
      stages.settle();
      rows.add(s, c, tiles.next_column());
    }
    warpgroups::end_turns();
    rows.write(blockIdx.y);
  }
#endif
}

}  // namespace ltood::guided::sm90
