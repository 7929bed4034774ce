// Student's t assignment of rows to centroids, its sharpened target, and the loss between them. Not yet verified on
// hardware.
//
//   d_ij = |z_i - mu_j|²
//   e_ij = ((nu + d_ij) / (nu + m_i))^-h,  h = (nu + 1) / 2,  m_i = min_j d_ij
//   q_ij = e_ij / sum_j e_ij,  f_j = sum_i q_ij
//   r_ij = p_ij / q_ij = (q_ij / f_j) / t_i,  t_i = sum_j q_ij² / f_j
//   l_i = sum_j q_ij r_ij log r_ij
//
// Three passes over the distances, each computing them anew, as f needs all totals and the loss needs f; N × K values
// never exist. With a = argmin_j d_ij and s_ij = (q_ij / f_j) / (q_ia / f_a), which is r_ij / r_ia, one pass gives
//
//   A_i = sum_j q_ij s_ij = 1 / r_ia,  t_i = A_i q_ia / f_a,  l_i = (sum_j q_ij s_ij log s_ij) / A_i - log A_i
//
// and r_ia - 1 = -(A_i - 1) / A_i without cancellation, which the gradient needs where q_ia is nearly 1.
//
//   pass      tile 128 × 64 (mainloop_sm80.cuh)         registers besides the tile
//   Assign    m_i, sum_j e_ij (online), a           4 a row
//   Mass      f_j: sums of columns, a warp at a time, persistent blocks, then added in a fixed order
//   Loss      t_i, l_i, q on request                4 a row
//   WeightPass   -2 grad_i dl_i/dd_ij in bfloat16 splits, the backward's operand; dl/dd = (p - q) h / (nu + d)
//
//   FLOP      2 N K D a pass (three times that in two splits), and 20 to 60 an element for the kernel
//   bytes     N D (K / 64 k_tiles of mu through L2) a pass; Mass 4 (blocks) K floats
//   limiter   tensor cores in two splits from D = 128 on; else the kernel's divisions and logarithms
//
// d = |z|² + |mu|² - 2 <z, mu> cancels where a row is near its centroid and both are far from the origin: such
// distances are summed again from the rows' differences, one at a time by the whole warp.
#pragma once

#include "cuda/mainloop_sm80.cuh"
#include "ops/cluster_kl/cuda/launch.h"

namespace ltood::cluster_kl {

using mainloop_sm80::at;
using mainloop_sm80::Fragments;
using mainloop_sm80::kBlockM;
using mainloop_sm80::kBlockN;
using mainloop_sm80::kNI;
using mainloop_sm80::kSlots;
using mainloop_sm80::kThreads;
using mainloop_sm80::kWarps;
using mainloop_sm80::slot_row;

struct PassParams {
  ClusterDistances in;
  float* loss;
  float* mass;
  float* stats;
  float* distances;
  int64_t cached_rows;
  float* q;
  int64_t* assignments;
  int* nearest;            // [N] a
  float* partial;          // [grid * kWarps, width] sums of columns
  int width;               // K, a multiple of 128
  int first_row, end_row;  // rows of the pass
  int tiles, range_tiles;  // of columns: all, and those of a block
  const float* grad_loss;
  Operand weights;  // [splits, end_row - first_row, width]
};

template <typename Body>
__device__ __forceinline__ void for_each_element(Body body) {
#pragma unroll
  for (int j = 0; j < kNI; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int s = 0; s < kSlots; ++s) body(s, j, e);
}

__device__ __forceinline__ float element(const void* rows, int type, size_t at) {
  if (type == kFloat32) return static_cast<const float*>(rows)[at];
  if (type == kBFloat16) return prim::to_float(static_cast<const __nv_bfloat16*>(rows)[at]);
  return prim::to_float(static_cast<const __half*>(rows)[at]);
}

// Turns a tile of products into squared distances; infinity beyond the last column.
struct Distances {
  const ClusterDistances& in;
  int first_row;  // of the warp
  float squares[kSlots], scale[kSlots];

