// Which pairs of rows the guided contrastive loss reads: O(N (k + log N)) work, negligible next to the tiles.
#pragma once

#include "cuda/primitives/math.cuh"
#include "ops/guided/cuda/launch.h"
#include "ops/guided/state.h"

namespace ltood::guided {

constexpr int kPlanThreads = 128;

__device__ __forceinline__ int64_t row_at(const GuidedParams& p, int position) {
  return p.order ? p.order[position] : position;
}

// Positions of the rows with keys in [low, high).
struct Range {
  int64_t begin, end;
  __device__ bool contains(int64_t at) const { return begin <= at && at < end; }
};

__device__ __forceinline__ Range range_of(const int64_t* ascending, int64_t count, int64_t low, int64_t high) {
  return {prim::lower_bound(ascending, count, low), prim::lower_bound(ascending, count, high)};
}

// far[c] K + c. A far outside [0, K) counts as K, a cluster nobody has; a c outside [0, K) comes last of all.
__device__ __forceinline__ int64_t cluster_key(const GuidedParams& p, int64_t c) {
  const int64_t count = p.clusters_count;
  if (c < 0 || c >= count) return count * count + count;
  const int64_t far = p.far[c];
  return (far < 0 || far >= count ? count : far) * count + c;
}

__device__ __forceinline__ bool same_instance(const GuidedParams& p, int a, int b) {
  if (p.instance) return p.instance[a] == p.instance[b];
  const int half = p.n / 2;
  return row_at(p, a) % half == row_at(p, b) % half;
}

// body(position) for the rows of the same image, the row's own one included.
template <typename Body>
__device__ __forceinline__ void for_each_view(const GuidedParams& p, int position, Body body) {
  if (!p.instance) {
    body(position);
    body(p.position_of[(row_at(p, position) + p.n / 2) % p.n]);
    return;
  }
  const int64_t id = p.instance[position];
  for (int64_t at = prim::lower_bound(p.instance_keys, p.n, id); at < p.n && p.instance_keys[at] == id; ++at) {
    if (p.members[at] >= p.columns) break;  // behind the columns come the rows of a partial problem
    body(static_cast<int>(p.members[at]));
  }
}

// The shift of a row's key over its cluster's: in a partial problem more than any key of a column, and one more.
__device__ __forceinline__ int64_t row_shift(const GuidedParams& p) {
  const int64_t count = p.clusters_count;
  return p.first ? count * count + count + 2 : 0;
}

__global__ void guided_keys_kernel(GuidedParams p) {
  const int row = blockIdx.x * kPlanThreads + threadIdx.x;
  if (row >= p.n) return;
  const bool unused = row >= p.columns && row < p.first;
  p.keys[row] = unused ? row_shift(p) - 1 : cluster_key(p, p.clusters[row]) + (row >= p.first ? row_shift(p) : 0);
}

__global__ void guided_positions_kernel(GuidedParams p) {
  const int position = blockIdx.x * kPlanThreads + threadIdx.x;
  if (position < p.n) p.position_of[row_at(p, position)] = position;
}

// The columns of a row's farthest cluster, and those whose farthest cluster is its own.
struct ClusterSpans {
  Range out{0, 0}, in{0, 0};

  __device__ __forceinline__ ClusterSpans(const GuidedParams& p, int position) {
    const int64_t count = p.clusters_count, key = p.keys[position] - row_shift(p), far = key / count, own = key % count;
    if (far < count) {
      const int64_t far_key = cluster_key(p, far);
      out = range_of(p.keys, p.columns, far_key, far_key + 1);
    }
    if (key < count * count + count) in = range_of(p.keys, p.columns, own * count, (own + 1) * count);
  }

