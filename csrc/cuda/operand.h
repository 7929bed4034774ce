// The matrix that the tensor cores read, made once from the caller's rows. Torch-free.
//
// Row i is x_i = scale_i * (sum over the splits of data_i). Rows are divided by a power of two, 2^e > max |x_ij|, which
// rounds nothing and keeps products in range; the scale puts it back, and with it 1 / |x_i| when rows are normalised.
//   bfloat16, float16 rows: one split, exact.
//   float32 rows: one split (rounded to bfloat16), or two, high + low, 16 bits of mantissa. Products of two splits take
//   three passes, high high + high low + low high: relative error 2^-16 of |x_i| |x_j|. Two splits of float16 hold 22
//   bits of the row's largest elements; weights that range over more than float16 does cannot be multiplied with them.
#pragma once

#include <cstdint>

namespace ltood {

constexpr int kKTile = 64;  // features of a k_tile: 128 bytes, every shared-memory bank once

struct Operand {
  const void* data;    // [splits, rows, kKTile * k_tiles] bfloat16 or float16, zeros beyond D
  const float* scale;  // [rows]
  int rows, k_tiles, splits;
  int is_half;  // float16, else bfloat16
};

enum ElementType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct PrepareParams {
  const void* x;  // [rows, d], contiguous
  int type;       // ElementType of x
  int rows, d;
  int normalize;
  Operand out;          // its data and scale are written
  float* inv_norm;      // [rows] or null: 1 / max(|x_i|, 1e-12), 1 when rows are not normalised
  const float* origin;  // [d] or null: taken from every row first
  float* squares;       // [rows] or null: |x_i - origin|², NaN where it is not finite
  int unscaled;         // rows are not divided and their scale is 1: for a product that sums over the rows (bfloat16)
};

// Returns a cudaError_t.
extern "C" int ltood_launch_prepare_rows(const PrepareParams* params, void* stream);

constexpr float kNormEps = 1e-12f;  // as torch.nn.functional.normalize

}  // namespace ltood
