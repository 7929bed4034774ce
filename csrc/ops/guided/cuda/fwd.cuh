// Forward tiles of the guided family. With s_ij = <u_i, u_j> / tau (student), c_ij = <e_i, e_j> (guide), t = c / tau_t:
//   negatives   sum_{j in out(i)} w-_ij exp(s_ij),   w-_ij = ((1 - c_ij) / 2)^gamma
//   distill     KL(softmax_j t_ij || softmax_j s_ij), j != i
// A block owns 128 rows and walks over the column tiles that its rows read (all for distillation, about 1 / K of them
// for the negatives), or over its share of them. Every lane keeps the sums of its own columns (online form); lanes meet
// once, at the end, and shares of columns in the epilogue kernel.
//
//   tile   rows × columns   warps   a warp's part      shared memory                     blocks an SM
//   all    128 × 64         4       32 × 64, twice     3 × (24 KiB + 512 B) = 73.5 KiB   2 (1 where an SM has 100 KiB)
//
// FLOP: 2 (D + Dg) a pair and pass (3 passes for float32), N² pairs for distillation, N²/K for negatives alone. Bytes:
// 24 KiB of L2 for every 1.05 MFLOP, as rows are read again with every tile; device memory N (D + Dg) once while it
// stays in L2. Exponentials: 3 a pair (1 without distillation, 1 more when gamma is not 1). Expected limiter: L2
// bandwidth of the row k_tiles up to D + Dg = 512, tensor cores beyond. Not yet verified on hardware.
#pragma once

#include "ops/guided/cuda/tile.cuh"

namespace ltood::guided {

constexpr int kForwardThreads = 128;
constexpr int kForwardFragments = 2;  // 16 rows each

// What a lane has summed for one row. KL(p || q) = excess / teacher_sum + log(1 + gap / teacher_sum) with u = t - s,
// excess = sum_j 2^t u, gap = sum_j (2^s - 2^t): the second term keeps its digits when q is close to p. Sums are in
// units of 2^max, excess and gap in those of the teacher.
struct RowSums {
  float negative_max = -INFINITY, negative = 0;
  float student_max = -INFINITY, student = 0;
  float teacher_max = -INFINITY, teacher = 0, excess = 0, gap = 0;
};

// 2^x - 1 for |x| <= 1/2 without the rounding of 1 + small (the CPU's polynomial, relative error 2^-21).
__device__ __forceinline__ float exp2_minus_1(float x) {
  float p = 0.00015345812f;
  p = p * x + 0.0013399931f;
  p = p * x + 0.0096184890f;
  p = p * x + 0.055503288f;
  p = p * x + 0.24022647f;
  p = p * x + 0.69314721f;
  return p * x;
}

using Fragment = float[kColumnFragments][4];  // 16 rows of a tile, of a warp

// One row of a lane's part of a fragment: elements 2 half and 2 half + 1 of each eight columns.
template <typename Body>
__device__ __forceinline__ void for_each_column(Body body) {
#pragma unroll
  for (int j = 0; j < kColumnFragments; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) body(j, e, fragment_col(j, e));
  }
}

// s and c of one row; `self` is the row's own place among the tile's columns, `count` how many of them exist. kInside:
// all 64 columns count, and none of them is the row itself.
template <bool kInside>
__device__ __forceinline__ void add_distill(RowSums& sums, const Fragment& s, const Fragment& c, int half, float scale,
                                            int self, int count) {
  const auto valid = [&](int column) { return kInside || (column != self && column < count); };
  float s_max = -INFINITY, t_max = -INFINITY;
  for_each_column([&](int j, int e, int column) {
    if (!valid(column)) return;
    s_max = fmaxf(s_max, s[j][2 * half + e]);
    t_max = fmaxf(t_max, c[j][2 * half + e] * scale);
  });
  sums.student *= raise(sums.student_max, s_max);
  const float grown = raise(sums.teacher_max, t_max);
  const float s_shift = shift_of(sums.student_max), t_shift = shift_of(sums.teacher_max);
  // 2^(s - t_shift) from 2^(s - s_shift). Where that is out of range gap is not used, but must not become NaN.
  const float ratio = prim::exp2_fast(fminf(s_shift - t_shift, 100.f));
  float student = 0, teacher = 0, excess = 0, gap = 0;
  for_each_column([&](int j, int e, int column) {
    if (!valid(column)) return;
    const float student_exponent = s[j][2 * half + e], t = c[j][2 * half + e] * scale;
    const float q = prim::exp2_fast(student_exponent - s_shift), p = prim::exp2_fast(t - t_shift);
    const float u = t - student_exponent;
    student += q;
    teacher += p;
    excess += p * u;
    gap += fabsf(u) <= 0.5f ? p * exp2_minus_1(-u) : q * ratio - p;
  });
  sums.student += student;
  sums.teacher = sums.teacher * grown + teacher;
  sums.excess = sums.excess * grown + excess;
  sums.gap = sums.gap * grown + gap;
}

// The negatives of one row: columns first, ..., first + count - 1 of the tile but for the row itself. Leaves exponents
// in s and factors in c. kInside: all 64 columns are negatives.
template <bool kInside>
__device__ __forceinline__ void add_negatives(RowSums& sums, const GuidedParams& p, Fragment& s, Fragment& c, int half,
                                              int self, int first, int count) {
  float max = -INFINITY;
  for_each_column([&](int j, int e, int column) {
    float &x = s[j][2 * half + e], &w = c[j][2 * half + e];
    const Repulsion pair(p, x, w);
    const bool inside =
        kInside || (static_cast<unsigned>(column - first) < static_cast<unsigned>(count) && column != self);
    x = inside ? pair.exponent : -INFINITY;
    w = inside ? pair.factor : 0.f;
    max = fmaxf(max, x);
  });
  sums.negative *= raise(sums.negative_max, max);
  const float shift = shift_of(sums.negative_max);
  float negative = 0;
  for_each_column(
      [&](int j, int e, int) { negative += c[j][2 * half + e] * prim::exp2_fast(s[j][2 * half + e] - shift); });
  sums.negative += negative;
}

