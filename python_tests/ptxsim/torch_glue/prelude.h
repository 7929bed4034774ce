// Included first: the CUDA glue registers its functions as CPU kernels of the namespace ltood_sim.
#pragma once

#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) _TORCH_LIBRARY_IMPL(ltood_sim, CPU, m, C10_UID)
