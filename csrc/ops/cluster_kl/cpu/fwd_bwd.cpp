// cluster_kl on the CPU: panels of rows against all centroids.
//
// The forward: pass 1 assigns the rows and sums the mass of the clusters, pass 2 needs that mass for target and
// loss. PanelBackward: the weights of a panel give grad_z = W mu - (W 1) z and grad_centroids += W' z - (W' 1) mu.
// Distances of the first `cached_rows` rows are computed once and kept for pass 2 and the backward; all others are
// computed again each time. Results do not depend on the number of threads: the rows are dealt to a number of workers
// that follows from the sizes alone, and their sums are added in the workers' order.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/median.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "common/dispatch.h"
#include "common/gemm.h"
#include "common/tile_schedule.h"
#include "ops/cluster_kl/cluster_kl.h"
#include "ops/cluster_kl/cpu/tile.h"

namespace ltood::cluster_kl {
namespace {

constexpr int64_t kPanelElements = 32 * 1024;  // of a panel's rows or distances: 128 KiB in fp32, three fit in L2
constexpr int64_t kMaxWorkers = 64;            // as many threads find work
constexpr int64_t kPartialElements = 4 * 1024 * 1024;  // of the workers' grad_centroids: at most 16 MiB in fp32

struct Rows {
  int64_t first, count;
};

// How the rows are cut, from the sizes alone.
struct PanelPlan {
  int64_t n, panel, n_panels, workers;

  explicit PanelPlan(const ClusterSizes& s) : n(s.n) {
    panel = std::clamp<int64_t>(kPanelElements / std::max(s.k, s.d) / 16 * 16, 16, 512);
    n_panels = (n + panel - 1) / panel;
    workers = std::min(std::clamp<int64_t>(kPartialElements / (s.k * s.d), 4, kMaxWorkers), n_panels);
  }

  // Calls body(worker, rows, scratch) for all panels; a worker's panels come one after another.
  template <typename Scratch, typename Body>
  void for_each_panel(const Scratch& prototype, const Body& body) const {
    run_parallel(workers, [&](int64_t w) {
      Scratch scratch = prototype.fresh();
      for (int64_t b = n_panels * w / workers; b < n_panels * (w + 1) / workers; ++b) {
        body(w, Rows{b * panel, std::min(panel, n - b * panel)}, scratch);
      }
    });
  }
};

template <typename T>
T* data(const at::Tensor& x) {
  return x.mutable_data_ptr<T>();
}

// The inputs as every panel reads them: in the wide dtype, around an origin that makes the norms small. Distances do
// not change with the origin; the median keeps one far centroid from taking it away from all others.
struct CpuProblem {
  ClusterSizes sizes;
  PanelPlan plan;
  double nu;
  at::TensorOptions wide;
  at::Tensor z, origin, mu, mu_transposed, mu_norms;

  template <typename T>
  static CpuProblem make(const ClusterSizes& sizes, const at::Tensor& z, const at::Tensor& centroids, double nu, T) {
    const auto wide = z.options().dtype(c10::CppTypeToScalarType<T>::value);
    at::Tensor mu = at::empty({sizes.k, sizes.d}, wide).copy_(centroids.detach());
    at::Tensor origin = std::get<0>(at::median(mu, 0)).contiguous();
    at::Tensor mu_norms = at::empty({sizes.k}, wide);
    center_rows(data<T>(mu), data<T>(origin), data<T>(mu_norms), sizes.k, sizes.d);
    return {sizes, PanelPlan(sizes), nu, wide, z.detach(), origin, mu, mu.t().contiguous(), mu_norms};
  }
};

// A thread's scratch for one panel at a time.
template <typename T>
struct Panel {
  const CpuProblem& p;
  at::Tensor x, norms, tile, weights, row_sums, row, sums;

  explicit Panel(const CpuProblem& problem) : p(problem) {}

