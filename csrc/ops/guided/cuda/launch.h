// The CUDA kernels of the guided family: one set of parameters, four launches. Torch-free.
//
// Rows are worked on in the order of their keys, far[c] K + c, so that the rows of a cluster, and the rows that a
// cluster is the farthest of, are both consecutive. "Position" is the place in this order. The caller sorts:
//   1. ltood_launch_guided_keys                      keys by row; the caller sorts them (stable) and orders z and guide
//   2. ltood_launch_guided_plan                      who reads whom, once the neighbours are known
//   3. ltood_launch_guided_forward | _backward
// Without clusters there is nothing to sort: the caller starts at 2 with `order` null.
//
// A partial problem, rows of one process against columns of others (guided_partial), is worked on as one matrix: the
// columns in the order of their keys, nothing up to the next multiple of 128, then the rows in the order of theirs.
// Statements about rows below hold from position `first` on, spans are of columns. The rows' keys are shifted so that
// one sort puts everything into its place; rows and columns are numbered in the same way, from the first column on.
// `first` tells the launches that it is one: they then write guided_partial's sums, or guided_partial_bwd's gradient.
#pragma once

#include <cstdint>

#include "cuda/operand.h"

namespace ltood {

// Positions begin, ..., end - 1, of a row's negatives (out; all rows where the farthest cluster has none left) and of
// the rows whose farthest cluster is its own (in).
struct GuidedSpans {
  int out_begin, out_end, in_begin, in_end;
};

// What a tile reads of its columns, [kGuidedFields, padded] floats by position; logarithms in base 2.
enum GuidedField : int {
  kScaleZ,
  kScaleE,
  kGuidedForwardFields,  // the rest is for the backward pass
  kLse = kGuidedForwardFields,
  kGradLse,          // dL/dlse
  kGradLseFallback,  // the same where all rows are the row's negatives, else 0
  kStudentLse,
  kTeacherLse,
  kDistillStudent,  // dL/ds_ij = kDistillStudent q_ij - kDistillTeacher p_ij
  kDistillTeacher,
  kGuidedTileFields,
  kPositiveGrad = kGuidedTileFields,  // dL/dloss / sum of the attractions; no tile reads it
  kGuidedFields
};

// The tiles' results for every row and range of the columns.
enum GuidedSum : int {
  kNegativeMax,
  kNegativeSum,
  kStudentMax,
  kStudentSum,
  kTeacherMax,
  kTeacherSum,
  kExcess,
  kGap,
  kGuidedSums
};

struct GuidedParams {
  Operand z, e;  // by position; e has unit rows
  Operand v;     // z in bfloat16 for the second product of the backward pass: z itself unless that is float16
  int n, d, k, clusters_count;
  int padded;    // n up to a multiple of 128
  int columns;   // the positions below are columns: n of a square
  int first;     // position of the first row: 0 of a square, `columns` up to a multiple of 128 of a partial problem
  int diagonal;  // of a partial problem: row i, from the first one on, is column i + diagonal
  int contrast, distill, backward;
  int k_splits;  // of the columns, each its own block; ltood_guided_k_splits()
  int weighted;
  float gamma;               // > 0
  float inv_tau;             // not read when temperature is given
  float inv_teacher_tau;     // 0: the student's
  const float* temperature;  // on the device, or null

  // The selection; null without clusters.
  const int64_t* clusters;       // [n] by row; what is outside [0, K) belongs to no cluster
  const int64_t* far;            // [K]
  int64_t* keys;                 // [n] by row from the first launch, ascending in the others
  const int64_t* order;          // [n] position -> row, or null: row = position
  const int64_t* instance;       // [n] by position, or null: rows i and i + n/2 are the views of an image
  const int64_t* instance_keys;  // [n] the same, ascending
  const int64_t* members;        // [n] their positions
  int64_t* neighbors;            // [n, k] by row; what is no neighbour of its own becomes -1
  int64_t* neighbor_at;          // [n, k] by position: positions, -1 = none
  const int64_t* reverse_keys;   // [n k] neighbor_at, ascending (backward)
  const int64_t* reverse_order;  // [n k] where they stood
  const uint8_t* every;  // [n - first], a partial problem's forward pass: all columns are the negatives of the marked
                         // rows, and no others are summed; or null
  int* position_of;      // [n] row -> position
  int* self_at;          // [padded] a partial problem's rows: position of the same column, -1 = none; null: a square
  GuidedSpans* spans;    // [n]
  uint8_t* fallback;     // [n]
  uint8_t* fallback_tiles;  // [padded / 64]
  uint32_t* tiles;          // [padded / 128, ceil(padded / 64 / 32)] bits: the column tiles of a block of rows
  float* fields;            // [kGuidedFields, padded]

  // Forward.
  float* sums;           // [k_splits, kGuidedSums, padded - first]
  float *loss, *kl;      // [n] by row
  double *weight, *lse;  // [n] by row; of a partial problem weight may be null: lse alone, -inf where unmarked
  double *student_lse, *teacher_lse;      // [n] by row
  double *positive_logit, *excess, *gap;  // [n - first] of a partial problem

  // Backward; gradients by row, null = 0. It reads weight and the lse above.
  const double *grad_loss, *grad_lse, *grad_kl, *grad_student_lse;  // [n]
  float* gradient;        // [k_splits, n - first, 64 k_tiles] by position, by unit rows
  const float* inv_norm;  // [n] by position
  int normalize;
  int grad_type;    // ElementType of grad_z
  void* grad_z;     // [n, d] by row
  float* u_dot_du;  // [n] <z_i, dL/dz_i> of the unit rows

  // Backward of a partial problem, in place of the above but `gradient`.
  const double *contrast_state, *distill_state;  // [n, kStateColumns] by row
  float* grad_unit;                              // [n - first, d] by row
};

constexpr int kGuidedRows = 128;     // of a block
constexpr int kGuidedColumns = 64;   // of a tile
constexpr int kGuidedOutKTiles = 2;  // of the gradient that a block computes

// Into how many ranges the columns are cut so that a small problem fills the device; a negative cudaError_t on failure.
extern "C" int ltood_guided_k_splits(int rows, int columns, int k_tiles, int backward);

// Each returns a cudaError_t.
extern "C" int ltood_launch_guided_keys(const GuidedParams* params, void* stream);
extern "C" int ltood_launch_guided_plan(const GuidedParams* params, void* stream);
extern "C" int ltood_launch_guided_forward(const GuidedParams* params, void* stream);
extern "C" int ltood_launch_guided_backward(const GuidedParams* params, void* stream);

}  // namespace ltood
