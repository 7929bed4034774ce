// Backward of the contrastive losses on Hopper: what cuda/lse_bwd.cuh computes with the fixed shift.
//
//   grad_u_i = sum_j G_ij u_j,   G_ij = (a_i + a_j) 2^(t_ij - shift),   a = w 2^(shift - lse2),   G_ii = 0, and so is
//   that of a row and its sole positive
//
// tile      128 rows, 64 of a consumer warpgroup, × 128 columns (one split, D <= 128) or 64; a block owns 128 rows, up
//           to 256 features of the output, a range of columns
// operands  rows stay in shared memory; columns pass through a ring of stages of two k_tiles, 16 to 32 KiB. Both are
//           read with K along the rows for S; the same stage then serves as V, read the other way, where it holds all
//           features of the output and two tiles fit; else V comes again (from L2)
// registers D = 128: 64 of S, 64 of the output, 32 of G, which is A of the second product and never leaves them
// cost      2 N² D multiply-adds for D <= 256 (times 3 for float32), S again for every further 256 features; N²
//           exponentials; from L2 32 KiB a tile of 128 × 128 at D = 128, 16 bytes a clock and SM
// limiter   by benchmarks/results/static_cost.md, a prediction: tensor cores, of which a tile of D = 128 takes 2,048
//           clocks. A warpgroup's turn is the
//           output's product of one tile and S of the next; its exponentials run under the other's turn. Not yet
//           verified on hardware.
//
// G is symmetric, and yet every tile serves its rows alone. To use it for its columns too would save S of the mirrored
// tile, a quarter of all products: at N = 16,384, D = 128 34 GFLOP, 35 µs at 990 TFLOP/s. But the columns' output,
// 64 KiB a tile, would have to leave the block and be added up: 8,256 tiles write and read 1.1 GB, 225 µs at 4.8 TB/s
// (both rates from the data sheet of an H200).
#pragma once

#include "cuda/primitives/math.cuh"
#include "cuda/tiles.cuh"
#include "cuda/warpgroups.cuh"
#include "ops/contrastive/cuda/launch.h"

namespace ltood::contrastive::sm90 {

struct LseBwd {
  CUtensorMap row_map, col_map;  // in boxes of 128 and of kTileN rows
  ContrastiveLseBwd p;
};

constexpr int kLseBwdRows = 128;
constexpr int kLseBwdRowKTile = tiles::k_tile_bytes<kLseBwdRows>();

// For operands of one or two splits and an output of 1, 2 or 4 k_tiles a block.
template <int kSplits, int kOut>
struct LseBwdShape {
  static constexpr tile_sizes::TileSize kChoice = tile_sizes::tile_of(tile_sizes::kLseBwd, kSplits, kOut);
  static_assert(kChoice.rows == kLseBwdRows && kChoice.k_tiles == kOut, "no entry in tile_sizes::kTiles");
  static constexpr int kTileN = kChoice.columns;
  static constexpr int kChunk = kChoice.stage_k_tiles;
  static constexpr int kOutChunks = kOut / kChunk;
  static constexpr int kKTileBytes = tiles::k_tile_bytes<kTileN>();
  static constexpr int kStageBytes = kChunk * kKTileBytes;
};

// How the columns pass: per tile `chunks` × splits stages for S; these serve as V too (`shared`), or V follows.
template <int kSplits, int kOut>
struct Schedule {
  int k_tiles, chunks, from, to;  // tiles
  bool shared;