  Panel fresh() const {
    Panel b(p);
    b.x = at::empty({p.plan.panel, p.sizes.d}, p.wide);
    b.norms = at::empty({p.plan.panel}, p.wide);
    b.tile = at::empty({p.plan.panel, p.sizes.k}, p.wide);
    b.weights = at::empty_like(b.tile);
    b.row_sums = at::empty({p.plan.panel}, p.wide);
    b.row = at::empty({p.sizes.k}, p.wide);
    b.sums = at::zeros({p.sizes.k}, p.wide);
    return b;
  }

  void load(Rows rows) {
    x.narrow(0, 0, rows.count).copy_(p.z.narrow(0, rows.first, rows.count));
    center_rows(data<T>(x), data<T>(p.origin), data<T>(norms), rows.count, p.sizes.d);
  }

  static bool cached(Rows rows, const at::Tensor& cache) { return rows.first + rows.count <= cache.size(0); }

  // Distances of the loaded rows, into the cache where they have a place in it.
  T* compute(Rows rows, const at::Tensor& cache) {
    at::Tensor out = cached(rows, cache) ? cache.narrow(0, rows.first, rows.count) : tile.narrow(0, 0, rows.count);
    const int64_t k = p.sizes.k, d = p.sizes.d;
    multiply(rows.count, k, d, {data<T>(x), d}, {data<T>(p.mu_transposed), k}, {data<T>(out), k}, false);
    squared_distances(data<T>(out), data<T>(x), data<T>(norms), data<T>(p.mu), data<T>(p.mu_norms), rows.count, k, d,
                      p.nu);
    return data<T>(out);
  }