  __device__ Distances(const ClusterDistances& in, int first_row) : in(in), first_row(first_row) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int row = first_row + slot_row(s);
      squares[s] = row < in.z.rows ? in.z_squares[row] : 0;
      scale[s] = row < in.z.rows ? in.z.scale[row] : 0;
    }
  }

  __device__ void operator()(Fragments& c, int first_column) const {
    uint64_t cancelled = 0;
#pragma unroll
    for (int j = 0; j < kNI; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = first_column + tiles::fragment_col(j, e);
        const bool inside = column < in.mu.rows;
        const float column_squares = inside ? in.mu_squares[column] : INFINITY;
        const float column_scale = inside ? in.mu.scale[column] : 0;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          const float sum = squares[s] + column_squares;
          const float distance = fmaf(-2.f, at(c, s, j, e) * scale[s] * column_scale, sum);
          if (inside && in.nu + distance < in.share * sum) cancelled |= uint64_t(1) << ((s * kNI + j) * 2 + e);
          at(c, s, j, e) = distance < 0 ? 0 : distance;
        }
      }
    sum_again(c, cancelled, first_column);
  }

  // One bit an element of this lane.
  __device__ void sum_again(Fragments& c, uint64_t cancelled, int first_column) const {
    const int lane = threadIdx.x % 32;
    while (const unsigned lanes = __ballot_sync(prim::kFullWarp, cancelled != 0)) {
      const int owner = __ffs(lanes) - 1;
      const int index = __shfl_sync(prim::kFullWarp, __ffsll(static_cast<long long>(cancelled)) - 1, owner);
      const int s = index / (2 * kNI), j = index / 2 % kNI;
      const int row = first_row + s * 8 + owner / 4, column = first_column + j * 8 + owner % 4 * 2 + index % 2;
      float sum = 0;
      for (int f = lane; f < in.d; f += 32) {
        const float difference = element(in.z_rows, in.type, size_t(row) * in.d + f) -
                                 element(in.mu_rows, in.type, size_t(column) * in.d + f);
        sum = fmaf(difference, difference, sum);
      }
      sum = prim::warp_sum(sum);
      for_each_element([&](int slot, int fragment, int e) {
        if (lane == owner && (slot * kNI + fragment) * 2 + e == index) at(c, slot, fragment, e) = sum;
      });
      if (lane == owner) cancelled &= cancelled - 1;
    }
  }
};

// e_ij, and h / (nu + d).
struct StudentT {
  float nu, h = 0.5f * (nu + 1);

  __device__ float weight(float distance, float nearest) const {
    if (nu == 1) return __fdividef(1 + nearest, 1 + distance);
    return expf(-h * log1p_positive((distance - nearest) * __fdividef(1, nu + nearest)));
  }
  // log (1 + v), v >= 0: the second term gives back what 1 + v lost of v.
  static __device__ float log1p_positive(float v) {
    if (v > 1e38f) v = 1e38f;
    const float w = 1 + v;
    return logf(w) + __fdividef(v - (w - 1), w);
  }
  __device__ float slope(float distance) const { return __fdividef(h, nu + distance); }
};

struct Assign {
  const PassParams& p;
  const StudentT kernel;
  int first_row;
  float nearest[kSlots], total[kSlots], own[kSlots];  // own: the least distance in this lane's columns
  int column[kSlots];

  __device__ Assign(const PassParams& p, int first_row) : p(p), kernel{p.in.nu}, first_row(first_row) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      nearest[s] = own[s] = INFINITY;
      total[s] = 0;
      column[s] = p.in.mu.rows;
    }
  }

  __device__ void use(Fragments& d, int first_column) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
#pragma unroll
      for (int j = 0; j < kNI; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (at(d, s, j, e) < own[s]) {
            own[s] = at(d, s, j, e);
            column[s] = first_column + tiles::fragment_col(j, e);
          }
        }
      const float least = -prim::warp_max<4>(-own[s]);
      if (least < nearest[s]) {
        if (total[s] > 0) total[s] *= kernel.weight(nearest[s], least);
        nearest[s] = least;
      }
    }
    for_each_element([&](int s, int j, int e) { total[s] += kernel.weight(at(d, s, j, e), nearest[s]); });
    if (first_row < p.cached_rows) keep(d, first_column);
  }

  __device__ void keep(const Fragments& d, int first_column) const {
    const int k = p.in.mu.rows;
    for_each_element([&](int s, int j, int e) {
      const int row = first_row + slot_row(s), column = first_column + tiles::fragment_col(j, e);
      if (row < p.cached_rows && column < k) p.distances[size_t(row) * k + column] = d[s / 2][j][s % 2 * 2 + e];
    });
  }

  __device__ void epilogue() {
    const int n = p.in.z.rows;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const float sum = prim::warp_sum<4>(total[s]);
#pragma unroll
      for (int offset = 1; offset <= 2; offset *= 2) {
        const float other = __shfl_xor_sync(prim::kFullWarp, own[s], offset);
        const int other_column = __shfl_xor_sync(prim::kFullWarp, column[s], offset);
        if (other < own[s] || (other == own[s] && other_column < column[s])) {
          own[s] = other;
          column[s] = other_column;
        }
      }
      const int row = first_row + slot_row(s), found = column[s] < p.in.mu.rows ? column[s] : 0;  // 0: a row of NaN
      if (threadIdx.x % 4 != 0 || row >= n) continue;
      p.stats[row] = nearest[s];
      p.stats[n + row] = sum;
      p.nearest[row] = found;
      if (p.assignments) p.assignments[row] = found;
    }
  }
};

