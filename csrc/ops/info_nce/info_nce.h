// Contrastive losses between two sets of embeddings: sizes and the validation of the arguments.
//
//   s_ij = <u_i, k_j> / tau over the columns: the rows of positive_key, or those of negative_keys where they are given
//   p(i) = i or target_i, the positive of row i among positive_key; columns with the id of row i are left out
//   rest_i = log sum exp(s_ij) over the columns of row i without p(i)
//   lse_i = log(exp(rest_i) + exp(s_ip)), loss_i = lse_i - s_ip = log(1 + exp(rest_i - s_ip))
//   decoupled        lse_i = rest_i
//   label smoothing  (1 - e) loss_i + e (lse_i - mean of s_ij over the columns and p(i))
// `symmetric` adds the same for the keys as rows, over the queries as columns.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

#include "common/arguments.h"
#include "common/check.h"
#include "common/dispatch.h"

namespace ltood {

struct InfoNceInputs {
  at::Tensor query;              // [N, D] float
  at::Tensor positive_key;       // [M, D] float
  OptionalTensor negative_keys;  // [Q, D] float
  Temperature temperature;
  OptionalTensor target;     // [N] int64, rows of positive_key; none: row i
  OptionalTensor query_ids;  // [N] int64
  OptionalTensor key_ids;    // int64, one a column
  bool normalize = true;
  bool symmetric = false;
  bool decoupled = false;
  double label_smoothing = 0;

