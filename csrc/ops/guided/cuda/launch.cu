#include <algorithm>

#include "cuda/launch.cuh"
#include "ops/guided/cuda/bwd.cuh"
#include "ops/guided/cuda/fwd.cuh"
#include "ops/guided/cuda/launch.h"
#include "ops/guided/cuda/partial.cuh"
#include "ops/guided/cuda/plan.cuh"
#include "ops/guided/cuda/rows.cuh"
#include "ops/guided/cuda/sm90/launch.h"

namespace ltood {

namespace {

using namespace guided;
using cuda::ceil_div;
using cuda::launch;
using Kernel = void (*)(GuidedParams);

template <typename half_t>
Kernel forward_kernel(const GuidedParams& p) {
  if (!p.distill) return guided_forward_kernel<half_t, true, false>;
  return p.contrast ? guided_forward_kernel<half_t, true, true> : guided_forward_kernel<half_t, false, true>;
}

template <typename half_t>
Kernel backward_kernel(const GuidedParams& p) {
  if (!p.distill) return guided_backward_kernel<half_t, true, false>;
  return p.contrast ? guided_backward_kernel<half_t, true, true> : guided_backward_kernel<half_t, false, true>;
}

int row_blocks(const GuidedParams& p) { return (p.padded - p.first) / kGuidedRows; }

template <typename half_t>
Kernel epilogue_kernel(const GuidedParams& p, bool backward) {
  if (p.first) return backward ? guided_partial_bwd_epilogue_kernel<half_t> : guided_partial_epilogue_kernel<half_t>;
  return backward ? guided_backward_epilogue_kernel<half_t> : guided_forward_epilogue_kernel<half_t>;
}

cudaError_t launch_epilogue(const GuidedParams& p, bool backward, void* stream) {
  const Kernel kernel =
      p.z.is_half ? epilogue_kernel<__half>(p, backward) : epilogue_kernel<__nv_bfloat16>(p, backward);
  return launch(kernel, ceil_div(p.n - p.first, kRowWarps), 32 * kRowWarps, 0, p, stream);
}

cudaError_t launch_forward_tiles(const GuidedParams& p, void* stream) {
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return error;
  if (const int stages = sm90::stages(p, limits, false)) return sm90::launch_forward(p, stages, stream);
  const Kernel kernel = p.z.is_half ? forward_kernel<__half>(p) : forward_kernel<__nv_bfloat16>(p);
  const dim3 grid(row_blocks(p), p.k_splits);
  return launch(kernel, grid, kForwardThreads, shared_bytes<kGuidedForwardFields>(), p, stream);
}

cudaError_t launch_backward_tiles(const GuidedParams& p, void* stream) {
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return error;
  if (const int stages = sm90::stages(p, limits, true)) return sm90::launch_backward(p, stages, stream);
  const Kernel kernel = p.z.is_half ? backward_kernel<__half>(p) : backward_kernel<__nv_bfloat16>(p);
  const dim3 grid(row_blocks(p), p.k_splits * ceil_div(p.v.k_tiles, kGuidedOutKTiles));
  return launch(kernel, grid, kBackwardThreads, shared_bytes<kGuidedTileFields>(), p, stream);
}

}  // namespace

// At N = 4,096 there are 32 blocks of rows for 132 multiprocessors: four shares of the columns each, eight in the
// forward pass, where two blocks fit (of the Hopper kernels the table's work_tiles). Sixteen bound the workspace; 512
// rows of a rank are 4 blocks, of many columns, and take up to 64.
extern "C" int ltood_guided_k_splits(int rows, int columns, int k_tiles, int backward) {
  const int most = rows == columns ? 16 : 64;
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return -error;
  const int work_tiles = cuda::use_sm90() ? sm90::tile(backward).work_tiles : backward ? 1 : 2;
  const int feature_tiles = backward ? ceil_div(k_tiles, kGuidedOutKTiles) : 1;
  const int blocks = ceil_div(rows, kGuidedRows) * feature_tiles, wanted = limits.multiprocessors * work_tiles;
  return std::max(1, std::min({wanted / blocks, ceil_div(columns, kGuidedColumns), most}));
}

extern "C" int ltood_launch_guided_keys(const GuidedParams* params, void* stream) {
  return launch(guided_keys_kernel, ceil_div(params->n, kPlanThreads), kPlanThreads, 0, *params, stream);
}

extern "C" int ltood_launch_guided_plan(const GuidedParams* params, void* stream) {
  const GuidedParams& p = *params;
  if (p.contrast) {
    const int blocks = ceil_div(p.n, kPlanThreads), tiles = ceil_div(p.padded / kGuidedColumns, kPlanThreads);
    if (const cudaError_t error = launch(guided_positions_kernel, blocks, kPlanThreads, 0, p, stream)) return error;
    const Kernel select = p.first ? guided_partial_select_kernel : guided_select_kernel;
    if (const cudaError_t error = launch(select, blocks, kPlanThreads, 0, p, stream)) return error;
    if (const cudaError_t error = launch(guided_fallback_tiles_kernel, tiles, kPlanThreads, 0, p, stream)) return error;
  }
  if (const cudaError_t error = launch(guided_tiles_kernel, row_blocks(p), kPlanThreads, 0, p, stream)) return error;
  return launch(guided_fields_kernel, ceil_div(p.padded, kPlanThreads), kPlanThreads, 0, p, stream);
}

extern "C" int ltood_launch_guided_forward(const GuidedParams* params, void* stream) {
  const GuidedParams& p = *params;
  if (const cudaError_t error = launch_forward_tiles(p, stream)) return error;
  return launch_epilogue(p, false, stream);
}

extern "C" int ltood_launch_guided_backward(const GuidedParams* params, void* stream) {
  const GuidedParams& p = *params;
  if (const cudaError_t error = launch_backward_tiles(p, stream)) return error;
  return launch_epilogue(p, true, stream);
}

}  // namespace ltood
