// The Hopper kernels of the guided family, torch-free: the tiles of cuda/launch.h's launchers, which call them. Not
// yet verified on hardware: taken only where LTOOD_CUDA_PATH=sm90 asks for them.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/tile_sizes_sm90.h"
#include "ops/guided/cuda/launch.h"

namespace ltood::guided::sm90 {

constexpr tile_sizes::TileSize tile(bool backward) {
  return tile_sizes::tile_of(backward ? tile_sizes::kGuidedBwd : tile_sizes::kGuided, 1, 1);
}

// Stages of the ring; 0: they do not take the problem (disabled, two splits, rows that do not fit).
int stages(const GuidedParams& p, const cuda::DeviceLimits& limits, bool backward);

cudaError_t launch_forward(const GuidedParams& p, int stages, void* stream);
cudaError_t launch_backward(const GuidedParams& p, int stages, void* stream);

}  // namespace ltood::guided::sm90
