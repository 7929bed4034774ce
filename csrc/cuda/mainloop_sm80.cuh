// The loop that knn and cluster_kl share: a block owns 128 rows of x and goes through the rows of y, its columns, tile
// by tile of 128 × 64. Four warps own 32 rows each of every tile, so that nothing about a row is shared between warps.
// The block's rows stay in shared memory where they fit, else their k_tiles are streamed with those of y.
#pragma once

#include "cuda/tiles.cuh"

namespace ltood::mainloop_sm80 {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kBlockM = 32 * kWarps, kBlockN = 64;
constexpr int kMI = 2, kNI = kBlockN / 8;  // fragments of a warp
constexpr int kSlots = 2 * kMI;            // rows of a lane: slot s is fragment s / 2, elements s % 2 * 2 and the next
constexpr int kStages = 3;

using Fragments = float[kMI][kNI][4];

__host__ __device__ constexpr int stage_bytes(bool resident) {
  return tiles::k_tile_bytes<kBlockN>() + (resident ? 0 : tiles::k_tile_bytes<kBlockM>());
}

inline int64_t shared_bytes(const Operand& x, bool resident) {
  return kStages * stage_bytes(resident) +
         (resident ? int64_t(x.k_tiles) * x.splits * tiles::k_tile_bytes<kBlockM>() : 0);
}

__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 * 32; }

// Row of slot s among the 32 of the warp.
__device__ __forceinline__ int slot_row(int s) { return tiles::fragment_row(s / 2, s % 2 * 2); }

__device__ __forceinline__ float& at(Fragments& c, int s, int j, int e) { return c[s / 2][j][s % 2 * 2 + e]; }

// Where a pipeline is: a column tile, and a step of its product.
struct LoopPosition {
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
__device__ __forceinline__ void run(const Operand& x, const Operand& y, int first_row, int begin, int end,
                                    uint32_t shared, UseTile use_tile) {
  const tiles::Steps steps{x.k_tiles, x.splits};
  const int per_tile = steps.count();
  const uint32_t rows = shared + kStages * stage_bytes(kResident);
  if constexpr (kResident) {
    for (int split = 0; split < x.splits; ++split)
      for (int k_tile = 0; k_tile < x.k_tiles; ++k_tile) {
        const uint32_t to = rows + (split * x.k_tiles + k_tile) * tiles::k_tile_bytes<kBlockM>();
        tiles::load_k_tile<kBlockM, kThreads>(to, x, split, k_tile, first_row);
      }
  }
  Fragments c;
  LoopPosition ahead{begin, 0}, now{begin, 0};
  const auto load = [&](int, int stage) {
    const uint32_t to = shared + stage * stage_bytes(kResident);
    const int k_tile = steps.k_tile(ahead.step);
    tiles::load_k_tile<kBlockN, kThreads>(to, y, steps.split_b(ahead.step), k_tile, ahead.tile * kBlockN);
    if constexpr (!kResident) {
      const uint32_t x_to = to + tiles::k_tile_bytes<kBlockN>();
      tiles::load_k_tile<kBlockM, kThreads>(x_to, x, steps.split_a(ahead.step), k_tile, first_row);
    }
    ahead.advance(per_tile);
  };
  const auto use = [&](int, int stage) {
    if (now.step == 0) tiles::clear(c);
    const uint32_t y_k_tile = shared + stage * stage_bytes(kResident);
    const int resident = steps.split_a(now.step) * x.k_tiles + steps.k_tile(now.step);
    const uint32_t x_k_tile =
        kResident ? rows + resident * tiles::k_tile_bytes<kBlockM>() : y_k_tile + tiles::k_tile_bytes<kBlockN>();
    tiles::multiply_k_tile<half_t>(c, x_k_tile, y_k_tile, warp_row(), 0);
    if (now.step + 1 == per_tile) use_tile(c, now.tile * kBlockN);
    now.advance(per_tile);
  };
  tiles::pipeline<kStages>((end - begin) * per_tile, load, use);
}

}  // namespace ltood::mainloop_sm80
