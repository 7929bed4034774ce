// What the contrastive losses do a row at a time, on both sides of the tiles: a warp a row, O(N D) work and memory.
#pragma once

#include "cuda/operand.cuh"
#include "cuda/primitives/math.cuh"
#include "ops/contrastive/cuda/launch.h"
#include "ops/contrastive/cuda/lse_fwd.cuh"

namespace ltood::contrastive {

constexpr int kRowWarps = 4;

// How many rows are in row i's segment: a range of the sorted ids.
__device__ inline int segment_size(const SegmentView& segments, int n, int64_t id) {
  return static_cast<int>(prim::lower_bound(segments.sorted, n, id + 1) - prim::lower_bound(segments.sorted, n, id));
}

// One thread a row. The other row of a segment of two.
__global__ void contrastive_pairs_kernel(const SegmentPairs p) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.n) return;
  const int64_t id = p.ids[row];
  const int64_t low = prim::lower_bound(p.sorted, p.n, id);
  const bool two = low + 1 < p.n && p.sorted[low + 1] == id && (low + 2 == p.n || p.sorted[low + 2] != id);
  p.partner[row] = two ? static_cast<int>(p.order[low] + p.order[low + 1]) - row : -1;
}

struct Positives {
  float similarity;  // sum of <u_i, u_j>, not divided by tau
  double weight;
};

template <typename half_t>
__device__ float dot_rows(const Operand& u, int d, int row, int other) {
  float dot = 0;
  for (int j = threadIdx.x % 32; j < d; j += 32) dot += element<half_t>(u, row, j) * element<half_t>(u, other, j);
  return prim::warp_sum(dot);
}

// Row i's other views: row i + N / 2, or its segment without itself, <u_i, sum - u_i>.
template <typename half_t>
__device__ Positives segment_positives(const Operand& u, int d, const SegmentView& segments, int row) {
  const int lane = threadIdx.x % 32;
  float dot = 0;
  if (!segments.ids) {
    const int half = u.rows / 2, other = row < half ? row + half : row - half;
    return {dot_rows<half_t>(u, d, row, other), 1.0};
  }
  const int64_t id = segments.ids[row];
  for (int j = lane; j < d; j += 32) {
    const float x = element<half_t>(u, row, j);
    dot += x * (segments.sums[id * d + j] - x);
  }
  return {prim::warp_sum(dot), double(segment_size(segments, u.rows, id) - 1)};
}

// Row i's slots: the chunks of its own strip of row tiles, and the columns' slots of every strip up to its own.
struct SlotRange {
  int rows, cols;
  __device__ SlotRange(const TrianglePlan& plan, int row) {
    const int strip = row / kTile / plan.row_tiles;
    rows = (plan.tiles - strip * plan.row_tiles + plan.col_tiles - 1) / plan.col_tiles;
    cols = strip + 1;
  }
};

// lse_i in natural units, from the slots in a fixed order: lane by lane, then over the warp.
__device__ inline double row_lse(const ContrastiveForward& p, int row) {
  const SlotRange slots(p.plan, row);
  const bool online = p.exponents.online;
  const size_t n = p.u.rows;
  float max = minus_infinity();
  for (int s = threadIdx.x % 32; online && s < slots.rows + slots.cols; s += 32) {
    const bool of_rows = s < slots.rows;
    max = fmaxf(max, of_rows ? p.row_maxima[s * n + row] : p.col_maxima[(s - slots.rows) * n + row]);
  }
  max = prim::warp_max(max);
  const float base = max == minus_infinity() ? 0.f : max;
  double sum = 0;
  for (int s = threadIdx.x % 32; s < slots.rows + slots.cols; s += 32) {
    const bool of_rows = s < slots.rows;
    const size_t at = (of_rows ? s : s - slots.rows) * n + row;
    const float part = of_rows ? p.row_sums[at] : p.col_sums[at];
    const float part_max = online ? (of_rows ? p.row_maxima[at] : p.col_maxima[at]) : base;
    sum += double(part) * (online ? exp2f(part_max - base) : 1.f);
  }
  sum = prim::warp_sum(sum);
  const float shift = online ? base : tiles::exponent_scale(p.exponents.inv_tau, p.exponents.temperature);
  return log(sum) + shift * prim::kLn2;
}

