#include <algorithm>

#include "ops/cluster_kl/cuda/bwd.cuh"
#include "ops/cluster_kl/cuda/plan.cuh"

namespace ltood {
namespace {

using namespace cluster_kl;

constexpr int64_t kChunkBytes = 64 << 20;  // of weights: they are read again from L2

// What the launches share. Two blocks a multiprocessor are to find work: the columns of the weights are cut in groups
// of tiles, and the rows of a chunk in k_splits for grad_mu, when there are few tiles.
struct ChunkPlan {
  int width, feature_k_tiles, range_tiles, k_splits, k_split_steps;
  int64_t weight_bytes;

  ChunkPlan(const ClusterKlBwdParams& p, const cuda::DeviceLimits& limits) {
    const int blocks = 2 * limits.multiprocessors, tiles = padded_width(p.in.mu.rows) / kBlockN;
    width = tiles * kBlockN;
    feature_k_tiles = p.z_splits.k_tiles;
    const int ranges = std::clamp(cuda::ceil_div(blocks, p.chunk_rows / kBlockM), 1, tiles);
    range_tiles = cuda::ceil_div(tiles, ranges);
    const int steps = p.chunk_rows / kKTile, wanted = cuda::ceil_div(blocks, width / kBlockM * feature_k_tiles);
    k_split_steps = cuda::ceil_div(steps, std::clamp(wanted, 1, std::max(steps / 4, 1)));
    k_splits = cuda::ceil_div(steps, k_split_steps);
    weight_bytes = int64_t(p.weight_splits) * p.chunk_rows * width * 2;
  }
};

cudaError_t launch_grad_z(const ClusterKlBwdParams& params, const ChunkPlan& plan, const PassParams& pass,
                          void* stream) {
  const int element_bytes = params.in.type == kFloat32 ? 4 : 2;
  const size_t offset = size_t(pass.first_row) * params.in.d * element_bytes;
  ProductParams p{};
  p.weights = pass.weights;
  p.other = params.mu_splits;
  p.steps = p.k_split_steps = plan.width / kKTile;
  p.rows = static_cast<const char*>(params.in.z_rows) + offset;
  p.origin = params.origin;
  p.type = params.in.type;
  p.d = params.in.d;
  p.grad_z = static_cast<char*>(params.grad_z) + offset;
  const dim3 grid(cuda::ceil_div(pass.weights.rows, kBlockM), plan.feature_k_tiles);
  return cuda::launch(product_kernel<false>, grid, kThreads, kProductBytes, p, stream);
}

// Adds the chunk to partial and partial_sums; the first one writes them.
cudaError_t launch_partial_mu(const ClusterKlBwdParams& params, const ChunkPlan& plan, const PassParams& pass,
                              const GradMuParams& mu, void* stream) {
  ProductParams p{};
  p.weights = pass.weights;
  p.other = params.z_splits;
  p.other_row = pass.first_row;
  p.steps = params.chunk_rows / kKTile;
  p.k_split_steps = plan.k_split_steps;
  p.d = params.in.d;
  p.partial = const_cast<float*>(mu.partial);
  p.partial_sums = const_cast<float*>(mu.partial_sums);
  p.k = params.in.mu.rows;
  p.first_chunk = pass.first_row == 0;
  const dim3 grid(plan.width / kBlockM, plan.feature_k_tiles, plan.k_splits);
  return cuda::launch(product_kernel<true>, grid, kThreads, kProductBytes, p, stream);
}

GradMuParams grad_mu_params(const ClusterKlBwdParams& params, const ChunkPlan& plan) {
  const int k = params.in.mu.rows, d = params.in.d;
  const float* partial = reinterpret_cast<const float*>(static_cast<char*>(params.workspace) + plan.weight_bytes);
  return {partial,
          partial + size_t(plan.k_splits) * k * d,
          plan.k_splits,
          k,
          d,
          params.in.type,
          params.in.mu_rows,
          params.origin,
          params.grad_mu};
}

cudaError_t launch_chunk(const ClusterKlBwdParams& params, const ChunkPlan& plan, const PassParams& pass,
                         const GradMuParams& mu, const cuda::DeviceLimits& limits, void* stream) {
  const dim3 grid(cuda::ceil_div(pass.weights.rows, kBlockM), cuda::ceil_div(pass.tiles, pass.range_tiles));
  if (const cudaError_t error = launch_pass<WeightPass>(grid, pass, limits, stream)) return error;
  if (params.grad_mu) {
    if (const cudaError_t error = launch_partial_mu(params, plan, pass, mu, stream)) return error;
  }
  return params.grad_z ? launch_grad_z(params, plan, pass, stream) : cudaSuccess;
}

}  // namespace

extern "C" int ltood_cluster_kl_chunk_rows(int64_t n, int64_t k, int weight_splits) {
  const int64_t fit = kChunkBytes / (int64_t(weight_splits) * 2 * padded_width(static_cast<int>(k)));
  const int64_t blocks = std::min(std::max<int64_t>(fit / kBlockM, 1), cuda::ceil_div<int64_t>(n, kBlockM));
  return static_cast<int>(blocks * kBlockM);
}

extern "C" int64_t ltood_cluster_kl_bwd_workspace(const ClusterKlBwdParams* params) {
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return -static_cast<int64_t>(error);
  const ChunkPlan plan(*params, limits);
  const int64_t floats = params->grad_mu ? int64_t(plan.k_splits) * params->in.mu.rows * (params->in.d + 1) : 0;
  return plan.weight_bytes + 4 * floats;
}

extern "C" int ltood_launch_cluster_kl_bwd(const ClusterKlBwdParams* params, void* stream) {
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return error;
  const ChunkPlan plan(*params, limits);
  const GradMuParams mu = grad_mu_params(*params, plan);
  const int n = params->in.z.rows;
  PassParams pass = pass_params(params->in);
  pass.mass = const_cast<float*>(params->mass);
  pass.stats = const_cast<float*>(params->stats);
  pass.grad_loss = params->grad_loss;
  pass.tiles = plan.width / kBlockN;
  pass.range_tiles = plan.range_tiles;
  for (int64_t first = 0; first < n; first += params->chunk_rows) {
    pass.first_row = static_cast<int>(first);
    pass.end_row = static_cast<int>(std::min<int64_t>(first + params->chunk_rows, n));
    pass.weights = {params->workspace,     nullptr, pass.end_row - pass.first_row, plan.width / kKTile,
                    params->weight_splits, 0};
    if (const cudaError_t error = launch_chunk(*params, plan, pass, mu, limits, stream)) return error;
  }
  return params->grad_mu ? cuda::launch(grad_mu_kernel, mu.k, kGradMuThreads, 0, mu, stream) : cudaSuccess;
}

}  // namespace ltood
