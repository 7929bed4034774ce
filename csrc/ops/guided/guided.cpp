#include "ops/guided/guided.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/max.h>

#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/row_panels.h"

namespace ltood {

namespace {

void check_embeddings(const char* argument, const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  const bool known = dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  LTOOD_CHECK_TYPE(known, "guided", argument, "float64, float32, bfloat16 or float16", dtype);
  LTOOD_CHECK_VALUE(x.dim() == 2 && x.numel() > 0, "guided", argument, "a non-empty matrix", x.sizes());
}

void check_indices(const char* argument, const at::Tensor& x, int64_t low, int64_t high) {
  LTOOD_CHECK_TYPE(x.scalar_type() == at::kLong && x.is_contiguous(), "guided", argument, "contiguous int64",
                   x.dtype());
  if (!x.is_cpu()) return;
  const int64_t* values = x.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < x.numel(); ++i) {
    const bool inside = low <= values[i] && values[i] < high;
    LTOOD_CHECK_VALUE(inside, "guided", argument, c10::str("in [", low, ", ", high, ")"), values[i]);
  }
}

void check_devices(const GuidedArguments& a) {
  const auto check = [&](const char* argument, const OptionalTensor& x) {
    const bool fits = !x.has_value() || x->device() == a.z.device();
    LTOOD_CHECK_VALUE(fits, "guided", argument, c10::str("on the device of z, ", a.z.device()), x->device());
  };
  check("guide", a.guide);
  check("clusters", a.clusters);
  check("far", a.far);
  check("instance_ids", a.instance_ids);
  check("pos_idx", a.neighbors);
}

// Fields that both kinds of arguments share. A temperature that a CUDA device holds is not read.
GuidedArguments shared_arguments(const Arguments& arguments, const char* op, const char* rows) {
  GuidedArguments in;
  in.z = arguments.tensor(rows);
  in.far = arguments.optional("far");
  in.tau = arguments.temperature();
  check_temperature(op, in.tau, in.z, rows);
  const bool on_device = in.tau.tensor && !in.tau.tensor->is_cpu();
  in.temperature = on_device ? 1.0 : in.tau.value();
  in.teacher_temperature = arguments.optional_number("teacher_temperature");
  in.force.gamma = arguments.number("gamma");
  in.force.weighted = arguments.flag("weighted") && in.force.gamma != 0;
  in.normalize = arguments.flag("normalize");
  return in;
}

}  // namespace

GuidedArguments guided_arguments(const Arguments& arguments) {
  GuidedArguments in = shared_arguments(arguments, "guided", "z");
  in.guide = arguments.tensor("guide");
  in.clusters = arguments.optional("clusters");
  in.instance_ids = arguments.optional("instance_ids");
  in.neighbors = arguments.optional("pos_idx");
  in.distill = arguments.flag("distill");
  return in;
}

GuidedArguments guided_partial_arguments(const Arguments& arguments) {
  GuidedArguments in = shared_arguments(arguments, "guided_partial", "y");
  in.guide = arguments.tensor("y_guide");
  const at::Tensor& x = arguments.tensor("x");
  check_embeddings("x", x);
  check_embeddings("y", in.z);
  for (const char* name : {"x_clusters", "x_instance"}) {
    check_vector("guided_partial", arguments.optional(name), name, at::kLong, x.size(0), x, "x");
  }
  for (const char* name : {"y_clusters", "y_instance"}) {
    check_vector("guided_partial", arguments.optional(name), name, at::kLong, in.z.size(0), x, "x");
  }
  in.clusters = both("clusters", arguments.optional("x_clusters"), arguments.optional("y_clusters"));
  in.instance_ids = both("instance", arguments.optional("x_instance"), arguments.optional("y_instance"));
  in.rows = GuidedRows{x, arguments.tensor("x_guide"), arguments.integer("diagonal")};
  return in;
}

