// knn: sizes and the one validation of its operator.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/arguments.h"

namespace ltood::knn {

struct KnnInputs {
  at::Tensor x;      // [N, D]
  OptionalTensor y;  // [Q, D]
  int64_t k = 0;
  bool normalize = true;
};

inline KnnInputs knn_inputs(const Arguments& arguments) {
  KnnInputs in;
  in.x = arguments.tensor("x");
  in.y = arguments.optional("y");
  in.k = arguments.integer("k");
  in.normalize = arguments.flag("normalize");
  return in;
}

struct KnnSizes {
  int64_t n, q, d;  // rows, rows that are searched, features
};

// Without y the rows are searched themselves, each except its own.
inline KnnSizes check_knn(const KnnInputs& in) {
  const at::Tensor& x = in.x;
  const OptionalTensor& y = in.y;
  const char* op = "knn";
  LTOOD_CHECK_TYPE(x.is_floating_point(), op, "x", "a float tensor", x.scalar_type());
  LTOOD_CHECK_VALUE(x.dim() == 2 && x.numel() > 0, op, "x", "a non-empty matrix [N, D]", "shape ", x.sizes());
  KnnSizes sizes{x.size(0), x.size(0), x.size(1)};
  if (y.has_value()) {
    LTOOD_CHECK_TYPE(y->is_floating_point(), op, "y", "a float tensor", y->scalar_type());
    LTOOD_CHECK_VALUE(y->dim() == 2 && y->size(0) > 0 && y->size(1) == sizes.d, op, "y",
                      "a non-empty matrix as wide as x", "shape ", y->sizes());
    LTOOD_CHECK_VALUE(y->device() == x.device(), op, "y", c10::str("on ", x.device(), " as x is"), y->device());
    sizes.q = y->size(0);
  }
  const int64_t most = y.has_value() ? sizes.q : sizes.n - 1;
  LTOOD_CHECK_VALUE(in.k >= 1 && in.k <= most, op, "k", c10::str("in [1, ", most, "], the rows that can be found"),
                    in.k);
  return sizes;
}

}  // namespace ltood::knn
