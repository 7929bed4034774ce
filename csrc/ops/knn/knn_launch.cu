#include <algorithm>

#include "cuda/launch.cuh"
#include "ops/knn/knn_kernel.cuh"

namespace ltood {
namespace {

using knn::TopkKernelParams;

// Columns are split so that two blocks a multiprocessor find work: 16,384 rows are 128 blocks, which a device of 132
// takes three times each. A share below 8 tiles spends more on filling its lists than on products.
TopkKernelParams plan(const TopkParams& p, const cuda::DeviceLimits& limits) {
  constexpr int kLeastTiles = 8;
  TopkKernelParams plan{p, cuda::ceil_div(p.x.rows, knn::kBlockM), 1, 0, p.indices};
  const int tiles = (p.y.rows - 1) / knn::kBlockN + 1;
  const int wanted = std::min(cuda::ceil_div(2 * limits.multiprocessors, plan.row_blocks), knn::kMaxSplits);
  plan.split_tiles = cuda::ceil_div(tiles, std::clamp(wanted, 1, std::max(tiles / kLeastTiles, 1)));
  plan.splits = cuda::ceil_div(tiles, plan.split_tiles);
  if (plan.splits > 1) plan.keys = static_cast<knn::Key*>(p.workspace);
  return plan;
}

template <typename half_t>
cudaError_t launch_topk(const TopkKernelParams& params, const cuda::DeviceLimits& limits, void* stream) {
  const int64_t wanted = knn::kPendingBytes + row_sweep::shared_bytes(params.topk.x, true);
  const bool resident = wanted <= limits.shared_bytes;
  const auto kernel = resident ? knn::topk_kernel<half_t, true> : knn::topk_kernel<half_t, false>;
  const int64_t shared = resident ? wanted : knn::kPendingBytes + row_sweep::shared_bytes(params.topk.x, false);
  return cuda::launch(kernel, params.row_blocks * params.splits, knn::kThreads, static_cast<int>(shared), params,
                      stream);
}

}  // namespace

extern "C" int64_t ltood_topk_workspace(const TopkParams* params) {
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return -static_cast<int64_t>(error);
  const int splits = plan(*params, limits).splits;
  return splits > 1 ? int64_t(splits) * params->x.rows * params->k * static_cast<int64_t>(sizeof(knn::Key)) : 0;
}

extern "C" int ltood_launch_topk(const TopkParams* params, void* stream) {
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return error;
  const TopkKernelParams planned = plan(*params, limits);
  const cudaError_t error = params->x.is_half ? launch_topk<__half>(planned, limits, stream)
                                              : launch_topk<__nv_bfloat16>(planned, limits, stream);
  if (error || planned.splits == 1) return error;
  return cuda::launch(knn::merge_kernel, cuda::ceil_div(params->x.rows, knn::kMergeWarps), 32 * knn::kMergeWarps, 0,
                      planned, stream);
}

}  // namespace ltood
