#include <algorithm>

#include "ops/knn/knn_sm90_kernel.cuh"
#include "ops/knn/knn_sm90_launch.h"

namespace ltood::knn::sm90 {

static_assert(kRows == sweep::kBlockM && kColumns == sweep::kBlockN);

int stages(const Operand& x, const cuda::DeviceLimits& limits) {
  constexpr int kMost = 6;
  if (!cuda::take_sm90()) return 0;
  const int fitting = (limits.shared_bytes - shared_bytes(x, 0) - sweep::barrier_bytes(kMost)) / sweep::kSliceBytes;
  return fitting < warpgroups::kFewestStages ? 0 : std::min(fitting, kMost);
}

cudaError_t launch(const TopkParams& p, int64_t* keys, int row_blocks, int splits, int split_tiles, int stages,
                   void* stream) {
  TopkSm90 f{{}, {p, row_blocks, splits, split_tiles, keys}, stages};
  if (const cudaError_t error = warpgroups::make_map(&f.maps.x, p.x, 128)) return error;
  if (const cudaError_t error = warpgroups::make_map(&f.maps.y, p.y, 128)) return error;
  const auto kernel = p.x.is_half ? topk_sm90_kernel<__half> : topk_sm90_kernel<__nv_bfloat16>;
  return cuda::launch(kernel, row_blocks * splits, warpgroups::kThreads, shared_bytes(p.x, stages), f, stream);
}

}  // namespace ltood::knn::sm90
