// Products of tiles whose shapes repeat. For callers inside a parallel region: one thread a product.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>

#include "common/gemm_double.h"

namespace ltood {

// c [m, n] = a [m, k] b [k, n], or c += a b.
//
// In float with oneDNN's batch-reduce kernel, which reads the tiles where they lie: on an AMD EPYC (Zen 4) it runs at
// 90-98 % of the FMA peak where at::mm, which packs both operands at each call, runs at 55-85 %. Without AVX2 torch
// passes it on to sgemm. oneDNN compiles a kernel a shape and thread (0.1 ms, 23 KiB) and keeps it: panels of 64 rows
// leave few shapes, as long as callers keep n and k to few (the spans of the guided losses have any width: at::mm).
inline void multiply(int64_t m, int64_t n, int64_t k, Matrix<const float> a, Matrix<const float> b, Matrix<float> c,
                     bool add) {
  constexpr int64_t kPanel = 64;
  for (int64_t row = 0; row < m; row += kPanel) {
    at::native::cpublas::brgemm(std::min(kPanel, m - row), n, k, a.stride, b.stride, c.stride, add,
                                a.data + row * a.stride, b.data, c.data + row * c.stride, /*is_vnni=*/false);
  }
}

}  // namespace ltood
