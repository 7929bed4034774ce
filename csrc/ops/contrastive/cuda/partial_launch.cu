#include <algorithm>

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

// 1,024 rows are 8 blocks for 264 places: 33 ranges of columns fill them. A range of fewer than 8 tiles spends more on
// its rows than on products; 256 of them make n KiB of sums, which one thread a row adds up.
int ltood_plan_contrastive_partial(ContrastivePartialSums* params) {
  constexpr int kLeastTiles = 8, kMaxSplits = 256;
  cuda::DeviceLimits limits;
  if (const cudaError_t error = cuda::device_limits(limits)) return error;
  ContrastivePartialSums& p = *params;
  p.row_blocks = cuda::ceil_div(p.x.rows, partial::kBlockM);
  const int tiles = cuda::ceil_div(p.y.rows, partial::kBlockN);
  const int wanted = std::min(cuda::ceil_div(2 * limits.multiprocessors, p.row_blocks), kMaxSplits);
  p.k_split_tiles = cuda::ceil_div(tiles, std::clamp(wanted, 1, std::max(tiles / kLeastTiles, 1)));
  p.k_splits = cuda::ceil_div(tiles, p.k_split_tiles);
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
