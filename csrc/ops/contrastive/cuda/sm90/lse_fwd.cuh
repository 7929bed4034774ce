// Forward of the contrastive losses on Hopper: what cuda/lse_fwd.cuh computes with the fixed shift, by wgmma and
// the copy engine. lse_i = log sum_{j != i} exp(s_ij), a tile of the upper triangle feeds its rows and its columns.
//
// tile      wide (splits * D <= 256): 128 columns × 256 rows, a consumer warpgroup 128 × 128 of them, 128 accumulators
//           a thread; narrow (splits * D <= 512, or with neighbours): 128 × 128, a warpgroup 64 × 128
// operands  columns are the A of a product and pass through a ring of k_tiles of 64 features, 16 KiB each; rows are B
//           and stay: D = 128, bf16, wide: 64 KiB rows + 6 stages
// sums      a thread's rows are the N of its products: it keeps 32 row sums (and nearest columns) in registers while
//           columns pass and reduces them once a row tile; of a column it has 32 elements a tile: two shuffles end it
// cost      N² D / 2 multiply-adds (times 3 for float32), N² / 2 exponentials; from L2 16 KiB a k_tile of 128 columns,
//           for 256 rows: 16 bytes a clock and SM at D = 128 if the tensor cores never wait
// limiter   by benchmarks/results/static_cost.md, a prediction: at D = 128 a wide tile takes 2,048 clocks of tensor
// cores
//           and 2,048 of ex2, modelled 2,516: the warpgroups take turns, one's products under the other's exponentials.
//           Not yet verified on hardware.
#pragma once

#include "cuda/primitives/math.cuh"
#include "cuda/tiles.cuh"
#include "cuda/warpgroups.cuh"
#include "ops/contrastive/cuda/lse_fwd.cuh"

