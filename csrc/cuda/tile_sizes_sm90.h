// The tiles of the sm_90a kernels: ONE table, which their launchers ask. `python -m benchmarks autotune` times every
// entry against its neighbours on a device and prints the table in this form. No device has been asked yet: what stands
// here is reasoned.
//
// rows × columns  256 consumer threads share a tile: rows * columns / 256 accumulators each, of 240 registers. Only
//                 columns come from L2, once for all rows: 256 rows ask for half as many bytes as 128
// stages          two k_tiles may be in use by products in flight, the others are on their way. A multiprocessor does
//                 2,048 multiply-adds a clock: a k_tile of 128 columns (16 KiB) lasts 1,024 clocks against 256 rows and
//                 512 against 128, and takes some 1,000 to come: four stages are the fewest, six leave a margin of two
// work_tiles      pieces of work for every multiprocessor: with eight the last round wastes an eighth at most, but each
//                 piece begins with its rows. The others give every block of rows to one multiprocessor, and cut the
//                 columns only where blocks are too few
//
// Worked: log-sum-exps at N = 16,384, D = 128, bfloat16, 132 multiprocessors. Two k_tiles of rows: the first entry, 256
// × 128. 64 KiB of rows, six stages of 16 KiB and 13 KiB of sums are 173 of 227 KiB; 128 accumulators and 32 sums are
// 160 of 192 registers. 8,256 tiles for 1,056 wanted work tiles: eight tiles each, 16 bytes a clock and multiprocessor
// from L2.
#pragma once

