// Row log-sum-exp of a partial problem of the contrastive similarities, without the n × M matrix. Not yet verified on
// hardware.
//
//   lse_i = log sum_{j != i + diagonal} exp(s_ij),   s_ij = <u(x_i), u(y_j)> / tau,   -inf where there is no column
//
// A block owns 128 rows and goes through the columns, or its share of them; a row's sum (and maximum, where the shift
// is not fixed) stays in the registers of the four lanes that hold the row. Nothing is symmetric: no column is summed.
//
// tile      128 × 64, 4 warps of 32 × 64, k_tiles of 64 features, 3 stages: the loop of mainloop_sm80.cuh
// shared    24 KiB of stages and the block's rows, 16 KiB a k_tile and split, where they fit; else they are streamed
//           in addition to the columns, 16 KiB more a stage
// FLOP      2 n M D (three times that in two splits), n M exponentials
// bytes     (n / 128) M D halves of y through L2, n k_splits floats (twice that with maxima)
// limiter   tensor cores by mma.sync, with exponentials (16 a clock and SM) close behind at D = 128
#pragma once

#include "cuda/mainloop_sm80.cuh"
#include "ops/contrastive/cuda/launch.h"
#include "ops/contrastive/cuda/lse_fwd.cuh"

namespace ltood::contrastive::partial {

using mainloop_sm80::Fragments;
using mainloop_sm80::kBlockM;
using mainloop_sm80::kBlockN;
using mainloop_sm80::kNI;
using mainloop_sm80::kSlots;
using mainloop_sm80::kThreads;

// Products become exponents, in units of log2 minus the shift; excluded pairs become -inf. `same` is the
// column that is the warp's first row.
template <bool kEdge>
__device__ __forceinline__ void scale_tile(Fragments& c, const Operand& y, const float (&factor)[kSlots], int first_col,
                                           int same, float shift) {
#pragma unroll
  for (int j = 0; j < kNI; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int col = first_col + fragment_col(j, e);
      const float col_scale = !kEdge || col < y.rows ? __ldg(y.scale + col) : 0.f;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        float& value = mainloop_sm80::at(c, s, j, e);
        value = fmaf(value * col_scale, factor[s], -shift);
        if (kEdge && (col >= y.rows || col == same + mainloop_sm80::slot_row(s))) value = minus_infinity();
      }
    }
  }
}

template <typename half_t, bool kResident, bool kOnline>
__global__ void __launch_bounds__(kThreads, 2) contrastive_partial_kernel(const ContrastivePartialSums p) {
  extern __shared__ __align__(128) char shared[];
  const int row_block = blockIdx.x % p.row_blocks, k_split = blockIdx.x / p.row_blocks;
  const int first_row = row_block * kBlockM + mainloop_sm80::warp_row(), same = first_row + p.diagonal;
  const int tile_count = (p.y.rows - 1) / kBlockN + 1, begin = k_split * p.k_split_tiles;
  const float scale = tiles::exponent_scale(p.exponents.inv_tau, p.exponents.temperature);
  const float shift = kOnline ? 0.f : scale;

  float factor[kSlots], sum[kSlots] = {}, max[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int row = first_row + mainloop_sm80::slot_row(s);
    factor[s] = row < p.x.rows ? p.x.scale[row] * scale : 0.f;
    max[s] = minus_infinity();
  }
  const auto use_tile = [&](Fragments& c, int first_col) {
    if (first_col + kBlockN > p.y.rows || (first_col < same + 32 && same < first_col + kBlockN)) {
      scale_tile<true>(c, p.y, factor, first_col, same, shift);
    } else {
      scale_tile<false>(c, p.y, factor, first_col, same, shift);
    }
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (kOnline) {
        add_row_online(c[s / 2], s % 2, max[s], sum[s]);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kNI; ++j) {
        sum[s] += prim::exp2_fast(mainloop_sm80::at(c, s, j, 0)) + prim::exp2_fast(mainloop_sm80::at(c, s, j, 1));
      }
    }
  };
  mainloop_sm80::run<half_t, kResident>(p.x, p.y, row_block * kBlockM, begin, min(begin + p.k_split_tiles, tile_count),
                                        prim::shared_address(shared), use_tile);
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int row = first_row + mainloop_sm80::slot_row(s);
    const float total = prim::warp_sum<4, 1>(sum[s]);
    if (threadIdx.x % 4 > 0 || row >= p.x.rows) continue;
    p.sums[size_t(k_split) * p.x.rows + row] = total;
    if (kOnline) p.maxima[size_t(k_split) * p.x.rows + row] = max[s];
  }
}

// One thread a row: the k_splits in their order, in double.
__global__ void contrastive_partial_lse_kernel(const ContrastivePartialSums p) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  const size_t n = p.x.rows;
  if (row >= p.x.rows) return;
  const bool online = p.exponents.online;
  float max = minus_infinity();
  for (int s = 0; online && s < p.k_splits; ++s) max = fmaxf(max, p.maxima[s * n + row]);
  const float base = max == minus_infinity() ? 0.f : max;
  double sum = 0;
  for (int s = 0; s < p.k_splits; ++s) {
    sum += double(p.sums[s * n + row]) * (online ? exp2f(p.maxima[s * n + row] - base) : 1.f);
  }
  const float shift = online ? base : tiles::exponent_scale(p.exponents.inv_tau, p.exponents.temperature);
  p.lse[row] = log(sum) + shift * prim::kLn2;
}

}  // namespace ltood::contrastive::partial
