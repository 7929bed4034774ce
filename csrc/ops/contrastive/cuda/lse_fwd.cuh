// Forward of the contrastive losses: row log-sum-exp of S = U U' / tau without its diagonal, and the nearest row.
//
//   lse_i = log sum_{j != i} exp(s_ij);   s_ij = s_ji, so a tile of the upper triangle feeds its rows and its columns.
//
// tile      128 × 128, a block of 8 warps (2 × 4), a warp 64 × 32: 64 accumulators a thread
// k_tiles    64 features, 3 stages in flight; the rows of a tile stay in shared memory when splits * D <= 256
// shared    D = 128, bf16: 32 KiB rows + 48 KiB columns + 1 KiB of sums a tile of the work tile: two blocks on an SM of
//           228 KiB
// cost      N² D / 2 multiply-adds (times 3 for float32), N² / 2 exponentials (N² online), N D halves from memory; of
//           each tile 16 KiB a k_tile from L2
// limiter   tensor cores by mma.sync, with exponentials (16 a clock and SM) close behind at D = 128
//
// Fixed shift: unit rows bound s by 1 / tau, so 2^(t - shift) needs no maximum, and row and column share it. Online:
// maxima of rows and of columns differ, so an element takes two exponentials. Not yet verified on hardware.
#pragma once

#include "cuda/tiles.cuh"
#include "ops/contrastive/cuda/launch.h"

namespace ltood::contrastive {

using tiles::fragment_col;
using tiles::fragment_row;

constexpr int kTile = 128;
constexpr int kWarpsM = 2, kWarpsN = 4;
constexpr int kThreads = 32 * kWarpsM * kWarpsN;
constexpr int kMI = kTile / kWarpsM / 16, kNI = kTile / kWarpsN / 8;
constexpr int kStages = 3;
constexpr int kKTileBytes = tiles::k_tile_bytes<kTile>();

__device__ inline float minus_infinity() { return __int_as_float(0xff800000); }

__device__ inline bool better(Nearest a, Nearest b) {
  return a.value > b.value || (a.value == b.value && a.index >= 0 && (b.index < 0 || a.index < b.index));
}

template <int kLanes, int kStride>
__device__ Nearest warp_nearest(Nearest best) {
#pragma unroll
  for (int offset = kStride * kLanes / 2; offset >= kStride; offset /= 2) {
    const Nearest other{__shfl_xor_sync(prim::kFullWarp, best.value, offset),
                        __shfl_xor_sync(prim::kFullWarp, best.index, offset)};
    if (better(other, best)) best = other;
  }
  return best;
}

__device__ inline bool admissible(const NeighborRules& rules, int i, int j) {
  if (rules.views > 0 && i % rules.views == j % rules.views) return false;
  if (rules.instance && rules.instance[i] == rules.instance[j]) return false;
  return !rules.domain || rules.domain[i] == rules.domain[j];
}

__device__ inline int sole_partner(const SolePairs& pairs, int row) {
  if (pairs.partner) return __ldg(pairs.partner + row);
  if (pairs.half == 0) return -1;
  return row < pairs.half ? row + pairs.half : row - pairs.half;
}

// (max, sum of 2^(t - max)) of two sets of exponents; -inf and 0 is the empty set. NaN and Inf end in the sum.
__device__ inline void combine_sums(float& max, float& sum, float other_max, float other_sum) {
  const float top = fmaxf(max, other_max);
  const float shift = top == minus_infinity() ? 0.f : top;
  sum = sum * prim::exp2_fast(max - shift) + other_sum * prim::exp2_fast(other_max - shift);
  max = top;
}

// A block's state for the columns of its work tile, one row of values for each of the warps that lie above each
// other.
struct ColumnSlots {
  float* sum;  // [kWarpsM, width]
  float* max;
  Nearest* nearest;
  int width;
};

// What a thread keeps of its rows while the columns pass.
template <bool kOnline, bool kNearest>
struct RowState {
  float factor[kMI][2];  // scale_i * log2(e) / tau
  float sum[kMI][2];
  float max[kOnline ? kMI : 1][2];
  Nearest nearest[kNearest ? kMI : 1][2];
};

// Products become exponents, in units of log2 minus the shift; excluded pairs become -inf.
template <bool kEdge, bool kOnline, bool kNearest>
__device__ __forceinline__ void scale_tile(float (&c)[kMI][kNI][4], const RowState<kOnline, kNearest>& rows,
                                           const Operand& u, int first_row, int first_col, float shift) {
#pragma unroll
  for (int j = 0; j < kNI; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int col = first_col + fragment_col(j, e);
      const float col_scale = !kEdge || col < u.rows ? __ldg(u.scale + col) : 0.f;
#pragma unroll
      for (int i = 0; i < kMI; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& value = c[i][j][2 * h + e];
          value = fmaf(value * col_scale, rows.factor[i][h], -shift);
          const int row = first_row + fragment_row(i, 2 * h);
          if (kEdge && (row == col || row >= u.rows || col >= u.rows)) value = minus_infinity();
        }
      }
    }
  }
}