namespace ltood::contrastive::sm90 {

using warpgroups::Ring;
using warpgroups::RingPosition;

struct Forward {
  CUtensorMap map;  // of u in boxes of a k_tile
  ContrastiveForward p;
};

template <bool kWide>
struct LseFwdShape {
  static constexpr int kRowTiles = kWide ? 2 : 1;  // of 128 rows, resident
  static constexpr int kHalves = kWide ? 2 : 1;    // of 64 columns, of a warpgroup
};

constexpr int kThreadRows = kTile / 4;  // rows of a thread
constexpr int kPairs = kTile / 8;       // in neighbours of two

// Shared memory: resident rows, ring, then this, then the barriers. Entries are of the resident rows, or of the columns
// of a work tile.
struct Epilogue {
  int64_t *instance, *domain;  // [128], with neighbours only
  Nearest* nearest;            // [width], with neighbours only
  Nearest* nearest_exchange;   // [warps, 128], with neighbours only
  float* factors;              // [row tiles, 128] scale_i * log2(e) / tau
  float* exchange;             // [warps, 128]
  float* columns;              // [row tiles, width]: sums, of each warpgroup where both see a column
  uint32_t barriers;
  int width;
};

__host__ __device__ constexpr int resident_bytes(const Operand& u, bool wide) {
  return (wide ? 2 : 1) * u.splits * u.k_tiles * kKTileBytes;
}
__host__ __device__ constexpr int epilogue_bytes(bool wide, bool nearest, int col_tiles) {
  const int row_tiles = wide ? 2 : 1, warps = warpgroups::kConsumerWarps;
  const int of_nearest = nearest ? (2 + warps + col_tiles) * kTile * 8 : 0;
  return of_nearest + (row_tiles + warps + row_tiles * col_tiles) * kTile * 4;
}

template <bool kWide, bool kNearest>
__device__ __forceinline__ Epilogue epilogue_of(unsigned char* memory, const Forward& f) {
  constexpr int kRowTiles = LseFwdShape<kWide>::kRowTiles;
  Epilogue epilogue;
  epilogue.width = f.p.plan.col_tiles * kTile;
  epilogue.instance = reinterpret_cast<int64_t*>(memory + resident_bytes(f.p.u, kWide) + f.p.plan.stages * kKTileBytes);
  epilogue.domain = epilogue.instance + kTile;
  epilogue.nearest = reinterpret_cast<Nearest*>(epilogue.domain + kTile);
  epilogue.nearest_exchange = epilogue.nearest + epilogue.width;
  epilogue.factors = kNearest ? reinterpret_cast<float*>(epilogue.nearest_exchange + warpgroups::kConsumerWarps * kTile)
                              : reinterpret_cast<float*>(epilogue.instance);
  epilogue.exchange = epilogue.factors + kRowTiles * kTile;
  epilogue.columns = epilogue.exchange + warpgroups::kConsumerWarps * kTile;
  epilogue.barriers = prim::shared_address(epilogue.columns + kRowTiles * epilogue.width);
  return epilogue;
}

struct WorkTile {
  int strip, chunk, from, to;  // its slots of columns and of rows, its column tiles
};

// Producer and consumers both walk over the row tiles of this block, row tiles [first, first + kRowTiles) against
// column tiles [from, to), which are none below the diagonal. `begin` and `end` surround a work tile. A block takes
// work tiles that follow each other, so that the resident rows rarely change.
template <bool kWide, typename Begin, typename Body, typename End>
__device__ __forceinline__ void for_each_row_tile(const TrianglePlan& plan, Begin begin, Body body, End end) {
  const auto share = [&](int block) { return int(int64_t(plan.work_tiles) * block / gridDim.x); };
  int strip = 0, first_work_tile = 0;
  for (int index = share(blockIdx.x); index < share(blockIdx.x + 1); ++index) {
    find_strip(plan, index, strip, first_work_tile);
    const int chunk = index - first_work_tile, from = strip * plan.row_tiles + chunk * plan.col_tiles;
    const WorkTile work{strip, chunk, from, min(from + plan.col_tiles, plan.tiles)};
    begin(work);
    for (int r = 0; r < plan.row_tiles; r += LseFwdShape<kWide>::kRowTiles) {
      const int first = work.strip * plan.row_tiles + r;
      if (first >= plan.tiles) break;
      body(work, first, max(work.from, first), work.to);
    }
    end(work);
  }
}

template <bool kWide>
__device__ __forceinline__ void produce(const Forward& f, const Ring& ring, uint32_t resident, uint32_t resident_full) {
  const Operand& u = f.p.u;
  const tiles::Steps steps{u.k_tiles, u.splits};
  const int k_tiles = u.splits * u.k_tiles;
  const uint32_t resident_empty = resident_full + 8;
  RingPosition at;
  uint32_t phase = 0;
  int cached = -1;  // the first resident row tile
  for_each_row_tile<kWide>(
      f.p.plan, [](const WorkTile&) {},
      [&](const WorkTile&, int first, int from, int to) {
        if (from < to && first != cached) {
          prim::mbarrier_wait(resident_empty, phase ^ 1);
          prim::mbarrier_arrive_expect(resident_full, LseFwdShape<kWide>::kRowTiles * k_tiles * kKTileBytes);
          for (int s = 0; s < LseFwdShape<kWide>::kRowTiles * k_tiles; ++s) {
            const int split = s / u.k_tiles % u.splits, row = (first + s / k_tiles) * kTile;
            prim::tma_load(resident + s * kKTileBytes, &f.map, resident_full, s % u.k_tiles * kKTile, row, split);
          }
          phase ^= 1;
          cached = first;
        }
        for (int tile = from; tile < to; ++tile) {
          for (int step = 0; step < steps.count(); ++step, at.advance(ring.stages)) {
            ring.claim(at, kKTileBytes);
            const int column = steps.k_tile(step) * kKTile;
            prim::tma_load(ring.at(at), &f.map, ring.full(at), column, tile * kTile, steps.split_b(step));
          }
        }
      },
      [](const WorkTile&) {});
}

// What a thread keeps of its rows while columns pass, and of its columns for a tile.
template <bool kNearest>
struct ThreadRows {
  float sum[kThreadRows];
  Nearest nearest[kNearest ? kThreadRows : 1];
};
template <int kHalves, bool kNearest>
struct ColumnState {
  float factor[kHalves][2];
  float sum[kHalves][2];
  int partner[kHalves][2];  // the row of a sole positive
  Nearest nearest[kNearest ? kHalves : 1][2];
  int64_t instance[kNearest ? kHalves : 1][2], domain[kNearest ? kHalves : 1][2];
};

// Exponentials of a tile, added to the sums of its rows and of its columns; and offered as neighbours: columns pass in
// ascending order, and so do the rows of a tile, so that the lower index keeps a tie. Views are never neighbours:
// they count as edge, as do sole positives.
template <bool kEdge, int kHalves, bool kNearest>
__device__ __forceinline__ void add_exponentials(const float (&c)[kHalves][kTile / 2], ThreadRows<kNearest>& rows,
                                                 ColumnState<kHalves, kNearest>& cols, const Epilogue& epilogue,
                                                 const float* row_factors, const NeighborRules& rules, float shift,
                                                 int n, int first_row, int first_col) {
  const int quad = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    if (kNearest) __syncwarp();  // keeps the loads of later rows behind: all at once they would spill
    const float2 factors = *reinterpret_cast<const float2*>(row_factors + j * 8 + quad);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = j * 8 + quad + e % 2, i_row = 2 * j + e % 2, r = e / 2;
        const int row = first_row + at, col = first_col + half * 64 + r * 8;
        float t = fmaf(c[half][4 * j + e] * (e % 2 ? factors.y : factors.x), cols.factor[half][r], -shift);
        if (kEdge && (row == col || row >= n || col >= n || row == cols.partner[half][r])) t = minus_infinity();
        // The fixed shift keeps t within [-126, 0] but for what is masked.
        const float x = kEdge ? prim::exp2_fast(t) : prim::exp2_shared<tile_sizes::kPolynomialEighths>(t, 4 * j + e);
        rows.sum[i_row] += x;
        cols.sum[half][r] += x;
        if (kNearest) {
          bool allowed = !kEdge || rules.views == 0 || (row - col != rules.views && col - row != rules.views);
          if (rules.instance) allowed = allowed && epilogue.instance[at] != cols.instance[half][r];
          if (rules.domain) allowed = allowed && epilogue.domain[at] == cols.domain[half][r];
          Nearest &of_row = rows.nearest[i_row], &of_col = cols.nearest[half][r];
          if (allowed && t > of_row.value) of_row = {t, col};
          if (allowed && t > of_col.value) of_col = {t, row};
        }
      }
    }
  }
}

