// cluster_kl on CUDA: the launchers. Torch-free.
#pragma once

#include <cstdint>

#include "cuda/operand.h"

namespace ltood {

// Everything that squared distances are made of. Operands are float16, two splits for float32, and hold the rows minus
// the origin, if there is one.
struct ClusterDistances {
  Operand z, mu;            // [N], [K]
  const float* z_squares;   // [N] their squared norms
  const float* mu_squares;  // [K]
  const void* z_rows;       // [N, d] as the caller gave them, in one element type
  const void* mu_rows;      // [K, d]
  int type;                 // ElementType of these
  int d;
  float nu;
  float share;  // a distance is summed again from differences where nu + distance is below this share of the norms
};

struct ClusterKlParams {
  ClusterDistances in;
  float* loss;       // [N]
  float* mass;       // [K]
  float* stats;      // [4, N]: nearest, total, target, excess (fwd.cuh)
  float* distances;  // [cached_rows, K]
  int64_t cached_rows;
  float* q;              // [N, K] or null
  int64_t* assignments;  // [N] or null
  void* workspace;       // ltood_cluster_kl_workspace() bytes
};

struct ClusterKlBwdParams {
  ClusterDistances in;
  const float* grad_loss;       // [N]
  const float* mass;            // [K]
  const float* stats;           // [4, N]
  const float* origin;          // [d] or null
  Operand z_splits, mu_splits;  // bfloat16, scale 1: what the weights are multiplied with
  int weight_splits;            // 2: weights keep 16 bits of mantissa, 1: 8
  void* grad_z;                 // [N, d] in the element type, or null
  float* grad_mu;               // [K, d] or null
  int chunk_rows;               // rows whose weights are in the workspace at a time, a multiple of 128
  void* workspace;              // ltood_cluster_kl_bwd_workspace() bytes
};

// Bytes on the current device, a negative cudaError_t on failure.
extern "C" int64_t ltood_cluster_kl_workspace(const ClusterKlParams* params);
extern "C" int64_t ltood_cluster_kl_bwd_workspace(const ClusterKlBwdParams* params);

// chunk_rows for weights of about 64 MiB.
extern "C" int ltood_cluster_kl_chunk_rows(int64_t n, int64_t k, int weight_splits);

// They return a cudaError_t.
extern "C" int ltood_launch_cluster_kl(const ClusterKlParams* params, void* stream);
extern "C" int ltood_launch_cluster_kl_bwd(const ClusterKlBwdParams* params, void* stream);

}  // namespace ltood
