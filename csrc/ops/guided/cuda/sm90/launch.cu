#include "ops/guided/cuda/sm90/bwd.cuh"
#include "ops/guided/cuda/sm90/fwd.cuh"
#include "ops/guided/cuda/sm90/launch.h"

namespace ltood::guided::sm90 {
namespace {

using Kernel = void (*)(Sm90);

template <typename half_t>
Kernel forward_kernel(const GuidedParams& p) {
  if (!p.distill) return guided_forward_sm90_kernel<half_t, true, false>;
  return p.contrast ? guided_forward_sm90_kernel<half_t, true, true> : guided_forward_sm90_kernel<half_t, false, true>;
}

template <typename half_t>
Kernel backward_kernel(const GuidedParams& p) {
  if (!p.distill) return guided_backward_sm90_kernel<half_t, true, false>;
  return p.contrast ? guided_backward_sm90_kernel<half_t, true, true>
                    : guided_backward_sm90_kernel<half_t, false, true>;
}

cudaError_t launch(Kernel kernel, const tile_sizes::TileSize& tile, const GuidedParams& p, int feature_tiles,
                   int stages, void* stream) {
  Sm90 f{{}, {}, {}, {}, {}, p, stages};
  if (const cudaError_t error = warpgroups::make_map(&f.z_rows, p.z, kGuidedRows)) return error;
  if (const cudaError_t error = warpgroups::make_map(&f.e_rows, p.e, kGuidedRows)) return error;
  if (const cudaError_t error = warpgroups::make_map(&f.z_columns, p.z, kGuidedColumns)) return error;
  if (const cudaError_t error = warpgroups::make_map(&f.e_columns, p.e, kGuidedColumns)) return error;
  if (const cudaError_t error = warpgroups::make_map(&f.v_columns, p.v, kGuidedColumns)) return error;
  const dim3 grid((p.padded - p.first) / kGuidedRows, p.k_splits * feature_tiles);
  return cuda::launch(kernel, grid, warpgroups::kThreads, tile_sizes::block_bytes(tile, resident_bytes(p), stages), f,
                      stream);
}

}  // namespace

int stages(const GuidedParams& p, const cuda::DeviceLimits& limits, bool backward) {
  if (!cuda::use_sm90() || p.z.splits != 1 || p.e.splits != 1) return 0;
  if (p.z.k_tiles + guide_k_tiles(p) > tile(backward).k_tiles) return 0;
  return tile_sizes::stages_beside(tile(backward), resident_bytes(p), limits.shared_bytes);
}

cudaError_t launch_forward(const GuidedParams& p, int stages, void* stream) {
  const Kernel kernel = p.z.is_half ? forward_kernel<__half>(p) : forward_kernel<__nv_bfloat16>(p);
  return launch(kernel, tile(false), p, 1, stages, stream);
}

cudaError_t launch_backward(const GuidedParams& p, int stages, void* stream) {
  const Kernel kernel = p.z.is_half ? backward_kernel<__half>(p) : backward_kernel<__nv_bfloat16>(p);
  return launch(kernel, tile(true), p, cuda::ceil_div(p.v.k_tiles, kGuidedOutKTiles), stages, stream);
}

}  // namespace ltood::guided::sm90
