#include "cuda/launch.cuh"
#include "ops/contrastive/cuda/partial.cuh"

namespace ltood {
namespace {

namespace partial = contrastive::partial;

using PartialKernel = void (*)(ContrastivePartialSums);

template <typename half_t>
PartialKernel partial_kernel(bool resident, bool online) {
  if (online) {
    return resident ? partial::contrastive_partial_kernel<half_t, true, true>
                    : partial::contrastive_partial_kernel<half_t, false, true>;
  }
  return resident ? partial::contrastive_partial_kernel<half_t, true, false>
                  : partial::contrastive_partial_kernel<half_t, false, false>;
}

}  // namespace

extern "C" {

int ltood_plan_contrastive_partial(ContrastivePartialSums* params) {
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return error;
  ContrastivePartialSums& p = *params;
  p.row_blocks = cuda::ceil_div(p.x.rows, partial::kBlockM);
  const int tiles = cuda::ceil_div(p.y.rows, partial::kBlockN);
  const cuda::ColumnSplit split = cuda::split_columns(tiles, p.row_blocks, 2 * limits.multiprocessors);
  p.k_split_tiles = split.tiles, p.k_splits = split.count;
  const int64_t resident = mainloop_sm80::shared_bytes(p.x, true);
  p.resident = resident <= limits.shared_bytes;
  p.shared_bytes = static_cast<int>(p.resident ? resident : mainloop_sm80::shared_bytes(p.x, false));
  return cudaSuccess;
}

int ltood_launch_contrastive_partial(const ContrastivePartialSums* params, void* stream) {
  constexpr int kRowThreads = 128;
  const ContrastivePartialSums& p = *params;
  const PartialKernel kernel = p.x.is_half ? partial_kernel<__half>(p.resident, p.exponents.online)
                                           : partial_kernel<__nv_bfloat16>(p.resident, p.exponents.online);
  const int blocks = p.row_blocks * p.k_splits;
  if (const cudaError_t error = cuda::launch(kernel, blocks, partial::kThreads, p.shared_bytes, p, stream))
    return error;
  return cuda::launch(partial::contrastive_partial_lse_kernel, cuda::ceil_div(p.x.rows, kRowThreads), kRowThreads, 0, p,
                      stream);
}
}

}  // namespace ltood
