// Backward of the contrastive losses: the gradient that arrives through the log-sum-exp.
//
//   grad_u_i = sum_j G_ij u_j,   G_ij = w_i exp(s_ij - lse_i) + w_j exp(s_ij - lse_j),   G_i,i+diagonal = 0
// With the fixed shift G_ij = (a_i + a_j) 2^(t_ij - shift), a = w 2^(shift - lse2): one exponential an element. Rows
// and columns are the N rows of a batch (diagonal 0), or n rows of it against the M columns of all or of others.
//
// tile      128 rows × 32 or 64 columns; a block owns 128 rows, up to 128 features of the output, a range of columns
// warps     16-bit rows: 4, each 32 rows, 160 accumulators (S and 128 features) with 32 columns, as many fit; float32
//           rows: 8, each 16 rows, 64 columns, as G then takes twice the registers
// k_tiles    64 features, 3 stages; S needs the k_tiles of the columns, then the output takes them again (from L2) as V
// shared    D = 128, bf16: 32 KiB rows + 24 KiB columns: two blocks (of 255 registers) on an SM
// cost      N = M: 2 N² D multiply-adds for D <= 128 (S once, G U once; times 3 for float32); S again for every further
//           128 features of the output; N² exponentials (2 N² online)
// limiter   tensor cores by mma.sync. G never leaves the registers: it is rounded to 16 bits (float32: high and low
//           split) and is the A operand of the second product. Not yet verified on hardware.
#pragma once

#include "cuda/tiles.cuh"
#include "ops/contrastive/cuda/launch.h"

namespace ltood::contrastive::bwd {

using tiles::fragment_col;
using tiles::fragment_row;

constexpr int kTileM = 128;
constexpr int kStages = 3;
constexpr int kRowKTileBytes = tiles::k_tile_bytes<kTileM>();

// Tiles for operands of one or two splits and an output of one or two k_tiles a block.
template <int kSplits, int kOut>
struct LseBwdTiles {
  static constexpr int kTileN = kSplits == 1 && kOut == 2 ? 32 : 64;
  static constexpr int kMI = kSplits == 2 ? 1 : 2;  // 16-row fragments of a warp
  static constexpr int kNI = kTileN / 8;
  static constexpr int kThreads = kTileM / (16 * kMI) * 32;
  static constexpr int kColKTileBytes = tiles::k_tile_bytes<kTileN>();
  static constexpr int kRegisters = 4 * kMI * kNI + kOut * kMI * (kKTile / 8) * 4;  // of accumulators
  static_assert(kRegisters <= 160, "a thread has 255 registers");

  // A stage holds columns and, unless they are resident, rows of a k_tile; or the columns of the output's k_tiles.
  static constexpr int kResidentStage = kOut * kColKTileBytes;
  static constexpr int kStreamedStage = kColKTileBytes + kRowKTileBytes;
  static_assert(kStreamedStage >= kResidentStage);
};

__device__ __forceinline__ float4 load_factors(const RowFactors* factors, int row, int n) {
  return row < n ? __ldg(reinterpret_cast<const float4*>(factors) + row) : float4{};
}

// Products become G_ij scale_j: the columns' operand lacks its scale. The factors of rows are read again for every tile
// (from L1): kept in registers across the products they would spill.
template <bool kEdge, bool kOnline, int kMI, int kNI>
__device__ __forceinline__ void weight_tile(float (&c)[kMI][kNI][4], const ContrastiveLseBwd& p, int first_row,
                                            int first_col, float scale) {
  float4 row[kMI][2];
#pragma unroll
  for (int i = 0; i < kMI; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row[i][h] = load_factors(p.row_factors, first_row + fragment_row(i, 2 * h), p.rows.rows);
      row[i][h].x *= scale;
    }
  }
#pragma unroll
  for (int j = 0; j < kNI; ++j) {
    __syncwarp();  // keeps the loads of later columns behind: all at once they would spill
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int col = first_col + fragment_col(j, e);
      const float4 column = load_factors(p.col_factors, col, kEdge ? p.cols.rows : col + 1);
#pragma unroll
      for (int i = 0; i < kMI; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& value = c[i][j][2 * h + e];
          const float t = value * column.x * row[i][h].x;
          float weight;
          if (kOnline) {
            weight = row[i][h].y * prim::exp2_fast(t - row[i][h].z) + column.y * prim::exp2_fast(t - column.z);
          } else {
            weight = (row[i][h].y + column.y) * prim::exp2_fast(t - scale);
          }
          value = weight * column.x;
          const int same = first_row + fragment_row(i, 2 * h) + p.diagonal, partner = __float_as_int(row[i][h].w);
          if (kEdge && (col >= p.cols.rows || col == same || col == partner)) value = 0;
        }
      }
    }
  }
}

// Whether a sole positive of one of the warp's rows is among the columns.
template <int kRows>
__device__ __forceinline__ bool holds_pair(const ContrastiveLseBwd& p, int first_row, int first_col, int cols) {
  const int row = first_row + threadIdx.x % kRows;
  const int partner = row < p.rows.rows ? __ldg(&p.row_factors[row].partner) : -1;
  return __any_sync(prim::kFullWarp, partner >= first_col && partner < first_col + cols);
}

