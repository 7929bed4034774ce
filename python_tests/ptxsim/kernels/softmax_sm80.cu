#include "cuda/launch.cuh"
#include "softmax_sm80.cuh"

namespace worked {

constexpr int kColumns = 64;

template <int kBug>
int pick(int bug, const Problem& p) {
  if constexpr (kBug > static_cast<int>(Bug::kShuffleDiverged)) {
    return cudaErrorInvalidValue;
  } else {
    if (bug != kBug) return pick<kBug + 1>(bug, p);
    const auto kernel = softmax_kernel<kColumns, static_cast<Bug>(kBug)>;
    return ltood::cuda::launch(kernel, (p.n + kRows - 1) / kRows, kThreads, kSharedBytes<kColumns>, p, nullptr);
  }
}

}  // namespace worked

extern "C" int launch_softmax(int bug, const worked::Problem* problem) { return worked::pick<0>(bug, *problem); }
