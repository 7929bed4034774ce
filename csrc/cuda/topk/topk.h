// Exact k nearest rows by inner product, fused: the interface of the CUDA kernel that knn, psd_loss (k > 1 or a bank)
// and guided_contrastive share. Torch-free.
#pragma once

#include <cstdint>

#include "cuda/operand.h"

namespace ltood {

struct TopkParams {
  Operand x;  // [N] rows that search
  Operand y;  // [Q] rows that are searched; x itself, or as many k_tiles and splits of the same type as x
  int k;
  int exclude_self;  // column i + diagonal is no candidate of row i
  int diagonal;
  int views;                  // > 0: rows i and j with i % views == j % views are no candidates of each other
  const int64_t* x_instance;  // [N] or null: rows of equal instance are no candidates of each other
  const int64_t* y_instance;  // [Q] or null, as x_instance
  const int64_t* x_domain;    // [N] or null: candidates have the row's own domain
  const int64_t* y_domain;    // [Q] or null, as x_domain
  float* values;              // [N, k] best first; ties to the lower index; -inf where there are fewer candidates
  int64_t* indices;           // [N, k]; -1 there
  void* workspace;            // ltood_topk_workspace() bytes
};

// Bytes of workspace on the current device, a negative cudaError_t on failure.
extern "C" int64_t ltood_topk_workspace(const TopkParams* params);

// Returns a cudaError_t.
extern "C" int ltood_launch_topk(const TopkParams* params, void* stream);

}  // namespace ltood