  __device__ explicit Schedule(const ContrastiveLseBwd& p) {
    using P = LseBwdShape<kSplits, kOut>;
    k_tiles = p.rows.k_tiles;
    chunks = (k_tiles + P::kChunk - 1) / P::kChunk;
    shared = chunks <= P::kOutChunks && 2 * chunks * kSplits <= p.stages;
    const int tiles = (p.cols.rows + P::kTileN - 1) / P::kTileN, per_split = (tiles + p.k_splits - 1) / p.k_splits;
    from = min(int(blockIdx.z) * per_split, tiles);
    to = min(from + per_split, tiles);
  }
  // Stages that a turn needs before the other warpgroup gives any back.
  __device__ int of_turn() const {
    return (shared ? 2 * chunks : chunks + LseBwdShape<kSplits, kOut>::kOutChunks) * kSplits;
  }
};

template <int kSplits, int kOut>
__device__ __forceinline__ void produce_columns(const LseBwd& f, const warpgroups::Ring& ring, uint32_t resident,
                                                uint32_t resident_full) {
  using P = LseBwdShape<kSplits, kOut>;
  const Schedule<kSplits, kOut> plan(f.p);
  prim::mbarrier_arrive_expect(resident_full, kSplits * plan.k_tiles * kLseBwdRowKTile);
  for (int s = 0; s < kSplits * plan.k_tiles; ++s) {
    const int column = s % plan.k_tiles * kKTile, row = blockIdx.x * kLseBwdRows;
    prim::tma_load(resident + s * kLseBwdRowKTile, &f.row_map, resident_full, column, row, s / plan.k_tiles);
  }
  warpgroups::RingPosition at;
  const auto load = [&](int tile, int first_k_tile, int chunks) {
    for (int stage = 0; stage < chunks * kSplits; ++stage, at.advance(ring.stages)) {
      ring.claim(at, P::kStageBytes);
#pragma unroll
      for (int i = 0; i < P::kChunk; ++i) {
        const int column = (first_k_tile + stage / kSplits * P::kChunk + i) * kKTile;
        const uint32_t to = ring.at(at) + i * P::kKTileBytes;
        prim::tma_load(to, &f.col_map, ring.full(at), column, tile * P::kTileN, stage % kSplits);
      }
    }
  };
  if (plan.from < plan.to) load(plan.from, 0, plan.chunks);
  for (int tile = plan.from; tile < plan.to; ++tile) {
    if (!plan.shared) load(tile, blockIdx.y * kOut, P::kOutChunks);
    if (tile + 1 < plan.to) load(tile + 1, 0, plan.chunks);
  }
}

// S becomes G_ij scale_j: the columns' operand lacks its scale. Column `same` is the thread's first row itself.
template <bool kEdge, int kSize>
__device__ __forceinline__ void weight_scores(float (&s)[kSize], const float2 (&of_row)[2], const int (&partner)[2],
                                              const RowFactors* factors, float scale, int n_cols, int same,
                                              int first_col) {
#pragma unroll
  for (int j = 0; j < kSize / 4; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int col = first_col + j * 8 + threadIdx.x % 4 * 2 + h;
      const bool inside = !kEdge || col < n_cols;
      const float2 of_col = inside ? __ldg(reinterpret_cast<const float2*>(factors + col)) : float2{};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& value = s[4 * j + 2 * r + h];
        const float t = fmaf(value * of_col.x, of_row[r].x, -scale);
        const float x =
            kEdge ? prim::exp2_fast(t) : prim::exp2_shared<tile_sizes::kPolynomialEighths>(t, 4 * j + 2 * r + h);
        value = (of_row[r].y + of_col.y) * x * of_col.x;
        if (kEdge && (!inside || col == same + 8 * r || col == partner[r])) value = 0;
      }
    }
  }
}

// What a consumer warpgroup does with its 64 rows.
template <typename half_t, int kSplits, int kOut>
class LseBwdConsumer {
  using P = LseBwdShape<kSplits, kOut>;
  using RingPosition = warpgroups::RingPosition;

 public:
  __device__ __forceinline__ LseBwdConsumer(const ContrastiveLseBwd& p, const warpgroups::Ring& ring, uint32_t resident)
      : p_(p),
        ring_(ring),
        plan_(p),
        rows_(resident + warpgroups::consumer() * kLseBwdRowKTile / 2),
        row_(blockIdx.x * kLseBwdRows + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4) {}

