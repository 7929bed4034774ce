#include "cuda/launch.cuh"
#include "cuda/topk/kernel.cuh"
#include "cuda/topk/sm90/launch.h"

namespace ltood {
namespace {

using knn::TopkKernelParams;

// Columns are split so that two blocks a multiprocessor (one of the Hopper kernel's) find work: 16,384 rows are 128
// blocks, which a device of 132 takes three times each.
TopkKernelParams plan(const TopkParams& p, const cuda::DeviceLimits& limits) {
  const bool sm90 = knn::sm90::stages(p.x, limits) > 0;
  TopkKernelParams plan{p, cuda::ceil_div(p.x.rows, sm90 ? knn::sm90::kTile.rows : knn::kBlockM), 1, 0, p.indices};
  const int tiles = (p.y.rows - 1) / (sm90 ? knn::sm90::kTile.columns : knn::kBlockN) + 1;
  const int places = (sm90 ? knn::sm90::kTile.work_tiles : 2) * limits.multiprocessors;
  const cuda::ColumnSplit split = cuda::split_columns(tiles, plan.row_blocks, places);
  plan.k_split_tiles = split.tiles, plan.k_splits = split.count;
  if (plan.k_splits > 1) plan.keys = static_cast<knn::Key*>(p.workspace);
  return plan;
}

template <typename half_t>
cudaError_t launch_lists(const TopkKernelParams& params, const cuda::DeviceLimits& limits, void* stream) {
  const int64_t wanted = knn::kPendingBytes + mainloop_sm80::shared_bytes(params.topk.x, true);
  const bool resident = wanted <= limits.shared_bytes;
  const auto kernel = resident ? knn::topk_kernel<half_t, true> : knn::topk_kernel<half_t, false>;
  const int64_t shared = resident ? wanted : knn::kPendingBytes + mainloop_sm80::shared_bytes(params.topk.x, false);
  return cuda::launch(kernel, params.row_blocks * params.k_splits, knn::kThreads, static_cast<int>(shared), params,
                      stream);
}

cudaError_t launch_lists(const TopkKernelParams& params, const cuda::DeviceLimits& limits, void* stream) {
  const TopkParams& p = params.topk;
  if (const int stages = knn::sm90::stages(p.x, limits)) {
    return knn::sm90::launch(p, params.keys, params.row_blocks, params.k_splits, params.k_split_tiles, stages, stream);
  }
  return p.x.is_half ? launch_lists<__half>(params, limits, stream)
                     : launch_lists<__nv_bfloat16>(params, limits, stream);
}

}  // namespace

extern "C" int64_t ltood_topk_workspace(const TopkParams* params) {
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return -static_cast<int64_t>(error);
  const int k_splits = plan(*params, limits).k_splits;
  return k_splits > 1 ? int64_t(k_splits) * params->x.rows * params->k * static_cast<int64_t>(sizeof(knn::Key)) : 0;
}

extern "C" int ltood_launch_topk(const TopkParams* params, void* stream) {
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return error;
  const TopkKernelParams planned = plan(*params, limits);
  const cudaError_t error = launch_lists(planned, limits, stream);
  if (error || planned.k_splits == 1) return error;
  return cuda::launch(knn::combine_kernel, cuda::ceil_div(params->x.rows, knn::kCombineWarps), 32 * knn::kCombineWarps,
                      0, planned, stream);
}

}  // namespace ltood
