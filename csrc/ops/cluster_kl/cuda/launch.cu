#include <algorithm>

#include "ops/cluster_kl/cuda/launch.h"
#include "ops/cluster_kl/cuda/plan.cuh"

namespace ltood {
namespace {

using namespace cluster_kl;

// Blocks of the Mass pass: each leaves a row of sums for every warp, so not one a block of rows.
int mass_blocks(const PassParams& p, const cuda::DeviceLimits& limits) {
  return std::min(cuda::ceil_div(p.in.z.rows, kBlockM), 2 * limits.multiprocessors);
}

int64_t partial_floats(const PassParams& p, const cuda::DeviceLimits& limits) {
  return int64_t(mass_blocks(p, limits)) * kWarps * p.width;
}

// mass[j] = the sum of column j of partial [end_row, width], its rows dealt to eight threads and added in order.
constexpr int kSumColumns = 32, kSumThreads = 8;

__global__ void __launch_bounds__(kSumColumns* kSumThreads) add_columns_kernel(PassParams p) {
  __shared__ float sums[kSumThreads][kSumColumns];
  const int column = blockIdx.x * kSumColumns + threadIdx.x % kSumColumns, part = threadIdx.x / kSumColumns;
  float sum = 0;
  for (int row = part; row < p.end_row; row += kSumThreads) sum += p.partial[size_t(row) * p.width + column];
  sums[part][threadIdx.x % kSumColumns] = sum;
  __syncthreads();
  if (part > 0 || column >= p.in.mu.rows) return;
  for (int other = 1; other < kSumThreads; ++other) sum += sums[other][threadIdx.x];
  p.mass[column] = sum;
}

}  // namespace

extern "C" int64_t ltood_cluster_kl_workspace(const ClusterKlParams* params) {
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return -static_cast<int64_t>(error);
  return 4 * (partial_floats(pass_params(params->in), limits) + params->in.z.rows);
}

extern "C" int ltood_launch_cluster_kl(const ClusterKlParams* params, void* stream) {
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return error;
  PassParams p = pass_params(params->in);
  p.loss = params->loss;
  p.mass = params->mass;
  p.stats = params->stats;
  p.distances = params->distances;
  p.cached_rows = params->cached_rows;
  p.q = params->q;
  p.assignments = params->assignments;
  p.partial = static_cast<float*>(params->workspace);
  p.nearest = reinterpret_cast<int*>(p.partial + partial_floats(p, limits));
  const int row_blocks = cuda::ceil_div(p.in.z.rows, kBlockM), sum_blocks = mass_blocks(p, limits);
  if (const cudaError_t error = launch_pass<Assign>(row_blocks, p, limits, stream)) return error;
  if (const cudaError_t error = launch_pass<Mass>(sum_blocks, p, limits, stream)) return error;
  PassParams sums = p;
  sums.end_row = sum_blocks * kWarps;
  if (const cudaError_t error = cuda::launch(add_columns_kernel, cuda::ceil_div(p.in.mu.rows, kSumColumns),
                                             kSumColumns * kSumThreads, 0, sums, stream)) {
    return error;
  }
  return launch_pass<Loss>(row_blocks, p, limits, stream);
}

}  // namespace ltood
