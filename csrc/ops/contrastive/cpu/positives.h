// The positives of the contrastive losses, linear in N. Torch-free; T is float or double.
//
// Rows that are positives of each other form a segment: the views of an image, the rows of a class. With the segment's
// sum S = sum of u_j, the similarities of row i to the others of its segment add up to <u_i, S - u_i>: no pair is
// visited. Sums are carried in double, so that taking u_i out of S again loses nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "common/segments.h"

namespace ltood {

// similarity_i = sum over the other rows j of i's segment of <u_i, u_j>, others_i = how many; segments [begin, end).
void segment_similarities(const RowSegments& segments, int64_t begin, int64_t end, const float* u, int64_t d,
                          double* similarity, double* others);
void segment_similarities(const RowSegments& segments, int64_t begin, int64_t end, const double* u, int64_t d,
                          double* similarity, double* others);

// grad_i -= scale * sum over the other rows j of i's segment of (positive_grad_i + positive_grad_j) u_j; segments
// [begin, end).
void segment_gradients(const RowSegments& segments, int64_t begin, int64_t end, const float* u, int64_t d,
                       const double* positive_grad, double scale, float* grad);
void segment_gradients(const RowSegments& segments, int64_t begin, int64_t end, const double* u, int64_t d,
                       const double* positive_grad, double scale, double* grad);

// Who chose a row as neighbour: row m was chosen by choosers[offsets[m]] ... choosers[offsets[m + 1] - 1], ascending.
struct Choosers {
  std::vector<int64_t> choosers, offsets;
};
Choosers invert_choices(const int64_t* indices, int64_t n, int64_t k);  // indices [n, k], -1 = none

// grad_i -= scale * positive_grad * u of every neighbour of i (positive_grad_i) and of every row that chose i (its
// positive_grad); rows [begin, end). Rows of a bank choose nobody: `choosers` null, and `u` is not read.
template <typename T>
struct NeighborPositives {
  const int64_t* indices;  // [N, k]
  int64_t k;
  const T* neighbors;  // [N or Q, D]: what the indices point into
  const Choosers* choosers;
  const double* positive_grad;  // [N]
};
void neighbor_gradients(const NeighborPositives<float>& chosen, int64_t begin, int64_t end, const float* u, int64_t d,
                        double scale, float* grad);
void neighbor_gradients(const NeighborPositives<double>& chosen, int64_t begin, int64_t end, const double* u, int64_t d,
                        double scale, double* grad);

}  // namespace ltood
