// Tiles of products of two operands: how a block brings k_tiles of them into shared memory and multiplies them.
//
// A k_tile is 64 features of some rows: 128 bytes a row, 16-byte chunks XOR-ed with the row so that ldmatrix, which
// takes a chunk of eight rows at a time, meets every bank once. A tile of <x_i, y_j> is summed over `steps()` pairs of
// k_tiles. A warp holds MI fragments of 16 rows and NI of 8 columns; lane / 4 and lane % 4 give its place in them
// (mma.cuh).
#pragma once

#include "cuda/operand.h"
#include "cuda/primitives/math.cuh"
#include "cuda/primitives/memory.cuh"
#include "cuda/primitives/mma.cuh"

namespace ltood::tiles {

constexpr int kRowBytes = kKTile * 2;

template <int kRows>
__host__ __device__ constexpr int k_tile_bytes() {
  return kRows * kRowBytes;
}

__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// The order in which a product visits splits and k_tiles: low × high and high × low before high × high, so that small
// terms are added first. Both operands have the same k_tiles and splits.
struct Steps {
  int k_tiles, splits;
  __device__ int count() const { return splits == 2 ? 3 * k_tiles : k_tiles; }
  __device__ int k_tile(int step) const {  // step % k_tiles, without a division
    return step < k_tiles ? step : step < 2 * k_tiles ? step - k_tiles : step - 2 * k_tiles;
  }
  __device__ int split_a(int step) const { return splits == 2 && step < k_tiles; }
  __device__ int split_b(int step) const { return splits == 2 && step >= k_tiles && step < 2 * k_tiles; }
};

// Rows first_row ... of one k_tile, zeros beyond the last row. All kThreads threads take part.
template <int kRows, int kThreads>
__device__ __forceinline__ void load_k_tile(uint32_t shared, const Operand& x, int split, int k_tile, int first_row) {
  static_assert(kRows * 8 % kThreads == 0 && kThreads % 64 == 0);
  constexpr int kRowsApart = kThreads / 8;  // of a thread's chunks: a multiple of 8, so that their swizzle is the same
  const int row = threadIdx.x / 8, chunk = threadIdx.x % 8, left = x.rows - first_row - row;
  const char* data = static_cast<const char*>(x.data);
  const size_t row_bytes = size_t(x.k_tiles) * kRowBytes;
  const char* from =
      data + (size_t(split) * x.rows + first_row + row) * row_bytes + size_t(k_tile) * kRowBytes + chunk * 16;
  const uint32_t to = shared + chunk_offset(row, chunk);
#pragma unroll
  for (int i = 0; i < kRows * 8 / kThreads; ++i) {
    const bool inside = i * kRowsApart < left;
    prim::cp_async16(to + i * kRowsApart * kRowBytes, inside ? from : data, inside);
    from += row_bytes * kRowsApart;
  }
}

// load(t, stage) fills a stage of shared memory for step t; kStages - 1 steps are on their way while one is in use.
// One barrier a step: it says that step t has landed for everybody, and that everybody has left the stage of step
// t - 1, which the load behind it overwrites.
template <int kStages, typename Load>
class Pipeline {
 public:
  __device__ __forceinline__ Pipeline(int steps, const Load& load) : steps_(steps), load_(load) {
#pragma unroll
    for (int t = 0; t < kStages - 1; ++t) {
      if (t < steps) load(t, t);
      prim::cp_async_commit();
    }
  }

  // The stage that holds the next step, valid until the next call.
  __device__ __forceinline__ int next() {
    prim::cp_async_wait<kStages - 2>();
    __syncthreads();
    const int stage = stage_, ahead = stage == 0 ? kStages - 1 : stage - 1;
    if (t_ + kStages - 1 < steps_) load_(t_ + kStages - 1, ahead);
    prim::cp_async_commit();
    ++t_;
    stage_ = stage + 1 == kStages ? 0 : stage + 1;
    return stage;
  }

  // After the last step: nothing is pending and every stage is free.
  __device__ __forceinline__ void drain() {
    prim::cp_async_wait<0>();
    __syncthreads();
  }

