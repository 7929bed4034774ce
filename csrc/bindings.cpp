// All operator schemas, and the Python module that carries them. No logic lives here.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "common/simd.h"

#ifdef LTOOD_WITH_CUDA
#include "cuda/probe.h"
#endif

// Inputs that several schemas share. Tensors come first, as torch.library differentiates no keyword-only tensor; all
// else is keyword-only, with defaults. A backward takes the gradients of the outputs, the outputs that its forward
// saves, and all inputs; ltood_fast/ops/_schema.py joins the two by these names.
#define TEMPERATURE "float temperature=1.0"

#define CONTRASTIVE_INPUTS                                                                         \
  "Tensor z, Tensor? temperature_tensor=None, Tensor? instance_ids=None, Tensor? labels=None, "    \
  "Tensor? neighbor_weights=None, Tensor? domain=None, Tensor? bank=None, Tensor? bank_ids=None, " \
  "Tensor? bank_domain=None, *, " TEMPERATURE                                                      \
  ", bool normalize=True, bool views=True, bool decoupled=False, int k=0, "                        \
  "float neighbor_weight=1.0"

// Rows [n, D] of one process against columns [M, D] of others; row i and column i + diagonal are the same embedding.
#define PARTIAL_INPUTS \
  "Tensor x, Tensor y, Tensor? temperature_tensor=None, Tensor? x_instance=None, Tensor? y_instance=None"
#define PARTIAL_OPTIONS TEMPERATURE ", bool normalize=True, SymInt diagonal=0"

#define GUIDED_INPUTS                                                                                  \
  "Tensor z, Tensor guide, Tensor? temperature_tensor=None, Tensor? clusters=None, Tensor? far=None, " \
  "Tensor? instance_ids=None, Tensor? pos_idx=None, *, int k=0, bool normalize=True, bool "            \
  "distill=False, " GUIDED_OPTIONS
#define GUIDED_OPTIONS TEMPERATURE ", float? teacher_temperature=None, bool weighted=True, float gamma=1.0"
#define GUIDED_COLUMNS                                   \
  "Tensor x_guide, Tensor y_guide, " PARTIAL_INPUTS      \
  ", Tensor? x_clusters=None, Tensor? y_clusters=None, " \
  "Tensor? far=None"

// Queries [N, D], their positives among the rows of positive_key [M, D], and a queue of negatives [Q, D].
#define INFO_NCE_INPUTS                                                                              \
  "Tensor query, Tensor positive_key, Tensor? negative_keys=None, Tensor? temperature_tensor=None, " \
  "Tensor? target=None, Tensor? query_ids=None, Tensor? key_ids=None"
#define INFO_NCE_OPTIONS \
  TEMPERATURE ", bool normalize=True, bool symmetric=False, bool decoupled=False, float label_smoothing=0.0"

#define SIGMOID_INPUTS \
  "Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor logit_bias, Tensor? target=None"

