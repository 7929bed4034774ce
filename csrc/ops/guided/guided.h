// Arguments of the guided family, checked: nothing reaches a kernel past check_guided().
//
// One op serves guided_contrastive (clusters given), relational_distill (distill) and stage2_loss (both). Legend: N
// rows, D and Dg features, K clusters, k neighbours. The formulas are in ltood_fast/reference/guided.py.
//
// Over a process group the same tiles are a partial problem: rows of one process [n] against the columns of others [M].
//   guided_partial        sums over the columns, which combine with those of other columns; positives: the views alone
//   guided_partial_bwd    (1/tau) sum_j (G_ij + G_ji) u(y_j), the gradient at u(x_i) of all rows' losses, from the
//                         states of both sides; without the neighbours, whose pairs the caller adds
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/arguments.h"
#include "ops/guided/state.h"

namespace ltood {

// The rows of a partial problem: row i is the same embedding as column i + diagonal, if there is such a column.
struct GuidedRows {
  at::Tensor z;      // [n, D]
  at::Tensor guide;  // [n, Dg]
  int64_t diagonal;
};

struct GuidedArguments {
  at::Tensor z;                 // [N, D] float64, float32, bfloat16 or float16
  at::Tensor guide;             // [N, Dg] the same choice
  OptionalTensor clusters;      // [N] int64 in [0, K); none: no contrastive part
  OptionalTensor far;           // [K] int64 in [0, K)
  OptionalTensor instance_ids;  // [N] int64; none: rows i and i + N/2 are views of one image
  OptionalTensor neighbors;     // [N, k] int64 in [-1, N), -1 = none; not given: search for them
  Temperature tau;
  double temperature = 1;                     // the value of tau, 1 where a CUDA device holds it
  std::optional<double> teacher_temperature;  // none: the student's
  Force force{};
  bool normalize = true;
  bool distill = false;
  std::optional<GuidedRows> rows;  // then the above are columns first, and N counts these rows too

  double teacher() const { return teacher_temperature.value_or(temperature); }
  int64_t n() const { return z.size(0) + (rows.has_value() ? rows->z.size(0) : 0); }
};

GuidedArguments guided_arguments(const Arguments& arguments);

// Arguments of the operators of a partial problem. Raises ValueError where only the rows or only the columns have
// clusters or instances.
GuidedArguments guided_partial_arguments(const Arguments& arguments);

// The type to compute in: double for float64 rows, and where an exponent <z_i, z_j> / tau of float32 rows can exceed
// 128 (long unnormalised rows, tau < 1/128): rounding it to float would move a softmax by 128 * 2^-24 = 10^-5.
c10::ScalarType compute_dtype(const GuidedArguments& arguments);

// The forward's saved tensors, and the gradients of its outputs; none = 0. [N] by row.
struct GuidedSaved {
  OptionalTensor grad_loss, grad_lse;  // contrast
  at::Tensor weight, lse, neighbors;
  OptionalTensor grad_kl, grad_student_lse;  // distill
  at::Tensor student_lse, teacher_lse;
};

GuidedSaved guided_saved(const Arguments& arguments);

// The four doubles of state.h for every row and column of a partial problem; none: that loss is disabled.
struct GuidedStates {
  OptionalTensor x_contrast, y_contrast;  // [., 4] kContrast*
  OptionalTensor x_distill, y_distill;    // [., 4] kDistill*
};

GuidedStates guided_states(const Arguments& arguments);

// Columns, then rows: what a partial problem knows of both. Raises ValueError where only one of them is given.
OptionalTensor both(const char* argument, const OptionalTensor& x, const OptionalTensor& y);

// Raise ValueError or TypeError. Integer values are read on the CPU alone: elsewhere that would wait for the device,
// and the kernels take what is out of range for no cluster and no neighbour.
void check_guided(const GuidedArguments& arguments, int64_t k);
void check_guided_bwd(const GuidedArguments& arguments, const GuidedSaved& saved);
void check_guided_partial(const GuidedArguments& arguments, const OptionalTensor& x_every, int64_t k);
void check_guided_partial_bwd(const GuidedArguments& arguments, const GuidedStates& states);

}  // namespace ltood