// Sole positives become -inf. Hardly a tile holds one: a warp looks at its 64 rows first.
__device__ __forceinline__ void exclude_pairs(float (&c)[kMI][kNI][4], const SolePairs& pairs, int n, int first_row,
                                              int first_col) {
  if (!pairs.partner && pairs.half == 0) return;
  constexpr int kRows = kTile / kWarpsM, kCols = kTile / kWarpsN;
  bool any = false;
  for (int row = first_row + threadIdx.x % 32; row < min(first_row + kRows, n); row += 32) {
    const int col = sole_partner(pairs, row) - first_col;
    any |= col >= 0 && col < kCols;
  }
  if (!__any_sync(prim::kFullWarp, any)) return;
#pragma unroll
  for (int i = 0; i < kMI; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + fragment_row(i, 2 * h);
      const int partner = row < n ? sole_partner(pairs, row) : -1;
#pragma unroll
      for (int j = 0; j < kNI; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (first_col + fragment_col(j, e) == partner) c[i][j][2 * h + e] = minus_infinity();
        }
      }
    }
  }
}

// Fixed shift: one exponential an element, for its row and its column.
template <bool kOnline, bool kNearest>
__device__ __forceinline__ void add_fixed(float (&c)[kMI][kNI][4], RowState<kOnline, kNearest>& rows,
                                          const ColumnSlots& cols, int slot, bool diagonal) {
#pragma unroll
  for (int j = 0; j < kNI; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kMI; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float x = prim::exp2_fast(c[i][j][2 * h + e]);
          rows.sum[i][h] += x;
          sum += x;
        }
      }
      sum = prim::warp_sum<8, 4>(sum);
      if (!diagonal && threadIdx.x % 32 < 4) cols.sum[slot + fragment_col(j, e)] += sum;
    }
  }
}

// A row's exponents of one tile, in the elements 2 h and 2 h + 1 of its fragments: the maximum is that of the quad that
// holds the row, the sum that of the lane.
template <int NI>
__device__ __forceinline__ void add_row_online(const float (&c)[NI][4], int h, float& max, float& sum) {
  float top = minus_infinity();
#pragma unroll
  for (int j = 0; j < NI; ++j) top = fmaxf(top, fmaxf(c[j][2 * h], c[j][2 * h + 1]));
  top = prim::warp_max<4, 1>(top);
  const float base = fmaxf(top, max), safe = base == minus_infinity() ? 0.f : base;
  sum *= prim::exp2_fast(max - safe);
#pragma unroll
  for (int j = 0; j < NI; ++j) sum += prim::exp2_fast(c[j][2 * h] - safe) + prim::exp2_fast(c[j][2 * h + 1] - safe);
  max = base;
}

// Online: running maxima, shared by the quad that holds a row and by the eight lanes that hold a column.
template <bool kOnline, bool kNearest>
__device__ __forceinline__ void add_online(float (&c)[kMI][kNI][4], RowState<kOnline, kNearest>& rows,
                                           const ColumnSlots& cols, int slot, bool diagonal) {
#pragma unroll
  for (int i = 0; i < kMI; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) add_row_online(c[i], h, rows.max[i][h], rows.sum[i][h]);
  }
  if (diagonal) return;
#pragma unroll
  for (int j = 0; j < kNI; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float top = minus_infinity(), sum = 0;
#pragma unroll
      for (int i = 0; i < kMI; ++i) top = fmaxf(top, fmaxf(c[i][j][e], c[i][j][2 + e]));
      top = prim::warp_max<8, 4>(top);
      const float safe = top == minus_infinity() ? 0.f : top;
#pragma unroll
      for (int i = 0; i < kMI; ++i) {
        sum += prim::exp2_fast(c[i][j][e] - safe) + prim::exp2_fast(c[i][j][2 + e] - safe);
      }
      sum = prim::warp_sum<8, 4>(sum);
      const int at = slot + fragment_col(j, e);
      if (threadIdx.x % 32 < 4) combine_sums(cols.max[at], cols.sum[at], top, sum);
    }
  }
}