TORCH_LIBRARY(ltood_fast, m) {
  // Similarities [N, k] and columns [N, k], best first; without y the rows search themselves, each except its own.
  m.def("knn(Tensor x, Tensor? y=None, *, int k, bool normalize=True) -> (Tensor cosines, Tensor indices)");

  // A loss per row [N], mass f [K], row statistics [3, N] ([4, N] on CUDA), distances of the first rows [cached_rows,
  // K], q [N, K] and assignments [N] on request (else [0, K], [0]).
  m.def(
      "cluster_kl(Tensor z, Tensor centroids, *, float nu=1.0, SymInt cached_rows=0, bool return_q=False, "
      "bool return_assignments=False) -> (Tensor loss, Tensor mass, Tensor stats, Tensor distances, Tensor q, "
      "Tensor assignments)");
  m.def(
      "cluster_kl_bwd(Tensor grad_loss, Tensor mass, Tensor stats, Tensor distances, Tensor z, Tensor centroids, *, "
      "float nu=1.0, bool need_z=True, bool need_centroids=True) -> (Tensor grad_z, Tensor grad_centroids)");

  // Row losses [N], empty where one is disabled; log-sum-exp [N] and weights of the positives [N] in float64; the k
  // nearest rows [N, k].
  m.def("contrastive(" CONTRASTIVE_INPUTS
        ") -> (Tensor instance_loss, Tensor class_loss, Tensor lse, Tensor instance_weight, Tensor class_weight, "
        "Tensor cosines, Tensor indices)");
  m.def(
      "contrastive_bwd(Tensor? grad_instance_loss, Tensor? grad_class_loss, Tensor? grad_lse, Tensor lse, "
      "Tensor instance_weight, Tensor class_weight, Tensor cosines, Tensor indices, " CONTRASTIVE_INPUTS
      ") -> (Tensor grad_z, Tensor grad_temperature_tensor)");
  // lse [n] and the k best columns [n, k]; grad_unit [n, D] = (1/tau) (x_weight exp(s - x_lse) + y_weight exp(s -
  // y_lse)) u(y).
  m.def("contrastive_partial(" PARTIAL_INPUTS
        ", Tensor? x_domain=None, Tensor? y_domain=None, Tensor? x_excluded=None, Tensor? y_excluded=None, "
        "*, " PARTIAL_OPTIONS ", int k=0) -> (Tensor lse, Tensor cosines, Tensor indices)");
  m.def(
      "contrastive_partial_bwd(Tensor x, Tensor y, Tensor x_lse, Tensor x_weight, Tensor? y_lse=None, "
      "Tensor? y_weight=None, Tensor? temperature_tensor=None, Tensor? x_excluded=None, Tensor? y_excluded=None, "
      "*, " PARTIAL_OPTIONS ") -> Tensor grad_unit");

  // Row losses [N] and log-sum-exp [N] (float64) of the queries over the keys, and of the keys over the queries (empty
  // unless symmetric); stats [3 or 6, N] float64.
  m.def("info_nce(" INFO_NCE_INPUTS ", *, " INFO_NCE_OPTIONS
        ") -> (Tensor loss, Tensor key_loss, Tensor lse, Tensor key_lse, Tensor stats)");
  m.def(
      "info_nce_bwd(Tensor? grad_loss, Tensor? grad_key_loss, Tensor? grad_lse, Tensor? grad_key_lse, Tensor "
      "stats, " INFO_NCE_INPUTS ", *, " INFO_NCE_OPTIONS
      ", bool need_query=True, bool need_positive_key=True, bool need_negative_keys=True, "
      "bool need_temperature_tensor=True) -> (Tensor grad_query, Tensor grad_positive_key, "
      "Tensor grad_negative_keys, Tensor grad_temperature_tensor)");
  // Row losses [N] of the sigmoid loss of all pairs; logit_scale and logit_bias 0-d.
  m.def("sigmoid_loss(" SIGMOID_INPUTS ", *, bool normalize=False) -> (Tensor loss)");
  m.def("sigmoid_loss_bwd(Tensor grad_loss, " SIGMOID_INPUTS
        ", *, bool normalize=False, bool need_image_features=True, bool need_text_features=True) -> "
        "(Tensor grad_image_features, Tensor grad_text_features, Tensor grad_logit_scale, Tensor grad_logit_bias)");

  // Stage 2. clusters: the guided contrastive loss; distill: relational distillation. Outputs of a disabled loss are
  // empty.
  m.def("guided(" GUIDED_INPUTS
        ") -> (Tensor loss, Tensor weight, Tensor lse, Tensor neighbors, Tensor kl, Tensor student_lse, "
        "Tensor teacher_lse)");
  m.def(
      "guided_bwd(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_kl, Tensor? grad_student_lse, Tensor weight, "
      "Tensor lse, Tensor neighbors, Tensor student_lse, Tensor teacher_lse, " GUIDED_INPUTS
      ") -> (Tensor grad_z, Tensor grad_temperature_tensor)");
  // Sums over the columns [n], with all columns as negatives where x_every says so, and the k best columns [n, k] by
  // the guide's cosines.
  m.def("guided_partial(" GUIDED_COLUMNS
        ", Tensor? x_every=None, *, int k=0, bool normalize=True, SymInt diagonal=0, "
        "bool distill=False, " GUIDED_OPTIONS
        ") -> (Tensor lse, Tensor lse_every, Tensor weight, Tensor positive_logit, Tensor cosines, Tensor indices, "
        "Tensor student_lse, Tensor teacher_lse, Tensor excess, Tensor gap)");
  m.def("guided_partial_bwd(" GUIDED_COLUMNS
        ", Tensor? x_contrast=None, Tensor? y_contrast=None, Tensor? x_distill=None, Tensor? y_distill=None, *, "
        "bool normalize=True, SymInt diagonal=0, " GUIDED_OPTIONS ") -> Tensor grad_unit");

#ifdef LTOOD_WITH_CUDA
  m.def("cuda_probe(Tensor out) -> ()");
#endif
}

namespace {

bool has_cuda() {
#ifdef LTOOD_WITH_CUDA
  return true;
#else
  return false;
#endif
}

// What this file was compiled with; ltood_fast.build_info() adds what is true at run time.
pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = LTOOD_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cpu_isa"] = ltood::cpu_isa();
  info["cuda"] = has_cuda();
  info["cuda_reason"] = LTOOD_CUDA_REASON;
#ifdef LTOOD_WITH_CUDA
  info["cuda_archs"] = LTOOD_CUDA_ARCHS;
  info["cuda_runtime"] = ltood::cuda_runtime_version();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("has_cuda", &has_cuda);
  m.def("build_info", &build_info);
}
