// cluster_kl: sizes and the one validation of its operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>

#include "common/arguments.h"

namespace ltood::cluster_kl {

struct ClusterInputs {
  at::Tensor z;          // [N, D]
  at::Tensor centroids;  // [K, D]
  double nu = 1;
};

inline ClusterInputs cluster_inputs(const Arguments& arguments) {
  ClusterInputs in;
  in.z = arguments.tensor("z");
  in.centroids = arguments.tensor("centroids");
  in.nu = arguments.number("nu");
  return in;
}

// The forward's saved tensors, the gradient of its losses, and which gradients are wanted.
struct ClusterSaved {
  at::Tensor grad_loss;               // [N]
  at::Tensor mass, stats, distances;  // [K], [3 or 4, N], [cached rows, K]
  bool need_z = true, need_centroids = true;
};

inline ClusterSaved cluster_saved(const Arguments& arguments) {
  ClusterSaved saved;
  saved.grad_loss = arguments.tensor("grad_loss");
  saved.mass = arguments.tensor("mass");
  saved.stats = arguments.tensor("stats");
  saved.distances = arguments.tensor("distances");
  saved.need_z = arguments.flag("need_z");
  saved.need_centroids = arguments.flag("need_centroids");
  return saved;
}

struct ClusterSizes {
  int64_t n, k, d;  // rows, clusters, features
};

inline ClusterSizes check_cluster_kl(const ClusterInputs& in, int64_t cached_rows) {
  const char* op = "cluster_kl";
  const at::Tensor &z = in.z, &centroids = in.centroids;
  LTOOD_CHECK_TYPE(z.is_floating_point(), op, "z", "a float tensor", z.scalar_type());
  LTOOD_CHECK_TYPE(centroids.is_floating_point(), op, "centroids", "a float tensor", centroids.scalar_type());
  LTOOD_CHECK_VALUE(z.dim() == 2 && z.numel() > 0, op, "z", "a non-empty matrix [N, D]", "shape ", z.sizes());
  const ClusterSizes sizes{z.size(0), centroids.dim() == 2 ? centroids.size(0) : 0, z.size(1)};
  LTOOD_CHECK_VALUE(sizes.k > 0 && centroids.size(1) == sizes.d, op, "centroids", "a non-empty matrix as wide as z",
                    "shape ", centroids.sizes());
  LTOOD_CHECK_VALUE(z.device() == centroids.device(), op, "centroids", "on the device of z", centroids.device());
  LTOOD_CHECK_VALUE(in.nu > 0 && std::isfinite(in.nu), op, "nu", "positive and finite", in.nu);
  LTOOD_CHECK_VALUE(cached_rows >= 0 && cached_rows <= sizes.n, op, "cached_rows", "in [0, N]", cached_rows);
  return sizes;
}

inline void check_cluster_kl_bwd(const ClusterSizes& sizes, const ClusterSaved& saved, int64_t stat_rows = 3) {
  const char* op = "cluster_kl_bwd";
  const at::Tensor &grad_loss = saved.grad_loss, &mass = saved.mass, &stats = saved.stats, &distances = saved.distances;
  LTOOD_CHECK_VALUE(grad_loss.sizes() == at::IntArrayRef({sizes.n}), op, "grad_loss", "of shape [N]",
                    grad_loss.sizes());
  LTOOD_CHECK_VALUE(mass.sizes() == at::IntArrayRef({sizes.k}), op, "mass", "of shape [K]", mass.sizes());
  LTOOD_CHECK_VALUE(stats.sizes() == at::IntArrayRef({stat_rows, sizes.n}), op, "stats",
                    c10::str("of shape [", stat_rows, ", N]"), stats.sizes());
  LTOOD_CHECK_VALUE(distances.dim() == 2 && distances.size(1) == sizes.k && distances.size(0) <= sizes.n, op,
                    "distances", "of shape [cached rows, K]", distances.sizes());
  for (const at::Tensor& output : {mass, stats, distances}) {
    LTOOD_CHECK_VALUE(output.is_contiguous() && output.scalar_type() == mass.scalar_type(), op, "saved tensors",
                      "as the forward returned them", output.scalar_type());
  }
}

}  // namespace ltood::cluster_kl
