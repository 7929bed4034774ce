// Row pieces of the guided family's tiles. Torch-free, vectorised, compiled for several instruction sets.
//
// Exponents and their sums are in base 2: s and t carry a factor log2(e), lse is a log2. Pointers are to n consecutive
// columns of one row:
//   s    student similarities <z_i, z_j> log2(e) / tau
//   cos  guide cosines <e_i, e_j>
//   t    cos * scale, scale = log2(e) / teacher_temperature
//   h    G_ij + G_ji, where G is the gradient of the loss by <z_i, z_j> / tau
#pragma once

#include <cstdint>
#include <limits>

#include "ops/guided/state.h"

namespace ltood {

template <typename T>
T attraction(Force force, T cos);
template <typename T>
T repulsion(Force force, T cos);

// A growing sum of w 2^x, kept as sum * 2^max.
template <typename T>
struct ExpSum {
  T max = -std::numeric_limits<T>::infinity();
  double sum = 0;

  // Returns what the sums on the old and on the other's max have to be multiplied with to lie on the new max.
  struct Scales {
    double own, other;
  };
  Scales add(T other_max, double other_sum);
  double log2() const;
};

// What the divergence of a row needs: KL(p || q) = E_p[t - s] + lse_s - lse_t, with u = t - s,
//   = excess / teacher.sum + log(1 + gap / teacher.sum),  excess = sum_j 2^t u,  gap = sum_j (2^s - 2^t),
// where the second form keeps its digits when q is close to p.
template <typename T>
struct DivergenceSum {
  ExpSum<T> student, teacher;
  double excess = 0, gap = 0;  // in units of 2^teacher.max

  double nats() const;
};

// Forward: acc += sum_j repulsion(cos_j) 2^s_j.
void add_negatives(ExpSum<float>& acc, const float* s, const float* cos, int64_t n, Force force);
void add_negatives(ExpSum<double>& acc, const double* s, const double* cos, int64_t n, Force force);

// Forward: the sums of more columns.
void add_distill(DivergenceSum<float>& acc, const float* s, const float* cos, int64_t n, float scale);
void add_distill(DivergenceSum<double>& acc, const double* s, const double* cos, int64_t n, double scale);

// Backward, this row's own negatives: h_j += a repulsion(cos_j) 2^(s_j - lse).
void grad_negatives(float* h, const float* s, const float* cos, int64_t n, Force force, float lse, float a);
void grad_negatives(double* h, const double* s, const double* cos, int64_t n, Force force, double lse, double a);

// Backward, the rows that have this one as a negative: h_j += a_j repulsion(cos_j) 2^(s_j - lse_j).
void grad_as_negative(float* h, const float* s, const float* cos, int64_t n, Force force, const float* lse,
                      const float* a);
void grad_as_negative(double* h, const double* s, const double* cos, int64_t n, Force force, const double* lse,
                      const double* a);

// What relational distillation needs of a row: q = 2^(s - student_lse), p = 2^(t - teacher_lse), G = a q - b p.
template <typename T>
struct DistillRow {
  const T* student_lse;
  const T* teacher_lse;
  const T* a;
  const T* b;

  DistillRow from(int64_t i) const { return {student_lse + i, teacher_lse + i, a + i, b + i}; }
};

// Backward: h_j += a q_ij - b p_ij + a_j q_ji - b_j p_ji, from the row's numbers (at [0]) and the columns'.
void grad_distill(float* h, const float* s, const float* cos, int64_t n, float scale, DistillRow<float> row,
                  DistillRow<float> columns);
void grad_distill(double* h, const double* s, const double* cos, int64_t n, double scale, DistillRow<double> row,
                  DistillRow<double> columns);

// A tile of pairs of rows, each computed once for both: cosines (or products) of the student and of the guide, `stride`
// apart; s and t are these times their scales. On the diagonal of the N×N pairs a row meets itself, which no sum
// counts, and sums go to the rows alone.
template <typename T>
struct PairTile {
  T* student;      // [rows, stride]
  const T* guide;  // [rows, stride]
  int64_t stride, rows, cols;
  T student_scale, teacher_scale;
  bool diagonal;
};

constexpr int64_t kMaxPairs = 256;  // rows and columns of such a tile

// What a row's divergence needs, not shifted (DivergenceSum on a maximum of 0), and what its gradient needs: weights
// times exp(-lse). All for exponents in the range where that is safe.
struct PairSums {
  double *student, *teacher, *excess, *gap;  // [n]

  PairSums from(int64_t i) const { return {student + i, teacher + i, excess + i, gap + i}; }
};
template <typename T>
struct PairFactors {
  const T *student, *teacher;  // [n]

  PairFactors from(int64_t i) const { return {student + i, teacher + i}; }
};

// Forward: the sums of the tile's rows and of its columns.
void add_pairs(PairTile<float> tile, PairSums rows, PairSums columns);
void add_pairs(PairTile<double> tile, PairSums rows, PairSums columns);

// Backward: student_rc <- (A_r + A_c) 2^s - (B_r + B_c) 2^t, the h of both rows; two exponentials a pair.
void weigh_pairs(PairTile<float> tile, PairFactors<float> rows, PairFactors<float> columns);
void weigh_pairs(PairTile<double> tile, PairFactors<double> rows, PairFactors<double> columns);

// The search for the k best cosines of a row, best first, ties to the lower row; NaN ranks above all numbers.
// The cosines of a tile only select candidates: how a matrix product rounds depends on where a column stands, and equal
// rows of the guide must tie. A candidate within `margin` of the k-th best is measured again by dot(), which always
// rounds alike.
template <typename T>
struct NeighborSearch {
  T* best;       // [k], -inf where there is none yet
  int64_t* row;  // [k]
  int64_t k;
  const T* guide;  // [width] of this row
  int64_t width;
  T margin;                  // what a product may be off by
  const int64_t* own_begin;  // positions of the row's own image, sorted: never taken
  const int64_t* own_end;
};

// n columns more: their cosines, rows [n], guide [n, width], and the position of the first.
void keep_best(NeighborSearch<float> search, const float* cos, const int64_t* rows, const float* guide, int64_t n,
               int64_t first);
void keep_best(NeighborSearch<double> search, const double* cos, const int64_t* rows, const double* guide, int64_t n,
               int64_t first);

float dot(const float* x, const float* y, int64_t n);
double dot(const double* x, const double* y, int64_t n);

}  // namespace ltood
