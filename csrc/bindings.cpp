// All operator schemas, and the Python module that carries them. No logic lives here.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#ifdef LTOOD_WITH_CUDA
#include "cuda/probe.h"
#endif

TORCH_LIBRARY(ltood_fast, m) {
  // knn: similarities [N, k] and columns [N, k], best first; without y the rows search themselves, each less its own
  m.def("knn(Tensor x, Tensor? y, int k, bool normalize) -> (Tensor cosines, Tensor indices)");
  // cluster_kl: a loss per row [N], mass f [K], row statistics [3, N] ([4, N] on CUDA), distances of the first rows
  // [cached_rows, K], q [N, K] and assignments [N] on request (else [0, K], [0])
  m.def(
      "cluster_kl(Tensor z, Tensor centroids, float nu, SymInt cached_rows, bool return_q, bool return_assignments) -> "
      "(Tensor loss, Tensor mass, Tensor stats, Tensor distances, Tensor q, Tensor assignments)");
  m.def(
      "cluster_kl_bwd(Tensor grad_loss, Tensor z, Tensor centroids, Tensor mass, Tensor stats, Tensor distances, "
      "float nu, bool need_z, bool need_centroids) -> (Tensor grad_z, Tensor grad_centroids)");
  m.def(
      "contrastive(Tensor z, float temperature, Tensor? temperature_tensor, bool normalize, bool views, "
      "Tensor? instance_ids, Tensor? labels, int k, float neighbor_weight, Tensor? neighbor_weights, Tensor? domain, "
      "Tensor? bank, Tensor? bank_ids, Tensor? bank_domain) -> (Tensor instance_loss, Tensor class_loss, Tensor lse, "
      "Tensor instance_weight, Tensor class_weight, Tensor cosines, Tensor indices)");
  m.def(
      "contrastive_bwd(Tensor? grad_instance, Tensor? grad_class, Tensor? grad_lse, Tensor z, float temperature, "
      "Tensor? temperature_tensor, bool normalize, Tensor? instance_ids, Tensor? labels, float neighbor_weight, "
      "Tensor? neighbor_weights, Tensor? bank, Tensor lse, Tensor instance_weight, Tensor class_weight, "
      "Tensor cosines, Tensor indices) -> (Tensor grad_z, Tensor grad_temperature)");
  // A partial problem of the same similarities: rows [n, D] of one process, columns [M, D] of others. lse [n], the k
  // best columns [n, k]; then grad_unit [n, D] = (1/tau) (x_weight exp(s - x_lse) + y_weight exp(s - y_lse)) u(y)
  m.def(
      "contrastive_partial(Tensor x, Tensor y, float temperature, Tensor? temperature_tensor, bool normalize, "
      "SymInt diagonal, int k, Tensor? x_instance, Tensor? y_instance, Tensor? x_domain, Tensor? y_domain) "
      "-> (Tensor lse, Tensor cosines, Tensor indices)");
  m.def(
      "contrastive_partial_bwd(Tensor x, Tensor y, float temperature, Tensor? temperature_tensor, bool normalize, "
      "SymInt diagonal, Tensor x_lse, Tensor x_weight, Tensor? y_lse, Tensor? y_weight) -> Tensor grad_unit");
  // Stage 2. clusters: the guided contrastive loss; distill: relational distillation. What is not asked for is empty.
  m.def(
      "guided(Tensor z, Tensor guide, Tensor? clusters, Tensor? far, Tensor? instance_ids, Tensor? pos_idx, "
      "float temperature, Tensor? temperature_tensor, float? teacher_temperature, int k, bool weighted, float gamma, "
      "bool normalize, bool distill) -> (Tensor loss, Tensor weight, Tensor lse, Tensor neighbors, Tensor kl, "
      "Tensor student_lse, Tensor teacher_lse)");
  m.def(
      "guided_bwd(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_kl, Tensor? grad_student_lse, Tensor z, "
      "Tensor guide, Tensor? clusters, Tensor? far, Tensor? instance_ids, Tensor weight, Tensor lse, Tensor neighbors, "
      "Tensor student_lse, Tensor teacher_lse, float temperature, Tensor? temperature_tensor, "
      "float? teacher_temperature, bool weighted, float gamma, bool normalize, bool distill) "
      "-> (Tensor grad_z, Tensor grad_temperature)");
  // A partial problem of the same pairs: rows [n] of one process, columns [M] of others. Sums of the rows over the
  // columns [n], with all columns as negatives where x_every says so, and the k best columns [n, k] by the guide's
  // cosines
  m.def(
      "guided_partial(Tensor x, Tensor x_guide, Tensor y, Tensor y_guide, SymInt diagonal, Tensor? x_clusters, "
      "Tensor? y_clusters, Tensor? far, Tensor? x_instance, Tensor? y_instance, Tensor? x_every, float temperature, "
      "Tensor? temperature_tensor, float? teacher_temperature, int k, bool weighted, float gamma, bool normalize, "
      "bool distill) -> (Tensor lse, Tensor lse_every, Tensor weight, Tensor positive_logit, Tensor cosines, Tensor "
      "indices, "
      "Tensor student_lse, Tensor teacher_lse, Tensor excess, Tensor gap)");
  m.def(
      "guided_partial_bwd(Tensor x, Tensor x_guide, Tensor y, Tensor y_guide, SymInt diagonal, Tensor? x_clusters, "
      "Tensor? y_clusters, Tensor? far, Tensor? x_instance, Tensor? y_instance, Tensor? x_contrast, "
      "Tensor? y_contrast, Tensor? x_distill, Tensor? y_distill, float temperature, Tensor? temperature_tensor, "
      "float? teacher_temperature, bool weighted, float gamma, bool normalize) -> Tensor grad_unit");

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
