// How the triangle of tiles is cut, for both of its kernels.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "ops/contrastive/cuda/launch.h"

namespace ltood::contrastive {

// Fills tiles, row_tiles, col_tiles, strips, chunks and work_tiles: about `wanted` work tiles of at most `most` column
// tiles, row tiles by the multiple of `together`. The slots hold N (strips + chunks) floats: at most 128 strips, and
// 128 chunks up to N = 262,144 (512 for a million).
inline void cut_triangle(TrianglePlan& plan, int rows, int together, int64_t wanted, int most) {
  constexpr int kTile = 128, kMostStrips = 128;
  plan.tiles = cuda::ceil_div(rows, kTile);
  plan.row_tiles = cuda::ceil_div(plan.tiles, kMostStrips * together) * together;
  const int64_t count = int64_t(plan.tiles) * (plan.tiles + 1) / 2;
  plan.col_tiles = static_cast<int>(std::clamp<int64_t>(cuda::ceil_div(count / plan.row_tiles, wanted), 1, most));
  plan.strips = cuda::ceil_div(plan.tiles, plan.row_tiles);
  plan.chunks = cuda::ceil_div(plan.tiles, plan.col_tiles);
  plan.work_tiles = 0;
  for (int g = 0; g < plan.strips; ++g) {
    plan.work_tiles += cuda::ceil_div(plan.tiles - g * plan.row_tiles, plan.col_tiles);
  }
}

}  // namespace ltood::contrastive
