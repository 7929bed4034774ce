// The contrastive losses on CUDA, torch-free: what the launchers take. Pointers are to device memory, arrays of rows
// are [N] unless said otherwise; launchers return a cudaError_t. The formulas are in contrastive.h.
#pragma once

#include <cstdint>

#include "cuda/operand.h"

namespace ltood {

// exp(s_ij) = 2^(<u_i, u_j> * log2(e) / tau).
struct Exponents {
  float inv_tau;
  const float* temperature;  // 0-d tensor or null; wins over inv_tau
  int online;                // running maxima; else the fixed shift 1 / tau, safe for unit rows and tau >= 0.023
};

// Who may be whose neighbour.
struct NeighborRules {
  int views;                // > 0: never rows i, j with i % views == j % views
  const int64_t* instance;  // or null: never rows of equal id
  const int64_t* domain;    // or null: only rows of equal id
};

// The sole positive of a row, which the tiles leave out and the row kernels add in double: the loss of a row with one
// positive may be a small difference of two large numbers (ops/contrastive/cpu/sole_positives.h).
struct SolePairs {
  int half;            // > 0: row i's is row i + half or i - half
  const int* partner;  // or null; wins over `half`; -1 = none
};

// How the upper triangle of tiles of 128 × 128 is cut into work tiles of row_tiles × col_tiles. A work tile leaves the
// sums of its rows in slot [its place in the row] and those of its columns in slot [its strip of tile rows].
struct TrianglePlan {
  int tiles;  // along a side
  int row_tiles, col_tiles;
  int strips, chunks;  // slots of columns and of rows
  int work_tiles;
  int blocks;        // of the grid
  int resident;      // the rows of a tile stay in shared memory while the columns pass
  int shared_bytes;  // of a block
  int stages;        // of the Hopper kernel; 0: it does not take the problem
};

struct Nearest {
  float value;
  int index;  // -1: none
};

struct ContrastiveForward {
  Operand u;
  Exponents exponents;
  NeighborRules rules;
  SolePairs pairs;
  int nearest;  // also the nearest admissible row of every row
  TrianglePlan plan;
  float* row_sums;    // [chunks, N]
  float* col_sums;    // [strips, N]
  float* row_maxima;  // the same, online only, in units of log2
  float* col_maxima;
  Nearest* row_nearest;  // the same, `nearest` only
  Nearest* col_nearest;
};

// Rows by segment, ids numbered from 0, with the sums that make positives linear in N.
struct SegmentView {
  const int64_t* ids;      // the segment of a row; null: no segments
  const int64_t* sorted;   // ids, ascending
  const float* sums;       // [segments, D] sum of u
  const float* grad_sums;  // [segments, D] sum of positive_grad * u, backward only
};

struct ContrastiveRows {
  Operand u;
  int d;
  Exponents exponents;
  ContrastiveForward tiles;  // its slots
  int has_views;             // the instance part is enabled
  SegmentView instances;     // null ids: rows i and i + N / 2
  SegmentView classes;       // null ids: no class part
  int k;
  float neighbor_weight;
  const double* neighbor_weights;  // or null
  float* cosines;                  // [N, k]
  int64_t* indices;                // [N, k]
  double* lse;
  float* instance_loss;
  float* class_loss;
  double* instance_weight;
  double* class_weight;
};

// The sole positives of rows by segment: ids and sorted as in SegmentView, order the rows by id.
struct SegmentPairs {
  int n;
  const int64_t* ids;
  const int64_t* sorted;
  const int64_t* order;
  int* partner;  // output
};

// The gradients at the log-sum-exp of each row, and at the mean over its positives divided by their weight.
struct RowGradients {
  int n;
  const float* grad_instance;  // or null
  const float* grad_class;     // or null
  const double* grad_lse;      // or null
  const double* lse;
  const double* instance_weight;
  const double* class_weight;
  float neighbor_weight;
  const double* neighbor_weights;  // or null
  float* lse_grad;                 // outputs
  float* instance_positive_grad;
  float* neighbor_positive_grad;
  float* class_positive_grad;
};

// What a tile of the backward needs of a row: G_ij = (a_i + a_j) 2^t_ij, or with `online` the two exponentials.
struct RowFactors {
  float scale;   // of the operand
  float weight;  // a = w 2^(shift - lse2), or w
  float lse2;    // lse in units of log2
  int partner;   // the column of a sole positive, where G is 0; -1 = none
};

struct ContrastiveFactors {
  Operand u;
  Exponents exponents;
  SolePairs pairs;       // of rows that are their own columns
  const double* lse;     // null: no weights: columns without a gradient
  const float* weight;   // the gradient that arrives at lse
  const float* largest;  // 0-d: the largest |weight| of rows and columns, for float16; null: 1
  RowFactors* factors;
};

// The rows against the columns: the same operand, or two that were prepared alike.
struct ContrastiveLseBwd {
  Operand rows, cols;
  Exponents exponents;
  int diagonal;                   // row i and column i + diagonal are the same embedding: G is 0 there
  const RowFactors* row_factors;  // of as many rows as the operand
  const RowFactors* col_factors;
  int k_splits;      // ranges of columns
  int resident;      // as in TrianglePlan
  int shared_bytes;  // of a block
  int stages;        // as in TrianglePlan
  float* out;        // [k_splits, rows, 64 * k_tiles], in units of largest / 8192 where there is one
};

struct ContrastiveBackward {
  Operand u;
  int d;
  Exponents exponents;
  RowGradients rows;          // its outputs
  const float* largest;       // as in ContrastiveFactors
  ContrastiveLseBwd lse_bwd;  // of the rows against themselves
  SolePairs pairs;            // of the instance part, or of the class part without it
  SegmentView instances, classes;
  int has_views;
  int k;
  const int64_t* indices;  // [N, k]
  const float* cosines;    // [N, k]
  const float*
      chosen_sum;  // [N, D]: neighbor_positive_grad * u summed over the rows that chose a row; null with a bank
  Operand bank;    // its data null: neighbours are in the batch
  int type;        // ElementType of grad_z
  int normalize;
  const float* inv_norm;
  void* grad_z;     // [N, D]
  float* u_dot_du;  // <u_i, dL/du_i>, twice the bank's part: dL/dtau = -(1 / 2 tau) of their sum
};

// out = (1 / tau) * (sum over the k_splits of lse_bwd)
struct ContrastiveLseBwdCombine {
  ContrastiveLseBwd lse_bwd;
  int d;
  const float* largest;  // as in ContrastiveFactors
  float* out;            // [rows, D]
};

// Log-sum-exp of a partial problem: rows against the columns of another operand that was prepared alike.
struct ContrastivePartialSums {
  Operand x, y;
  Exponents exponents;
  int diagonal;    // row i and column i + diagonal are the same embedding, a pair left out
  int row_blocks;  // the plan: blocks of rows, ranges of columns, tiles of a range
  int k_splits, k_split_tiles;
  int resident;      // as in TrianglePlan
  int shared_bytes;  // of a block
  float* sums;       // [k_splits, n]
  float* maxima;     // the same, online only, in units of log2
  double* lse;       // [n]
};

extern "C" {
// Fills `plan` from u, exponents and nearest; clears `nearest` where a block's shared memory has no room for it
// (k_tiles that are streamed, online, 100 KiB), which leaves the search to the top-k kernel.
int ltood_plan_contrastive(ContrastiveForward* params);
int ltood_launch_contrastive_tiles(const ContrastiveForward* params, void* stream);
int ltood_launch_contrastive_pairs(const SegmentPairs* params, void* stream);
int ltood_launch_contrastive_rows(const ContrastiveRows* params, void* stream);
int ltood_launch_contrastive_row_gradients(const RowGradients* params, void* stream);
int ltood_launch_contrastive_factors(const ContrastiveFactors* params, void* stream);
int ltood_plan_contrastive_lse_bwd(ContrastiveLseBwd* params);  // fills k_splits, resident, shared_bytes, stages
int ltood_launch_contrastive_lse_bwd(const ContrastiveLseBwd* params, void* stream);
int ltood_launch_contrastive_lse_bwd_combine(const ContrastiveLseBwdCombine* params, void* stream);
int ltood_plan_contrastive_partial(ContrastivePartialSums* params);
int ltood_launch_contrastive_partial(const ContrastivePartialSums* params, void* stream);
int ltood_launch_contrastive_epilogue(const ContrastiveBackward* params, void* stream);
}

}  // namespace ltood