GuidedSaved guided_saved(const Arguments& arguments) {
  GuidedSaved saved;
  saved.grad_loss = arguments.optional("grad_loss");
  saved.grad_lse = arguments.optional("grad_lse");
  saved.weight = arguments.tensor("weight");
  saved.lse = arguments.tensor("lse");
  saved.neighbors = arguments.tensor("neighbors");
  saved.grad_kl = arguments.optional("grad_kl");
  saved.grad_student_lse = arguments.optional("grad_student_lse");
  saved.student_lse = arguments.tensor("student_lse");
  saved.teacher_lse = arguments.tensor("teacher_lse");
  return saved;
}

GuidedStates guided_states(const Arguments& arguments) {
  GuidedStates states;
  states.x_contrast = arguments.optional("x_contrast");
  states.y_contrast = arguments.optional("y_contrast");
  states.x_distill = arguments.optional("x_distill");
  states.y_distill = arguments.optional("y_distill");
  return states;
}

c10::ScalarType compute_dtype(const GuidedArguments& a) {
  const auto longest = [&](const at::Tensor& z) {
    if (a.normalize) return 1.0;
    const double norm = at::linalg_vector_norm(z, 2, at::IntArrayRef{1}, false, at::kDouble).max().item().toDouble();
    // The squares of finite float64 rows can overflow: such rows are refused, those with Inf are not.
    return std::isinf(norm) && at::isfinite(z).all().item().toBool() ? 1e150 : norm;
  };
  const double product = longest(a.z) * longest(a.rows.has_value() ? a.rows->z : a.z);
  const double largest = std::max(product / a.temperature, 1 / a.teacher());
  if (std::isfinite(product)) check_exponents("guided", largest);
  return largest <= kMaxFloatExponent ? wide_dtype(a.z.scalar_type()) : at::kDouble;
}

void check_guided(const GuidedArguments& a, int64_t k) {
  LTOOD_CHECK_VALUE(k >= 0, "guided", "k", "at least 0", k);
  check_embeddings("z", a.z);
  check_embeddings("guide", a.guide);
  const int64_t n = a.n();
  check_devices(a);
  LTOOD_CHECK_VALUE(a.guide.size(0) == a.z.size(0), "guided", "guide", "of as many rows as z", a.guide.sizes());
  LTOOD_CHECK_VALUE(a.temperature > 0, "guided", "temperature", "positive", a.temperature);
  LTOOD_CHECK_VALUE(a.teacher() > 0, "guided", "teacher_temperature", "positive", a.teacher());
  LTOOD_CHECK_VALUE(a.force.gamma >= 0, "guided", "gamma", "non-negative", a.force.gamma);
  if (!a.clusters.has_value()) {
    LTOOD_CHECK_VALUE(a.distill, "guided", "clusters", "given when distill is false", "none");
    return;
  }
  LTOOD_CHECK_VALUE(a.far.has_value() && a.far->dim() == 1 && a.far->numel() > 0, "guided", "far", "of shape [K]",
                    a.far.has_value() ? c10::str(a.far->sizes()) : "none");
  LTOOD_CHECK_VALUE(a.clusters->dim() == 1 && a.clusters->size(0) == n, "guided", "clusters", "of shape [N]",
                    a.clusters->sizes());
  check_indices("far", *a.far, 0, a.far->numel());
  check_indices("clusters", *a.clusters, 0, a.far->numel());
  if (a.instance_ids.has_value()) {
    LTOOD_CHECK_TYPE(a.instance_ids->scalar_type() == at::kLong && a.instance_ids->is_contiguous(), "guided",
                     "instance_ids", "contiguous int64", a.instance_ids->dtype());
    LTOOD_CHECK_VALUE(a.instance_ids->dim() == 1 && a.instance_ids->size(0) == n, "guided", "instance_ids",
                      "of shape [N]", a.instance_ids->sizes());
  } else {
    LTOOD_CHECK_VALUE(n % 2 == 0, "guided", "instance_ids", "given for an odd number of rows", "none");
  }
  if (a.neighbors.has_value()) {
    LTOOD_CHECK_VALUE(a.neighbors->dim() == 2 && a.neighbors->size(0) == n, "guided", "pos_idx", "of shape [N, k]",
                      a.neighbors->sizes());
    check_indices("pos_idx", *a.neighbors, -1, n);
  }
}