// A row's sums over the quad that shares it, written by its first lane.
template <bool kContrast, bool kDistill>
__device__ __forceinline__ void write_sums(RowSums sums, const GuidedParams& p, int k_split, int row) {
  const bool writes = threadIdx.x % 4 == 0;
  const int padded = p.padded - p.first;
  float* to = p.sums + size_t(k_split) * kGuidedSums * padded + row - p.first;
  const auto meet = [&](float& max) { return raise(max, prim::warp_max<4, 1>(max)); };
  const auto write = [&](int field, float value) {
    if (writes) to[size_t(field) * padded] = value;
  };
  if (kContrast) {
    const float factor = meet(sums.negative_max);
    write(kNegativeMax, sums.negative_max);
    write(kNegativeSum, prim::warp_sum<4, 1>(sums.negative * factor));
  }
  if (kDistill) {
    const float student = meet(sums.student_max), teacher = meet(sums.teacher_max);
    write(kStudentMax, sums.student_max);
    write(kStudentSum, prim::warp_sum<4, 1>(sums.student * student));
    write(kTeacherMax, sums.teacher_max);
    write(kTeacherSum, prim::warp_sum<4, 1>(sums.teacher * teacher));
    write(kExcess, prim::warp_sum<4, 1>(sums.excess * teacher));
    write(kGap, prim::warp_sum<4, 1>(sums.gap * teacher));
  }
}

template <typename half_t, bool kContrast, bool kDistill>
__global__ void __launch_bounds__(kForwardThreads) guided_forward_kernel(GuidedParams p) {
  extern __shared__ __align__(1024) char shared[];
  const uint32_t stages = prim::shared_address(shared);
  const uint32_t slots = stages + kStages * kStageBytes;
  const float* fields = reinterpret_cast<const float*>(shared + kStages * kStageBytes);
  int* columns = reinterpret_cast<int*>(shared + kStages * (kStageBytes + kGuidedForwardFields * kFieldBytes));
  const int first_row = p.first + blockIdx.x * kGuidedRows, warp_row = threadIdx.x / 32 * 16 * kForwardFragments;
  const ProductSteps steps(p);
  const Share share(p, blockIdx.x, blockIdx.y);
  TileList tiles(share.words, share.first);
  Turn load_at(steps.all), use_at = load_at;

  RowSums sums[kForwardFragments][2];

  Fragment s[kForwardFragments], c[kForwardFragments];
  int load_column = 0;
  const auto load = [&](int, int stage) {
    if (load_at.next()) {
      load_column = tiles.next_column();
      if (threadIdx.x == 0) columns[load_at.slot] = load_column;
      load_fields<kGuidedForwardFields, kForwardThreads>(slots + load_at.slot * kGuidedForwardFields * kFieldBytes, p,
                                                         load_column);
    }
    load_product<kForwardThreads>(stages + stage * kStageBytes, p, steps, load_at.step, first_row, load_column);
  };
  // What belongs to the rows is read again with every tile: the registers are full.
  const auto tile_epilogue = [&]() {
    const float* slot = fields + use_at.slot * kGuidedForwardFields * kGuidedColumns;
    const int first_column = columns[use_at.slot];
    const float inv_tau = exponent_scale(p.inv_tau, p.temperature), inv_teacher_tau = teacher_scale(p);
#pragma unroll
    for (int i = 0; i < kForwardFragments; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + warp_row + fragment_row(i, 2 * half), self = own_column(p, row) - first_column;
        const float row_z = p.fields[size_t(kScaleZ) * p.padded + row] * inv_tau;
        const float row_e = p.fields[size_t(kScaleE) * p.padded + row];
#pragma unroll
        for (int j = 0; j < kColumnFragments; ++j) {
          const float2 z = field_pair(slot, kScaleZ, fragment_col(j, 0));
          const float2 e = field_pair(slot, kScaleE, fragment_col(j, 0));
          s[i][j][2 * half] *= row_z * z.x, s[i][j][2 * half + 1] *= row_z * z.y;
          c[i][j][2 * half] *= row_e * e.x, c[i][j][2 * half + 1] *= row_e * e.y;
        }
        if (kDistill)
          add_distill<false>(sums[i][half], s[i], c[i], half, inv_teacher_tau, self, p.columns - first_column);
        if (kContrast) {
          const GuidedSpans spans = row < p.n ? p.spans[row] : GuidedSpans{0, 0, 0, 0};
          add_negatives<false>(sums[i][half], p, s[i], c[i], half, self, spans.out_begin - first_column,
                               spans.out_end - spans.out_begin);
        }
        __syncwarp();
      }
    }
  };
  pipeline<kStages>((share.last - share.first) * steps.all, load, [&](int, int stage) {
    if (use_at.next()) {
      clear(s);
      clear(c);
    }
    const uint32_t rows = stages + stage * kStageBytes;
    if (use_at.step < steps.student) {
      multiply_k_tile<half_t>(s, rows, rows + kRowKTile, warp_row, 0);
    } else {
      multiply_k_tile<half_t>(c, rows, rows + kRowKTile, warp_row, 0);
    }
    if (use_at.step == steps.all - 1) tile_epilogue();
  });
#pragma unroll
  for (int i = 0; i < kForwardFragments; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + warp_row + fragment_row(i, 2 * half);
      write_sums<kContrast, kDistill>(sums[i][half], p, blockIdx.y, row);
    }
  }
}

}  // namespace ltood::guided