 private:
  int steps_, t_ = 0, stage_ = 0;
  const Load& load_;
};

// The pipeline where all steps are alike: use(t, stage) for every step.
template <int kStages, typename Load, typename Use>
__device__ __forceinline__ void pipeline(int steps, const Load& load, const Use& use) {
  Pipeline<kStages, Load> stages(steps, load);
  for (int t = 0; t < steps; ++t) use(t, stages.next());
  stages.drain();
}

template <int MI, int NI>
__device__ __forceinline__ void clear(float (&c)[MI][NI][4]) {
#pragma unroll
  for (int i = 0; i < MI; ++i)
#pragma unroll
    for (int j = 0; j < NI; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[i][j][e] = 0;
}

// c += A B' over one k_tile: A rows warp_row ..., B rows (columns of the tile) warp_col ....
template <typename half_t, int MI, int NI>
__device__ __forceinline__ void multiply_k_tile(float (&c)[MI][NI][4], uint32_t a_k_tile, uint32_t b_k_tile,
                                                int warp_row, int warp_col) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kKTile / 16; ++k) {
    uint32_t a[MI][4];
#pragma unroll
    for (int i = 0; i < MI; ++i) {
      prim::ldmatrix_x4(a[i], a_k_tile + chunk_offset(warp_row + i * 16 + lane % 16, k * 2 + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < NI / 2; ++j) {
      uint32_t b[4];
      const int row = warp_col + j * 16 + lane % 8 + lane / 16 * 8;
      prim::ldmatrix_x4(b, b_k_tile + chunk_offset(row, k * 2 + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        prim::mma_m16n8k16<half_t>(c[i][2 * j], a[i], b[0], b[1]);
        prim::mma_m16n8k16<half_t>(c[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// A tile of weights as the A operand of the next product: fragments of 16 columns, two accumulator fragments each.
template <typename half_t, int MI, int NI>
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[MI][NI / 2][4], const float (&c)[MI][NI][4]) {
#pragma unroll
  for (int i = 0; i < MI; ++i)
#pragma unroll
    for (int j = 0; j < NI / 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float (&from)[4] = c[i][2 * j + e / 2];
        packed[i][j][e] = prim::pack<half_t>(from[e % 2 * 2], from[e % 2 * 2 + 1]);
      }
}

// What packing rounded away.
template <typename half_t, int MI, int NI>
__device__ __forceinline__ void subtract_packed(float (&c)[MI][NI][4], const uint32_t (&packed)[MI][NI / 2][4]) {
#pragma unroll
  for (int i = 0; i < MI; ++i)
#pragma unroll
    for (int j = 0; j < NI / 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float (&to)[4] = c[i][2 * j + e / 2];
        const half_t* halves = reinterpret_cast<const half_t*>(&packed[i][j][e]);
        to[e % 2 * 2] -= prim::to_float(halves[0]);
        to[e % 2 * 2 + 1] -= prim::to_float(halves[1]);
      }
}

// c += W V: W [MI * 16, KI * 16] from registers, V's k_tile [KI * 16 rows, 64 features] from shared memory.
template <typename half_t, int MI, int KI>
__device__ __forceinline__ void multiply_weights(float (&c)[MI][kKTile / 8][4], const uint32_t (&weights)[MI][KI][4],
                                                 uint32_t v_k_tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < KI; ++k) {
#pragma unroll
    for (int j = 0; j < kKTile / 16; ++j) {
      uint32_t b[4];
      prim::ldmatrix_x4_trans(b, v_k_tile + chunk_offset(k * 16 + lane % 16, j * 2 + lane / 16));
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        prim::mma_m16n8k16<half_t>(c[i][2 * j], weights[i][k], b[0], b[1]);
        prim::mma_m16n8k16<half_t>(c[i][2 * j + 1], weights[i][k], b[2], b[3]);
      }
    }
  }
}

// Row (of MI * 16) of accumulator element e of fragment i, column (of NI * 8) of element e of fragment j.
__device__ __forceinline__ int fragment_row(int i, int e) { return i * 16 + e / 2 * 8 + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int fragment_col(int j, int e) { return j * 8 + threadIdx.x % 4 * 2 + e % 2; }

// The factor that turns products into exponents of 2; a temperature on the device wins.
__device__ __forceinline__ float exponent_scale(float inv_tau, const float* temperature) {
  return (temperature ? 1.f / *temperature : inv_tau) * prim::kLog2E;
}

}  // namespace ltood::tiles
