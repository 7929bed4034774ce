// One warp a row: the largest element, the norm, and the row in 16-bit splits. Reads N D elements (three times, the
// second and third from cache) and writes splits * N * D halves: bound by memory, negligible next to the N² work.
#include "cuda/launch.cuh"
#include "cuda/operand.h"
#include "cuda/primitives/math.cuh"
#include "cuda/primitives/mma.cuh"

namespace ltood {
namespace {

constexpr int kWarps = 4;

// e with max <= 2^e, |e| <= 126; 0 for Inf and NaN, which then stay what they are.
__device__ int exponent_above(float largest) {
  const int biased = (__float_as_int(largest) >> 23) & 0xff;
  return biased == 0xff ? 0 : max(-126, min(126, biased - 126));
}

template <typename in_t>
__device__ __forceinline__ float element(const PrepareParams& p, const in_t* x, int j) {
  return p.origin ? prim::to_float(x[j]) - p.origin[j] : prim::to_float(x[j]);
}

template <typename in_t, typename half_t>
__global__ void prepare_rows_kernel(PrepareParams p) {
  const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.rows) return;
  const in_t* x = static_cast<const in_t*>(p.x) + size_t(row) * p.d;
  int bits = 0;  // of |x|: they order as the numbers do, and NaN above all
  for (int j = lane; j < p.d; j += 32) bits = max(bits, __float_as_int(fabsf(element(p, x, j))));
  for (int offset = 16; offset > 0; offset /= 2) bits = max(bits, __shfl_xor_sync(prim::kFullWarp, bits, offset));
  const int e = p.unscaled ? 0 : exponent_above(__int_as_float(bits));
  const float down = exp2f(static_cast<float>(-e));
  float squares = 0;
  for (int j = lane; j < p.d; j += 32) {
    const float v = element(p, x, j) * down;
    squares += v * v;
  }
  squares = prim::warp_sum(squares);
  const float norm = sqrtf(squares);  // of the row divided by 2^e
  if (lane == 0) {
    const float inverse = 1 / (norm >= kNormEps * down ? norm : kNormEps * down);
    const float scale = p.normalize ? (norm == norm ? inverse : norm) : exp2f(static_cast<float>(e));
    const_cast<float*>(p.out.scale)[row] = scale;
    if (p.squares) {
      const float up = exp2f(static_cast<float>(e)), whole = squares * up * up;
      p.squares[row] = whole + (whole - whole);
    }
    if (p.inv_norm) p.inv_norm[row] = p.normalize ? scale * down : 1.f;
  }
  const int width = kKTile * p.out.k_tiles;
  half_t* high = static_cast<half_t*>(const_cast<void*>(p.out.data)) + size_t(row) * width;
  half_t* low = p.out.splits == 2 ? high + size_t(p.rows) * width : nullptr;
  for (int j = lane; j < width; j += 32) {
    const float v = j < p.d ? element(p, x, j) * down : 0.f;
    high[j] = prim::from_float<half_t>(v);
    if (low) low[j] = prim::from_float<half_t>(v - prim::to_float(high[j]));
  }
}

template <typename in_t, typename half_t>
int launch(const PrepareParams& p, void* stream) {
  return cuda::launch(prepare_rows_kernel<in_t, half_t>, cuda::ceil_div(p.rows, kWarps), 32 * kWarps, 0, p, stream);
}

}  // namespace

extern "C" int ltood_launch_prepare_rows(const PrepareParams* params, void* stream) {
  const PrepareParams& p = *params;
  switch (p.type) {
    case kFloat32:
      return p.out.is_half ? launch<float, __half>(p, stream) : launch<float, __nv_bfloat16>(p, stream);
    case kBFloat16:
      return p.out.is_half ? launch<__nv_bfloat16, __half>(p, stream) : launch<__nv_bfloat16, __nv_bfloat16>(p, stream);
    default:
      return p.out.is_half ? launch<__half, __half>(p, stream) : launch<__half, __nv_bfloat16>(p, stream);
  }
}

}  // namespace ltood
