// One element of an operand, for kernels that go through rows without the tensor cores.
#pragma once

#include "cuda/operand.h"
#include "cuda/primitives/mma.cuh"

namespace ltood {

// x_ij, the sum of the splits times the scale.
template <typename half_t>
__device__ __forceinline__ float element(const Operand& x, int64_t row, int j) {
  const size_t width = size_t(kKTile) * x.k_tiles;
  const half_t* data = static_cast<const half_t*>(x.data) + row * width + j;
  float value = prim::to_float(data[0]);
  if (x.splits == 2) value += prim::to_float(data[x.rows * width]);
  return value * x.scale[row];
}

}  // namespace ltood
