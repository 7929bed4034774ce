// Row kernels of a partial problem of the guided family, one warp a row: what cuda/fwd.cuh and
// cuda/bwd.cuh, whose tiles serve it too, leave for guided_partial and guided_partial_bwd. With N'(i) = the
// columns of out(i) (all of them in a pass with `every`), V(i) the other views among the columns, G_ij = dL/ds_ij:
//
//   lse = log( sum_{N'(i)} w-_ij exp(s_ij) + sum_{V(i)} (1 - [v in N'(i)] w-_iv) exp(s_iv) )
//   weight, positive_logit = sum_{V(i)} w+_iv, sum_{V(i)} w+_iv s_iv
//   excess, gap = sum_j p_ij (t_ij - s_ij), sum_j exp(s_ij) / sum_j exp(t_ij) - 1
//   grad_unit = (1/tau) sum_j (G_ij + G_ji) u_j
//
// Tile: none, as in rows.cuh: n (k_splits + views) reads of a row's sums or D + Dg features, against the
// 2 n M (D + Dg) FLOP of the tiles. Bytes: the operands hold M + n rows, sums and gradients n. Expected limiter: device
// memory. Not yet verified on hardware.
#pragma once

#include "ops/guided/cuda/rows.cuh"

namespace ltood::guided {

// A row whose negatives are not all columns has no sum in a pass with `every`, which repeats no positives.
template <typename half_t>
__device__ __forceinline__ void partial_epilogue_contrast(const GuidedParams& p, int position) {
  const int64_t row = row_at(p, position) - p.first;
  const bool counts = !p.every || p.every[row];
  const ContrastSums sums = counts ? contrast_sums<half_t>(p, position) : ContrastSums{};
  if (threadIdx.x % 32 != 0) return;
  p.lse[row] = counts ? sums.total.log2() * prim::kLn2 : -INFINITY;
  if (!p.weight) return;
  p.weight[row] = sums.weight;
  p.positive_logit[row] = sums.positive_logit * prim::kLn2;
}

// excess and gap as shares of the teacher's sum, in nats: with the log-sums they combine with those of other columns.
__device__ __forceinline__ void partial_epilogue_distill(const GuidedParams& p, int position) {
  const DistillSums sums(p, position);
  if (threadIdx.x % 32 != 0) return;
  const int64_t row = row_at(p, position) - p.first;
  const bool empty = sums.teacher.sum == 0;
  const double teacher = sums.teacher.sum;
  p.student_lse[row] = sums.student.log2() * prim::kLn2;
  p.teacher_lse[row] = sums.teacher.log2() * prim::kLn2;
  p.excess[row] = empty ? 0 : sums.excess / teacher * prim::kLn2;
  p.gap[row] = empty ? 0 : sums.gap / teacher;
}

template <typename half_t>
__global__ void __launch_bounds__(32 * kRowWarps) guided_partial_epilogue_kernel(GuidedParams p) {
  const int position = p.first + blockIdx.x * kRowWarps + threadIdx.x / 32;
  if (position >= p.n) return;
  if (p.contrast) partial_epilogue_contrast<half_t>(p, position);
  if (p.distill) partial_epilogue_distill(p, position);
}

template <typename half_t>
__global__ void __launch_bounds__(32 * kRowWarps) guided_partial_bwd_epilogue_kernel(GuidedParams p) {
  const int position = p.first + blockIdx.x * kRowWarps + threadIdx.x / 32;
  if (position >= p.n) return;
  const float* gradient = collect_gradient<half_t>(p, position);
  const float inv_tau = p.temperature ? 1.f / *p.temperature : p.inv_tau;
  float* to = p.grad_unit + (row_at(p, position) - p.first) * p.d;
  for (int feature = threadIdx.x % 32 * 2; feature < p.d; feature += 64) {
    to[feature] = gradient[feature] * inv_tau;
    if (feature + 1 < p.d) to[feature + 1] = gradient[feature + 1] * inv_tau;
  }
}

}  // namespace ltood::guided
