// Rows of embeddings: their norms, normalisation, and the gradient through it. Torch-free; T is float or double.
#pragma once

#include <cstdint>

namespace ltood {

constexpr double kNormEps = 1e-12;  // as torch.nn.functional.normalize: u = x / max(|x|, eps)

void row_norms(const float* x, int64_t n, int64_t d, double* norms);
void row_norms(const double* x, int64_t n, int64_t d, double* norms);

void normalize_rows(float* x, int64_t n, int64_t d, const double* norms);
void normalize_rows(double* x, int64_t n, int64_t d, const double* norms);

// From g = dL/du / factor to dL/dx in place: factor (g - <u, g> u) / |x|, and factor g / eps where |x| < eps (there
// u = x / eps is linear); 0 where |x| < smallest_norm. `norms` null: x = u, factor g. radial_i = <u_i, dL/du_i>.
void normalize_rows_bwd(const float* u, float* grad, int64_t n, int64_t d, const double* norms, double factor,
                        double smallest_norm, double* radial);
void normalize_rows_bwd(const double* u, double* grad, int64_t n, int64_t d, const double* norms, double factor,
                        double smallest_norm, double* radial);

}  // namespace ltood