// Rows: what the eight lanes that share a row have, then the warps; written to the work tile's slot.
template <bool kWide, bool kNearest>
__device__ __forceinline__ void flush_rows(const ContrastiveForward& p, const ThreadRows<kNearest>& rows,
                                           const Epilogue& epilogue, int first, int slot, float scale) {
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int at = warp * kTile + i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
    const bool writes = threadIdx.x % 32 < 4;
    __syncwarp();  // one row after the other: all at once they would spill
    const float sum = prim::warp_sum<8, 4>(rows.sum[i]);
    if (writes) epilogue.exchange[at] = sum;
    if (kNearest) {
      const Nearest best = warp_nearest<8, 4>(rows.nearest[i]);
      if (writes) epilogue.nearest_exchange[at] = best;
    }
  }
  warpgroups::sync_consumers();
  const int row = first * kTile + threadIdx.x;
  if (threadIdx.x < LseFwdShape<kWide>::kRowTiles * kTile && row < p.u.rows) {
    constexpr int kWarps = warpgroups::kConsumerWarps / LseFwdShape<kWide>::kRowTiles;
    const int from = threadIdx.x / kTile * kWarps * kTile + threadIdx.x % kTile;
    const size_t out = size_t(slot) * p.u.rows + row;
    float sum = epilogue.exchange[from];
    for (int w = 1; w < kWarps; ++w) sum += epilogue.exchange[from + w * kTile];
    p.row_sums[out] = sum;
    if (!kNearest) return;
    Nearest best = epilogue.nearest_exchange[from];
    for (int w = 1; w < kWarps; ++w) {
      const Nearest other = epilogue.nearest_exchange[from + w * kTile];
      if (better(other, best)) best = other;
    }
    p.row_nearest[out] = {(best.value + scale) / scale, best.index};
  }
}

// A block's consumers, thread by thread.
template <typename half_t, bool kWide, bool kNearest>
class TileConsumer {
  static constexpr int kRowTiles = LseFwdShape<kWide>::kRowTiles, kHalves = LseFwdShape<kWide>::kHalves;
  using Columns = ColumnState<kHalves, kNearest>;

 public:
  __device__ __forceinline__ TileConsumer(const Forward& f, const Epilogue& epilogue, const Ring& ring,
                                          uint32_t resident)
      : p_(f.p),
        n_(f.p.u.rows),
        epilogue_(epilogue),
        ring_(ring),
        steps_{f.p.u.k_tiles, f.p.u.splits},
        rows_(resident + own() * f.p.u.splits * f.p.u.k_tiles * kKTileBytes),
        own_col_((kWide ? 0 : warpgroups::consumer() * 64) + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4),
        scale_(tiles::exponent_scale(f.p.exponents.inv_tau, f.p.exponents.temperature)) {}

