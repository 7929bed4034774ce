#include "ops/info_nce/cpu/sigmoid_tile.h"

#include "common/simd_log.h"

namespace ltood {
namespace {

// exp(-|l|) <= 1, NaN for NaN.
template <typename T>
LTOOD_INLINE T decay(T l) {
  return exp2_simd((l < T(0) ? l : -l) * T(kLog2E));
}

template <typename T>
LTOOD_INLINE void softplus_sums(Tile<T> tile, Logit<T> logit, double* row_sum) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const T* __restrict v = tile.values + r * tile.stride;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < tile.cols; ++c) {
      const T l = logit.scale * v[c] + logit.bias;
      sum += (l < T(0) ? T(0) : l) + log1p_simd(decay(l));
    }
    row_sum[r] += sum;
  }
}

template <typename T>
LTOOD_INLINE void sigmoid_weights(Tile<T> tile, Logit<T> logit, const T* weight, double* row_sum) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* __restrict v = tile.values + r * tile.stride;
    const T factor = weight[r];
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < tile.cols; ++c) {
      const T l = logit.scale * v[c] + logit.bias;
      const T e = decay(l);
      const T g = factor * ((l < T(0) ? e : T(1)) / (T(1) + e));
      sum += g;
      v[c] = g;
    }
    row_sum[r] += sum;
  }
}

}  // namespace

LTOOD_CLONES void add_softplus(Tile<float> tile, Logit<float> logit, double* row_sum) {
  softplus_sums(tile, logit, row_sum);
}
LTOOD_CLONES void add_softplus(Tile<double> tile, Logit<double> logit, double* row_sum) {
  softplus_sums(tile, logit, row_sum);
}

LTOOD_CLONES void weight_by_sigmoid(Tile<float> tile, Logit<float> logit, const float* weight, double* row_sum) {
  sigmoid_weights(tile, logit, weight, row_sum);
}
LTOOD_CLONES void weight_by_sigmoid(Tile<double> tile, Logit<double> logit, const double* weight, double* row_sum) {
  sigmoid_weights(tile, logit, weight, row_sum);
}

}  // namespace ltood