// The nearest rows. Hardly a tile improves a best value once some have passed, so the largest element is compared
// first, and the rules (which need reads) are asked only for what would win. Columns pass in ascending order: a row
// keeps the lower index of a tie.
template <bool kOnline, bool kNearest>
__device__ __forceinline__ void offer_rows(const float (&c)[kMI][kNI][4], RowState<kOnline, kNearest>& rows,
                                           const NeighborRules& rules, int first_row, int first_col) {
#pragma unroll
  for (int i = 0; i < kMI; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Nearest& best = rows.nearest[i][h];
      float top = minus_infinity();
#pragma unroll
      for (int j = 0; j < kNI; ++j) top = fmaxf(top, fmaxf(c[i][j][2 * h], c[i][j][2 * h + 1]));
      if (!(top > best.value)) continue;
      const int row = first_row + fragment_row(i, 2 * h);
#pragma unroll
      for (int j = 0; j < kNI; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = first_col + fragment_col(j, e);
          if (c[i][j][2 * h + e] > best.value && admissible(rules, row, col)) best = {c[i][j][2 * h + e], col};
        }
      }
    }
  }
}

__device__ __forceinline__ void offer_columns(const float (&c)[kMI][kNI][4], const ColumnSlots& cols,
                                              const NeighborRules& rules, int first_row, int first_col, int slot) {
  bool any = false;
#pragma unroll
  for (int j = 0; j < kNI; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float top = minus_infinity();
#pragma unroll
      for (int i = 0; i < kMI; ++i) top = fmaxf(top, fmaxf(c[i][j][e], c[i][j][2 + e]));
      any |= top > cols.nearest[slot + fragment_col(j, e)].value;
    }
  }
  if (!__any_sync(prim::kFullWarp, any)) return;
#pragma unroll
  for (int j = 0; j < kNI; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int col = first_col + fragment_col(j, e);
      Nearest best{minus_infinity(), -1};
#pragma unroll
      for (int i = 0; i < kMI; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float value = c[i][j][2 * h + e];
          const int row = first_row + fragment_row(i, 2 * h);
          if (value > best.value && admissible(rules, row, col)) best = {value, row};
        }
      }
      best = warp_nearest<8, 4>(best);
      Nearest& kept = cols.nearest[slot + fragment_col(j, e)];
      __syncwarp();
      if (threadIdx.x % 32 < 4 && better(best, kept)) kept = best;
    }
  }
}

// Rows: quads, then the warps of a row of warps, through `exchange`; written to the work tile's slot of rows.
template <bool kOnline, bool kNearest>
__device__ void flush_rows(const ContrastiveForward& p, const RowState<kOnline, kNearest>& rows,
                           unsigned char* exchange, int first_row, int slot, float scale, float shift) {
  const int warp_n = threadIdx.x / 32 % kWarpsN, warp_row = threadIdx.x / 32 / kWarpsN * (kTile / kWarpsM);
  float* sums = reinterpret_cast<float*>(exchange);  // [kWarpsN, kTile] each
  float* maxima = sums + kWarpsN * kTile;
  Nearest* nearest = reinterpret_cast<Nearest*>(maxima + kWarpsN * kTile);
#pragma unroll
  for (int i = 0; i < kMI; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = warp_n * kTile + warp_row + fragment_row(i, 2 * h);
      const bool first = threadIdx.x % 4 == 0;
      const float sum = prim::warp_sum<4, 1>(rows.sum[i][h]);
      if (first) sums[at] = sum;
      if (kOnline && first) maxima[at] = rows.max[i][h];
      if (kNearest) {
        const Nearest best = warp_nearest<4, 1>(rows.nearest[i][h]);
        if (first) nearest[at] = best;
      }
    }
  }
  __syncthreads();
  const int row = first_row + threadIdx.x;
  if (threadIdx.x < kTile && row < p.u.rows) {
    const size_t out = size_t(slot) * p.u.rows + row;
    float max = kOnline ? maxima[threadIdx.x] : 0.f, sum = sums[threadIdx.x];
    Nearest best = kNearest ? nearest[threadIdx.x] : Nearest{};
    for (int w = 1; w < kWarpsN; ++w) {
      const int at = w * kTile + threadIdx.x;
      if (kOnline) {
        combine_sums(max, sum, maxima[at], sums[at]);
      } else {
        sum += sums[at];
      }
      if (kNearest && better(nearest[at], best)) best = nearest[at];
    }
    p.row_sums[out] = sum;
    if (kOnline) p.row_maxima[out] = max;
    if (kNearest) p.row_nearest[out] = {(best.value + shift) / scale, best.index};
  }
  __syncthreads();
}