template <typename half_t, int kSplits, int kOut, bool kOnline>
__global__ void __launch_bounds__(LseBwdTiles<kSplits, kOut>::kThreads)
    contrastive_lse_bwd_kernel(const ContrastiveLseBwd p) {
  extern __shared__ __align__(128) unsigned char memory[];
  using S = LseBwdTiles<kSplits, kOut>;
  constexpr int kMI = S::kMI, kNI = S::kNI, kTileN = S::kTileN, kThreads = S::kThreads;
  constexpr int kColKTileBytes = S::kColKTileBytes;
  const int warp_row = threadIdx.x / 32 * 16 * kMI, n = p.rows.rows, m = p.cols.rows;
  const int first_row = blockIdx.x * kTileM, first_k_tile = blockIdx.y * kOut;
  const int n_out = min(kOut, p.rows.k_tiles - first_k_tile);
  const int col_tiles = (m + kTileN - 1) / kTileN, per_split = (col_tiles + p.k_splits - 1) / p.k_splits;
  const int from = min(int(blockIdx.z) * per_split, col_tiles), to = min(from + per_split, col_tiles);
  const tiles::Steps steps{p.rows.k_tiles, kSplits};
  const int products = steps.count(), per_tile = products + kSplits;
  const uint32_t rows_at = prim::shared_address(memory);
  const uint32_t stages_at = rows_at + (p.resident ? kSplits * p.rows.k_tiles * kRowKTileBytes : 0);
  const int bytes = p.resident ? S::kResidentStage : S::kStreamedStage;
  const float scale = tiles::exponent_scale(p.exponents.inv_tau, p.exponents.temperature);

  if (p.resident) {
    for (int s = 0; s < kSplits * p.rows.k_tiles; ++s) {
      const uint32_t at = rows_at + s * kRowKTileBytes;
      tiles::load_k_tile<kTileM, kThreads>(at, p.rows, s / p.rows.k_tiles, s % p.rows.k_tiles, first_row);
    }
  }
  float out[kOut][kMI][kKTile / 8][4];
#pragma unroll
  for (int o = 0; o < kOut; ++o) tiles::clear(out[o]);

  const auto load = [&](int t, int stage) {
    const int step = t % per_tile, first_col = (from + t / per_tile) * kTileN;
    const uint32_t at = stages_at + stage * bytes;
    if (step >= products) {  // V: the high split, then the low one
#pragma unroll
      for (int o = 0; o < kOut; ++o) {
        if (o >= n_out) continue;
        const uint32_t k_tile_at = at + o * kColKTileBytes;
        tiles::load_k_tile<kTileN, kThreads>(k_tile_at, p.cols, step - products, first_k_tile + o, first_col);
      }
      return;
    }
    tiles::load_k_tile<kTileN, kThreads>(at, p.cols, steps.split_b(step), steps.k_tile(step), first_col);
    if (p.resident) return;
    tiles::load_k_tile<kTileM, kThreads>(at + kColKTileBytes, p.rows, steps.split_a(step), steps.k_tile(step),
                                         first_row);
  };
  // Step by step of a kind, so that S and the packed weights are never alive together (but while one becomes the
  // other).
  tiles::Pipeline<kStages, decltype(load)> stages((to - from) * per_tile, load);
  for (int tile = from; tile < to; ++tile) {
    float c[kMI][kNI][4];
    tiles::clear(c);
    for (int step = 0; step < products; ++step) {
      const uint32_t at = stages_at + stages.next() * bytes;
      const uint32_t resident = rows_at + (steps.split_a(step) * p.rows.k_tiles + steps.k_tile(step)) * kRowKTileBytes;
      tiles::multiply_k_tile<half_t>(c, p.resident ? resident : at + kColKTileBytes, at, warp_row, 0);
    }
    const int row0 = first_row + warp_row, col0 = tile * kTileN, same = row0 + p.diagonal;
    const bool diagonal = col0 < same + 16 * kMI && same < col0 + kTileN;
    if (col0 + kTileN > m || diagonal || holds_pair<16 * kMI>(p, row0, col0, kTileN)) {
      weight_tile<true, kOnline>(c, p, row0, col0, scale);
    } else {
      weight_tile<false, kOnline>(c, p, row0, col0, scale);
    }
    uint32_t high[kMI][kNI / 2][4], low[kMI][kNI / 2][4];  // low: of two splits only
    tiles::pack_weights<half_t>(high, c);
    if (kSplits == 2) {
      tiles::subtract_packed<half_t>(c, high);
      tiles::pack_weights<half_t>(low, c);
    }
#pragma unroll
    for (int split = 0; split < kSplits; ++split) {
      const uint32_t at = stages_at + stages.next() * bytes;
#pragma unroll
      for (int o = 0; o < kOut; ++o) {
        if (o >= n_out) continue;
        tiles::multiply_weights<half_t>(out[o], high, at + o * kColKTileBytes);
        if (kSplits == 2 && split == 0) tiles::multiply_weights<half_t>(out[o], low, at + o * kColKTileBytes);
      }
    }
  }
  stages.drain();

  const int width = kKTile * p.rows.k_tiles;
#pragma unroll
  for (int o = 0; o < kOut; ++o) {
    if (o >= n_out) continue;
#pragma unroll
    for (int i = 0; i < kMI; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_row + warp_row + fragment_row(i, 2 * h);
        if (row >= n) continue;
        float* line = p.out + (size_t(blockIdx.z) * n + row) * width + (first_k_tile + o) * kKTile;
#pragma unroll
        for (int j = 0; j < kKTile / 8; ++j) {
          const float2 pair{out[o][i][j][2 * h], out[o][i][j][2 * h + 1]};
          *reinterpret_cast<float2*>(line + fragment_col(j, 0)) = pair;
        }
      }
    }
  }
}

}  // namespace ltood::contrastive::bwd