void check_guided_bwd(const GuidedArguments& a, const GuidedSaved& saved) {
  check_guided(a, 0);
  const auto check_rows = [&](const char* argument, const OptionalTensor& x, bool used) {
    const bool fits = !used || !x.has_value() || (x->dim() == 1 && x->size(0) == a.n());
    LTOOD_CHECK_VALUE(fits, "guided_bwd", argument, "of shape [N]", x->sizes());
  };
  check_rows("grad_loss", saved.grad_loss, a.clusters.has_value());
  check_rows("grad_lse", saved.grad_lse, a.clusters.has_value());
  check_rows("weight", saved.weight, a.clusters.has_value());
  check_rows("lse", saved.lse, a.clusters.has_value());
  check_rows("grad_kl", saved.grad_kl, a.distill);
  check_rows("grad_student_lse", saved.grad_student_lse, a.distill);
  check_rows("student_lse", saved.student_lse, a.distill);
  check_rows("teacher_lse", saved.teacher_lse, a.distill);
}

OptionalTensor both(const char* argument, const OptionalTensor& x, const OptionalTensor& y) {
  LTOOD_CHECK_VALUE(x.has_value() == y.has_value(), "guided_partial", argument, "given of the rows and of the columns",
                    "one of them");
  if (!x.has_value()) return std::nullopt;
  return at::cat({*y, *x});
}

namespace {

void check_partial_rows(const GuidedArguments& a, int64_t k) {
  const GuidedRows& rows = *a.rows;
  check_embeddings("x", rows.z);
  check_embeddings("x_guide", rows.guide);
  const auto check_like = [](const char* argument, const at::Tensor& x, const at::Tensor& y) {
    const bool like = x.scalar_type() == y.scalar_type() && x.size(1) == y.size(1) && x.device() == y.device();
    LTOOD_CHECK_VALUE(like, "guided_partial", argument, "of the type, width and device of the columns", x.sizes());
  };
  check_guided(a, k);
  check_like("x", rows.z, a.z);
  check_like("x_guide", rows.guide, a.guide);
  LTOOD_CHECK_VALUE(rows.guide.size(0) == rows.z.size(0), "guided_partial", "x_guide", "of as many rows as x",
                    rows.guide.sizes());
  const bool has_views = !a.clusters.has_value() || a.instance_ids.has_value();
  LTOOD_CHECK_VALUE(has_views, "guided_partial", "x_instance", "given where clusters are", "none");
}

}  // namespace

void check_guided_partial(const GuidedArguments& a, const OptionalTensor& x_every, int64_t k) {
  check_partial_rows(a, k);
  const at::Tensor& x = a.rows->z;
  const bool fits = !x_every.has_value() || (x_every->scalar_type() == at::kBool && x_every->is_contiguous() &&
                                             x_every->numel() == x.size(0) && x_every->device() == x.device());
  LTOOD_CHECK_VALUE(fits, "guided_partial", "x_every", "contiguous bool of shape [n] on the device of x",
                    c10::str(x_every->dtype(), " ", x_every->sizes(), " on ", x_every->device()));
}

void check_guided_partial_bwd(const GuidedArguments& a, const GuidedStates& states) {
  check_partial_rows(a, 0);
  const auto check = [&](const char* argument, const OptionalTensor& x, bool used, int64_t rows) {
    const bool fits = x.has_value() == used && (!used || (x->scalar_type() == at::kDouble && x->dim() == 2 &&
                                                          x->size(0) == rows && x->size(1) == kStateColumns));
    LTOOD_CHECK_VALUE(fits, "guided_partial_bwd", argument, "float64 with a row of 4 for each row, where its part is",
                      x.has_value() ? c10::str(x->sizes()) : "none");
  };
  check("x_contrast", states.x_contrast, a.clusters.has_value(), a.rows->z.size(0));
  check("y_contrast", states.y_contrast, a.clusters.has_value(), a.z.size(0));
  check("x_distill", states.x_distill, a.distill, a.rows->z.size(0));
  check("y_distill", states.y_distill, a.distill, a.z.size(0));
}

}  // namespace ltood
