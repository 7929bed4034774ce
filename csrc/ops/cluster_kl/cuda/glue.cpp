#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "cuda/operand_torch.h"
#include "ops/cluster_kl/cluster_kl.h"
#include "ops/cluster_kl/cuda/launch.h"

namespace ltood::cluster_kl {
namespace {

constexpr const char* kOp = "cluster_kl";
constexpr int64_t kStats = 4;  // rows of the statistics

// A matrix [rows, D] as the kernels read it. The tensors live as long as the launches that are enqueued with them.
struct PreparedMatrix {
  at::Tensor x, data, scale, squares;
  Operand view;
};

// float16 splits for distances; bfloat16 splits, unscaled, for products with weights.
PreparedMatrix prepare(const at::Tensor& x, const OptionalTensor& origin, int splits, bool is_half) {
  LTOOD_CHECK_VALUE(x.size(0) <= std::numeric_limits<int>::max(), kOp, "z", "of fewer than 2^31 rows", x.size(0));
  const int n = static_cast<int>(x.size(0)), d = static_cast<int>(x.size(1)), k_tiles = (d + kKTile - 1) / kKTile;
  const at::TensorOptions wide = x.options().dtype(at::kFloat);
  PreparedMatrix m{
      x,
      at::empty({splits, n, int64_t(kKTile) * k_tiles}, x.options().dtype(is_half ? at::kHalf : at::kBFloat16)),
      at::empty({n}, wide),
      at::empty({n}, wide),
      {}};
  m.view = {m.data.data_ptr(), m.scale.const_data_ptr<float>(), n, k_tiles, splits, is_half};
  PrepareParams params{};
  params.x = x.const_data_ptr();
  params.type = element_type(kOp, "z", x);
  params.rows = n;
  params.d = d;
  params.out = m.view;
  params.origin = origin ? origin->const_data_ptr<float>() : nullptr;
  params.squares = m.squares.mutable_data_ptr<float>();
  params.unscaled = !is_half;
  check_launch(kOp, ltood_launch_prepare_rows(&params, current_stream(x)));
  return m;
}

// The inputs in one type: their own, or float32 where they differ. float32 rows are taken around the median centroid,
// so that a common offset costs no precision; the splits of 16-bit rows are exact.
struct CudaProblem {
  at::Tensor z, centroids;
  bool rounded;  // float32 inputs, bfloat16-grade products
  OptionalTensor origin;
  PreparedMatrix rows, mu;
  ClusterDistances distances;

  CudaProblem(const at::Tensor& z_given, const at::Tensor& centroids_given, double nu) {
    element_type(kOp, "z", z_given);
    element_type(kOp, "centroids", centroids_given);
    const at::ScalarType type =
        z_given.scalar_type() == centroids_given.scalar_type() ? z_given.scalar_type() : at::kFloat;
    z = z_given.detach().to(type).contiguous();
    centroids = centroids_given.detach().to(type).contiguous();
    rounded = at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::MEDIUM;
    // The lower median of every feature. at::median is not deterministic on CUDA, and torch can be told to refuse it.
    if (is_wide()) origin = std::get<0>(at::sort(centroids, 0)).select(0, (centroids.size(0) - 1) / 2).contiguous();
    const int splits = two_splits() ? 2 : 1;
    rows = prepare(z, origin, splits, true);
    mu = prepare(centroids, origin, splits, true);
    // The rounding of a product, against what may be lost of nu + distance: 2^-21, 2^-11 and (exact splits) 2^-23.
    const float share = two_splits() ? 1.f / 8 : is_wide() ? 1.f / 16 : 1.f / 1024;
    distances = {rows.view,
                 mu.view,
                 rows.squares.const_data_ptr<float>(),
                 mu.squares.const_data_ptr<float>(),
                 z.const_data_ptr(),
                 centroids.const_data_ptr(),
                 element_type(kOp, "z", z),
                 static_cast<int>(z.size(1)),
                 static_cast<float>(nu),
                 share};
  }

