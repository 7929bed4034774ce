#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cuda/operand_torch.h"
#include "cuda/topk/torch.h"
#include "ops/knn/knn.h"

namespace ltood::knn {
namespace {

// Rows of two types are searched as float32, which holds both.
at::ScalarType search_type(const at::Tensor& x, const OptionalTensor& y) {
  element_type("knn", "x", x);
  if (y.has_value()) element_type("knn", "y", *y);
  return y.has_value() && y->scalar_type() != x.scalar_type() ? at::kFloat : x.scalar_type();
}

std::tuple<at::Tensor, at::Tensor> knn_cuda(const Arguments& arguments) {
  const KnnInputs in = knn_inputs(arguments);
  const at::Tensor& x = in.x;
  const OptionalTensor& y = in.y;
  const int64_t k = in.k;
  const bool normalize = in.normalize;
  const char* op = "knn";
  const KnnSizes sizes = check_knn(in);
  const at::ScalarType type = search_type(x, y);
  const c10::DeviceGuard guard(x.device());
  const OperandTensors queries = prepare_rows(op, "x", x.detach().to(type), normalize, true);
  const OperandTensors base = y.has_value() ? prepare_rows(op, "y", y->detach().to(type), normalize, true) : queries;
  at::Tensor values = at::empty({sizes.n, k}, x.options().dtype(at::kFloat));
  at::Tensor indices = at::empty({sizes.n, k}, x.options().dtype(at::kLong));
  TopkParams params{};
  params.x = queries.view;
  params.y = base.view;
  params.k = static_cast<int>(k);
  params.exclude_self = !y.has_value();
  params.values = values.mutable_data_ptr<float>();
  params.indices = indices.mutable_data_ptr<int64_t>();
  launch_topk(op, params, x);
  return {values, indices};
}

}  // namespace

TORCH_LIBRARY_IMPL(ltood_fast, CUDA, m) { m.impl("knn", by_name<knn_cuda>()); }

}  // namespace ltood::knn