// m_i and 1 / sum_j e_ij of a lane's rows; 0 beyond the last row.
struct Assigned {
  float nearest[kSlots], inverse_total[kSlots];

  __device__ Assigned(const PassParams& p, int first_row) {
    const int n = p.in.z.rows;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int row = first_row + slot_row(s);
      nearest[s] = row < n ? p.stats[row] : 0;
      inverse_total[s] = row < n ? 1 / p.stats[n + row] : 0;
    }
  }
};

__device__ __forceinline__ float inverse_mass(const PassParams& p, int column) {
  const float mass = column < p.in.mu.rows ? p.mass[column] : 0;
  return mass == 0 ? 0 : 1 / mass;  // a mass that underflowed belongs to no row
}

struct Mass {
  const PassParams& p;
  const StudentT kernel;
  const Assigned rows;
  float* sums;  // [width] of this warp
  bool first;   // of the warp's blocks of rows

  __device__ Mass(const PassParams& p, int first_row)
      : p(p), kernel{p.in.nu}, rows(p, first_row), first(first_row < static_cast<int>(gridDim.x) * kBlockM) {
    sums = p.partial + size_t(blockIdx.x * kWarps + threadIdx.x / 32) * p.width;
  }

  // The eight lanes of equal lane % 4 add their rows; in three steps each gives away half of its columns and is left
  // with those of fragment lane / 4.
  __device__ void use(Fragments& d, int first_column) {
    float column[2 * kNI];
#pragma unroll
    for (int i = 0; i < 2 * kNI; ++i) {
      column[i] = 0;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        column[i] += kernel.weight(at(d, s, i / 2, i % 2), rows.nearest[s]) * rows.inverse_total[s];
      }
    }
    give_half<8, 16>(column);
    give_half<4, 8>(column);
    give_half<2, 4>(column);
    float2* to = reinterpret_cast<float2*>(sums + first_column + tiles::fragment_col(threadIdx.x % 32 / 4, 0));
    const float2 before = first ? float2{0, 0} : *to;
    *to = {before.x + column[0], before.y + column[1]};
  }

  template <int kHalf, int kOffset>
  static __device__ void give_half(float (&column)[2 * kNI]) {
    const bool upper = threadIdx.x & kOffset;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? column[i] : column[i + kHalf], kept = upper ? column[i + kHalf] : column[i];
      column[i] = kept + __shfl_xor_sync(prim::kFullWarp, given, kOffset);
    }
  }

  __device__ void epilogue() {}
};

struct Loss {
  const PassParams& p;
  const StudentT kernel;
  const Assigned rows;
  int first_row;
  int nearest_column[kSlots];
  float nearest_mass[kSlots];
  float ratios[kSlots] = {}, excess[kSlots] = {}, terms[kSlots] = {}, logs[kSlots] = {};