  const at::Tensor& columns() const { return negative_keys ? *negative_keys : positive_key; }
  // The type of sums and results.
  c10::ScalarType wide() const {
    const bool doubles = query.scalar_type() == at::kDouble || positive_key.scalar_type() == at::kDouble ||
                         columns().scalar_type() == at::kDouble;
    return doubles ? at::kDouble : at::kFloat;
  }
};

inline InfoNceInputs info_nce_inputs(const Arguments& arguments) {
  InfoNceInputs in;
  in.query = arguments.tensor("query");
  in.positive_key = arguments.tensor("positive_key");
  in.negative_keys = arguments.optional("negative_keys");
  in.temperature = arguments.temperature();
  in.target = arguments.dense("target");
  in.query_ids = arguments.dense("query_ids");
  in.key_ids = arguments.dense("key_ids");
  in.normalize = arguments.flag("normalize");
  in.symmetric = arguments.flag("symmetric");
  in.decoupled = arguments.flag("decoupled");
  in.label_smoothing = arguments.number("label_smoothing");
  return in;
}

// Saved by the forward for each direction: rest_i = largest_i / tau + log_sum_i over the columns of row i without p(i).
// The count of those columns is 0 without label smoothing.
enum InfoNceStat : int64_t { kLargestStat, kLogSumStat, kCountStat, kStats };

// The forward's saved tensor, and the gradients of its outputs; none = 0. stats: [kStats, N], with those of the keys
// below [2 kStats, N].
struct InfoNceSaved {
  OptionalTensor grad_loss, grad_key_loss;  // [N]
  OptionalTensor grad_lse, grad_key_lse;    // [N] float64
  at::Tensor stats;
  bool need_query, need_positive_key, need_negative_keys, need_temperature;
};

inline InfoNceSaved info_nce_saved(const Arguments& arguments) {
  InfoNceSaved saved;
  saved.grad_loss = arguments.dense("grad_loss");
  saved.grad_key_loss = arguments.dense("grad_key_loss");
  saved.grad_lse = arguments.dense("grad_lse");
  saved.grad_key_lse = arguments.dense("grad_key_lse");
  saved.stats = arguments.tensor("stats").contiguous();
  saved.need_query = arguments.flag("need_query");
  saved.need_positive_key = arguments.flag("need_positive_key");
  saved.need_negative_keys = arguments.flag("need_negative_keys");
  saved.need_temperature = arguments.flag("need_temperature_tensor");
  return saved;
}

inline void check_keys(const InfoNceInputs& in, const at::Tensor& keys, const char* name, bool allow_empty) {
  const at::Tensor& query = in.query;
  LTOOD_CHECK_TYPE(at::isFloatingType(keys.scalar_type()), "info_nce", name, "a float tensor", keys.scalar_type());
  LTOOD_CHECK_VALUE(keys.dim() == 2 && keys.size(1) == query.size(1) && (allow_empty || keys.size(0) > 0), "info_nce",
                    name, c10::str("a ", allow_empty ? "" : "non-empty ", "matrix as wide as query"), "shape ",
                    keys.sizes());
  LTOOD_CHECK_VALUE(keys.device() == query.device(), "info_nce", name, c10::str("on ", query.device(), " as query is"),
                    keys.device());
}

inline void check_info_nce(const InfoNceInputs& in) {
  const at::Tensor& query = in.query;
  LTOOD_CHECK_TYPE(at::isFloatingType(query.scalar_type()), "info_nce", "query", "a float tensor", query.scalar_type());
  LTOOD_CHECK_VALUE(query.dim() == 2 && query.numel() > 0, "info_nce", "query", "a non-empty matrix [N, D]", "shape ",
                    query.sizes());
  check_temperature("info_nce", in.temperature, query, "query");
  check_keys(in, in.positive_key, "positive_key", false);
  if (in.negative_keys) check_keys(in, *in.negative_keys, "negative_keys", true);
  const int64_t n = query.size(0), m = in.positive_key.size(0);
  check_vector("info_nce", in.target, "target", at::kLong, n, query, "query");
  check_vector("info_nce", in.query_ids, "query_ids", at::kLong, n, query, "query");
  check_vector("info_nce", in.key_ids, "key_ids", at::kLong, in.columns().size(0), query, "query");
  LTOOD_CHECK_VALUE(in.target || m >= n, "info_nce", "positive_key",
                    c10::str("of at least ", n, " rows, one for each query (or pass target)"), m);
  LTOOD_CHECK_VALUE(!in.symmetric || (m == n && !in.target && !in.negative_keys), "info_nce", "symmetric",
                    "false unless every query has one row of positive_key, without target and negative_keys", "true");
  LTOOD_CHECK_VALUE(in.query_ids.has_value() == in.key_ids.has_value(), "info_nce", "key_ids",
                    "given when query_ids are, and only then", in.key_ids ? "ids" : "none");
  LTOOD_CHECK_VALUE(!in.decoupled || in.label_smoothing == 0, "info_nce", "label_smoothing", "0 with decoupled",
                    in.label_smoothing);
}

// The backward takes the forward's outputs unchanged.
inline void check_info_nce_bwd(const InfoNceInputs& in, const InfoNceSaved& saved) {
  check_info_nce(in);
  const int64_t n = in.query.size(0), directions = in.symmetric ? 2 : 1;
  check_vector("info_nce_bwd", saved.grad_loss, "grad_loss", in.wide(), n, in.query, "query");
  check_vector("info_nce_bwd", saved.grad_key_loss, "grad_key_loss", in.wide(), n, in.query, "query");
  check_vector("info_nce_bwd", saved.grad_lse, "grad_lse", at::kDouble, n, in.query, "query");
  check_vector("info_nce_bwd", saved.grad_key_lse, "grad_key_lse", at::kDouble, n, in.query, "query");
  LTOOD_CHECK_VALUE(in.symmetric || (!saved.grad_key_loss && !saved.grad_key_lse), "info_nce_bwd", "symmetric",
                    "true with gradients of the keys' direction", "false");
  LTOOD_CHECK_TYPE(saved.stats.scalar_type() == at::kDouble, "info_nce_bwd", "stats", at::kDouble,
                   saved.stats.scalar_type());
  LTOOD_CHECK_VALUE(saved.stats.dim() == 2 && saved.stats.size(0) == kStats * directions && saved.stats.size(1) == n,
                    "info_nce_bwd", "stats", c10::str("of shape [", kStats * directions, ", ", n, "]"), "shape ",
                    saved.stats.sizes());
}

}  // namespace ltood