  // Distances of rows that pass 1 has seen. loaded: x holds the rows already.
  const T* recall(Rows rows, const at::Tensor& cache, bool loaded) {
    if (cached(rows, cache)) return data<T>(cache) + rows.first * p.sizes.k;
    if (!loaded) load(rows);
    return compute(rows, cache);
  }
};

template <typename T>
RowStats<T> stats_at(const at::Tensor& stats, int64_t row) {
  T* first = data<T>(stats) + row;
  const int64_t n = stats.size(1);
  return {first, first + n, first + 2 * n};
}

// partial[w] += panel sums, in float64; the panel's sums start again at 0.
template <typename T>
void flush(const at::Tensor& partial, int64_t worker, T* sums) {
  const int64_t k = partial.size(1);
  double* row = data<double>(partial) + worker * k;
  for (int64_t j = 0; j < k; ++j) {
    row[j] += sums[j];
    sums[j] = 0;
  }
}

// [K] in the wide dtype from [workers, K].
template <typename T>
at::Tensor add_in_order(const at::Tensor& partial, const at::TensorOptions& wide) {
  at::Tensor total = partial[0].clone();
  for (int64_t w = 1; w < partial.size(0); ++w) total.add_(partial[w]);
  return total.to(wide.dtype());
}

template <typename T>
at::Tensor inverse(const at::Tensor& mass) {
  at::Tensor result = at::empty_like(mass);
  for (int64_t j = 0; j < mass.numel(); ++j) {
    const T f = data<T>(mass)[j];
    data<T>(result)[j] = f == 0 ? 0 : 1 / f;  // a mass that underflowed belongs to no row
  }
  return result;
}

template <typename T>
at::Tensor assign(const CpuProblem& p, const at::Tensor& stats, const at::Tensor& cache,
                  const at::Tensor& assignments) {
  at::Tensor partial = at::zeros({p.plan.workers, p.sizes.k}, p.wide.dtype(at::kDouble));
  p.plan.for_each_panel(Panel<T>(p), [&](int64_t worker, Rows rows, Panel<T>& b) {
    b.load(rows);
    const T* tile = b.compute(rows, cache);
    assign_rows(tile, stats_at<T>(stats, rows.first), data<T>(b.sums), data<T>(b.row), rows.count, p.sizes.k, p.nu);
    flush(partial, worker, data<T>(b.sums));
    if (assignments.numel()) nearest_columns(tile, data<int64_t>(assignments) + rows.first, rows.count, p.sizes.k);
  });
  return add_in_order<T>(partial, p.wide);
}

using ClusterKlOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct ClusterOptions {
  int64_t cached_rows = 0;
  bool return_q = false, return_assignments = false;
};

template <typename T>
ClusterKlOutputs forward(const ClusterInputs& in, const ClusterSizes& sizes, const ClusterOptions& options) {
  const CpuProblem p = CpuProblem::make(sizes, in.z, in.centroids, in.nu, T{});
  const int64_t n = sizes.n, k = sizes.k, cached_rows = options.cached_rows;
  at::Tensor loss = at::empty({n}, p.wide), stats = at::empty({3, n}, p.wide),
             cache = at::empty({cached_rows, k}, p.wide);
  at::Tensor q = at::empty({options.return_q ? n : 0, k}, p.wide);
  at::Tensor assignments = at::empty({options.return_assignments ? n : 0}, p.wide.dtype(at::kLong));
  cache.narrow(0, cached_rows / p.plan.panel * p.plan.panel, cached_rows % p.plan.panel).zero_();
  const at::Tensor mass = assign<T>(p, stats, cache, assignments), inverse_mass = inverse<T>(mass);
  p.plan.for_each_panel(Panel<T>(p), [&](int64_t, Rows rows, Panel<T>& b) {
    const T* tile = b.recall(rows, cache, false);
    T* q_rows = options.return_q ? data<T>(q) + rows.first * k : data<T>(b.row);
    row_losses(tile, stats_at<T>(stats, rows.first), data<T>(inverse_mass), data<T>(loss) + rows.first, q_rows,
               options.return_q ? k : 0, rows.count, k, in.nu);
  });
  return {loss, mass, stats, cache, q, assignments};
}

// Whether some number of `computed` is not finite though the rows and the centroids are: float has overflown.
bool overflows(const at::Tensor& computed, const ClusterInputs& in) {
  const auto finite = [](const at::Tensor& x) { return x.isfinite().all().item<bool>(); };
  return computed.scalar_type() == at::kFloat && !finite(computed) && finite(in.z) && finite(in.centroids);
}

ClusterKlOutputs cluster_kl_cpu(const Arguments& arguments) {
  const ClusterInputs in = cluster_inputs(arguments);
  ClusterOptions options{arguments.integer("cached_rows"), arguments.flag("return_q"),
                         arguments.flag("return_assignments")};
  const ClusterSizes sizes = check_cluster_kl(in, options.cached_rows);
  const at::ScalarType dtype = c10::promoteTypes(in.z.scalar_type(), in.centroids.scalar_type());
  ClusterKlOutputs outputs =
      dispatch_wide(dtype, [&](auto zero) { return forward<decltype(zero)>(in, sizes, options); });
  if (!overflows(std::get<0>(outputs), in)) return outputs;
  // Squared distances beyond 3e38. The statistics would not fit in float: NaN tells the backward to compute them again.
  auto& [loss, mass, stats, cache, q, assignments] = outputs;
  options.cached_rows = 0;
  const auto [loss64, mass64, stats64, no_cache, q64, assignments64] = forward<double>(in, sizes, options);
  stats.fill_(std::numeric_limits<double>::quiet_NaN());
  return {loss64.to(at::kFloat), mass64.to(at::kFloat), stats, cache, q64.to(at::kFloat), assignments64};
}

// The parts of the backward that the workers share.
template <typename T>
struct PanelBackward {
  const CpuProblem& p;
  at::Tensor grad_loss, inverse_mass, stats, cache;
  at::Tensor grad_z;                // [N, D] in the dtype of z, or [0, D]
  at::Tensor partial, column_sums;  // [workers, K, D], [workers, K]; or [0, ...]

