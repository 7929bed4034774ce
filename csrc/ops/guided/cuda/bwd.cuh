// Backward tiles of the guided family. With G_ij = dL/ds_ij the gradient of the unit row u_i is (1/tau) sum_j H_ij u_j,
// H = G + G', so that a block owns the result of its 128 rows: no atomics. Away from the positives
//   H_ij = [j in out(i)] a_i w-_ij exp(s_ij - lse_i) + [i in out(j)] a_j w-_ij exp(s_ij - lse_j)          (contrast)
//        + a'_i q_ij + a'_j q_ji - b_i p_ij - b_j p_ji,   q, p the student's and teacher's softmax         (distill)
// The block walks over the column tiles of its rows as the forward kernel does, forms H from both products in registers
// and multiplies it with the columns, which come a second time: flash attention's backward for a single output.
//
//   tile   rows × columns   warps   a warp's part    output features   shared memory                    blocks an SM
//   all    128 × 64         8       16 × 64, twice   128 a block       3 × (24 + 2.25 KiB) = 78.8 KiB   1
//
// FLOP: 2 (D + Dg) ceil(D / 128) + 2 D a pair and pass: the products are formed again for every 128 output features
// (3 passes for float32, of H too: high and low splits). Exponentials: 4 a pair for distillation, 2 for the negatives.
// Expected limiter: exponentials at D = Dg = 128 with both parts, the products beyond. Not yet verified on hardware.
#pragma once

#include "ops/guided/cuda/tile.cuh"

namespace ltood::guided {

constexpr int kBackwardThreads = 256;

// What a lane knows about each of its two rows.
struct RowFields {
  float field[kGuidedTileFields];
  int out_begin, out_count, in_begin, in_count;
};

// 2^x for what a factor multiplies: x can be large only where that is next to nothing, and 0 * 2^x must be 0. NaN stays
// NaN: the minimum that keeps it is one instruction, a comparison and a choice are two.
__device__ __forceinline__ float exp2_finite(float x) {
  float bounded;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(bounded) : "f"(x), "f"(127.f));
  return prim::exp2_fast(bounded);
}

__device__ __forceinline__ bool in_span(int at, int begin, int count) {
  return static_cast<unsigned>(at - begin) < static_cast<unsigned>(count);
}

// H_ij for the pair of a row and a column, s in base 2, from the fields of both.
template <bool kContrast, bool kDistill>
__device__ __forceinline__ float pair_gradient(const GuidedParams& p, const RowFields& row, int column,
                                               const float (&of_column)[kGuidedTileFields], float s, float cos,
                                               float teacher) {
  float h = 0;
  if (kDistill) {
    const float t = cos * teacher;
    h += row.field[kDistillStudent] * exp2_finite(s - row.field[kStudentLse]);
    h += of_column[kDistillStudent] * exp2_finite(s - of_column[kStudentLse]);
    h -= row.field[kDistillTeacher] * exp2_finite(t - row.field[kTeacherLse]);
    h -= of_column[kDistillTeacher] * exp2_finite(t - of_column[kTeacherLse]);
  }
  if (kContrast) {
    const Repulsion pair(p, s, cos);
    const float own = in_span(column, row.out_begin, row.out_count) ? row.field[kGradLse] : 0.f;
    const float other = in_span(column, row.in_begin, row.in_count) ? of_column[kGradLse] : of_column[kGradLseFallback];
    h += pair.factor *
         (own * exp2_finite(pair.exponent - row.field[kLse]) + other * exp2_finite(pair.exponent - of_column[kLse]));
  }
  return h;
}

// Of the row at a position; its student's scale becomes a factor of exponents.
template <bool kContrast>
__device__ __forceinline__ void read_row_fields(RowFields& row, const GuidedParams& p, int position, float inv_tau) {
#pragma unroll
  for (int f = 0; f < kGuidedTileFields; ++f) row.field[f] = p.fields[size_t(f) * p.padded + position];
  row.field[kScaleZ] *= inv_tau;
  const GuidedSpans spans = kContrast && position < p.n ? p.spans[position] : GuidedSpans{0, 0, 0, 0};
  row.out_begin = spans.out_begin, row.out_count = spans.out_end - spans.out_begin;
  row.in_begin = spans.in_begin, row.in_count = spans.in_end - spans.in_begin;
}

// H_ij times the column's scale, which its operand lacks, from the operands' products; the row's own column is not
// known here. kInside: the column exists.
template <bool kContrast, bool kDistill, bool kInside = false>
__device__ __forceinline__ float weighted_gradient(const GuidedParams& p, const RowFields& row, int column,
                                                   const float (&of_column)[kGuidedTileFields], float product_z,
                                                   float product_e, float teacher) {
  const float h = pair_gradient<kContrast, kDistill>(p, row, column, of_column,
                                                     product_z * (row.field[kScaleZ] * of_column[kScaleZ]),
                                                     product_e * (row.field[kScaleE] * of_column[kScaleE]), teacher);
  return kInside || column < p.columns ? h * of_column[kScaleZ] : 0.f;
}

// Where a block's share of the gradient of the row at a position goes.
__device__ __forceinline__ float* gradient_at(const GuidedParams& p, int k_split, int position) {
  return p.gradient + (int64_t(k_split) * (p.n - p.first) + position - p.first) * kKTile * p.z.k_tiles;
}