  bool is_wide() const { return z.scalar_type() == at::kFloat; }
  bool two_splits() const { return is_wide() && !rounded; }
  // bfloat16 holds bfloat16 rows in one split, all others in two.
  PreparedMatrix weighed(const at::Tensor& x) const {
    const bool one_split = x.scalar_type() == at::kBFloat16 || (is_wide() && rounded);
    return prepare(x, origin, one_split ? 1 : 2, false);
  }
};

at::Tensor workspace(int64_t bytes, const at::Tensor& like) {
  if (bytes < 0) check_launch(kOp, static_cast<int>(-bytes));
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

using ClusterKlOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ClusterKlOutputs cluster_kl_cuda(const Arguments& arguments) {
  const ClusterInputs in = cluster_inputs(arguments);
  const at::Tensor& z = in.z;
  const int64_t cached_rows = arguments.integer("cached_rows");
  const bool return_q = arguments.flag("return_q"), return_assignments = arguments.flag("return_assignments");
  const ClusterSizes sizes = check_cluster_kl(in, cached_rows);
  const c10::DeviceGuard guard(z.device());
  const CudaProblem problem(z, in.centroids, in.nu);
  const at::TensorOptions wide = z.options().dtype(at::kFloat);
  const int64_t n = sizes.n, k = sizes.k;
  at::Tensor loss = at::empty({n}, wide), mass = at::empty({k}, wide), stats = at::empty({kStats, n}, wide);
  at::Tensor distances = at::empty({cached_rows, k}, wide), q = at::empty({return_q ? n : 0, k}, wide);
  at::Tensor assignments = at::empty({return_assignments ? n : 0}, wide.dtype(at::kLong));
  ClusterKlParams params{};
  params.in = problem.distances;
  params.loss = loss.mutable_data_ptr<float>();
  params.mass = mass.mutable_data_ptr<float>();
  params.stats = stats.mutable_data_ptr<float>();
  params.distances = distances.mutable_data_ptr<float>();
  params.cached_rows = cached_rows;
  params.q = return_q ? q.mutable_data_ptr<float>() : nullptr;
  params.assignments = return_assignments ? assignments.mutable_data_ptr<int64_t>() : nullptr;
  const at::Tensor space = workspace(ltood_cluster_kl_workspace(&params), z);
  params.workspace = space.mutable_data_ptr();
  check_launch(kOp, ltood_launch_cluster_kl(&params, current_stream(z)));
  return {loss, mass, stats, distances, q, assignments};
}

std::tuple<at::Tensor, at::Tensor> cluster_kl_bwd_cuda(const Arguments& arguments) {
  const ClusterInputs in = cluster_inputs(arguments);
  const ClusterSaved saved = cluster_saved(arguments);
  const ClusterSizes sizes = check_cluster_kl(in, 0);
  check_cluster_kl_bwd(sizes, saved, kStats);
  const at::Tensor &z = in.z, &mass = saved.mass;
  LTOOD_CHECK_TYPE(mass.scalar_type() == at::kFloat, kOp, "mass", "float32 on CUDA", mass.scalar_type());
  const c10::DeviceGuard guard(z.device());
  const CudaProblem problem(z, in.centroids, in.nu);
  const PreparedMatrix z_splits = problem.weighed(problem.z), mu_splits = problem.weighed(problem.centroids);
  const at::Tensor grad = saved.grad_loss.detach().to(at::kFloat).contiguous();
  at::Tensor grad_z = at::empty({saved.need_z ? sizes.n : 0, sizes.d}, problem.z.options());
  at::Tensor grad_mu = at::empty({saved.need_centroids ? sizes.k : 0, sizes.d}, mass.options());
  ClusterKlBwdParams params{};
  params.in = problem.distances;
  params.grad_loss = grad.const_data_ptr<float>();
  params.mass = mass.const_data_ptr<float>();
  params.stats = saved.stats.const_data_ptr<float>();
  params.origin = problem.origin ? problem.origin->const_data_ptr<float>() : nullptr;
  params.z_splits = z_splits.view;
  params.mu_splits = mu_splits.view;
  params.weight_splits = problem.two_splits() ? 2 : 1;
  params.grad_z = saved.need_z ? grad_z.mutable_data_ptr() : nullptr;
  params.grad_mu = saved.need_centroids ? grad_mu.mutable_data_ptr<float>() : nullptr;
  params.chunk_rows = ltood_cluster_kl_chunk_rows(sizes.n, sizes.k, params.weight_splits);
  const at::Tensor space = workspace(ltood_cluster_kl_bwd_workspace(&params), z);
  params.workspace = space.mutable_data_ptr();
  check_launch(kOp, ltood_launch_cluster_kl_bwd(&params, current_stream(z)));
  return {grad_z.to(z.scalar_type()), grad_mu.to(in.centroids.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(ltood_fast, CUDA, m) {
  m.impl("cluster_kl", by_name<cluster_kl_cuda>());
  m.impl("cluster_kl_bwd", by_name<cluster_kl_bwd_cuda>());
}

}  // namespace ltood::cluster_kl
