// Sums of rows by key, deterministic: class sums, and gradients that come back to rows that were chosen. Torch-free.
#pragma once

#include <cstdint>

#include "cuda/operand.h"

namespace ltood {

//   sums[key] = sum over the positions p with keys[p] = key of weight[r] * x_r,  r = order[p] / entries_per_row
// Rows of `sums` whose key does not occur are left alone; positions with a negative key count for nothing.
struct SegmentSumsParams {
  Operand x;
  const int64_t* keys;   // [count] ascending
  const int64_t* order;  // [count]
  int64_t count;
  int entries_per_row;
  const float* weight;  // [x.rows] or null: 1
  int d;
  float* sums;   // [keys, d]
  float* edges;  // workspace, [ltood_segment_edges(count), d]
};

// Rows of the workspace.
extern "C" int64_t ltood_segment_edges(int64_t count);

// Returns a cudaError_t.
extern "C" int ltood_launch_segment_sums(const SegmentSumsParams* params, void* stream);

}  // namespace ltood
