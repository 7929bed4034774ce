// The top-k kernel with its workspace from torch's allocator.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "cuda/operand_torch.h"
#include "cuda/topk/topk.h"

namespace ltood {

// On the current stream of the device of `like`. The workspace is returned to the allocator when the launches have been
// enqueued, which reuses it on that stream only.
inline void launch_topk(const char* op, TopkParams params, const at::Tensor& like) {
  const int64_t bytes = ltood_topk_workspace(&params);
  if (bytes < 0) check_launch(op, static_cast<int>(-bytes));
  const at::Tensor workspace = at::empty({bytes}, like.options().dtype(at::kByte));
  params.workspace = workspace.mutable_data_ptr();
  check_launch(op, ltood_launch_topk(&params, current_stream(like)));
}

}  // namespace ltood
