#include "common/gemm_double.h"

#include "common/simd.h"

namespace ltood {

namespace {

constexpr int64_t kPanelRows = 8, kPanelColumns = 16;  // 16 accumulators of 8 doubles, of 32 vector registers

// c [kRows, kColumns] = a [kRows, k] b [k, kColumns], or c += a b: every element a sum over k in order.
template <int64_t kRows, int64_t kColumns>
LTOOD_INLINE void multiply_panel(int64_t k, Matrix<const double> a, Matrix<const double> b, Matrix<double> c,
                                 bool add) {
  double sum[kRows][kColumns] = {};
  for (int64_t p = 0; p < k; ++p) {
    const double* __restrict row = b.data + p * b.stride;
    for (int64_t i = 0; i < kRows; ++i) {
      const double x = a.data[i * a.stride + p];
#pragma omp simd
      for (int64_t j = 0; j < kColumns; ++j) sum[i][j] += x * row[j];
    }
  }
  for (int64_t i = 0; i < kRows; ++i) {
    double* __restrict to = c.data + i * c.stride;
    for (int64_t j = 0; j < kColumns; ++j) to[j] = add ? to[j] + sum[i][j] : sum[i][j];
  }
}

template <int64_t kColumns>
LTOOD_INLINE void multiply_columns(int64_t m, int64_t k, Matrix<const double> a, Matrix<const double> b,
                                   Matrix<double> c, bool add) {
  const auto below = [](auto matrix, int64_t row) {
    matrix.data += row * matrix.stride;
    return matrix;
  };
  int64_t i = 0;
  for (; i + kPanelRows <= m; i += kPanelRows) {
    multiply_panel<kPanelRows, kColumns>(k, below(a, i), b, below(c, i), add);
  }
  for (; i < m; ++i) multiply_panel<1, kColumns>(k, below(a, i), b, below(c, i), add);
}

}  // namespace

LTOOD_CLONES void multiply(int64_t m, int64_t n, int64_t k, Matrix<const double> a, Matrix<const double> b,
                           Matrix<double> c, bool add) {
  const auto from = [](auto matrix, int64_t column) {
    matrix.data += column;
    return matrix;
  };
  int64_t j = 0;
  for (; j + kPanelColumns <= n; j += kPanelColumns) {
    multiply_columns<kPanelColumns>(m, k, a, from(b, j), from(c, j), add);
  }
  for (; j + 4 <= n; j += 4) multiply_columns<4>(m, k, a, from(b, j), from(c, j), add);
  for (; j < n; ++j) multiply_columns<1>(m, k, a, from(b, j), from(c, j), add);
}

}  // namespace ltood