  void panel(int64_t worker, Rows rows, Panel<T>& b) const {
    const int64_t k = p.sizes.k, d = p.sizes.d;
    b.load(rows);
    const T* tile = b.recall(rows, cache, true);
    at::Tensor weights = b.weights.narrow(0, 0, rows.count), x = b.x.narrow(0, 0, rows.count);
    descent_weights(data<T>(weights), tile, stats_at<T>(stats, rows.first), data<T>(inverse_mass),
                    data<T>(grad_loss) + rows.first, data<T>(b.row_sums), data<T>(b.sums), rows.count, k, p.nu);
    if (partial.numel()) {
      // The distances have served: their place takes W', which the product reads row by row.
      at::Tensor transposed = b.tile.view({k, p.plan.panel}).narrow(1, 0, rows.count);
      transposed.copy_(weights.t());
      multiply(k, d, rows.count, {data<T>(transposed), p.plan.panel}, {data<T>(x), d},
               {data<T>(partial) + worker * k * d, d}, true);
      flush(column_sums, worker, data<T>(b.sums));
    }
    if (grad_z.numel()) {
      at::Tensor out = grad_z.narrow(0, rows.first, rows.count);
      at::Tensor wide = grad_z.scalar_type() == x.scalar_type() ? out : at::empty_like(x);
      multiply(rows.count, d, k, {data<T>(weights), k}, {data<T>(p.mu), d}, {data<T>(wide), d}, false);
      subtract_scaled_rows(data<T>(wide), data<T>(b.row_sums), data<T>(x), rows.count, d);
      if (!wide.is_same(out)) out.copy_(wide);
    }
  }

  at::Tensor grad_centroids(at::ScalarType dtype) const {
    if (!partial.numel()) return at::empty({0, p.sizes.d}, p.wide.dtype(dtype));
    at::Tensor total = partial[0];
    for (int64_t w = 1; w < partial.size(0); ++w) total.add_(partial[w]);
    const at::Tensor sums = add_in_order<T>(column_sums, p.wide);
    subtract_scaled_rows(data<T>(total), data<T>(sums), data<T>(p.mu), p.sizes.k, p.sizes.d);
    return at::empty_like(total, p.wide.dtype(dtype)).copy_(total);
  }
};

template <typename T>
std::tuple<at::Tensor, at::Tensor> backward(const ClusterInputs& in, const ClusterSizes& sizes,
                                            const ClusterSaved& saved) {
  const CpuProblem p = CpuProblem::make(sizes, in.z, in.centroids, in.nu, T{});
  const int64_t workers = saved.need_centroids ? p.plan.workers : 0;
  PanelBackward<T> backward{p};
  backward.grad_loss = saved.grad_loss.detach().to(p.wide.dtype()).contiguous();
  backward.inverse_mass = inverse<T>(saved.mass);
  backward.stats = saved.stats;
  backward.cache = saved.distances;
  backward.grad_z = at::empty({saved.need_z ? sizes.n : 0, sizes.d}, in.z.options());
  backward.partial = at::zeros({workers, sizes.k, sizes.d}, p.wide);
  backward.column_sums = at::zeros({workers, sizes.k}, p.wide.dtype(at::kDouble));
  p.plan.for_each_panel(Panel<T>(p), [&](int64_t worker, Rows rows, Panel<T>& b) { backward.panel(worker, rows, b); });
  return {backward.grad_z, backward.grad_centroids(in.centroids.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor> cluster_kl_bwd_cpu(const Arguments& arguments) {
  const ClusterInputs in = cluster_inputs(arguments);
  ClusterSaved saved = cluster_saved(arguments);
  const ClusterSizes sizes = check_cluster_kl(in, 0);
  check_cluster_kl_bwd(sizes, saved);
  if (overflows(saved.stats, in)) {
    const auto [loss, mass, stats, cache, q, assignments] = forward<double>(in, sizes, {});
    saved.mass = mass, saved.stats = stats, saved.distances = cache;
  }
  return dispatch_wide(saved.mass.scalar_type(), [&](auto zero) { return backward<decltype(zero)>(in, sizes, saved); });
}

}  // namespace

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) {
  m.impl("cluster_kl", by_name<cluster_kl_cpu>());
  m.impl("cluster_kl_bwd", by_name<cluster_kl_bwd_cpu>());
}

}  // namespace ltood::cluster_kl
