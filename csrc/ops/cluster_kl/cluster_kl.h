// cluster_kl: sizes and the one validation of its operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>

#include "common/check.h"

namespace ltood::cluster_kl {

struct Sizes {
  int64_t n, k, d;  // rows, clusters, features
};

inline Sizes check_cluster_kl(const at::Tensor& z, const at::Tensor& centroids, double nu, int64_t cached_rows) {
  const char* op = "cluster_kl";
  LTOOD_CHECK_TYPE(z.is_floating_point(), op, "z", "a float tensor", z.scalar_type());
  LTOOD_CHECK_TYPE(centroids.is_floating_point(), op, "centroids", "a float tensor", centroids.scalar_type());
  LTOOD_CHECK_VALUE(z.dim() == 2 && z.numel() > 0, op, "z", "a non-empty matrix [N, D]", "shape ", z.sizes());
  const Sizes sizes{z.size(0), centroids.dim() == 2 ? centroids.size(0) : 0, z.size(1)};
  LTOOD_CHECK_VALUE(sizes.k > 0 && centroids.size(1) == sizes.d, op, "centroids", "a non-empty matrix as wide as z",
                    "shape ", centroids.sizes());
  LTOOD_CHECK_VALUE(z.device() == centroids.device(), op, "centroids", "on the device of z", centroids.device());
  LTOOD_CHECK_VALUE(nu > 0 && std::isfinite(nu), op, "nu", "positive and finite", nu);
  LTOOD_CHECK_VALUE(cached_rows >= 0 && cached_rows <= sizes.n, op, "cached_rows", "in [0, N]", cached_rows);
  return sizes;
}

inline void check_cluster_kl_bwd(const Sizes& sizes, const at::Tensor& grad_loss, const at::Tensor& mass,
                                 const at::Tensor& stats, const at::Tensor& distances, int64_t stat_rows = 3) {
  const char* op = "cluster_kl_bwd";
  LTOOD_CHECK_VALUE(grad_loss.sizes() == at::IntArrayRef({sizes.n}), op, "grad_loss", "of shape [N]",
                    grad_loss.sizes());
  LTOOD_CHECK_VALUE(mass.sizes() == at::IntArrayRef({sizes.k}), op, "mass", "of shape [K]", mass.sizes());
  LTOOD_CHECK_VALUE(stats.sizes() == at::IntArrayRef({stat_rows, sizes.n}), op, "stats",
                    c10::str("of shape [", stat_rows, ", N]"), stats.sizes());
  LTOOD_CHECK_VALUE(distances.dim() == 2 && distances.size(1) == sizes.k && distances.size(0) <= sizes.n, op,
                    "distances", "of shape [cached rows, K]", distances.sizes());
  for (const at::Tensor& saved : {mass, stats, distances}) {
    LTOOD_CHECK_VALUE(saved.is_contiguous() && saved.scalar_type() == mass.scalar_type(), op, "saved tensors",
                      "as the forward returned them", saved.scalar_type());
  }
}

}  // namespace ltood::cluster_kl
