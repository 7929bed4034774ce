// What the guided losses of a square ask of all pairs of rows, each pair computed once: a tile of the upper triangle
// serves its rows and its columns, by row throughout. Partial problems, and exponents too large for sums that are not
// shifted, take the tiles of rows.h, where every row looks at its columns alone.
//
//   forward   the guide's nearest rows; sum 2^s, 2^t, 2^t (t - s), 2^s - 2^t of every row
//   backward  dL/du_i = (1/tau) sum_j H_ij u_j,   H_ij = (A_i + A_j) 2^s_ij - (B_i + B_j) 2^t_ij = H_ji,
//             A = dL/dlse_student exp(-lse_student), B = dL/dkl exp(-lse_teacher), dL/dkl counted in A too
//
// FLOP a pair of rows i < j: 2 (D + Dg) forward and 6 D + 2 Dg backward, where rows on their own take twice 2 (D + Dg)
// and twice 4 D + 2 Dg; exponentials: two and two, where those take four and eight.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "ops/guided/cpu/tile.h"
#include "ops/guided/guided.h"

namespace ltood {

// Whether the divergences of the arguments can be had this way, in T.
template <typename T>
bool pairs_serve(const GuidedArguments& arguments);

// The guide's k nearest rows of other images, [N, k] int64, -1 where there are fewer (k = 0: none); and, with
// `divergence`, its [N] sums.
template <typename T>
at::Tensor forward_pairs(const GuidedArguments& arguments, int64_t k, std::vector<DivergenceSum<T>>* divergence);

// sum_j H_ij u_j, [N, D] in T.
template <typename T>
at::Tensor backward_pairs(const GuidedArguments& arguments, const GuidedSaved& saved);

}  // namespace ltood