  __device__ __forceinline__ GuidedSpans packed() const {
    return {static_cast<int>(out.begin), static_cast<int>(out.end), static_cast<int>(in.begin),
            static_cast<int>(in.end)};
  }
};

// The spans of a row, and its neighbours: what is out of range, of its own image, or listed before becomes -1.
__global__ void guided_select_kernel(GuidedParams p) {
  const int position = blockIdx.x * kPlanThreads + threadIdx.x;
  if (position >= p.n) return;
  ClusterSpans spans(p, position);
  Range& out = spans.out;
  int64_t left = out.end - out.begin;
  for_each_view(p, position, [&](int view) { left -= out.contains(view); });
  int64_t* neighbors = p.neighbors + row_at(p, position) * p.k;
  for (int s = 0; s < p.k; ++s) {
    const int64_t j = neighbors[s];
    bool keep = j >= 0 && j < p.n && !same_instance(p, position, p.position_of[j]);
    for (int before = 0; before < s; ++before) keep = keep && neighbors[before] != j;
    if (!keep) neighbors[s] = -1;
    const int64_t at = keep ? p.position_of[j] : -1;
    p.neighbor_at[int64_t(position) * p.k + s] = at;
    left -= keep && out.contains(at);
  }
  p.fallback[position] = left == 0;
  if (left == 0) out = {0, p.n};
  p.spans[position] = spans.packed();
}

// The spans of a partial problem's rows. Which rows and columns fall back is told by the caller, who knows all columns.
__global__ void guided_partial_select_kernel(GuidedParams p) {
  const int position = blockIdx.x * kPlanThreads + threadIdx.x;
  if (position >= p.n) return;
  const int64_t row = row_at(p, position);
  bool all = p.contrast_state && p.contrast_state[row * kStateColumns + kContrastFallback] != 0;
  p.fallback[position] = all;
  if (position < p.first) return;
  ClusterSpans spans(p, position);
  if (p.every) {
    spans.out = {0, 0};
    all = p.every[row - p.first];
  }
  if (all) spans.out = {0, p.columns};
  p.spans[position] = spans.packed();
}

__global__ void guided_fallback_tiles_kernel(GuidedParams p) {
  const int tile = blockIdx.x * kPlanThreads + threadIdx.x, first = tile * kGuidedColumns;
  if (first >= p.padded) return;
  uint8_t any = 0;
  for (int position = first; position < min(first + kGuidedColumns, p.columns); ++position) any |= p.fallback[position];
  p.fallback_tiles[tile] = any;
}

// Bits of the tiles of a word, 32 from first_tile on, that positions begin, ..., end - 1 lie in.
__device__ __forceinline__ uint32_t tile_bits(int first_tile, int begin, int end) {
  if (begin >= end) return 0;
  const int low = max(begin / kGuidedColumns - first_tile, 0), high = min((end - 1) / kGuidedColumns - first_tile, 31);
  return low > 31 || high < low ? 0 : (0xffffffffu >> (31 - high)) & (0xffffffffu << low);
}

// The column tiles that any row of a block reads: all for distillation, else those of its negatives and, backward, of
// the rows it is a negative of.
__global__ void __launch_bounds__(kPlanThreads) guided_tiles_kernel(GuidedParams p) {
  static_assert(kPlanThreads == kGuidedRows);
  __shared__ GuidedSpans spans[kGuidedRows];
  const int position = p.first + blockIdx.x * kGuidedRows + threadIdx.x;
  spans[threadIdx.x] = p.contrast && position < p.n ? p.spans[position] : GuidedSpans{0, 0, 0, 0};
  __syncthreads();
  const int count = p.padded / kGuidedColumns, words = (count + 31) / 32;
  for (int word = threadIdx.x; word < words; word += kPlanThreads) {
    uint32_t bits = p.distill ? tile_bits(word * 32, 0, p.columns) : 0;
    if (!p.distill) {
      for (int r = 0; r < kGuidedRows; ++r) {
        bits |= tile_bits(word * 32, spans[r].out_begin, spans[r].out_end);
        if (p.backward) bits |= tile_bits(word * 32, spans[r].in_begin, spans[r].in_end);
      }
      for (int t = 0; p.backward && t < min(32, count - word * 32); ++t) {
        bits |= uint32_t(p.fallback_tiles[word * 32 + t]) << t;
      }
    }
    p.tiles[int64_t(blockIdx.x) * words + word] = bits;
  }
}

// In base 2. A row without any term has -inf, and no pair that could use it.
__device__ __forceinline__ float finite_log2(double natural) {
  const float value = static_cast<float>(natural * prim::kLog2E);
  return value == -INFINITY ? 0.f : value;
}

// The gradients of the outputs, as the tiles read them. A row without positives has loss 0 whatever its sums.
__device__ __forceinline__ void backward_fields(const GuidedParams& p, int position, float (&field)[kGuidedFields]) {
  const int64_t row = row_at(p, position);
  const auto gradient = [&](const double* of) { return of ? static_cast<float>(of[row]) : 0.f; };
  if (p.contrast) {
    const float weight = static_cast<float>(p.weight[row]), of_loss = weight != 0 ? gradient(p.grad_loss) : 0.f;
    field[kLse] = finite_log2(p.lse[row]);
    field[kGradLse] = gradient(p.grad_lse) + of_loss;
    field[kGradLseFallback] = p.fallback[position] ? field[kGradLse] : 0.f;
    field[kPositiveGrad] = weight != 0 ? of_loss / weight : 0.f;
  }
  if (p.distill) {
    field[kStudentLse] = finite_log2(p.student_lse[row]);
    field[kTeacherLse] = finite_log2(p.teacher_lse[row]);
    field[kDistillTeacher] = gradient(p.grad_kl);
    field[kDistillStudent] = gradient(p.grad_student_lse) + field[kDistillTeacher];
  }
}

// The same of a partial problem, from what the caller has worked out for its rows and columns.
__device__ __forceinline__ void state_fields(const GuidedParams& p, int position, float (&field)[kGuidedFields]) {
  const int64_t at = row_at(p, position) * kStateColumns;
  if (p.contrast) {
    const double* state = p.contrast_state + at;
    field[kLse] = finite_log2(state[kContrastLse]);
    field[kGradLse] = static_cast<float>(state[kContrastGradLse]);
    field[kGradLseFallback] = p.fallback[position] ? field[kGradLse] : 0.f;
    field[kPositiveGrad] = static_cast<float>(state[kContrastAttract]);
  }
  if (p.distill) {
    const double* state = p.distill_state + at;
    field[kStudentLse] = finite_log2(state[kDistillStudentLse]);
    field[kTeacherLse] = finite_log2(state[kDistillTeacherLse]);
    field[kDistillStudent] = static_cast<float>(state[kDistillGradLse]);
    field[kDistillTeacher] = static_cast<float>(state[kDistillAttract]);
  }
}

// The position of the column that a partial problem's row is.
__device__ __forceinline__ int same_column(const GuidedParams& p, int position) {
  if (position < p.first || position >= p.n) return -1;
  const int64_t column = row_at(p, position) - p.first + p.diagonal;
  if (column < 0 || column >= p.columns) return -1;
  return p.contrast ? p.position_of[column] : static_cast<int>(column);
}

__global__ void guided_fields_kernel(GuidedParams p) {
  const int position = blockIdx.x * kPlanThreads + threadIdx.x;
  if (position >= p.padded) return;
  float field[kGuidedFields] = {};
  if (position < p.columns || (p.first <= position && position < p.n)) {
    field[kScaleZ] = p.z.scale[position];
    field[kScaleE] = p.e.scale[position];
    if (p.backward && p.first) {
      state_fields(p, position, field);
    } else if (p.backward) {
      backward_fields(p, position, field);
    }
  }
  if (p.self_at) p.self_at[position] = same_column(p, position);
#pragma unroll
  for (int f = 0; f < kGuidedFields; ++f) {
    if (f < kGuidedForwardFields || p.backward) p.fields[size_t(f) * p.padded + position] = field[f];
  }
}

}  // namespace ltood::guided
