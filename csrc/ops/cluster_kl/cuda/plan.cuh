// How the passes of cluster_kl are launched: shared by forward and backward.
#pragma once

#include "cuda/launch.cuh"
#include "ops/cluster_kl/cuda/fwd.cuh"

namespace ltood::cluster_kl {

// Columns of weights and sums: whole tiles of centroids.
inline int padded_width(int k) { return cuda::ceil_div(k, 128) * 128; }

inline PassParams pass_params(const ClusterDistances& in) {
  PassParams p{};
  p.in = in;
  p.width = padded_width(in.mu.rows);
  p.end_row = in.z.rows;
  p.tiles = p.range_tiles = cuda::ceil_div(in.mu.rows, kBlockN);
  return p;
}

template <typename Pass>
cudaError_t launch_pass(dim3 grid, const PassParams& p, const cuda::DeviceLimits& limits, void* stream) {
  const int64_t wanted = mainloop_sm80::shared_bytes(p.in.z, true);
  const bool resident = wanted <= limits.shared_bytes;
  const auto kernel = resident ? pass_kernel<Pass, true> : pass_kernel<Pass, false>;
  const int64_t shared = resident ? wanted : mainloop_sm80::shared_bytes(p.in.z, false);
  return cuda::launch(kernel, grid, kThreads, static_cast<int>(shared), p, stream);
}

}  // namespace ltood::cluster_kl