namespace ltood::tile_sizes {

constexpr int kSharedBytes = 227 * 1024;  // of a block
constexpr int kConsumerThreads = 256;     // two warpgroups; a third loads
// 65,536 registers of a multiprocessor: 256 * 240 + 128 * 24 = 64,512.
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
constexpr int kOtherRegisters = 48;  // of a consumer thread: addresses, counters, factors
constexpr int kBarrierBytes = 16;    // of a stage, and of the rows
constexpr int kInFlight = 2;         // k_tiles whose products may be unfinished while the next one's are issued
constexpr int kFewestStages = kInFlight + 2;
constexpr int kMostColTiles = 8;  // of a work tile of the upper triangle: their sums stay in shared memory

enum TiledKernel {
  kSums,       // contrastive forward, the log-sum-exp alone
  kNeighbors,  // the same with the nearest row
  kLseBwd,     // contrastive backward
  kTopk,       // nearest neighbours
  kGuided,     // guided losses forward
  kGuidedBwd,  // the same backward
};

struct TileSize {
  TiledKernel kernel;
  int splits;   // of the operands; 0: any
  int k_tiles;  // up to so many: splits × k_tiles of the resident rows (guided: both); kLseBwd: k_tiles of a block's
                // output
  int rows, columns;
  int stage_k_tiles;  // of the columns, in a stage of the ring
  int stages;         // of the ring; fewer where the rows leave less room
  int work_tiles;     // pieces of work a multiprocessor
};

// clang-format off
constexpr TileSize kTiles[] = {
    {kSums, 0, 4, 256, 128, 1, 6, 8},
    {kSums, 0, 8, 128, 128, 1, 6, 8},
    {kNeighbors, 0, 8, 128, 128, 1, 6, 8},
    {kLseBwd, 1, 1, 128, 128, 1, 8, 1},
    {kLseBwd, 1, 2, 128, 128, 2, 6, 1},
    {kLseBwd, 1, 4, 128, 64, 2, 8, 1},
    {kLseBwd, 2, 1, 128, 64, 1, 8, 1},
    {kLseBwd, 2, 2, 128, 64, 2, 8, 1},
    {kLseBwd, 2, 4, 128, 64, 2, 8, 1},
    {kTopk, 0, 4, 256, 128, 1, 6, 1},
    {kGuided, 1, 8, 128, 64, 2, 6, 1},
    {kGuidedBwd, 1, 8, 128, 64, 2, 6, 1},
};
// clang-format on

// Of eight exponentials of the contrastive kernels, those that are polynomials on the FMA pipe. The special-function
// unit gives 16 a clock: the 32,768 of a wide tile take 2,048 clocks, as its products do at D = 128. One of eight less
// would save 256 of them, and cost 4,096 * 10 instructions on a pipe that does 128 a clock: 320, beside some 1,500 that
// are there. It could gain where exponentials are the limit (D = 64) and lose elsewhere: none without a measurement.
#ifndef LTOOD_POLYNOMIAL_EIGHTHS
#define LTOOD_POLYNOMIAL_EIGHTHS 0
#endif
constexpr int kPolynomialEighths = LTOOD_POLYNOMIAL_EIGHTHS;
static_assert(0 <= kPolynomialEighths && kPolynomialEighths <= 8);

// The entry for operands of so many splits and k_tiles; rows = 0: none takes them.
constexpr TileSize tile_of(TiledKernel kernel, int splits, int k_tiles) {
  for (const TileSize& t : kTiles) {
    if (t.kernel == kernel && (t.splits == 0 || t.splits == splits) && k_tiles <= t.k_tiles) return t;
  }
  return {};
}

// Registers of a consumer thread that live from one product to the next: S (and G, its second operand), the output, the
// sums and neighbours of 32 rows. The guided losses have two products, sums of two rows, an output of 128 features and
// what H takes of two rows.
constexpr int registers_of(const TileSize& t) {
  const int products = t.rows * t.columns / kConsumerThreads;
  switch (t.kernel) {
    case kSums:
      return products + 32;
    case kNeighbors:
      return products + 3 * 32;
    case kLseBwd:
      return products + t.splits * products / 2 + t.rows * t.k_tiles * 64 / kConsumerThreads;
    case kGuided:
      return 2 * products + 2 * 8;
    case kGuidedBwd:
      return 2 * products + products / 2 + t.rows * 128 / kConsumerThreads + 2 * 14;
    default:
      return products;
  }
}

constexpr int stage_bytes(const TileSize& t) { return t.stage_k_tiles * t.columns * 128; }

// Shared memory at the widest rows that an entry takes, but for ring and barriers.
constexpr int fixed_bytes(const TileSize& t) {
  const int rows = t.rows * 128 * t.k_tiles, row_tiles = t.rows / 128, warps = kConsumerThreads / 32;
  const int sums = (row_tiles + warps + row_tiles * kMostColTiles) * 128 * 4;
  switch (t.kernel) {
    case kSums:
      return rows + sums;
    case kNeighbors:
      return rows + sums + (2 + warps + kMostColTiles) * 128 * 8;
    case kLseBwd:
      return rows * t.splits;
    case kGuided:
    case kGuidedBwd:
      return rows;
    default:
      return rows + 16 * t.rows * 8;
  }
}

// Stages beside so many bytes; 0: too few for the products in flight, and the kernel does not take the problem.
constexpr int stages_beside(const TileSize& t, int bytes, int shared = kSharedBytes) {
  const int fitting = (shared - bytes - kBarrierBytes) / (stage_bytes(t) + kBarrierBytes);
  return fitting < kFewestStages ? 0 : fitting < t.stages ? fitting : t.stages;
}

constexpr int block_bytes(const TileSize& t, int bytes, int stages) {
  return bytes + stages * stage_bytes(t) + (stages + 1) * kBarrierBytes;
}

// wgmma is issued for 64 or 128 columns, and for 64 or 128 features of an output.
constexpr bool fits(const TileSize& t) {
  const bool shape = (t.rows == 128 || t.rows == 256) && (t.columns == 64 || t.columns == 128) &&
                     (t.stage_k_tiles == 1 || t.stage_k_tiles == 2) && t.k_tiles % t.stage_k_tiles == 0;
  return shape && t.work_tiles >= 1 && t.stages >= kFewestStages && stages_beside(t, fixed_bytes(t)) > 0 &&
         registers_of(t) <= kConsumerRegisters - kOtherRegisters;
}

constexpr bool all_fit() {
  for (const TileSize& t : kTiles) {
    if (!fits(t)) return false;
  }
  return true;
}
static_assert(all_fit(), "an entry of kTiles exceeds a block's shared memory or a thread's registers");

}  // namespace ltood::tile_sizes