  __device__ Loss(const PassParams& p, int first_row)
      : p(p), kernel{p.in.nu}, rows(p, first_row), first_row(first_row) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int row = first_row + slot_row(s);
      nearest_column[s] = row < p.in.z.rows ? p.nearest[row] : 0;
      nearest_mass[s] = p.mass[nearest_column[s]];
    }
  }

  __device__ void use(Fragments& d, int first_column) {
    constexpr float kTiny = 1.17549435e-38f;
#pragma unroll
    for (int j = 0; j < kNI; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = first_column + tiles::fragment_col(j, e);
        const float inverse = inverse_mass(p, column);
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          const float weight = kernel.weight(at(d, s, j, e), rows.nearest[s]);
          const float q = weight * rows.inverse_total[s];
          const float ratio = column == nearest_column[s] ? 1 : weight * inverse * nearest_mass[s];
          const float log_term = ratio * logf(ratio < kTiny ? kTiny : ratio);
          ratios[s] += q * ratio;
          excess[s] += q * (ratio - 1);
          terms[s] += q * (log_term - (ratio - 1));
          logs[s] += q * log_term;
          at(d, s, j, e) = q;
        }
      }
    if (p.q) write_q(d, first_column);
  }

  __device__ void write_q(const Fragments& q, int first_column) const {
    const int k = p.in.mu.rows;
    for_each_element([&](int s, int j, int e) {
      const int row = first_row + slot_row(s), column = first_column + tiles::fragment_col(j, e);
      if (row < p.in.z.rows && column < k) p.q[size_t(row) * k + column] = q[s / 2][j][s % 2 * 2 + e];
    });
  }

  // Where B = A - 1 is small, l = sum q (s log s - (s - 1)) / A - (log (1 + B) - B / A): both are of second order in
  // r - 1, so that a small loss keeps its relative accuracy.
  __device__ void epilogue() {
    const int n = p.in.z.rows;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const float a = prim::warp_sum<4>(ratios[s]), b = prim::warp_sum<4>(excess[s]);
      const float term = prim::warp_sum<4>(terms[s]), log_term = prim::warp_sum<4>(logs[s]);
      const int row = first_row + slot_row(s);
      if (threadIdx.x % 4 != 0 || row >= n) continue;
      p.loss[row] = fabsf(b) < 0.25f ? term / a - (log1pf(b) - b / a) : log_term / a - logf(a);
      p.stats[2 * size_t(n) + row] = a * rows.inverse_total[s] / nearest_mass[s];
      p.stats[3 * size_t(n) + row] = -b / a;
    }
  }
};

struct WeightPass {
  const PassParams& p;
  const StudentT kernel;
  const Assigned rows;
  int first_row;
  float factor[kSlots], inverse_target[kSlots], excess[kSlots];

  __device__ WeightPass(const PassParams& p, int first_row)
      : p(p), kernel{p.in.nu}, rows(p, first_row), first_row(first_row) {
    const size_t n = p.in.z.rows;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const size_t row = first_row + slot_row(s);
      factor[s] = row < n ? -2 * p.grad_loss[row] : 0;
      inverse_target[s] = row < n ? 1 / p.stats[2 * n + row] : 0;
      excess[s] = row < n ? p.stats[3 * n + row] : 0;
    }
  }

  __device__ void use(Fragments& d, int first_column) {
#pragma unroll
    for (int j = 0; j < kNI; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float inverse = inverse_mass(p, first_column + tiles::fragment_col(j, e));
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          const float distance = at(d, s, j, e);
          const float q = kernel.weight(distance, rows.nearest[s]) * rows.inverse_total[s];
          const float less_one = q > 0.5f ? excess[s] : q * inverse * inverse_target[s] - 1;
          at(d, s, j, e) = factor[s] * q * less_one * kernel.slope(distance);
        }
      }
#pragma unroll
      for (int s = 0; s < kSlots; ++s)
        store(s, at(d, s, j, 0), at(d, s, j, 1), first_column + tiles::fragment_col(j, 0));
    }
  }

  __device__ void store(int s, float w0, float w1, int column) const {
    const int row = first_row + slot_row(s) - p.first_row;
    if (row >= p.weights.rows) return;
    uint32_t* to = static_cast<uint32_t*>(const_cast<void*>(p.weights.data)) + (size_t(row) * p.width + column) / 2;
    const uint32_t high = prim::pack<__nv_bfloat16>(w0, w1);
    *to = high;
    if (p.weights.splits == 1) return;
    const __nv_bfloat16* halves = reinterpret_cast<const __nv_bfloat16*>(&high);
    to[size_t(p.weights.rows) * p.width / 2] =
        prim::pack<__nv_bfloat16>(w0 - prim::to_float(halves[0]), w1 - prim::to_float(halves[1]));
  }

  __device__ void epilogue() {}
};

template <typename Pass, bool kResident>
__global__ void __launch_bounds__(kThreads, 2) pass_kernel(PassParams p) {
  extern __shared__ __align__(128) char shared[];
  const int begin = blockIdx.y * p.range_tiles, end = min(begin + p.range_tiles, p.tiles);
  for (int block_row = p.first_row + blockIdx.x * kBlockM; block_row < p.end_row; block_row += gridDim.x * kBlockM) {
    const int first_row = block_row + mainloop_sm80::warp_row();
    const Distances distances(p.in, first_row);
    Pass pass(p, first_row);
    mainloop_sm80::run<__half, kResident>(p.in.z, p.in.mu, block_row, begin, end, prim::shared_address(shared),
                                          [&](Fragments& c, int first_column) {
                                            distances(c, first_column);
                                            pass.use(c, first_column);
                                          });
    pass.epilogue();
  }
}

}  // namespace ltood::cluster_kl
