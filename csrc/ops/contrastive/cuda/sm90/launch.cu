#include <algorithm>

#include "ops/contrastive/cuda/plan.h"
#include "ops/contrastive/cuda/sm90/launch.h"
#include "ops/contrastive/cuda/sm90/lse_bwd.cuh"
#include "ops/contrastive/cuda/sm90/lse_fwd.cuh"

namespace ltood::contrastive::sm90 {
namespace {

using cuda::ceil_div;

tile_sizes::TileSize tile_of(const ContrastiveForward& p) {
  return tile_sizes::tile_of(p.nearest ? tile_sizes::kNeighbors : tile_sizes::kSums, p.u.splits,
                             p.u.splits * p.u.k_tiles);
}

bool is_wide(const tile_sizes::TileSize& tile) { return tile.rows == 2 * kTile; }

template <typename half_t>
auto tiles_kernel(const ContrastiveForward& p) {
  if (p.nearest) return contrastive_tiles_sm90_kernel<half_t, false, true>;
  return is_wide(tile_of(p)) ? contrastive_tiles_sm90_kernel<half_t, true, false>
                             : contrastive_tiles_sm90_kernel<half_t, false, false>;
}

// The tile sizes that tile_sizes_sm90.h counts are those that the kernels take, and each has a kernel.
constexpr bool table_is_right() {
  for (const tile_sizes::TileSize& t : tile_sizes::kTiles) {
    if (t.kernel != tile_sizes::kSums && t.kernel != tile_sizes::kNeighbors) continue;
    const bool wide = t.rows == 2 * kTile, nearest = t.kernel == tile_sizes::kNeighbors;
    const Operand widest{nullptr, nullptr, 0, t.k_tiles, 1, 0};
    const int bytes = resident_bytes(widest, wide) + epilogue_bytes(wide, nearest, tile_sizes::kMostColTiles);
    if (bytes != tile_sizes::fixed_bytes(t) || t.columns != kTile || t.stage_k_tiles != 1 || (wide && nearest))
      return false;
  }
  return true;
}
static_assert(table_is_right());

struct LseBwdSm90Launch {
  void (*kernel)(LseBwd);
  tile_sizes::TileSize tile;
};

template <typename half_t, int kSplits, int kOut>
LseBwdSm90Launch lse_bwd_launch() {
  return {contrastive_lse_bwd_sm90_kernel<half_t, kSplits, kOut>, LseBwdShape<kSplits, kOut>::kChoice};
}

template <typename half_t, int kSplits>
LseBwdSm90Launch lse_bwd_launch(int k_tiles) {
  if (k_tiles == 1) return lse_bwd_launch<half_t, kSplits, 1>();
  return k_tiles == 2 ? lse_bwd_launch<half_t, kSplits, 2>() : lse_bwd_launch<half_t, kSplits, 4>();
}

// Two splits of bfloat16 are unnormalised rows, which take the online form.
LseBwdSm90Launch lse_bwd_launch(const Operand& u) {
  if (!u.is_half) return lse_bwd_launch<__nv_bfloat16, 1>(u.k_tiles);
  return u.splits == 2 ? lse_bwd_launch<__half, 2>(u.k_tiles) : lse_bwd_launch<__half, 1>(u.k_tiles);
}

}  // namespace

bool plan_tiles(ContrastiveForward& p, const cuda::DeviceLimits& limits) {
  const tile_sizes::TileSize tile = tile_of(p);
  const bool wide = is_wide(tile);
  TrianglePlan& plan = p.plan;
  plan.stages = 0;
  if (!cuda::use_sm90() || p.exponents.online || tile.rows == 0) return false;
  const int rows = resident_bytes(p.u, wide), most = tile_sizes::kMostColTiles;
  plan.stages = tile_sizes::stages_beside(tile, rows + epilogue_bytes(wide, p.nearest, most), limits.shared_bytes);
  if (plan.stages == 0) return false;
  cut_triangle(plan, p.u.rows, tile.rows / kTile, tile.work_tiles * limits.multiprocessors, most);
  plan.blocks = std::min(plan.work_tiles, limits.multiprocessors);
  plan.resident = 1;
  plan.shared_bytes =
      tile_sizes::block_bytes(tile, rows + epilogue_bytes(wide, p.nearest, plan.col_tiles), plan.stages);
  return true;
}

// N = 4,096 is 32 blocks of rows for 132 multiprocessors: four ranges of columns.
bool plan_lse_bwd(ContrastiveLseBwd& p, const cuda::DeviceLimits& limits) {
  p.stages = 0;
  if (!cuda::use_sm90() || p.exponents.online || (p.rows.splits == 2 && !p.rows.is_half)) return false;
  const tile_sizes::TileSize tile = lse_bwd_launch(p.rows).tile;
  const int rows = p.rows.splits * p.rows.k_tiles * kLseBwdRowKTile;
  p.stages = tile_sizes::stages_beside(tile, rows, limits.shared_bytes);
  if (p.stages == 0) return false;
  p.resident = 1;
  p.shared_bytes = tile_sizes::block_bytes(tile, rows, p.stages);
  const int row_blocks = ceil_div(p.rows.rows, tile.rows) * ceil_div(p.rows.k_tiles, tile.k_tiles);
  const int wanted = tile.work_tiles * limits.multiprocessors / row_blocks,
            most = 8 * ceil_div(p.cols.rows, p.rows.rows);
  p.k_splits = std::max(1, std::min({wanted, most, ceil_div(p.cols.rows, tile.columns)}));
  return true;
}

cudaError_t launch_lse_bwd(const ContrastiveLseBwd& p, void* stream) {
  const LseBwdSm90Launch lse_bwd = lse_bwd_launch(p.rows);
  LseBwd f{{}, {}, p};
  const tile_sizes::TileSize& tile = lse_bwd.tile;
  if (const cudaError_t error = warpgroups::make_map(&f.row_map, p.rows, tile.rows)) return error;
  if (const cudaError_t error = warpgroups::make_map(&f.col_map, p.cols, tile.columns)) return error;
  const dim3 grid(ceil_div(p.rows.rows, tile.rows), ceil_div(p.rows.k_tiles, tile.k_tiles), p.k_splits);
  return cuda::launch(lse_bwd.kernel, grid, warpgroups::kThreads, p.shared_bytes, f, stream);
}

cudaError_t launch_tiles(const ContrastiveForward& p, void* stream) {
  Forward f{{}, p};
  if (const cudaError_t error = warpgroups::make_map(&f.map, p.u, kTile)) return error;
  const auto kernel = p.u.is_half ? tiles_kernel<__half>(p) : tiles_kernel<__nv_bfloat16>(p);
  return cuda::launch(kernel, p.plan.blocks, warpgroups::kThreads, p.plan.shared_bytes, f, stream);
}

}  // namespace ltood::contrastive::sm90