  __device__ __forceinline__ void run(uint32_t resident_full) {
    const float scale = tiles::exponent_scale(p_.exponents.inv_tau, p_.exponents.temperature);
    const int first_same = blockIdx.x * kLseBwdRows + p_.diagonal;  // the block's first row among the columns
    float2 of_row[2];
    int partner[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_ + 8 * r;
      partner[r] = row < p_.rows.rows ? __ldg(&p_.row_factors[row].partner) : -1;
      of_row[r] = row < p_.rows.rows ? __ldg(reinterpret_cast<const float2*>(p_.row_factors + row)) : float2{};
      of_row[r].x *= scale;
    }
#pragma unroll
    for (int i = 0; i < 32 * kOut; ++i) out_[i / (32 * P::kChunk)][i % (32 * P::kChunk)] = 0;
    const bool turns = plan_.of_turn() <= ring_.stages;
    prim::mbarrier_wait(resident_full, 0);
    warpgroups::begin_turns();
    if (plan_.from < plan_.to) multiply_scores();
    settle(0);
    for (int tile = plan_.from; tile < plan_.to; ++tile) {
      const int first_col = tile * P::kTileN;
      const bool diagonal = first_col < first_same + kLseBwdRows && first_same < first_col + P::kTileN;
      const int n_cols = p_.cols.rows, same = row_ + p_.diagonal;
      if (diagonal || first_col + P::kTileN > n_cols || holds_pair(partner, first_col)) {
        weight_scores<true>(s_, of_row, partner, p_.col_factors, scale, n_cols, same, first_col);
      } else {
        weight_scores<false>(s_, of_row, partner, p_.col_factors, scale, n_cols, same, first_col);
      }
      pack_scores();
      if (turns) warpgroups::wait_for_turn();
      multiply_values();
      if (tile + 1 < plan_.to) multiply_scores();
      if (turns) warpgroups::end_turn();
      settle(plan_.shared ? plan_.chunks * kSplits : 0);
    }
    warpgroups::end_turns();
    store();
  }

 private:
  __device__ __forceinline__ static bool holds_pair(const int (&partner)[2], int first_col) {
    bool any = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) any |= partner[r] >= first_col && partner[r] < first_col + P::kTileN;
    return __any_sync(prim::kFullWarp, any);
  }

  // S of the ring's next stages: low × high and high × low before high × high, so that small terms are added first.
  __device__ __forceinline__ void multiply_scores() {
    for (int chunk = 0; chunk < plan_.chunks; ++chunk) {
      RingPosition splits[kSplits];
      take(splits);
      const int k_tiles = min(P::kChunk, plan_.k_tiles - chunk * P::kChunk);
      prim::wgmma_fence();
#pragma unroll
      for (int pass = 0; pass < 2 * kSplits - 1; ++pass) {
        const int low_row = kSplits == 2 && pass == 0, low_col = kSplits == 2 && pass == 1;
        const uint32_t rows = rows_ + (low_row * plan_.k_tiles + chunk * P::kChunk) * kLseBwdRowKTile;
        const uint32_t cols = ring_.at(splits[low_col]);
        for (int i = 0; i < k_tiles; ++i) {
#pragma unroll
          for (int k = 0; k < kKTile / 16; ++k) {
            prim::wgmma_shared<half_t>(s_, prim::matrix_descriptor(rows + i * kLseBwdRowKTile + k * 32),
                                       prim::matrix_descriptor(cols + i * P::kKTileBytes + k * 32),
                                       chunk > 0 || pass > 0 || i > 0 || k > 0);
          }
        }
      }
      commit(!plan_.shared);
    }
  }

  // output += G V, V in the oldest stages (shared) or in the next ones.
  __device__ __forceinline__ void multiply_values() {
    RingPosition oldest = left_;
#pragma unroll
    for (int o = 0; o < P::kOutChunks; ++o) {
      if (plan_.shared && o >= plan_.chunks) continue;
      RingPosition splits[kSplits];
      if (plan_.shared) {
        for (RingPosition& split : splits) {
          split = oldest;
          oldest.advance(ring_.stages);
        }
      } else {
        take(splits);
      }
      prim::wgmma_fence();
#pragma unroll
      for (int pass = 0; pass < 2 * kSplits - 1; ++pass) {
        const int low_weight = kSplits == 2 && pass == 0, low_value = kSplits == 2 && pass == 1;
        const uint32_t values = ring_.at(splits[low_value]);
#pragma unroll
        for (int k = 0; k < P::kTileN / 16; ++k) {
          prim::wgmma_registers<half_t>(out_[o], g_[low_weight][k],
                                        prim::matrix_descriptor(values + k * 16 * tiles::kRowBytes, P::kKTileBytes),
                                        true);
        }
      }
      commit(!plan_.shared);
    }
  }

  __device__ __forceinline__ void take(RingPosition (&splits)[kSplits]) {
#pragma unroll
    for (RingPosition& split : splits) {
      split = at_;
      ring_.wait(at_);
      at_.advance(ring_.stages);
    }
  }

  // A group of products is on its way; those before the last one have ended, and their stages, unless V is still to be
  // read from them, are given back.
  __device__ __forceinline__ void commit(bool last_use) {
    prim::wgmma_commit();
    if (!last_use) return;
    if (flying_ == 1) {
      prim::wgmma_wait<1>();
      release(kSplits);
    } else {
      flying_ = 1;
    }
  }

  // All products have ended; gives back what flew and `stages` more.
  __device__ __forceinline__ void settle(int stages) {
    prim::wgmma_wait<0>();
    release(stages + flying_ * kSplits);
    flying_ = 0;
  }

  __device__ __forceinline__ void release(int stages) {
    for (int i = 0; i < stages; ++i, left_.advance(ring_.stages)) ring_.release(left_);
  }

  // G as the A operand, in splits: what rounding takes from the first is in the second.
  __device__ __forceinline__ void pack_scores() {
#pragma unroll
    for (int i = 0; i < P::kTileN / 4; ++i) {
      uint32_t& high = g_[0][i / 4][i % 4];
      high = prim::pack<half_t>(s_[2 * i], s_[2 * i + 1]);
      if (kSplits == 1) continue;
      const half_t* halves = reinterpret_cast<const half_t*>(&high);
      g_[kSplits - 1][i / 4][i % 4] =
          prim::pack<half_t>(s_[2 * i] - prim::to_float(halves[0]), s_[2 * i + 1] - prim::to_float(halves[1]));
    }
  }

  __device__ __forceinline__ void store() const {
    const int width = kKTile * plan_.k_tiles;
#pragma unroll
    for (int o = 0; o < P::kOutChunks; ++o) {
#pragma unroll
      for (int j = 0; j < 8 * P::kChunk; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = row_ + 8 * r;
          const int feature = (blockIdx.y * kOut + o * P::kChunk) * kKTile + j * 8 + threadIdx.x % 4 * 2;
          if (row >= p_.rows.rows || feature >= width) continue;
          float* to = p_.out + (size_t(blockIdx.z) * p_.rows.rows + row) * width + feature;
          *reinterpret_cast<float2*>(to) = {out_[o][4 * j + 2 * r], out_[o][4 * j + 2 * r + 1]};
        }
      }
    }
  }

  const ContrastiveLseBwd& p_;
  const warpgroups::Ring& ring_;
  const Schedule<kSplits, kOut> plan_;
  const uint32_t rows_;
  const int row_;  // the thread's first
  RingPosition at_, left_;
  int flying_ = 0;  // segments whose stages are to be given back
  float s_[P::kTileN / 2], out_[P::kOutChunks][32 * P::kChunk];
  uint32_t g_[kSplits][P::kTileN / 16][4];
};

