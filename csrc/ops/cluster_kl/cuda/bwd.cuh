// Gradients of cluster_kl from the weights w_ij = -2 grad_i dl_i/dd_ij of a chunk of rows. Not yet verified on
// hardware.
//
//   grad_z_i = sum_j w_ij (mu_j - z_i) = (W mu)_i - (W 1)_i z_i
//   grad_mu_j = sum_i w_ij (z_i - mu_j) = (W' z)_j - (W' 1)_j mu_j, summed over the chunks
//
//   tile       128 × 64, 4 warps of 32 × 64; 64 terms of the sum a stage, 3 stages of 24 KiB. Rows of the result are
//              rows of z, or centroids, for which the weights go through ldmatrix.trans
//   FLOP       2 N K D for each gradient, times the products of splits, and an eighth more: sums of W come from a
//              product with ones, and so are sums of the very weights that were multiplied
//   bytes      4 N K of weights, written and read D / 64 times, in chunks that fit L2; k_splits K D floats for grad_mu
//   limiter    tensor cores for D >= 128, else L2
//
// float32 rows are multiplied in two bfloat16 splits: relative to |w| |mu| a gradient is good to 2^-16, which shows
// where clusters are tight and far from each other.
#pragma once

#include "cuda/mainloop_sm80.cuh"
#include "ops/cluster_kl/cuda/fwd.cuh"

