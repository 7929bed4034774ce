#include "cuda/topk/sm90/kernel.cuh"
#include "cuda/topk/sm90/launch.h"

namespace ltood::knn::sm90 {

constexpr Operand widest{nullptr, nullptr, 0, kTile.k_tiles, 1, 0};
static_assert(kTile.rows == mainloop::kBlockM && kTile.columns == mainloop::kBlockN && kTile.stage_k_tiles == 1);
static_assert(fixed_bytes(widest) == tile_sizes::fixed_bytes(kTile));

int stages(const Operand& x, const cuda::DeviceLimits& limits) {
  return cuda::use_sm90() ? tile_sizes::stages_beside(kTile, fixed_bytes(x), limits.shared_bytes) : 0;
}

cudaError_t launch(const TopkParams& p, int64_t* keys, int row_blocks, int k_splits, int k_split_tiles, int stages,
                   void* stream) {
  TopkSm90 f{{}, {p, row_blocks, k_splits, k_split_tiles, keys}, stages};
  if (const cudaError_t error = warpgroups::make_map(&f.maps.x, p.x, 128)) return error;
  if (const cudaError_t error = warpgroups::make_map(&f.maps.y, p.y, 128)) return error;
  const auto kernel = p.x.is_half ? topk_sm90_kernel<__half> : topk_sm90_kernel<__nv_bfloat16>;
  const int shared = tile_sizes::block_bytes(kTile, fixed_bytes(p.x), stages);
  return cuda::launch(kernel, row_blocks * k_splits, warpgroups::kThreads, shared, f, stream);
}

}  // namespace ltood::knn::sm90
