// Row kernels of the guided family, one warp a row: positives, which are few, and what follows from the tiles' sums.
// O(N (k + views) (D + Dg)) reads, negligible next to the tiles; a row that is the neighbour of very many takes long.
#pragma once

#include <type_traits>

#include "cuda/primitives/mma.cuh"
#include "ops/guided/cuda/plan.cuh"
#include "ops/guided/cuda/tile.cuh"

namespace ltood::guided {

constexpr int kRowWarps = 4;

__device__ __forceinline__ float2 to_floats(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ __forceinline__ float2 to_floats(__half2 pair) { return __half22float2(pair); }

// Two neighbouring features of a row, without its scale.
template <typename half_t>
__device__ __forceinline__ float2 feature_pair(const Operand& x, int64_t row, int feature) {
  using pair_t = std::conditional_t<std::is_same_v<half_t, __half>, __half2, __nv_bfloat162>;
  const int width = kKTile * x.k_tiles;
  const half_t* at = static_cast<const half_t*>(x.data) + row * width + feature;
  float2 pair = to_floats(*reinterpret_cast<const pair_t*>(at));
  if (x.splits == 2) {
    const float2 low = to_floats(*reinterpret_cast<const pair_t*>(at + int64_t(x.rows) * width));
    pair.x += low.x;
    pair.y += low.y;
  }
  return pair;
}

__device__ __forceinline__ float2& pair_at(float* features, int feature) {
  return *reinterpret_cast<float2*>(features + feature);
}

// <x_i, x_j>, the same bits in every lane and for (j, i).
template <typename half_t>
__device__ __forceinline__ float dot_rows(const Operand& x, int i, int j) {
  float sum = 0;
  for (int feature = threadIdx.x % 32 * 2; feature < kKTile * x.k_tiles; feature += 64) {
    const float2 a = feature_pair<half_t>(x, i, feature), b = feature_pair<half_t>(x, j, feature);
    sum += a.x * b.x + a.y * b.y;
  }
  return prim::warp_sum(sum) * (x.scale[i] * x.scale[j]);
}

// What draws row i to its positive: s in base 2, and the forces.
struct WarpPositivePair {
  float s, attract, repel;
};

template <typename half_t>
__device__ __forceinline__ WarpPositivePair positive_pair(const GuidedParams& p, int i, int j, float scale) {
  const float cos = p.weighted ? dot_rows<half_t>(p.e, i, j) : 0.f;
  return {dot_rows<half_t>(p.z, i, j) * scale, force_of(p, cos), force_of(p, -cos)};
}

// The share of exp(s_ij) that the tiles have left out of row i's sum: all of it, or, where j lies among the negatives
// and was added with its repulsion, the rest. Both splits are positive: nothing cancels.
__device__ __forceinline__ float missing_share(bool among_negatives, const WarpPositivePair& pair) {
  return among_negatives ? 1.f - pair.repel : 1.f;
}

// Whether column j is among row i's negatives, and whether row i is among column j's, from the spans of row i.
__device__ __forceinline__ bool repels(const GuidedSpans& spans, int j) {
  return spans.out_begin <= j && j < spans.out_end;
}
__device__ __forceinline__ bool is_repelled(const GuidedParams& p, const GuidedSpans& spans, int j) {
  return p.fallback[j] || (spans.in_begin <= j && j < spans.in_end);
}

// body(j) for the columns of the same image but for the row's own.
template <typename Body>
__device__ __forceinline__ void for_each_other_view(const GuidedParams& p, int i, Body body) {
  const int self = own_column(p, i);
  for_each_view(p, i, [&](int view) {
    if (view != self) body(view);
  });
}

// body(j) for the positions P(i).
template <typename Body>
__device__ __forceinline__ void for_each_positive(const GuidedParams& p, int i, Body body) {
  for_each_other_view(p, i, body);
  for (int s = 0; s < p.k; ++s) {
    const int64_t j = p.neighbor_at[int64_t(i) * p.k + s];
    if (j >= 0) body(static_cast<int>(j));
  }
}

struct WarpExpSum {
  float max = -INFINITY, sum = 0;

  __device__ __forceinline__ float add(float other_max, float other) {
    const float grown = raise(max, other_max);
    const float factor = other_max == max ? 1.f : prim::exp2_fast(other_max - max);
    sum = sum * grown + other * factor;
    return factor;
  }
  // In two numbers, as their sum in one float loses digits of the second.
  __device__ __forceinline__ double log2() const {
    return sum == 0 ? -INFINITY : static_cast<double>(max) + static_cast<double>(log2f(sum));
  }
};

// What a tile has left for a row in one share of the columns.
struct TileSums {
  const float* sums;
  int stride;

  __device__ __forceinline__ TileSums(const GuidedParams& p, int k_split, int position)
      : sums(p.sums + size_t(k_split) * kGuidedSums * (p.padded - p.first) + position - p.first),
        stride(p.padded - p.first) {}

  __device__ __forceinline__ float of(GuidedSum field) const { return sums[size_t(field) * stride]; }
};

// A row's sum over negatives and positives, and the logits of the positives, in base 2.
struct ContrastSums {
  WarpExpSum total;
  float weight = 0, positive_logit = 0;
};

template <typename half_t>
__device__ __forceinline__ ContrastSums contrast_sums(const GuidedParams& p, int position) {
  const GuidedSpans spans = p.spans[position];
  const float scale = exponent_scale(p.inv_tau, p.temperature);
  ContrastSums sums;
  for (int k_split = 0; k_split < p.k_splits; ++k_split) {
    const TileSums tiles(p, k_split, position);
    sums.total.add(tiles.of(kNegativeMax), tiles.of(kNegativeSum));
  }
  for_each_positive(p, position, [&](int j) {
    const WarpPositivePair pair = positive_pair<half_t>(p, position, j, scale);
    sums.total.add(pair.s, missing_share(repels(spans, j), pair));
    sums.weight += pair.attract;
    sums.positive_logit += pair.attract * pair.s;
  });
  return sums;
}

template <typename half_t>
__device__ __forceinline__ void contrast_epilogue(const GuidedParams& p, int position) {
  const ContrastSums sums = contrast_sums<half_t>(p, position);
  if (threadIdx.x % 32 != 0) return;
  const int64_t row = row_at(p, position);
  const double lse = sums.total.log2(), positive_logit = static_cast<double>(sums.positive_logit / sums.weight);
  p.loss[row] = sums.weight == 0 ? 0.f : static_cast<float>((lse - positive_logit) * prim::kLn2);
  p.weight[row] = sums.weight;
  p.lse[row] = lse * prim::kLn2;
}

// Both softmaxes of a row.
struct DistillSums {
  WarpExpSum student, teacher;
  float excess = 0, gap = 0;  // in units of 2^teacher.max

  __device__ __forceinline__ DistillSums(const GuidedParams& p, int position) {
    for (int k_split = 0; k_split < p.k_splits; ++k_split) {
      const TileSums tiles(p, k_split, position);
      student.add(tiles.of(kStudentMax), tiles.of(kStudentSum));
      const float before = teacher.max, factor = teacher.add(tiles.of(kTeacherMax), tiles.of(kTeacherSum));
      const float grown = before == teacher.max ? 1.f : prim::exp2_fast(before - teacher.max);
      excess = excess * grown + tiles.of(kExcess) * factor;
      gap = gap * grown + tiles.of(kGap) * factor;
    }
  }
};

__device__ __forceinline__ void distill_epilogue(const GuidedParams& p, int position) {
  const DistillSums sums(p, position);
  if (threadIdx.x % 32 != 0) return;
  const int64_t row = row_at(p, position);
  const double student = sums.student.log2(), teacher = sums.teacher.log2();
  const float ratio = sums.gap / sums.teacher.sum;
  const float difference = fabsf(ratio) < 0.5f ? log1pf(ratio) : static_cast<float>((student - teacher) * prim::kLn2);
  p.kl[row] = p.n == 1 ? 0.f : sums.excess / sums.teacher.sum * static_cast<float>(prim::kLn2) + difference;
  p.student_lse[row] = student * prim::kLn2;
  p.teacher_lse[row] = teacher * prim::kLn2;
}

template <typename half_t>
__global__ void __launch_bounds__(32 * kRowWarps) guided_forward_epilogue_kernel(GuidedParams p) {
  const int position = blockIdx.x * kRowWarps + threadIdx.x / 32;
  if (position >= p.n) return;
  if (p.contrast) contrast_epilogue<half_t>(p, position);
  if (p.distill) distill_epilogue(p, position);
}

// dL/ds_ij of the positive j of i, less what the tiles have counted.
__device__ __forceinline__ float positive_gradient(const GuidedParams& p, int i, bool among_negatives,
                                                   const WarpPositivePair& pair) {
  const auto field = [&](int f) { return p.fields[size_t(f) * p.padded + i]; };
  const float share = missing_share(among_negatives, pair) * prim::exp2_fast(pair.s - field(kLse));
  return field(kGradLse) * share - field(kPositiveGrad) * pair.attract;
}

// gradient [64 k_tiles] of row i += (G_ij + G_ji) u_j over the positives of i, and the rows whose neighbour i is.
template <typename half_t>
__device__ __forceinline__ void add_positives(const GuidedParams& p, int i, float* gradient) {
  const float scale = exponent_scale(p.inv_tau, p.temperature);
  const auto add = [&](int j, bool own, bool other) {
    const GuidedSpans& spans = p.spans[i];
    const WarpPositivePair pair = positive_pair<half_t>(p, i, j, scale);
    float coefficient = own ? positive_gradient(p, i, repels(spans, j), pair) : 0.f;
    if (other) coefficient += positive_gradient(p, j, is_repelled(p, spans, j), pair);
    coefficient *= p.z.scale[j];
    for (int feature = threadIdx.x % 32 * 2; feature < kKTile * p.z.k_tiles; feature += 64) {
      const float2 z = feature_pair<half_t>(p.z, j, feature);
      float2& sum = pair_at(gradient, feature);
      sum = {sum.x + coefficient * z.x, sum.y + coefficient * z.y};
    }
  };
  for_each_other_view(p, i, [&](int view) { add(view, true, true); });
  for (int s = 0; s < p.k; ++s) {
    const int64_t j = p.neighbor_at[int64_t(i) * p.k + s];
    if (j >= 0) add(static_cast<int>(j), true, false);
  }
  const int64_t entries = int64_t(p.n) * p.k;
  const Range callers = range_of(p.reverse_keys, entries, i, i + 1);
  for (int64_t at = callers.begin; at < callers.end; ++at) {
    add(static_cast<int>(p.reverse_order[at] / p.k), false, true);
  }
}

__device__ __forceinline__ void store(const GuidedParams& p, int64_t at, float value) {
  if (p.grad_type == kFloat32) {
    static_cast<float*>(p.grad_z)[at] = value;
  } else if (p.grad_type == kBFloat16) {
    static_cast<__nv_bfloat16*>(p.grad_z)[at] = prim::from_float<__nv_bfloat16>(value);
  } else {
    static_cast<__half*>(p.grad_z)[at] = prim::from_float<__half>(value);
  }
}

// The gradient of a unit row in units of tau, in place of its first share: the shares of the columns added up, and the
// positives.
template <typename half_t>
__device__ __forceinline__ float* collect_gradient(const GuidedParams& p, int position) {
  const int width = kKTile * p.z.k_tiles, rows = p.n - p.first;
  float* gradient = p.gradient + int64_t(position - p.first) * width;
  for (int feature = threadIdx.x % 32 * 2; feature < width; feature += 64) {
    float2 sum{0, 0};
    for (int k_split = 0; k_split < p.k_splits; ++k_split) {
      const float2 part = pair_at(gradient + int64_t(k_split) * rows * width, feature);
      sum = {sum.x + part.x, sum.y + part.y};
    }
    pair_at(gradient, feature) = sum;
  }
  if (p.contrast) add_positives<half_t>(p, position, gradient);
  return gradient;
}

// The way back through the normalisation:
// dz = (g - u <u, g>) / |z|. A row shorter than 1e-12 was divided by that and has no radial part. Seven blocks fit on
// an SM: 72 registers.
template <typename half_t>
__global__ void __launch_bounds__(32 * kRowWarps, 7) guided_backward_epilogue_kernel(GuidedParams p) {
  const int position = blockIdx.x * kRowWarps + threadIdx.x / 32, width = kKTile * p.z.k_tiles;
  if (position >= p.n) return;
  float* gradient = collect_gradient<half_t>(p, position);
  const float inv_tau = p.temperature ? 1.f / *p.temperature : p.inv_tau, scale = p.z.scale[position];
  float u_dot_du = 0;
  for (int feature = threadIdx.x % 32 * 2; feature < width; feature += 64) {
    const float2 z = feature_pair<half_t>(p.z, position, feature);
    const float2 g = pair_at(gradient, feature);
    u_dot_du += g.x * z.x + g.y * z.y;
  }
  u_dot_du = prim::warp_sum(u_dot_du) * scale * inv_tau;
  if (threadIdx.x % 32 == 0) p.u_dot_du[position] = u_dot_du;
  const float length = p.normalize ? p.inv_norm[position] : 1.f;
  const float radial = p.normalize && length < 1 / kNormEps ? u_dot_du * scale : 0.f;
  const int64_t to = row_at(p, position) * p.d;
  for (int feature = threadIdx.x % 32 * 2; feature < p.d; feature += 64) {
    const float2 z = feature_pair<half_t>(p.z, position, feature), g = pair_at(gradient, feature);
    store(p, to + feature, (g.x * inv_tau - radial * z.x) * length);
    if (feature + 1 < p.d) store(p, to + feature + 1, (g.y * inv_tau - radial * z.y) * length);
  }
}

}  // namespace ltood::guided