template <typename half_t, bool kContrast, bool kDistill>
__global__ void __launch_bounds__(kBackwardThreads) guided_backward_kernel(GuidedParams p) {
  using value_t = __nv_bfloat16;  // H spans more powers of two than float16 has
  constexpr int kSlotBytes = kGuidedTileFields * kFieldBytes;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t stages = prim::shared_address(shared), slots = stages + kStages * kStageBytes;
  const float* fields = reinterpret_cast<const float*>(shared + kStages * kStageBytes);
  int* columns = reinterpret_cast<int*>(shared + kStages * (kStageBytes + kSlotBytes));
  const int first_row = p.first + blockIdx.x * kGuidedRows, warp_row = threadIdx.x / 32 * 16;
  const int k_split = blockIdx.y % p.k_splits, first_k_tile = blockIdx.y / p.k_splits * kGuidedOutKTiles;
  const int out_k_tiles = min(kGuidedOutKTiles, p.v.k_tiles - first_k_tile);
  const ProductSteps steps(p);
  const Share share(p, blockIdx.x, k_split);
  TileList tiles(share.words, share.first);
  Turn load_at(steps.all + out_k_tiles * p.v.splits), use_at = load_at;

  RowFields rows[2];
  int self[2];
  const float inv_tau = exponent_scale(p.inv_tau, p.temperature), teacher = teacher_scale(p);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int position = first_row + warp_row + fragment_row(0, 2 * half);
    self[half] = own_column(p, position);
    read_row_fields<kContrast>(rows[half], p, position, inv_tau);
  }

  float s[1][kColumnFragments][4], c[1][kColumnFragments][4], out[kGuidedOutKTiles][1][kKTile / 8][4];
  uint32_t high[1][kColumnFragments / 2][4], low[1][kColumnFragments / 2][4];
#pragma unroll
  for (int k_tile = 0; k_tile < kGuidedOutKTiles; ++k_tile) clear(out[k_tile]);
  // H of the tile, times the columns' scales, in s; then packed.
  const auto products_epilogue = [&]() {
    const float* slot = fields + use_at.slot * kGuidedTileFields * kGuidedColumns;
    const int first_column = columns[use_at.slot];
#pragma unroll
    for (int j = 0; j < kColumnFragments; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = fragment_col(j, e);
        float of_column[kGuidedTileFields];
#pragma unroll
        for (int f = 0; f < kGuidedTileFields; ++f) of_column[f] = slot[f * kGuidedColumns + column];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = s[0][j][2 * half + e];
          const float h = weighted_gradient<kContrast, kDistill>(p, rows[half], first_column + column, of_column, x,
                                                                 c[0][j][2 * half + e], teacher);
          x = first_column + column == self[half] ? 0.f : h;
        }
      }
    }
    pack_weights<value_t>(high, s);
    if (p.v.splits == 2) {
      subtract_packed<value_t>(s, high);
      pack_weights<value_t>(low, s);
    }
  };
  // Step `step` of the second product: low splits of the columns first.
  const auto value_split = [&](int step) { return p.v.splits == 2 && step % 2 == 0; };
  int load_column = 0;
  const auto load = [&](int, int stage) {
    const uint32_t to = stages + stage * kStageBytes;
    if (load_at.next()) {
      load_column = tiles.next_column();
      if (threadIdx.x == 0) columns[load_at.slot] = load_column;
      load_fields<kGuidedTileFields, kBackwardThreads>(slots + load_at.slot * kSlotBytes, p, load_column);
    }
    if (load_at.step < steps.all) {
      load_product<kBackwardThreads>(to, p, steps, load_at.step, first_row, load_column);
    } else {
      const int step = load_at.step - steps.all;
      load_k_tile<kGuidedColumns, kBackwardThreads>(to + kRowKTile, p.v, value_split(step),
                                                    first_k_tile + step / p.v.splits, load_column);
    }
  };
  pipeline<kStages>((share.last - share.first) * load_at.steps, load, [&](int, int stage) {
    if (use_at.next()) {
      clear(s);
      clear(c);
    }
    const uint32_t row_k_tile = stages + stage * kStageBytes, column_k_tile = row_k_tile + kRowKTile;
    if (use_at.step < steps.student) {
      multiply_k_tile<half_t>(s, row_k_tile, column_k_tile, warp_row, 0);
    } else if (use_at.step < steps.all) {
      multiply_k_tile<half_t>(c, row_k_tile, column_k_tile, warp_row, 0);
    } else {
      const int step = use_at.step - steps.all, k_tile = step / p.v.splits;
      const bool with_low = p.v.splits == 2 && !value_split(step);
#pragma unroll
      for (int to = 0; to < kGuidedOutKTiles; ++to) {
        if (to != k_tile) continue;
        if (with_low) multiply_weights<value_t>(out[to], low, column_k_tile);
        multiply_weights<value_t>(out[to], high, column_k_tile);
      }
    }
    if (use_at.step == steps.all - 1) products_epilogue();
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int position = first_row + warp_row + fragment_row(0, 2 * half);
    if (position >= p.n) continue;
    float* to = gradient_at(p, k_split, position) + first_k_tile * kKTile;
#pragma unroll
    for (int k_tile = 0; k_tile < kGuidedOutKTiles; ++k_tile) {
      if (k_tile >= out_k_tiles) continue;
#pragma unroll
      for (int j = 0; j < kKTile / 8; ++j) {
        *reinterpret_cast<float2*>(to + k_tile * kKTile + fragment_col(j, 0)) = {out[k_tile][0][j][2 * half],
                                                                                 out[k_tile][0][j][2 * half + 1]};
      }
    }
  }
}

}  // namespace ltood::guided
