// Partial contrastive similarities: the rows of one process against the columns of all, or of one other.
//
//   s_ij = <u(x_i), u(y_j)> / tau; row i and column i + diagonal are the same embedding, a pair left out of everything
//   contrastive_partial        lse_i = log sum_j exp(s_ij), and the k best admissible columns of every row
//   contrastive_partial_bwd   grad_u_i = (1/tau) sum_j G_ij u(y_j), the gradient at u(x_i) of sum w lse over all rows:
//                            G_ij = x_weight_i exp(s_ij - x_lse_i) + y_weight_j exp(s_ij - y_lse_j)
// Partial problems that share no column combine: lse by logaddexp, the best columns by their cosines, lse_bwd by a sum.
#pragma once

#include <algorithm>

#include "ops/contrastive/contrastive.h"

namespace ltood {

struct PartialInputs {
  const at::Tensor& x;  // [n, D] float
  const at::Tensor& y;  // [M, D] of the same type
  double temperature;
  const OptionalTensor& temperature_tensor;  // 0-d, wins over `temperature`
  bool normalize;
  int64_t diagonal;
};

struct PartialSearch {
  int64_t k;
  OptionalTensor x_instance, y_instance;  // [n], [M] int64; none: no rule
  OptionalTensor x_domain, y_domain;      // [n], [M] int64; none: no rule
};

// Log-sum-exp and the gradient that arrives at it: of the rows, and of the columns as rows of another process.
struct PartialLseGrads {
  OptionalTensor x_lse, x_weight;  // [n] float64
  OptionalTensor y_lse, y_weight;  // [M] float64; none: the columns have no gradient
};

inline void check_contrastive_partial(const char* op, const PartialInputs& in) {
  LTOOD_CHECK_TYPE(at::isFloatingType(in.x.scalar_type()), op, "x", "a float tensor", in.x.scalar_type());
  LTOOD_CHECK_TYPE(in.y.scalar_type() == in.x.scalar_type(), op, "y", c10::str(in.x.scalar_type(), " as x is"),
                   in.y.scalar_type());
  LTOOD_CHECK_VALUE(in.x.dim() == 2 && in.x.numel() > 0, op, "x", "a non-empty matrix [n, D]", "shape ", in.x.sizes());
  LTOOD_CHECK_VALUE(in.y.dim() == 2 && in.y.size(0) > 0 && in.y.size(1) == in.x.size(1), op, "y",
                    "a non-empty matrix as wide as x", "shape ", in.y.sizes());
  LTOOD_CHECK_VALUE(in.y.device() == in.x.device(), op, "y", c10::str("on ", in.x.device(), " as x is"), in.y.device());
  if (!in.temperature_tensor) return;
  LTOOD_CHECK_VALUE(in.temperature_tensor->dim() == 0, op, "temperature", "a float or a 0-d float tensor", "shape ",
                    in.temperature_tensor->sizes());
  LTOOD_CHECK_VALUE(in.temperature_tensor->device() == in.x.device(), op, "temperature",
                    c10::str("on ", in.x.device(), " as x is"), in.temperature_tensor->device());
}

inline void check_contrastive_partial(const PartialInputs& in, const PartialSearch& search) {
  const char* op = "contrastive_partial";
  check_contrastive_partial(op, in);
  LTOOD_CHECK_VALUE(search.k >= 0, op, "k", "at least 0", search.k);
  check_vector(op, search.x_instance, "x_instance", at::kLong, in.x.size(0), in.x, "x");
  check_vector(op, search.y_instance, "y_instance", at::kLong, in.y.size(0), in.x, "x");
  check_vector(op, search.x_domain, "x_domain", at::kLong, in.x.size(0), in.x, "x");
  check_vector(op, search.y_domain, "y_domain", at::kLong, in.y.size(0), in.x, "x");
  LTOOD_CHECK_VALUE(search.x_instance.has_value() == search.y_instance.has_value(), op, "y_instance",
                    "given when x_instance is, and only then", search.y_instance ? "one" : "none");
  LTOOD_CHECK_VALUE(search.x_domain.has_value() == search.y_domain.has_value(), op, "y_domain",
                    "given when x_domain is, and only then", search.y_domain ? "one" : "none");
}

inline void check_contrastive_partial_bwd(const PartialInputs& in, const PartialLseGrads& rows) {
  const char* op = "contrastive_partial_bwd";
  check_contrastive_partial(op, in);
  check_vector(op, rows.x_lse, "x_lse", at::kDouble, in.x.size(0), in.x, "x");
  check_vector(op, rows.x_weight, "x_weight", at::kDouble, in.x.size(0), in.x, "x");
  check_vector(op, rows.y_lse, "y_lse", at::kDouble, in.y.size(0), in.x, "x");
  check_vector(op, rows.y_weight, "y_weight", at::kDouble, in.y.size(0), in.x, "x");
  LTOOD_CHECK_VALUE(rows.y_lse.has_value() == rows.y_weight.has_value(), op, "y_weight",
                    "given when y_lse is, and only then", rows.y_weight ? "one" : "none");
}

// The same pairs, within what sums of indices can hold: a diagonal outside (-n, M) meets nothing.
inline int64_t bounded_diagonal(const PartialInputs& in) {
  return std::clamp(in.diagonal, -in.x.size(0), in.y.size(0));
}

}  // namespace ltood
