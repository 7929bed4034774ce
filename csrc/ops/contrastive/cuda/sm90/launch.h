// The Hopper kernels of the contrastive losses, torch-free. They fill the same slots as those of cuda/launch.h,
// whose launchers call them. Not yet verified on hardware: taken only where LTOOD_CUDA_PATH=sm90 asks for them.
#pragma once

#include "cuda/launch.cuh"
#include "ops/contrastive/cuda/launch.h"

namespace ltood::contrastive::sm90 {

// Fill the plan and return true if the kernel takes the problem: enabled, on compute capability 9.0, with the fixed
// shift, rows that fit in shared memory.
bool plan_tiles(ContrastiveForward& p, const cuda::DeviceLimits& limits);
bool plan_lse_bwd(ContrastiveLseBwd& p, const cuda::DeviceLimits& limits);

cudaError_t launch_tiles(const ContrastiveForward& p, void* stream);
cudaError_t launch_lse_bwd(const ContrastiveLseBwd& p, void* stream);

}  // namespace ltood::contrastive::sm90