  __device__ __forceinline__ void run(uint32_t resident_full) {
    uint32_t phase = 0;
    int cached = -1;
    warpgroups::begin_turns();
    for_each_row_tile<kWide>(
        p_.plan, [&](const WorkTile&) { clear_columns(); },
        [&](const WorkTile& work, int first, int from, int to) {
          prepare_rows(first);
          if (from < to && first != cached) {
            if (cached >= 0 && threadIdx.x % 32 == 0) prim::mbarrier_arrive(resident_full + 8);
            prim::mbarrier_wait(resident_full, phase);
            phase ^= 1;
            cached = first;
          }
          mainloop(work, first, from, to);
        },
        [&](const WorkTile& work) { flush_columns(work); });
    warpgroups::end_turns();
  }

 private:
  // Which of the resident row tiles is this warpgroup's.
  __device__ __forceinline__ static int own() { return kWide ? warpgroups::consumer() : 0; }

  __device__ __forceinline__ void clear_columns() {
    warpgroups::sync_consumers();
    for (int i = threadIdx.x; i < kRowTiles * epilogue_.width; i += warpgroups::kConsumerThreads) {
      epilogue_.columns[i] = 0;
      if (kNearest) epilogue_.nearest[i] = {minus_infinity(), -1};
    }
  }

  __device__ __forceinline__ void prepare_rows(int first) {
    warpgroups::sync_consumers();  // the mainloop before has ended
    for (int i = threadIdx.x; i < kRowTiles * kTile; i += warpgroups::kConsumerThreads) {
      const int row = first * kTile + i;
      epilogue_.factors[i] = row < n_ ? p_.u.scale[row] * scale_ : 0.f;
      if (kNearest && p_.rules.instance) epilogue_.instance[i] = row < n_ ? p_.rules.instance[row] : 0;
      if (kNearest && p_.rules.domain) epilogue_.domain[i] = row < n_ ? p_.rules.domain[row] : 0;
    }
    warpgroups::sync_consumers();
  }