template <bool kOnline, bool kNearest>
__device__ void flush_columns(const ContrastiveForward& p, const ColumnSlots& cols, int first_col, int n_cols, int slot,
                              float scale, float shift) {
  __syncthreads();
  for (int c = threadIdx.x; c < n_cols && first_col + c < p.u.rows; c += kThreads) {
    const size_t out = size_t(slot) * p.u.rows + first_col + c;
    float max = kOnline ? cols.max[c] : 0.f, sum = cols.sum[c];
    Nearest best = kNearest ? cols.nearest[c] : Nearest{};
    for (int w = 1; w < kWarpsM; ++w) {
      const int at = w * cols.width + c;
      if (kOnline) {
        combine_sums(max, sum, cols.max[at], cols.sum[at]);
      } else {
        sum += cols.sum[at];
      }
      if (kNearest && better(cols.nearest[at], best)) best = cols.nearest[at];
    }
    p.col_sums[out] = sum;
    if (kOnline) p.col_maxima[out] = max;
    if (kNearest) p.col_nearest[out] = {(best.value + shift) / scale, best.index};
  }
}

template <bool kOnline, bool kNearest>
__device__ void clear_columns(const ColumnSlots& cols) {
  __syncthreads();
  for (int c = threadIdx.x; c < kWarpsM * cols.width; c += kThreads) {
    cols.sum[c] = 0;
    if (kOnline) cols.max[c] = minus_infinity();
    if (kNearest) cols.nearest[c] = {minus_infinity(), -1};
  }
}

// One row of tiles against the columns [from, to), both in tiles.
template <typename half_t, bool kOnline, bool kNearest>
__device__ void mainloop(const ContrastiveForward& p, const ColumnSlots& cols, unsigned char* memory, int row_tile,
                         int from, int to, int work_tile_from, int slot) {
  const int warp_row = threadIdx.x / 32 / kWarpsN * (kTile / kWarpsM);
  const int warp_col = threadIdx.x / 32 % kWarpsN * (kTile / kWarpsN);
  const int first_row = row_tile * kTile;
  const tiles::Steps steps{p.u.k_tiles, p.u.splits};
  const int per_tile = steps.count();
  const uint32_t rows_at = prim::shared_address(memory);
  const uint32_t stages_at = rows_at + (p.plan.resident ? p.u.splits * p.u.k_tiles * kKTileBytes : 0);
  const int stage_bytes = p.plan.resident ? kKTileBytes : 2 * kKTileBytes;
  const float scale = tiles::exponent_scale(p.exponents.inv_tau, p.exponents.temperature);
  const float shift = kOnline ? 0.f : scale;

  RowState<kOnline, kNearest> rows;
#pragma unroll
  for (int i = 0; i < kMI; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + warp_row + fragment_row(i, 2 * h);
      rows.factor[i][h] = row < p.u.rows ? p.u.scale[row] * scale : 0.f;
      rows.sum[i][h] = 0;
      if (kOnline) rows.max[i][h] = minus_infinity();
      if (kNearest) rows.nearest[i][h] = {minus_infinity(), -1};
    }
  }
  if (p.plan.resident) {
    for (int s = 0; s < p.u.splits * p.u.k_tiles; ++s) {
      const uint32_t at = rows_at + s * kKTileBytes;
      tiles::load_k_tile<kTile, kThreads>(at, p.u, s / p.u.k_tiles, s % p.u.k_tiles, first_row);
    }
  }
  float c[kMI][kNI][4];
  const auto load = [&](int t, int stage) {
    const int step = t % per_tile, first_col = (from + t / per_tile) * kTile;
    const uint32_t at = stages_at + stage * stage_bytes;
    tiles::load_k_tile<kTile, kThreads>(at, p.u, steps.split_b(step), steps.k_tile(step), first_col);
    if (p.plan.resident) return;
    tiles::load_k_tile<kTile, kThreads>(at + kKTileBytes, p.u, steps.split_a(step), steps.k_tile(step), first_row);
  };
  const auto use = [&](int t, int stage) {
    const int step = t % per_tile, col_tile = from + t / per_tile;
    const uint32_t at = stages_at + stage * stage_bytes;
    const uint32_t resident = rows_at + (steps.split_a(step) * p.u.k_tiles + steps.k_tile(step)) * kKTileBytes;
    if (step == 0) tiles::clear(c);
    tiles::multiply_k_tile<half_t>(c, p.plan.resident ? resident : at + kKTileBytes, at, warp_row, warp_col);
    if (step + 1 < per_tile) return;
    const bool diagonal = col_tile == row_tile;
    const int row0 = first_row + warp_row, col0 = col_tile * kTile + warp_col;
    const int at_col = threadIdx.x / 32 / kWarpsN * cols.width + (col_tile - work_tile_from) * kTile + warp_col;
    if (diagonal || (col_tile + 1) * kTile > p.u.rows) {
      scale_tile<true>(c, rows, p.u, row0, col0, shift);
    } else {
      scale_tile<false>(c, rows, p.u, row0, col0, shift);
    }
    exclude_pairs(c, p.pairs, p.u.rows, row0, col0);
    if (kNearest) {
      offer_rows(c, rows, p.rules, row0, col0);
      if (!diagonal) offer_columns(c, cols, p.rules, row0, col0, at_col);
    }
    if (kOnline) {
      add_online(c, rows, cols, at_col, diagonal);
    } else {
      add_fixed(c, rows, cols, at_col, diagonal);
    }
  };
  tiles::pipeline<kStages>((to - from) * per_tile, load, use);
  flush_rows(p, rows, memory, first_row, slot, scale, shift);
}

