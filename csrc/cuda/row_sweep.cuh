// The loop that knn and cluster_kl share: a block owns 128 rows of x and goes through the rows of y, its columns, tile
// by tile of 128 × 64. Four warps own 32 rows each of every tile, so that nothing about a row is shared between warps.
// The block's rows stay in shared memory where they fit, else their slices are streamed beside those of y.
#pragma once

#include "cuda/tiles.cuh"

namespace ltood::row_sweep {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kBlockM = 32 * kWarps, kBlockN = 64;
constexpr int kMI = 2, kNI = kBlockN / 8;  // fragments of a warp
constexpr int kSlots = 2 * kMI;            // rows of a lane: slot s is fragment s / 2, elements s % 2 * 2 and the next
constexpr int kStages = 3;

using Fragments = float[kMI][kNI][4];

__host__ __device__ constexpr int stage_bytes(bool resident) {
  return tiles::slice_bytes<kBlockN>() + (resident ? 0 : tiles::slice_bytes<kBlockM>());
}

inline int64_t shared_bytes(const Operand& x, bool resident) {
  return kStages * stage_bytes(resident) +
         (resident ? int64_t(x.slices) * x.splits * tiles::slice_bytes<kBlockM>() : 0);
}

__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 * 32; }

// Row of slot s among the 32 of the warp.
__device__ __forceinline__ int slot_row(int s) { return tiles::fragment_row(s / 2, s % 2 * 2); }

__device__ __forceinline__ float& at(Fragments& c, int s, int j, int e) { return c[s / 2][j][s % 2 * 2 + e]; }

// Where a pipeline is: a column tile, and a step of its product.
struct Position {
  int tile, step;
  __device__ void advance(int steps) {
    if (++step == steps) {
      step = 0;
      ++tile;
    }
  }
};

// Calls use_tile(c, first_column) for the column tiles begin ... end - 1, in order, with c the products of the
// operands' data: scales are left to it. It may overwrite c. Afterwards shared memory is free.
template <typename half_t, bool kResident, typename UseTile>
__device__ __forceinline__ void sweep(const Operand& x, const Operand& y, int first_row, int begin, int end,
                                      uint32_t shared, UseTile use_tile) {
  const tiles::Steps steps{x.slices, x.splits};
  const int per_tile = steps.count();
  const uint32_t rows = shared + kStages * stage_bytes(kResident);
  if constexpr (kResident) {
    for (int split = 0; split < x.splits; ++split)
      for (int slice = 0; slice < x.slices; ++slice) {
        const uint32_t to = rows + (split * x.slices + slice) * tiles::slice_bytes<kBlockM>();
        tiles::load_slice<kBlockM, kThreads>(to, x, split, slice, first_row);
      }
  }
  Fragments c;
  Position ahead{begin, 0}, now{begin, 0};
  const auto load = [&](int, int stage) {
    const uint32_t to = shared + stage * stage_bytes(kResident);
    const int slice = steps.slice(ahead.step);
    tiles::load_slice<kBlockN, kThreads>(to, y, steps.split_b(ahead.step), slice, ahead.tile * kBlockN);
    if constexpr (!kResident) {
      const uint32_t x_to = to + tiles::slice_bytes<kBlockN>();
      tiles::load_slice<kBlockM, kThreads>(x_to, x, steps.split_a(ahead.step), slice, first_row);
    }
    ahead.advance(per_tile);
  };
  const auto use = [&](int, int stage) {
    if (now.step == 0) tiles::clear(c);
    const uint32_t y_slice = shared + stage * stage_bytes(kResident);
    const int resident = steps.split_a(now.step) * x.slices + steps.slice(now.step);
    const uint32_t x_slice =
        kResident ? rows + resident * tiles::slice_bytes<kBlockM>() : y_slice + tiles::slice_bytes<kBlockN>();
    tiles::multiply_slice<half_t>(c, x_slice, y_slice, warp_row(), 0);
    if (now.step + 1 == per_tile) use_tile(c, now.tile * kBlockN);
    now.advance(per_tile);
  };
  tiles::pipeline<kStages>((end - begin) * per_tile, load, use);
}

}  // namespace ltood::row_sweep