  __device__ __forceinline__ void mainloop(const WorkTile& work, int first, int from, int to) {
    const int row_tile = first + own(), first_row = row_tile * kTile;
    ThreadRows<kNearest> rows;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      rows.sum[i] = 0;
      if (kNearest) rows.nearest[i] = {minus_infinity(), -1};
    }
    for (int tile = from; tile < to; ++tile) {
      const int first_col = tile * kTile + own_col_;
      Columns cols;
      prepare_columns(cols, first_col);
      float c[kHalves][kTile / 2];
      warpgroups::multiply_tile<half_t>(c, steps_.count(), ring_, at_, left_, [&](int step, uint32_t stage) {
        const uint32_t cols = stage + (kWide ? 0 : warpgroups::consumer() * kKTileBytes / 2);
        return make_uint2(cols, rows_ + (steps_.split_a(step) * steps_.k_tiles + steps_.k_tile(step)) * kKTileBytes);
      });
      if (tile < row_tile) continue;  // the second row tile's share of the diagonal's left neighbour
      const float* factors = epilogue_.factors + own() * kTile;
      if (is_edge(tile, row_tile) || holds_pair(cols, first_row)) {
        add_exponentials<true>(c, rows, cols, epilogue_, factors, p_.rules, scale_, n_, first_row, first_col);
      } else {
        add_exponentials<false>(c, rows, cols, epilogue_, factors, p_.rules, scale_, n_, first_row, first_col);
      }
      if (tile != row_tile) add_columns(cols, (tile - work.from) * kTile + own_col_);
    }
    flush_rows<kWide>(p_, rows, epilogue_, first, work.chunk, scale_);
  }

  // Tiles with elements that do not count, or count for no neighbour: the diagonal, the end, pairs of views.
  __device__ __forceinline__ bool is_edge(int tile, int row_tile) const {
    const int apart = (tile - row_tile) * kTile - p_.rules.views;
    const bool views = kNearest && p_.rules.views > 0 && -kTile < apart && apart < kTile;
    return tile == row_tile || (tile + 1) * kTile > n_ || views;
  }

  __device__ __forceinline__ static bool holds_pair(const Columns& cols, int first_row) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < 2 * kHalves; ++i) {
      const int row = cols.partner[i / 2][i % 2] - first_row;
      any |= row >= 0 && row < kTile;
    }
    return __any_sync(prim::kFullWarp, any);
  }

  __device__ __forceinline__ void prepare_columns(Columns& cols, int first_col) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int col = first_col + half * 64 + r * 8;
        cols.factor[half][r] = col < n_ ? __ldg(p_.u.scale + col) : 0.f;
        cols.sum[half][r] = 0;
        cols.partner[half][r] = col < n_ ? sole_partner(p_.pairs, col) : -1;
        if (!kNearest) continue;
        cols.nearest[half][r] = {minus_infinity(), -1};
        if (p_.rules.instance) cols.instance[half][r] = col < n_ ? p_.rules.instance[col] : 0;
        if (p_.rules.domain) cols.domain[half][r] = col < n_ ? p_.rules.domain[col] : 0;
      }
    }
  }

  // What a quad has of its columns, which no other of the warpgroup sees.
  __device__ __forceinline__ void add_columns(const Columns& cols, int at) {
#pragma unroll
    for (int i = 0; i < 2 * kHalves; ++i) {
      const int col = at + i / 2 * 64 + i % 2 * 8;
      const bool first = threadIdx.x % 4 == 0;
      const float sum = prim::warp_sum<4, 1>(cols.sum[i / 2][i % 2]);
      if (first) epilogue_.columns[own() * epilogue_.width + col] += sum;
      if (!kNearest) continue;
      const Nearest best = warp_nearest<4, 1>(cols.nearest[i / 2][i % 2]);
      if (first && better(best, epilogue_.nearest[col])) epilogue_.nearest[col] = best;
    }
  }

  __device__ __forceinline__ void flush_columns(const WorkTile& work) {
    warpgroups::sync_consumers();
    const int first_col = work.from * kTile, n_cols = min(work.to * kTile, n_) - first_col;
    for (int i = threadIdx.x; i < n_cols; i += warpgroups::kConsumerThreads) {
      const size_t out = size_t(work.strip) * n_ + first_col + i;
      p_.col_sums[out] = epilogue_.columns[i] + (kWide ? epilogue_.columns[epilogue_.width + i] : 0.f);
      if (!kNearest) continue;
      p_.col_nearest[out] = {(epilogue_.nearest[i].value + scale_) / scale_, epilogue_.nearest[i].index};
    }
  }

  const ContrastiveForward& p_;
  const int n_;
  const Epilogue& epilogue_;
  const Ring& ring_;
  const tiles::Steps steps_;
  const uint32_t rows_;
  const int own_col_;  // the thread's first column of a tile: its warp's 16 of the warpgroup's 64
  const float scale_;
  RingPosition at_, left_;
};

template <typename half_t, bool kWide, bool kNearest>
__global__ void __launch_bounds__(warpgroups::kThreads, 1)
    contrastive_tiles_sm90_kernel(const __grid_constant__ Forward f) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // empty in a compilation for anything else
  extern __shared__ __align__(1024) unsigned char memory[];
  const Epilogue epilogue = epilogue_of<kWide, kNearest>(memory, f);
  const uint32_t resident = prim::shared_address(memory);
  const Ring ring{resident + resident_bytes(f.p.u, kWide), epilogue.barriers, f.p.plan.stages, kKTileBytes};
  const uint32_t resident_full = epilogue.barriers + f.p.plan.stages * warpgroups::kBarrierBytes;
  if (threadIdx.x == 0) {
    ring.init();
    prim::mbarrier_init(resident_full, 1);
    prim::mbarrier_init(resident_full + 8, warpgroups::kConsumerWarps);
    prim::mbarrier_init_fence();
  }
  __syncthreads();
  if (warpgroups::is_producer()) {
    prim::give_registers<warpgroups::kProducerRegisters>();
    if (threadIdx.x == warpgroups::kConsumerThreads) produce<kWide>(f, ring, resident, resident_full);
  } else {
    prim::take_registers<warpgroups::kConsumerRegisters>();
    TileConsumer<half_t, kWide, kNearest>(f, epilogue, ring, resident).run(resident_full);
  }
#endif
}

}  // namespace ltood::contrastive::sm90
