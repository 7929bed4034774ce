// One op for nt_xent, supcon, psd_loss, domain_loss and stage1_loss: sizes and the validation of its arguments.
//
//   s_ij = <u_i, u_j> / tau,  lse_i = log sum_{j != i} exp(s_ij)
//   instance part (`views`):  lse_i - (sum_{V(i)} s_iv + lam_i sum_{M_k(i)} s_im) / (|V(i)| + lam_i |M_k(i)|)
//   class part (`labels`):    lse_i - mean of s_ij over the other rows of i's label
// A row without positives has loss 0 and weight 0.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

#include <optional>

#include "common/check.h"
#include "common/dispatch.h"

namespace ltood {

using OptionalTensor = std::optional<at::Tensor>;

inline OptionalTensor dense(const OptionalTensor& x) { return x ? OptionalTensor(x->contiguous()) : std::nullopt; }

struct ContrastiveInputs {
  const at::Tensor& z;  // [N, D] float
  double temperature;
  const OptionalTensor& temperature_tensor;  // 0-d, wins over `temperature`
  bool normalize;
  bool views;                              // whether there is an instance part
  const OptionalTensor& instance_ids;      // [N] int64; none: rows i and i + N/2
  const OptionalTensor& labels;            // [N] int64; none: no class part
  int64_t k;                               // neighbours of the instance part, 0 = none
  double neighbor_weight;                  // lam
  const OptionalTensor& neighbor_weights;  // [N] float64, wins over `neighbor_weight`
  const OptionalTensor& domain;            // [N] int64
  const OptionalTensor& bank;              // [Q, D] float
  const OptionalTensor& bank_ids;          // [Q] int64
  const OptionalTensor& bank_domain;       // [Q] int64
};

struct ContrastiveSizes {
  int64_t n, d, q;
};

inline void check_vector(const char* op, const OptionalTensor& x, const char* name, c10::ScalarType dtype,
                         int64_t length, const at::Tensor& rows, const char* name_of_rows) {
  if (!x) return;
  LTOOD_CHECK_TYPE(x->scalar_type() == dtype, op, name, dtype, x->scalar_type());
  LTOOD_CHECK_VALUE(x->dim() == 1 && x->size(0) == length, op, name, c10::str("of shape [", length, "]"), "shape ",
                    x->sizes());
  LTOOD_CHECK_VALUE(x->device() == rows.device(), op, name, c10::str("on ", rows.device(), " as ", name_of_rows, " is"),
                    x->device());
}

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
  LTOOD_CHECK_VALUE(!in.bank_ids || in.instance_ids, "contrastive", "instance_ids", "given with bank_ids", "none");
  LTOOD_CHECK_VALUE(!in.bank_domain || in.domain, "contrastive", "domain", "given with bank_domain", "none");
  return sizes;
}

// What the forward returned must come back as it was.
inline void check_contrastive_bwd(const OptionalTensor& grad_instance, const OptionalTensor& grad_class,
                                  const OptionalTensor& grad_lse, const at::Tensor& z,
                                  const OptionalTensor& instance_ids, const OptionalTensor& labels,
                                  const OptionalTensor& neighbor_weights, const OptionalTensor& bank,
                                  const at::Tensor& lse, const at::Tensor& instance_weight,
                                  const at::Tensor& class_weight, const at::Tensor& cosines,
                                  const at::Tensor& indices) {
  const int64_t n = check_embeddings(z, bank).n;
  const c10::ScalarType dtype = wide_dtype(z.scalar_type());
  check_rows(grad_instance, "grad_instance", dtype, n, z);
  check_rows(grad_class, "grad_class", dtype, n, z);
  check_rows(grad_lse, "grad_lse", at::kDouble, n, z);
  check_rows(instance_ids, "instance_ids", at::kLong, n, z);
  check_rows(labels, "labels", at::kLong, n, z);
  check_rows(neighbor_weights, "neighbor_weights", at::kDouble, n, z);
  check_rows(lse, "lse", at::kDouble, n, z);
  check_rows(instance_weight, "instance_weight", at::kDouble, grad_instance ? n : instance_weight.numel(), z);
  check_rows(class_weight, "class_weight", at::kDouble, grad_class ? n : class_weight.numel(), z);
  LTOOD_CHECK_VALUE(!grad_class || labels, "contrastive_bwd", "labels", "given with grad_class", "none");
  const bool matrices = indices.dim() == 2 && indices.size(0) == n && cosines.sizes() == indices.sizes();
  LTOOD_CHECK_VALUE(matrices, "contrastive_bwd", "indices", c10::str("of shape [", n, ", k] as cosines is"), "shapes ",
                    indices.sizes(), " and ", cosines.sizes());
  LTOOD_CHECK_TYPE(indices.scalar_type() == at::kLong, "contrastive_bwd", "indices", "an int64 tensor",
                   indices.scalar_type());
}

}  // namespace ltood
