#include <algorithm>
#include <type_traits>

#include "cuda/launch.cuh"
#include "ops/contrastive/cuda/lse_bwd.cuh"
#include "ops/contrastive/cuda/lse_fwd.cuh"
#include "ops/contrastive/cuda/plan.h"
#include "ops/contrastive/cuda/rows.cuh"
#include "ops/contrastive/cuda/sm90/launch.h"

namespace ltood {
namespace {

using cuda::ceil_div;

using TilesKernel = void (*)(ContrastiveForward);

template <typename half_t>
TilesKernel tiles_kernel(bool online, bool nearest) {
  if (online) {
    return nearest ? contrastive::contrastive_tiles_kernel<half_t, true, true>
                   : contrastive::contrastive_tiles_kernel<half_t, true, false>;
  }
  return nearest ? contrastive::contrastive_tiles_kernel<half_t, false, true>
                 : contrastive::contrastive_tiles_kernel<half_t, false, false>;
}

TilesKernel tiles_kernel(const ContrastiveForward& p) {
  return p.u.is_half ? tiles_kernel<__half>(p.exponents.online, p.nearest)
                     : tiles_kernel<__nv_bfloat16>(p.exponents.online, p.nearest);
}

// N = 16,384 on 132 multiprocessors: 128 × 129 / 2 = 8,256 tiles for 264 blocks. Work tiles of 1 × 4 tiles make 2,112
// of them, eight a block, so that the last round wastes little, while the rows are loaded for every fourth tile only.
void plan_triangle(ContrastiveForward& p, const cuda::DeviceLimits& limits) {
  TrianglePlan& plan = p.plan;
  const int rows = p.u.splits * p.u.k_tiles * contrastive::kKTileBytes;
  const int stages = contrastive::kStages * contrastive::kKTileBytes;
  const auto column_tile = [&] {
    return ((p.exponents.online ? 8 : 4) + (p.nearest ? 8 : 0)) * contrastive::kWarpsM * contrastive::kTile;
  };
  plan.resident = p.u.splits * p.u.k_tiles <= 4 && rows + stages + column_tile() <= limits.shared_bytes;
  const int tile_bytes = plan.resident ? rows + stages : 2 * stages;
  if (tile_bytes + column_tile() > limits.shared_bytes) p.nearest = 0;
  const int most = std::clamp((limits.shared_bytes - tile_bytes) / column_tile(), 1, 16);
  contrastive::cut_triangle(plan, p.u.rows, 1, 8 * 2 * limits.multiprocessors, most);
  plan.shared_bytes = tile_bytes + plan.col_tiles * column_tile();
}

struct LseBwdLaunch {
  void (*kernel)(ContrastiveLseBwd);
  int threads, tile_cols, resident_stage, streamed_stage;
};

// Two bfloat16 splits are those of unnormalised rows: always online.
template <typename half_t, int kSplits, int kOut>
LseBwdLaunch lse_bwd_launch(bool online) {
  using S = contrastive::bwd::LseBwdTiles<kSplits, kOut>;
  auto kernel = contrastive::bwd::contrastive_lse_bwd_kernel<half_t, kSplits, kOut, true>;
  if constexpr (std::is_same_v<half_t, __half> || kSplits == 1) {
    if (!online) kernel = contrastive::bwd::contrastive_lse_bwd_kernel<half_t, kSplits, kOut, false>;
  }
  return {kernel, S::kThreads, S::kTileN, S::kResidentStage, S::kStreamedStage};
}

template <typename half_t, int kSplits>
LseBwdLaunch lse_bwd_launch(const ContrastiveLseBwd& p) {
  const bool online = p.exponents.online;
  return p.rows.k_tiles > 1 ? lse_bwd_launch<half_t, kSplits, 2>(online) : lse_bwd_launch<half_t, kSplits, 1>(online);
}

LseBwdLaunch lse_bwd_launch(const ContrastiveLseBwd& p) {
  if (p.rows.is_half) return p.rows.splits == 2 ? lse_bwd_launch<__half, 2>(p) : lse_bwd_launch<__half, 1>(p);
  return p.rows.splits == 2 ? lse_bwd_launch<__nv_bfloat16, 2>(p) : lse_bwd_launch<__nv_bfloat16, 1>(p);
}

template <typename half_t>
auto epilogue_kernel(int type) {
  if (type == kFloat32) return contrastive::contrastive_epilogue_kernel<half_t, float>;
  if (type == kFloat16) return contrastive::contrastive_epilogue_kernel<half_t, __half>;
  return contrastive::contrastive_epilogue_kernel<half_t, __nv_bfloat16>;
}

constexpr int kRowThreads = 128;

}  // namespace

extern "C" {

int ltood_plan_contrastive(ContrastiveForward* params) {
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return error;
  if (contrastive::sm90::plan_tiles(*params, limits)) return cudaSuccess;
  plan_triangle(*params, limits);
  int resident_blocks = 1;
  const auto kernel = reinterpret_cast<const void*>(tiles_kernel(*params));
  if (const cudaError_t error = cuda::allow_shared(kernel, params->plan.shared_bytes)) return error;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &resident_blocks, kernel, contrastive::kThreads, params->plan.shared_bytes)) {
    return error;
  }
  params->plan.blocks = std::min(params->plan.work_tiles, std::max(1, resident_blocks) * limits.multiprocessors);
  return cudaSuccess;
}