__device__ inline Nearest row_nearest(const ContrastiveForward& p, int row) {
  const SlotRange slots(p.plan, row);
  Nearest best{minus_infinity(), -1};
  for (int s = threadIdx.x % 32; s < slots.rows + slots.cols; s += 32) {
    const size_t n = p.u.rows;
    const Nearest other = s < slots.rows ? p.row_nearest[s * n + row] : p.col_nearest[(s - slots.rows) * n + row];
    if (better(other, best)) best = other;
  }
  return warp_nearest<32, 1>(best);
}

// log(e^a + e^b).
__device__ inline double log_add(double a, double b) {
  const double high = fmax(a, b), low = fmin(a, b);
  if (isnan(a) || isnan(b)) return a + b;
  return isinf(low) || isinf(high) ? high : high + log1p(exp(low - high));
}

// A row's log-sum-exp, and its sole positive p: lse - s_p = log(1 + exp(rest - s_p)) keeps the digits of a small loss.
struct RowLse {
  double lse, rest;  // over all other rows; over those of the tiles
  double sole;       // s_p
  bool has_sole;

  // lse - similarity / (tau weight), 0 for rows without positives. `part`: whether p is a positive of this part.
  __device__ float loss(Positives positives, double inv_tau, bool part) const {
    if (!(positives.weight > 0)) return 0.f;
    const double mean = positives.similarity * inv_tau / positives.weight;
    if (!has_sole || !part) return static_cast<float>(lse - mean);
    const double gap = rest - sole, above = fmax(gap, 0.0) + log1p(exp(-fabs(gap)));
    return static_cast<float>(above + (positives.weight == 1 ? 0.0 : sole - mean));
  }
};

template <typename half_t>
__device__ RowLse add_sole_positive(const ContrastiveRows& p, double rest, int row, double inv_tau) {
  const int partner = sole_partner(p.tiles.pairs, row);
  if (partner < 0) return {rest, rest, 0, false};
  const double s = dot_rows<half_t>(p.u, p.d, row, partner) * inv_tau;
  return {log_add(rest, s), rest, s, true};
}

template <typename half_t>
__global__ void __launch_bounds__(32 * kRowWarps) contrastive_rows_kernel(const ContrastiveRows p) {
  const int row = blockIdx.x * kRowWarps + threadIdx.x / 32;
  if (row >= p.u.rows) return;
  const bool first = threadIdx.x % 32 == 0;
  const double inv_tau = p.exponents.temperature ? 1.0 / *p.exponents.temperature : double(p.exponents.inv_tau);
  const RowLse lse = add_sole_positive<half_t>(p, row_lse(p.tiles, row), row, inv_tau);
  if (first) p.lse[row] = lse.lse;
  if (p.has_views) {
    Positives positives = segment_positives<half_t>(p.u, p.d, p.instances, row);
    if (p.tiles.nearest) {
      const Nearest best = row_nearest(p.tiles, row);
      if (first) p.cosines[row] = best.value;
      if (first) p.indices[row] = best.index;
      __syncwarp();
    }
    const double lam = p.neighbor_weights ? p.neighbor_weights[row] : double(p.neighbor_weight);
    for (int64_t at = int64_t(row) * p.k; at < int64_t(row + 1) * p.k; ++at) {
      if (p.indices[at] < 0) continue;
      positives.similarity += static_cast<float>(lam) * p.cosines[at];
      positives.weight += lam;
    }
    if (first) p.instance_loss[row] = lse.loss(positives, inv_tau, /*part=*/true);
    if (first) p.instance_weight[row] = positives.weight;
  }
  if (p.classes.ids) {
    const Positives positives = segment_positives<half_t>(p.u, p.d, p.classes, row);
    if (first) p.class_loss[row] = lse.loss(positives, inv_tau, /*part=*/!p.has_views);
    if (first) p.class_weight[row] = positives.weight;
  }
}

