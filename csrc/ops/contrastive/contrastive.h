// One op for nt_xent, supcon, psd_loss, domain_loss and stage1_loss: sizes and the validation of its arguments.
//
//   s_ij = <u_i, u_j> / tau,  lse_i = log sum_{j != i} exp(s_ij)
//   instance part (`views`):  lse_i - (sum_{V(i)} s_iv + lam_i sum_{M_k(i)} s_im) / (|V(i)| + lam_i |M_k(i)|)
//   class part (`labels`):    lse_i - mean of s_ij over the other rows of i's label
// A row without positives has loss 0 and weight 0. `decoupled`: lse_i is over the negatives alone, the rows that are
// no positives of i; a row without negatives has loss 0 and weight 0 too.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

#include <optional>

#include "common/arguments.h"
#include "common/check.h"
#include "common/dispatch.h"

namespace ltood {

struct ContrastiveInputs {
  at::Tensor z;  // [N, D] float
  Temperature temperature;
  bool normalize = true;
  bool views = true;                // whether there is an instance part
  bool decoupled = false;           // whether the positives leave the denominator
  OptionalTensor instance_ids;      // [N] int64; none: rows i and i + N/2
  OptionalTensor labels;            // [N] int64; none: no class part
  int64_t k = 0;                    // neighbours of the instance part
  double neighbor_weight = 1;       // lam
  OptionalTensor neighbor_weights;  // [N] float64, wins over `neighbor_weight`
  OptionalTensor domain;            // [N] int64
  OptionalTensor bank;              // [Q, D] float
  OptionalTensor bank_ids;          // [Q] int64
  OptionalTensor bank_domain;       // [Q] int64
};

inline ContrastiveInputs contrastive_inputs(const Arguments& arguments) {
  ContrastiveInputs in;
  in.z = arguments.tensor("z");
  in.temperature = arguments.temperature();
  in.normalize = arguments.flag("normalize");
  in.views = arguments.flag("views");
  in.decoupled = arguments.flag("decoupled");
  in.instance_ids = arguments.dense("instance_ids");
  in.labels = arguments.dense("labels");
  in.k = arguments.integer("k");
  in.neighbor_weight = arguments.number("neighbor_weight");
  in.neighbor_weights = arguments.dense("neighbor_weights");
  in.domain = arguments.dense("domain");
  in.bank = arguments.optional("bank");
  in.bank_ids = arguments.dense("bank_ids");
  in.bank_domain = arguments.dense("bank_domain");
  return in;
}

// The forward's saved tensors, and the gradients of its outputs; none = 0.
struct ContrastiveSaved {
  OptionalTensor grad_instance, grad_class, grad_lse;  // [N]
  at::Tensor lse, instance_weight, class_weight;       // [N], the weights empty where their part is disabled
  at::Tensor cosines, indices;                         // [N, k]
};

inline ContrastiveSaved contrastive_saved(const Arguments& arguments) {
  ContrastiveSaved saved;
  saved.grad_instance = arguments.dense("grad_instance_loss");
  saved.grad_class = arguments.dense("grad_class_loss");
  saved.grad_lse = arguments.dense("grad_lse");
  saved.lse = arguments.tensor("lse").contiguous();
  saved.instance_weight = arguments.tensor("instance_weight").contiguous();
  saved.class_weight = arguments.tensor("class_weight").contiguous();
  saved.cosines = arguments.tensor("cosines").contiguous();
  saved.indices = arguments.tensor("indices").contiguous();
  return saved;
}

struct ContrastiveSizes {
  int64_t n, d, q;
};

inline void check_rows(const OptionalTensor& x, const char* name, c10::ScalarType dtype, int64_t length,
                       const at::Tensor& z) {
  check_vector("contrastive", x, name, dtype, length, z, "z");
}

inline ContrastiveSizes check_embeddings(const at::Tensor& z, const OptionalTensor& bank) {
  LTOOD_CHECK_TYPE(at::isFloatingType(z.scalar_type()), "contrastive", "z", "a float tensor", z.scalar_type());
  LTOOD_CHECK_VALUE(z.dim() == 2 && z.numel() > 0, "contrastive", "z", "a non-empty matrix [N, D]", "shape ",
                    z.sizes());
  ContrastiveSizes sizes{z.size(0), z.size(1), 0};
  if (!bank) return sizes;
  LTOOD_CHECK_TYPE(at::isFloatingType(bank->scalar_type()), "contrastive", "bank", "a float tensor",
                   bank->scalar_type());
  LTOOD_CHECK_VALUE(bank->dim() == 2 && bank->size(0) > 0 && bank->size(1) == sizes.d, "contrastive", "bank",
                    "a non-empty matrix as wide as z", "shape ", bank->sizes());
  LTOOD_CHECK_VALUE(bank->device() == z.device(), "contrastive", "bank", c10::str("on ", z.device(), " as z is"),
                    bank->device());
  sizes.q = bank->size(0);
  return sizes;
}

inline ContrastiveSizes check_contrastive(const ContrastiveInputs& in) {
  const ContrastiveSizes sizes = check_embeddings(in.z, in.bank);
  check_temperature("contrastive", in.temperature, in.z, "z");
  const int64_t n = sizes.n;
  check_rows(in.instance_ids, "instance_ids", at::kLong, n, in.z);
  check_rows(in.labels, "labels", at::kLong, n, in.z);
  check_rows(in.neighbor_weights, "neighbor_weights", at::kDouble, n, in.z);
  check_rows(in.domain, "domain", at::kLong, n, in.z);
  check_rows(in.bank_ids, "bank_ids", at::kLong, sizes.q, in.z);
  check_rows(in.bank_domain, "bank_domain", at::kLong, sizes.q, in.z);
  LTOOD_CHECK_VALUE(in.views || in.labels, "contrastive", "views", "true when there are no labels", "false");
  LTOOD_CHECK_VALUE(!in.views || in.instance_ids || n % 2 == 0, "contrastive", "instance_ids",
                    "given when the number of rows is odd", "none for ", n, " rows");
  const int64_t candidates = in.bank ? sizes.q : n - 1;
  LTOOD_CHECK_VALUE(in.k >= 0 && in.k <= candidates && (in.k == 0 || in.views), "contrastive", "k",
                    c10::str("in [0, ", candidates, "], and 0 without views"), in.k);
  LTOOD_CHECK_VALUE(!in.decoupled || (in.k == 0 && in.views != in.labels.has_value()), "contrastive", "decoupled",
                    "false with neighbours, and where there are both views and labels", "true");
  LTOOD_CHECK_VALUE(!in.bank_ids || in.instance_ids, "contrastive", "instance_ids", "given with bank_ids", "none");
  LTOOD_CHECK_VALUE(!in.bank_domain || in.domain, "contrastive", "domain", "given with bank_domain", "none");
  return sizes;
}

// The backward takes the forward's outputs unchanged.
inline void check_contrastive_bwd(const ContrastiveInputs& in, const ContrastiveSaved& saved) {
  const at::Tensor& z = in.z;
  const int64_t n = check_embeddings(z, in.bank).n;
  check_temperature("contrastive_bwd", in.temperature, z, "z");
  LTOOD_CHECK_VALUE(!in.decoupled || in.views != in.labels.has_value(), "contrastive_bwd", "decoupled",
                    "false where there are both views and labels", "true");
  const c10::ScalarType dtype = wide_dtype(z.scalar_type());
  check_rows(saved.grad_instance, "grad_instance_loss", dtype, n, z);
  check_rows(saved.grad_class, "grad_class_loss", dtype, n, z);
  check_rows(saved.grad_lse, "grad_lse", at::kDouble, n, z);
  check_rows(in.instance_ids, "instance_ids", at::kLong, n, z);
  check_rows(in.labels, "labels", at::kLong, n, z);
  check_rows(in.neighbor_weights, "neighbor_weights", at::kDouble, n, z);
  check_rows(saved.lse, "lse", at::kDouble, n, z);
  check_rows(saved.instance_weight, "instance_weight", at::kDouble,
             saved.grad_instance ? n : saved.instance_weight.numel(), z);
  check_rows(saved.class_weight, "class_weight", at::kDouble, saved.grad_class ? n : saved.class_weight.numel(), z);
  LTOOD_CHECK_VALUE(!saved.grad_class || in.labels, "contrastive_bwd", "labels", "given with grad_class_loss", "none");
  const at::Tensor& indices = saved.indices;
  const bool matrices = indices.dim() == 2 && indices.size(0) == n && saved.cosines.sizes() == indices.sizes();
  LTOOD_CHECK_VALUE(matrices, "contrastive_bwd", "indices", c10::str("of shape [", n, ", k] as cosines is"), "shapes ",
                    indices.sizes(), " and ", saved.cosines.sizes());
  LTOOD_CHECK_TYPE(indices.scalar_type() == at::kLong, "contrastive_bwd", "indices", "an int64 tensor",
                   indices.scalar_type());
}

}  // namespace ltood