int ltood_launch_contrastive_tiles(const ContrastiveForward* params, void* stream) {
  const ContrastiveForward& p = *params;
  if (p.plan.stages) return contrastive::sm90::launch_tiles(p, stream);
  return cuda::launch(tiles_kernel(p), p.plan.blocks, contrastive::kThreads, p.plan.shared_bytes, p, stream);
}

int ltood_launch_contrastive_pairs(const SegmentPairs* params, void* stream) {
  const auto kernel = contrastive::contrastive_pairs_kernel;
  return cuda::launch(kernel, ceil_div(params->n, kRowThreads), kRowThreads, 0, *params, stream);
}

int ltood_launch_contrastive_rows(const ContrastiveRows* params, void* stream) {
  const auto kernel = params->u.is_half ? contrastive::contrastive_rows_kernel<__half>
                                        : contrastive::contrastive_rows_kernel<__nv_bfloat16>;
  const int blocks = ceil_div(params->u.rows, contrastive::kRowWarps);
  return cuda::launch(kernel, blocks, 32 * contrastive::kRowWarps, 0, *params, stream);
}

int ltood_launch_contrastive_row_gradients(const RowGradients* params, void* stream) {
  const auto kernel = contrastive::contrastive_row_gradients_kernel;
  return cuda::launch(kernel, ceil_div(params->n, kRowThreads), kRowThreads, 0, *params, stream);
}

int ltood_launch_contrastive_factors(const ContrastiveFactors* params, void* stream) {
  const auto kernel = contrastive::contrastive_factors_kernel;
  return cuda::launch(kernel, ceil_div(params->u.rows, kRowThreads), kRowThreads, 0, *params, stream);
}

// N = 4,096 is 32 blocks of rows for 264 places: 8 ranges of columns fill them. lse_bwd takes N D floats a range. Few
// rows against many columns, 512 against 4,096, are cut into 64: the floats are those of 264 blocks of rows at most.
int ltood_plan_contrastive_lse_bwd(ContrastiveLseBwd* params) {
  using namespace contrastive::bwd;
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return error;
  ContrastiveLseBwd& p = *params;
  if (contrastive::sm90::plan_lse_bwd(p, limits)) return cudaSuccess;
  const LseBwdLaunch lse_bwd = lse_bwd_launch(p);
  const int rows = p.rows.splits * p.rows.k_tiles * kRowKTileBytes;
  p.shared_bytes = rows + kStages * lse_bwd.resident_stage;
  p.resident = p.rows.splits * p.rows.k_tiles <= 4 && p.shared_bytes <= limits.shared_bytes;
  if (!p.resident) p.shared_bytes = kStages * lse_bwd.streamed_stage;
  const int row_blocks = ceil_div(p.rows.rows, kTileM) * ceil_div(p.rows.k_tiles, 2);
  const int wanted = 2 * limits.multiprocessors / row_blocks, most = 8 * ceil_div(p.cols.rows, p.rows.rows);
  p.k_splits = std::max(1, std::min({wanted, most, ceil_div(p.cols.rows, lse_bwd.tile_cols)}));
  return cudaSuccess;
}

int ltood_launch_contrastive_lse_bwd(const ContrastiveLseBwd* params, void* stream) {
  using namespace contrastive::bwd;
  const ContrastiveLseBwd& p = *params;
  if (p.stages) return contrastive::sm90::launch_lse_bwd(p, stream);
  const LseBwdLaunch lse_bwd = lse_bwd_launch(p);
  const dim3 grid(ceil_div(p.rows.rows, kTileM), ceil_div(p.rows.k_tiles, p.rows.k_tiles > 1 ? 2 : 1), p.k_splits);
  return cuda::launch(lse_bwd.kernel, grid, lse_bwd.threads, p.shared_bytes, p, stream);
}

int ltood_launch_contrastive_lse_bwd_combine(const ContrastiveLseBwdCombine* params, void* stream) {
  const int blocks = ceil_div(params->lse_bwd.rows.rows, contrastive::kRowWarps);
  const auto kernel = contrastive::contrastive_lse_bwd_combine_kernel;
  return cuda::launch(kernel, blocks, 32 * contrastive::kRowWarps, 0, *params, stream);
}

int ltood_launch_contrastive_epilogue(const ContrastiveBackward* params, void* stream) {
  const auto kernel =
      params->u.is_half ? epilogue_kernel<__half>(params->type) : epilogue_kernel<__nv_bfloat16>(params->type);
  const int blocks = ceil_div(params->u.rows, contrastive::kRowWarps);
  return cuda::launch(kernel, blocks, 32 * contrastive::kRowWarps, 0, *params, stream);
}
}

}  // namespace ltood