// One thread a row.
__global__ void contrastive_row_gradients_kernel(const RowGradients p) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.n) return;
  double lse_grad = p.grad_lse ? p.grad_lse[row] : 0.0, positive_grad = 0, class_positive_grad = 0;
  if (p.grad_instance && p.instance_weight[row] > 0) {
    lse_grad += p.grad_instance[row];
    positive_grad = p.grad_instance[row] / p.instance_weight[row];
  }
  if (p.grad_class && p.class_weight[row] > 0) {
    lse_grad += p.grad_class[row];
    class_positive_grad = p.grad_class[row] / p.class_weight[row];
  }
  if (isinf(p.lse[row]) && p.lse[row] < 0) lse_grad = 0;  // no other row: nothing to repel
  const double lam = p.neighbor_weights ? p.neighbor_weights[row] : double(p.neighbor_weight);
  p.lse_grad[row] = static_cast<float>(lse_grad);
  p.instance_positive_grad[row] = static_cast<float>(positive_grad);
  p.neighbor_positive_grad[row] = static_cast<float>(lam * positive_grad);
  p.class_positive_grad[row] = static_cast<float>(class_positive_grad);
}

// float16 weights keep their digits near 1: they are carried in units of the largest / 2^13, so that G_ij scale_j, at
// most 2 * 2 in units of the largest, stays below 2^15.
__device__ inline float weight_unit(const float* largest) { return largest && *largest > 0 ? *largest / 8192.f : 1.f; }

__global__ void contrastive_factors_kernel(const ContrastiveFactors p) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= p.u.rows) return;
  const float scale = tiles::exponent_scale(p.exponents.inv_tau, p.exponents.temperature);
  const double lse2 = p.lse ? p.lse[row] / prim::kLn2 : 0.0;
  const bool alone = !p.lse || (isinf(lse2) && lse2 < 0);
  const float weight = alone ? 0.f : p.weight[row] / weight_unit(p.largest);
  const float shifted = alone ? 0.f : weight * static_cast<float>(exp2(double(scale) - lse2));
  const float lse2_float = alone ? 0.f : static_cast<float>(lse2);
  p.factors[row] = {p.u.scale[row], p.exponents.online ? weight : shifted, lse2_float, sole_partner(p.pairs, row)};
}

// Element j of grad_u_i, summed over the k_splits.
__device__ __forceinline__ float summed_lse_bwd(const ContrastiveLseBwd& p, int row, int j) {
  const size_t width = size_t(kKTile) * p.rows.k_tiles, k_split = p.rows.rows * width;
  float sum = 0;
  for (int s = 0; s < p.k_splits; ++s) sum += p.out[s * k_split + row * width + j];
  return sum;
}

__global__ void __launch_bounds__(32 * kRowWarps) contrastive_lse_bwd_combine_kernel(const ContrastiveLseBwdCombine p) {
  const int row = blockIdx.x * kRowWarps + threadIdx.x / 32;
  if (row >= p.lse_bwd.rows.rows) return;
  const Exponents& exponents = p.lse_bwd.exponents;
  const float inv_tau = exponents.temperature ? 1.f / *exponents.temperature : exponents.inv_tau;
  const float factor = weight_unit(p.largest) * inv_tau;
  for (int j = threadIdx.x % 32; j < p.d; j += 32)
    p.out[size_t(row) * p.d + j] = factor * summed_lse_bwd(p.lse_bwd, row, j);
}

// sum over the segment's other rows of (positive_grad_i + positive_grad_j) u_j, element j.
template <typename half_t>
__device__ __forceinline__ float segment_positive_grad(const ContrastiveBackward& p, const SegmentView& segments,
                                                       const float* grad_sums, int row, float u, int j) {
  const float positive_grad = grad_sums[row];
  if (!segments.ids) {
    const int half = p.u.rows / 2, other = row < half ? row + half : row - half;
    return (positive_grad + grad_sums[other]) * element<half_t>(p.u, other, j);
  }
  const size_t at = size_t(segments.ids[row]) * p.d + j;
  return positive_grad * (segments.sums[at] - u) + (segments.grad_sums[at] - positive_grad * u);
}

