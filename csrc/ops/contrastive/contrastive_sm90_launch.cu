#include <algorithm>

#include "ops/contrastive/contrastive_sm90_bwd_kernel.cuh"
#include "ops/contrastive/contrastive_sm90_kernel.cuh"
#include "ops/contrastive/contrastive_sm90_launch.h"

namespace ltood::contrastive::sm90 {
namespace {

using cuda::ceil_div;

// With neighbours a thread has no registers for 128 accumulators.
bool is_wide(const ContrastiveForward& p) { return p.u.parts * p.u.slices <= 4 && !p.nearest; }

template <typename half_t>
auto tiles_kernel(const ContrastiveForward& p) {
  if (p.nearest) return contrastive_tiles_sm90_kernel<half_t, false, true>;
  return is_wide(p) ? contrastive_tiles_sm90_kernel<half_t, true, false>
                    : contrastive_tiles_sm90_kernel<half_t, false, false>;
}

struct PushLaunch {
  void (*kernel)(Push);
  int tile_cols, stage_bytes, out_slices;
};

template <typename half_t, int kParts, int kOut>
PushLaunch push_launch() {
  using P = PushShape<kParts, kOut>;
  return {contrastive_push_sm90_kernel<half_t, kParts, kOut>, P::kTileN, P::kStageBytes, kOut};
}

template <typename half_t, int kParts>
PushLaunch push_launch(int slices) {
  if (slices == 1) return push_launch<half_t, kParts, 1>();
  return slices == 2 ? push_launch<half_t, kParts, 2>() : push_launch<half_t, kParts, 4>();
}

// Two parts of bfloat16 are rows as they are, which take the online form.
PushLaunch push_launch(const Operand& u) {
  if (!u.is_half) return push_launch<__nv_bfloat16, 1>(u.slices);
  return u.parts == 2 ? push_launch<__half, 2>(u.slices) : push_launch<__half, 1>(u.slices);
}

}  // namespace

// N = 16,384, D = 128 on 132 multiprocessors: 64 groups of two row tiles, 8,256 tiles; units of 2 × 4 make 1,056 of
// them, eight a block. 64 KiB of rows, six stages of 16 KiB and 9 KiB of sums are 169 of 227 KiB.
bool plan_tiles(ContrastiveForward& p, const cuda::DeviceLimits& limits) {
  constexpr int kMostStages = 6, kMostColTiles = 8;
  const bool wide = is_wide(p);
  TrianglePlan& plan = p.plan;
  plan.stages = 0;
  if (!cuda::take_sm90() || p.exponents.online) return false;
  const int left = limits.shared_bytes - resident_bytes(p.u, wide);
  const int stages = (left - tail_bytes(wide, p.nearest, kMostColTiles, kMostStages)) / kSliceBytes;
  if (stages < warpgroups::kFewestStages) return false;
  plan.stages = std::min(stages, kMostStages);
  plan.tiles = ceil_div(p.u.rows, kTile);
  const int row_tiles = wide ? 2 : 1;
  plan.row_tiles = ceil_div(plan.tiles, 128 * row_tiles) * row_tiles;
  const int64_t count = int64_t(plan.tiles) * (plan.tiles + 1) / 2, wanted = 8 * limits.multiprocessors;
  plan.col_tiles = static_cast<int>(std::clamp<int64_t>(ceil_div(count / plan.row_tiles, wanted), 1, kMostColTiles));
  plan.groups = ceil_div(plan.tiles, plan.row_tiles);
  plan.chunks = ceil_div(plan.tiles, plan.col_tiles);
  plan.units = 0;
  for (int g = 0; g < plan.groups; ++g) plan.units += ceil_div(plan.tiles - g * plan.row_tiles, plan.col_tiles);
  plan.blocks = std::min(plan.units, limits.multiprocessors);
  plan.resident = 1;
  plan.shared_bytes =
      resident_bytes(p.u, wide) + plan.stages * kSliceBytes + tail_bytes(wide, p.nearest, plan.col_tiles, plan.stages);
  return true;
}

// N = 4,096 is 32 blocks of rows for 132 multiprocessors: four ranges of columns. D = 128, bf16: 32 KiB of rows and six
// stages of 32 KiB, a tile each: two are held by a turn, four are on their way.
bool plan_push(ContrastivePush& p, const cuda::DeviceLimits& limits) {
  constexpr int kMostStages = 8;
  p.stages = 0;
  if (!cuda::take_sm90() || p.exponents.online || (p.rows.parts == 2 && !p.rows.is_half)) return false;
  const PushLaunch push = push_launch(p.rows);
  const int rows = p.rows.parts * p.rows.slices * kPushRowSlice;
  const int barriers = (kMostStages + 1) * warpgroups::kBarrierBytes;
  const int stages = (limits.shared_bytes - rows - barriers) / push.stage_bytes;
  if (stages < warpgroups::kFewestStages) return false;
  p.stages = std::min(stages, kMostStages);
  p.resident = 1;
  p.shared_bytes = rows + p.stages * push.stage_bytes + barriers;
  const int row_blocks = ceil_div(p.rows.rows, kPushRows) * ceil_div(p.rows.slices, push.out_slices);
  const int wanted = limits.multiprocessors / row_blocks, most = 8 * ceil_div(p.cols.rows, p.rows.rows);
  p.splits = std::max(1, std::min({wanted, most, ceil_div(p.cols.rows, push.tile_cols)}));
  return true;
}

cudaError_t launch_push(const ContrastivePush& p, void* stream) {
  const PushLaunch push = push_launch(p.rows);
  Push f{{}, {}, p};
  if (const cudaError_t error = warpgroups::make_map(&f.row_map, p.rows, kPushRows)) return error;
  if (const cudaError_t error = warpgroups::make_map(&f.col_map, p.cols, push.tile_cols)) return error;
  const dim3 grid(ceil_div(p.rows.rows, kPushRows), ceil_div(p.rows.slices, push.out_slices), p.splits);
  return cuda::launch(push.kernel, grid, warpgroups::kThreads, p.shared_bytes, f, stream);
}

cudaError_t launch_tiles(const ContrastiveForward& p, void* stream) {
  Forward f{{}, p};
  if (const cudaError_t error = warpgroups::make_map(&f.map, p.u, kTile)) return error;
  const auto kernel = p.u.is_half ? tiles_kernel<__half>(p) : tiles_kernel<__nv_bfloat16>(p);
  return cuda::launch(kernel, p.plan.blocks, warpgroups::kThreads, p.plan.shared_bytes, f, stream);
}

}  // namespace ltood::contrastive::sm90
