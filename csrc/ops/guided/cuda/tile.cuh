// What the forward and the backward tiles of the guided family share: which tiles a block visits, in which steps, and
// how a pair's similarity and force become an exponent.
#pragma once

#include "cuda/tiles.cuh"
#include "ops/guided/cuda/launch.h"

namespace ltood::guided {

using namespace tiles;

constexpr int kStages = 3;
constexpr int kColumnFragments = kGuidedColumns / 8;
constexpr int kRowKTile = k_tile_bytes<kGuidedRows>(), kColumnKTile = k_tile_bytes<kGuidedColumns>();
constexpr int kStageBytes = kRowKTile + kColumnKTile;
constexpr int kFieldBytes = kGuidedColumns * 4;

// Shared memory of a block: the stages, behind them the columns' fields and the first column of every tile under way.
template <int kFields>
constexpr int shared_bytes() {
  return kStages * (kStageBytes + kFields * kFieldBytes + 16);
}

// Counts through the steps of tiles, and through the slots that what belongs to a tile takes turns in.
struct Turn {
  int steps;  // of a tile
  int step, slot = kStages - 1;

  __device__ __forceinline__ explicit Turn(int steps_of_tile) : steps(steps_of_tile), step(steps_of_tile - 1) {}

  // True where a tile begins.
  __device__ __forceinline__ bool next() {
    if (++step < steps) return false;
    step = 0;
    slot = slot + 1 == kStages ? 0 : slot + 1;
    return true;
  }
};

// The column tiles that a row block reads, in order.
struct TileList {
  const uint32_t* words;
  int word = 0;
  uint32_t bits;

  __device__ __forceinline__ TileList(const uint32_t* of_block, int skip) : words(of_block), bits(of_block[0]) {
    for (; skip > 0; --skip) next_column();
  }

  __device__ __forceinline__ int next_column() {
    while (bits == 0) bits = words[++word];
    const int tile = word * 32 + __ffs(bits) - 1;
    bits &= bits - 1;
    return tile * kGuidedColumns;
  }
};

// The part of a row block's tiles that a block of the grid takes: tiles first, ..., last - 1 of them.
struct Share {
  const uint32_t* words;
  int first, last;

  __device__ __forceinline__ Share(const GuidedParams& p, int row_block, int k_split) {
    const int count = (p.padded / kGuidedColumns + 31) / 32;
    words = p.tiles + int64_t(row_block) * count;
    int tiles = 0;
    for (int w = 0; w < count; ++w) tiles += __popc(words[w]);
    first = static_cast<int>(int64_t(tiles) * k_split / p.k_splits);
    last = static_cast<int>(int64_t(tiles) * (k_split + 1) / p.k_splits);
  }
};

// Steps of a tile: the student's product, the guide's where it is needed.
struct ProductSteps {
  Steps z, e;
  int student, all;

  __device__ __forceinline__ explicit ProductSteps(const GuidedParams& p)
      : z{p.z.k_tiles, p.z.splits},
        e{p.e.k_tiles, p.e.splits},
        student(z.count()),
        all(student + (p.distill || p.weighted ? e.count() : 0)) {}
};

// The k_tiles of rows and columns that a step of the products multiplies.
template <int kThreads>
__device__ __forceinline__ void load_product(uint32_t stage, const GuidedParams& p, const ProductSteps& steps, int step,
                                             int first_row, int column) {
  if (step < steps.student) {
    load_k_tile<kGuidedRows, kThreads>(stage, p.z, steps.z.split_a(step), steps.z.k_tile(step), first_row);
    load_k_tile<kGuidedColumns, kThreads>(stage + kRowKTile, p.z, steps.z.split_b(step), steps.z.k_tile(step), column);
  } else {
    step -= steps.student;
    load_k_tile<kGuidedRows, kThreads>(stage, p.e, steps.e.split_a(step), steps.e.k_tile(step), first_row);
    load_k_tile<kGuidedColumns, kThreads>(stage + kRowKTile, p.e, steps.e.split_b(step), steps.e.k_tile(step), column);
  }
}

// The first kFields fields of a tile's columns.
template <int kFields, int kThreads>
__device__ __forceinline__ void load_fields(uint32_t shared, const GuidedParams& p, int column) {
  constexpr int kChunks = kFieldBytes / 16;
  for (int chunk = threadIdx.x; chunk < kFields * kChunks; chunk += kThreads) {
    const float* from = p.fields + size_t(chunk / kChunks) * p.padded + column + chunk % kChunks * 4;
    prim::cp_async16(shared + chunk * 16, from, true);
  }
}

// The position of the column that a row is.
__device__ __forceinline__ int own_column(const GuidedParams& p, int row) { return p.self_at ? p.self_at[row] : row; }

// Two neighbouring columns' values of a field, from a slot of fields.
__device__ __forceinline__ float2 field_pair(const float* slot, int field, int column) {
  return *reinterpret_cast<const float2*>(slot + field * kGuidedColumns + column);
}

__device__ __forceinline__ float teacher_scale(const GuidedParams& p) {
  return p.inv_teacher_tau > 0 ? p.inv_teacher_tau * prim::kLog2E : exponent_scale(p.inv_tau, p.temperature);
}

// ((1 + signed_cos) / 2)^gamma; NaN stays NaN, and a rounding error above 1 is no negative force.
__device__ __forceinline__ float force_of(const GuidedParams& p, float signed_cos) {
  if (!p.weighted) return 1.f;
  const float half = 0.5f + 0.5f * signed_cos, base = half < 0 ? 0.f : half;
  if (p.gamma == 1) return base;
  return base == 0 ? 0.f : exp2f(p.gamma * log2f(base));
}

// w 2^x with w = ((1 - cos) / 2)^gamma as factor * 2^exponent, where a pair without force cannot raise the maximum.
struct Repulsion {
  float exponent, factor;

  __device__ __forceinline__ Repulsion(const GuidedParams& p, float x, float cos) : exponent(x), factor(1.f) {
    if (!p.weighted) return;
    const float half = 0.5f - 0.5f * cos, base = half < 0 ? 0.f : half;
    if (p.gamma == 1) {
      exponent = base == 0 ? -INFINITY : x;
      factor = base;
    } else {
      exponent = base == 0 ? -INFINITY : x + p.gamma * __log2f(base);
    }
  }
};

// The maximum as a shift of exponents: nothing to shift while there is none.
__device__ __forceinline__ float shift_of(float max) { return max == -INFINITY ? 0.f : max; }

// Raises a maximum; returns what sums in units of 2^max have to be multiplied with.
__device__ __forceinline__ float raise(float& max, float other) {
  const float higher = fmaxf(max, other), factor = max == higher ? 1.f : prim::exp2_fast(max - higher);
  max = higher;
  return factor;
}

}  // namespace ltood::guided