// neighbor_positive_grad_i times the sum of i's neighbours, and what the rows that chose i positive_grad.
template <typename half_t>
__device__ __forceinline__ float neighbor_positive_grad(const ContrastiveBackward& p, int row, int j) {
  const Operand& from = p.bank.data ? p.bank : p.u;
  float sum = 0;
  for (int64_t at = int64_t(row) * p.k; at < int64_t(row + 1) * p.k; ++at) {
    const int64_t m = p.indices[at];
    if (m >= 0 && m < from.rows) sum += element<half_t>(from, m, j);
  }
  return p.rows.neighbor_positive_grad[row] * sum + (p.chosen_sum ? p.chosen_sum[size_t(row) * p.d + j] : 0.f);
}

// -(dL/ds_ip + dL/ds_pi) of a row and its sole positive p: dL/ds_ip = w P_ip - g = g (P_ip - 1) + (w - g) P_ip.
template <typename half_t>
__device__ float sole_attraction(const ContrastiveBackward& p, int row, int partner, double inv_tau) {
  const double s = dot_rows<half_t>(p.u, p.d, row, partner) * inv_tau;
  const float* positive_grad = p.has_views ? p.rows.instance_positive_grad : p.rows.class_positive_grad;
  double attraction = 0;
  const int members[] = {row, partner};
  for (const int i : members) {
    const double log_share = s - p.rows.lse[i], g = positive_grad[i], w = p.rows.lse_grad[i];
    if (w == 0 && g == 0) continue;  // 0 of a softmax without a value
    attraction -= g * expm1(log_share) + (w - g) * exp(log_share);
  }
  return static_cast<float>(attraction);
}

// grad_u = (lse_bwd - grad_sums) / tau, summed over the k_splits, then through the normalisation:
//   grad_z = (grad_u - u <u, grad_u>) / |z|;   unnormalised rows, or rows shorter than eps: grad_z = grad_u * inv_norm.
template <typename half_t, typename out_t>
__global__ void __launch_bounds__(32 * kRowWarps) contrastive_epilogue_kernel(const ContrastiveBackward p) {
  const int row = blockIdx.x * kRowWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.u.rows) return;
  const float inv_tau = p.exponents.temperature ? 1.f / *p.exponents.temperature : p.exponents.inv_tau;
  const float unit = weight_unit(p.largest);
  float* line = p.lse_bwd.out + row * size_t(kKTile) * p.u.k_tiles;
  const int partner = sole_partner(p.pairs, row);
  const float attraction = partner < 0 ? 0.f : sole_attraction<half_t>(p, row, partner, inv_tau);
  const bool views = p.has_views && partner < 0, classes = p.classes.ids && (partner < 0 || p.has_views);
  float radial = 0;
  for (int j = lane; j < p.d; j += 32) {
    float grad = unit * summed_lse_bwd(p.lse_bwd, row, j);
    const float u = element<half_t>(p.u, row, j);
    if (partner >= 0) grad -= attraction * element<half_t>(p.u, partner, j);
    if (views) grad -= segment_positive_grad<half_t>(p, p.instances, p.rows.instance_positive_grad, row, u, j);
    if (p.k > 0) grad -= neighbor_positive_grad<half_t>(p, row, j);
    if (classes) grad -= segment_positive_grad<half_t>(p, p.classes, p.rows.class_positive_grad, row, u, j);
    grad *= inv_tau;
    line[j] = grad;
    radial += u * grad;
  }
  radial = prim::warp_sum(radial);
  const float inv_norm = p.inv_norm[row];
  const bool project = p.normalize && inv_norm < 1 / kNormEps;
  out_t* grad_z = static_cast<out_t*>(p.grad_z) + size_t(row) * p.d;
  for (int j = lane; j < p.d; j += 32) {
    const float tangent = line[j] - (project ? element<half_t>(p.u, row, j) * radial : 0.f);
    grad_z[j] = prim::from_float<out_t>(tangent * inv_norm);
  }
  if (lane > 0) return;
  float to_bank = 0;  // similarities to a bank have one row with a gradient, not two
  for (int64_t at = int64_t(row) * p.k; p.bank.data && at < int64_t(row + 1) * p.k; ++at) {
    if (p.indices[at] >= 0) to_bank += p.cosines[at];
  }
  p.u_dot_du[row] = radial - p.rows.neighbor_positive_grad[row] * to_bank * inv_tau;
}

}  // namespace ltood::contrastive
