// The Hopper kernel behind topk.h, torch-free. Not yet verified on hardware: taken only where LTOOD_CUDA_PATH=sm90
// asks.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/tile_sizes_sm90.h"
#include "cuda/topk/topk.h"

namespace ltood::knn::sm90 {

// Stages of its ring; 0: it does not take the problem (disabled, or rows do not fit in shared memory).
int stages(const Operand& x, const cuda::DeviceLimits& limits);

constexpr tile_sizes::TileSize kTile = tile_sizes::tile_of(tile_sizes::kTopk, 0, 1);

// keys, row_blocks, k_splits and k_split_tiles as in TopkKernelParams.
cudaError_t launch(const TopkParams& p, int64_t* keys, int row_blocks, int k_splits, int k_split_tiles, int stages,
                   void* stream);

}  // namespace ltood::knn::sm90