namespace ltood::cluster_kl {

constexpr int kProductStages = 3;
constexpr int kProductStage = tiles::k_tile_bytes<kBlockM>() + tiles::k_tile_bytes<kBlockN>();
constexpr int kProductBytes = kProductStages * kProductStage;

struct ProductParams {
  Operand weights;           // [splits, rows of the chunk, width]
  Operand other;             // [splits, K] centroids for grad_z, [splits, N] rows for grad_mu
  int other_row;             // of `other` that meets the first weight of the sum
  int k_split_steps, steps;  // of 64 terms: of a block, all
  const void* rows;          // [N, d] in the element type, for grad_z
  const float* origin;
  int type, d;
  void* grad_z;         // of the chunk's first row
  float* partial;       // [k_splits, K, d] for grad_mu
  float* partial_sums;  // [k_splits, K]
  int k;
  int first_chunk;
};

// Which splits are multiplied, smallest product first.
struct Products {
  int weight_splits, other_splits;
  __device__ int count() const { return weight_splits + other_splits - 1; }
  __device__ int weight_split(int product) const { return weight_splits == 2 && product == 0; }
  __device__ int other_split(int product) const { return other_splits == 2 && product == weight_splits - 1; }
};

// A fragments of the weights [64 rows, 128 columns] as two k_tiles, transposed: rows of the fragment are columns.
__device__ __forceinline__ void load_transposed(uint32_t (&a)[4], uint32_t k_tiles, int k, int column) {
  const int lane = threadIdx.x % 32;
  const int from = column + lane / 8 % 2 * 8, row = k * 16 + lane / 16 * 8 + lane % 8;
  const uint32_t k_tile = k_tiles + from / kKTile * tiles::k_tile_bytes<kKTile>();
  prim::ldmatrix_x4_trans(a, k_tile + tiles::chunk_offset(row, from % kKTile / 8));
}

template <bool kTransposed>
__device__ __forceinline__ void multiply(Fragments& c, float (&sums)[mainloop_sm80::kMI][4], uint32_t weights,
                                         uint32_t other, bool add_sums) {
  constexpr uint32_t kOnes = 0x3f803f80;  // bfloat16
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kKTile / 16; ++k) {
    uint32_t a[mainloop_sm80::kMI][4];
#pragma unroll
    for (int i = 0; i < mainloop_sm80::kMI; ++i) {
      const int row = mainloop_sm80::warp_row() + i * 16;
      if constexpr (kTransposed) {
        load_transposed(a[i], weights, k, row);
      } else {
        prim::ldmatrix_x4(a[i], weights + tiles::chunk_offset(row + lane % 16, k * 2 + lane / 16));
      }
      if (add_sums) prim::mma_m16n8k16<__nv_bfloat16>(sums[i], a[i], kOnes, kOnes);
    }
#pragma unroll
    for (int j = 0; j < kNI / 2; ++j) {
      uint32_t b[4];
      prim::ldmatrix_x4_trans(b, other + tiles::chunk_offset(k * 16 + lane % 16, j * 2 + lane / 16));
#pragma unroll
      for (int i = 0; i < mainloop_sm80::kMI; ++i) {
        prim::mma_m16n8k16<__nv_bfloat16>(c[i][2 * j], a[i], b[0], b[1]);
        prim::mma_m16n8k16<__nv_bfloat16>(c[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

__device__ __forceinline__ void store(void* to, int type, size_t at, float value) {
  if (type == kFloat32) {
    static_cast<float*>(to)[at] = value;
  } else if (type == kBFloat16) {
    static_cast<__nv_bfloat16*>(to)[at] = prim::from_float<__nv_bfloat16>(value);
  } else {
    static_cast<__half*>(to)[at] = prim::from_float<__half>(value);
  }
}

// Rows of the tile: weights.rows rows of the chunk, or centroids.
template <bool kTransposed>
__device__ __forceinline__ void product_epilogue(const ProductParams& p, const Fragments& c,
                                                 const float (&sums)[mainloop_sm80::kMI][4]) {
  const int first_row = blockIdx.x * kBlockM + mainloop_sm80::warp_row(), rows = kTransposed ? p.k : p.weights.rows;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int row = first_row + slot_row(s);
    const float sum = sums[s / 2][s % 2 * 2];
    if (row >= rows) continue;
    const size_t out_row = kTransposed ? size_t(blockIdx.z) * p.k + row : row;
    if (kTransposed && blockIdx.y == 0 && threadIdx.x % 4 == 0) {
      p.partial_sums[out_row] = sum + (p.first_chunk ? 0 : p.partial_sums[out_row]);
    }
#pragma unroll
    for (int j = 0; j < kNI; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int feature = blockIdx.y * kKTile + tiles::fragment_col(j, e);
        if (feature >= p.d) continue;
        const float value = c[s / 2][j][s % 2 * 2 + e];
        const size_t at = out_row * p.d + feature;
        if constexpr (kTransposed) {
          p.partial[at] = value + (p.first_chunk ? 0 : p.partial[at]);
        } else {
          const float z = element(p.rows, p.type, at) - (p.origin ? p.origin[feature] : 0);
          store(p.grad_z, p.type, at, value - sum * z);
        }
      }
  }
}

template <bool kTransposed>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(ProductParams p) {
  extern __shared__ __align__(128) char shared[];
  const uint32_t stages = prim::shared_address(shared);
  const Products products{p.weights.splits, p.other.splits};
  const int begin = blockIdx.z * p.k_split_steps, steps = min(p.k_split_steps, p.steps - begin);
  mainloop_sm80::LoopPosition ahead{0, 0}, now{0, 0};  // a product of splits, and a step of it
  Fragments c;
  float sums[mainloop_sm80::kMI][4] = {};
  tiles::clear(c);
  const auto load = [&](int, int stage) {
    const int split = products.weight_split(ahead.tile), step = begin + ahead.step;
    const uint32_t to = stages + stage * kProductStage;
    if constexpr (kTransposed) {
      for (int half = 0; half < 2; ++half) {
        tiles::load_k_tile<kKTile, kThreads>(to + half * tiles::k_tile_bytes<kKTile>(), p.weights, split,
                                             blockIdx.x * 2 + half, step * kKTile);
      }
    } else {
      tiles::load_k_tile<kBlockM, kThreads>(to, p.weights, split, step, blockIdx.x * kBlockM);
    }
    tiles::load_k_tile<kKTile, kThreads>(to + tiles::k_tile_bytes<kBlockM>(), p.other, products.other_split(ahead.tile),
                                         blockIdx.y, p.other_row + step * kKTile);
    ahead.advance(steps);
  };
  const auto use = [&](int, int stage) {
    const uint32_t weights = stages + stage * kProductStage;
    multiply<kTransposed>(c, sums, weights, weights + tiles::k_tile_bytes<kBlockM>(), !products.other_split(now.tile));
    now.advance(steps);
  };
  tiles::pipeline<kProductStages>(products.count() * steps, load, use);
  product_epilogue<kTransposed>(p, c, sums);
}

struct GradMuParams {
  const float* partial;       // [k_splits, K, d]
  const float* partial_sums;  // [k_splits, K]
  int k_splits, k, d, type;
  const void* rows;  // [K, d] in the element type
  const float* origin;
  float* grad_mu;  // [K, d]
};

constexpr int kGradMuThreads = 128;

// One block a centroid.
__global__ void __launch_bounds__(kGradMuThreads) grad_mu_kernel(GradMuParams p) {
  const int row = blockIdx.x;
  float weight = 0;
  for (int k_split = 0; k_split < p.k_splits; ++k_split) weight += p.partial_sums[size_t(k_split) * p.k + row];
  for (int feature = threadIdx.x; feature < p.d; feature += kGradMuThreads) {
    const size_t at = size_t(row) * p.d + feature;
    float sum = 0;
    for (int k_split = 0; k_split < p.k_splits; ++k_split) sum += p.partial[size_t(k_split) * p.k * p.d + at];
    const float mu = element(p.rows, p.type, at) - (p.origin ? p.origin[feature] : 0);
    p.grad_mu[at] = sum - weight * mu;
  }
}

}  // namespace ltood::cluster_kl