template <typename half_t, int kSplits, int kOut>
__global__ void __launch_bounds__(warpgroups::kThreads, 1)
    contrastive_lse_bwd_sm90_kernel(const __grid_constant__ LseBwd f) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // empty in a compilation for anything else
  using P = LseBwdShape<kSplits, kOut>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t resident = prim::shared_address(memory);
  const uint32_t stages_at = resident + kSplits * f.p.rows.k_tiles * kLseBwdRowKTile;
  const uint32_t barriers = stages_at + f.p.stages * P::kStageBytes;
  const warpgroups::Ring ring{stages_at, barriers, f.p.stages, P::kStageBytes};
  const uint32_t resident_full = barriers + f.p.stages * warpgroups::kBarrierBytes;
  if (threadIdx.x == 0) {
    ring.init();
    prim::mbarrier_init(resident_full, 1);
    prim::mbarrier_init_fence();
  }
  __syncthreads();
  if (warpgroups::is_producer()) {
    prim::give_registers<warpgroups::kProducerRegisters>();
    if (threadIdx.x == warpgroups::kConsumerThreads) {
      produce_columns<kSplits, kOut>(f, ring, resident, resident_full);
    }
  } else {
    prim::take_registers<warpgroups::kConsumerRegisters>();
    LseBwdConsumer<half_t, kSplits, kOut>(f.p, ring, resident).run(resident_full);
  }
#endif
}

}  // namespace ltood::contrastive::sm90
