// Partial contrastive similarities: the rows of one process against the columns of all, or of one other.
//
//   s_ij = <u(x_i), u(y_j)> / tau; row i and column i + diagonal are the same embedding, a pair left out of everything
//   contrastive_partial        lse_i = log sum_j exp(s_ij), and the k best admissible columns of every row
//   excluded                   ids of rows and columns: columns of the row's id, if it is not -1, leave lse
//   contrastive_partial_bwd    grad_u_i = (1/tau) sum_j G_ij u(y_j), the gradient at u(x_i) of sum w lse over all rows:
//                              G_ij = x_weight_i exp(s_ij - x_lse_i) + y_weight_j exp(s_ij - y_lse_j)
// Partial problems that share no column combine: lse by logaddexp, the best columns by their cosines, lse_bwd by a sum.
#pragma once

#include <algorithm>

#include "ops/contrastive/contrastive.h"

namespace ltood {

struct PartialInputs {
  at::Tensor x;  // [n, D] float
  at::Tensor y;  // [M, D] of the same type
  Temperature temperature;
  bool normalize = true;
  int64_t diagonal = 0;
};

inline PartialInputs partial_inputs(const Arguments& arguments) {
  PartialInputs in;
  in.x = arguments.tensor("x");
  in.y = arguments.tensor("y");
  in.temperature = arguments.temperature();
  in.normalize = arguments.flag("normalize");
  in.diagonal = arguments.integer("diagonal");
  return in;
}

// The pairs that leave the log-sum-exp, though not the search.
struct PartialExcluded {
  OptionalTensor x, y;  // [n], [M] int64, -1 = none; both or neither
};

inline PartialExcluded partial_excluded(const Arguments& arguments) {
  return {arguments.dense("x_excluded"), arguments.dense("y_excluded")};
}

struct PartialSearch {
  int64_t k = 0;
  OptionalTensor x_instance, y_instance;  // [n], [M] int64; none: no rule
  OptionalTensor x_domain, y_domain;      // [n], [M] int64; none: no rule
};

inline PartialSearch partial_search(const Arguments& arguments) {
  PartialSearch search;
  search.k = arguments.integer("k");
  search.x_instance = arguments.dense("x_instance");
  search.y_instance = arguments.dense("y_instance");
  search.x_domain = arguments.dense("x_domain");
  search.y_domain = arguments.dense("y_domain");
  return search;
}

// Log-sum-exp and its gradient: of the rows, and of the columns as rows of another process.
struct PartialLseGrads {
  OptionalTensor x_lse, x_weight;  // [n] float64
  OptionalTensor y_lse, y_weight;  // [M] float64; none: the columns have no gradient
};

inline PartialLseGrads partial_lse_grads(const Arguments& arguments) {
  PartialLseGrads grads;
  grads.x_lse = arguments.dense("x_lse");
  grads.x_weight = arguments.dense("x_weight");
  grads.y_lse = arguments.dense("y_lse");
  grads.y_weight = arguments.dense("y_weight");
  return grads;
}

inline void check_contrastive_partial(const char* op, const PartialInputs& in) {
  LTOOD_CHECK_TYPE(at::isFloatingType(in.x.scalar_type()), op, "x", "a float tensor", in.x.scalar_type());
  LTOOD_CHECK_TYPE(in.y.scalar_type() == in.x.scalar_type(), op, "y", c10::str(in.x.scalar_type(), " as x is"),
                   in.y.scalar_type());
  LTOOD_CHECK_VALUE(in.x.dim() == 2 && in.x.numel() > 0, op, "x", "a non-empty matrix [n, D]", "shape ", in.x.sizes());
  LTOOD_CHECK_VALUE(in.y.dim() == 2 && in.y.size(0) > 0 && in.y.size(1) == in.x.size(1), op, "y",
                    "a non-empty matrix as wide as x", "shape ", in.y.sizes());
  LTOOD_CHECK_VALUE(in.y.device() == in.x.device(), op, "y", c10::str("on ", in.x.device(), " as x is"), in.y.device());
  check_temperature(op, in.temperature, in.x, "x");
}

inline void check_excluded(const char* op, const PartialInputs& in, const PartialExcluded& excluded) {
  check_vector(op, excluded.x, "x_excluded", at::kLong, in.x.size(0), in.x, "x");
  check_vector(op, excluded.y, "y_excluded", at::kLong, in.y.size(0), in.x, "x");
  LTOOD_CHECK_VALUE(excluded.x.has_value() == excluded.y.has_value(), op, "y_excluded",
                    "given when x_excluded is, and only then", excluded.y ? "one" : "none");
}

inline void check_contrastive_partial(const PartialInputs& in, const PartialExcluded& excluded,
                                      const PartialSearch& search) {
  const char* op = "contrastive_partial";
  check_contrastive_partial(op, in);
  check_excluded(op, in, excluded);
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

inline void check_contrastive_partial_bwd(const PartialInputs& in, const PartialExcluded& excluded,
                                          const PartialLseGrads& rows) {
  const char* op = "contrastive_partial_bwd";
  check_contrastive_partial(op, in);
  check_excluded(op, in, excluded);
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
