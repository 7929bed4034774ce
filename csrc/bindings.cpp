// All operator schemas, and the Python module that carries them. No logic lives here.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#ifdef LTOOD_WITH_CUDA
#include "cuda/probe.h"
#endif

TORCH_LIBRARY(ltood_fast, m) {
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