// Work tiles of the upper triangle are counted strip by strip, in chunks of columns from the diagonal on. Finds the
// strip of a work tile, and the first work tile of the strip; work tiles ascend, so the search goes on where it was.
__device__ __forceinline__ void find_strip(const TrianglePlan& plan, int work, int& strip, int& first_work_tile) {
  for (;;) {
    const int in_strip = (plan.tiles - strip * plan.row_tiles + plan.col_tiles - 1) / plan.col_tiles;
    if (work < first_work_tile + in_strip) break;
    first_work_tile += in_strip;
    ++strip;
  }
}

template <typename half_t, bool kOnline, bool kNearest>
__global__ void __launch_bounds__(kThreads, kOnline || kNearest ? 1 : 2)
    contrastive_tiles_kernel(const ContrastiveForward p) {
  extern __shared__ __align__(128) unsigned char memory[];
  const TrianglePlan& plan = p.plan;
  const int stage_bytes = plan.resident ? kKTileBytes : 2 * kKTileBytes;
  const int tiles_bytes = (plan.resident ? p.u.splits * p.u.k_tiles * kKTileBytes : 0) + kStages * stage_bytes;
  ColumnSlots cols;
  cols.width = plan.col_tiles * kTile;
  cols.sum = reinterpret_cast<float*>(memory + tiles_bytes);
  cols.max = cols.sum + kWarpsM * cols.width;
  cols.nearest = reinterpret_cast<Nearest*>(kOnline ? cols.max + kWarpsM * cols.width : cols.max);
  const float scale = tiles::exponent_scale(p.exponents.inv_tau, p.exponents.temperature);
  const float shift = kOnline ? 0.f : scale;
  int strip = 0, first_work_tile = 0;
  for (int work = blockIdx.x; work < plan.work_tiles; work += gridDim.x) {
    find_strip(plan, work, strip, first_work_tile);
    const int chunk = work - first_work_tile;
    const int from = strip * plan.row_tiles + chunk * plan.col_tiles, to = min(from + plan.col_tiles, plan.tiles);
    clear_columns<kOnline, kNearest>(cols);
    for (int r = 0; r < plan.row_tiles; ++r) {
      const int row_tile = strip * plan.row_tiles + r;
      if (row_tile >= plan.tiles) break;
      mainloop<half_t, kOnline, kNearest>(p, cols, memory, row_tile, max(from, row_tile), to, from, chunk);
    }
    flush_columns<kOnline, kNearest>(p, cols, from * kTile, (to - from) * kTile, strip, scale, shift);
  }
}

}  // namespace ltood::contrastive
