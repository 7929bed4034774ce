// Vector loops over a tile of squared distances [rows, K]; torch-free. T is float or double.
//
//   weight  e_ij = (1 + d_ij/nu)^-h, h = (nu + 1)/2, up to a factor a row;  q_ij = e_ij / sum_j e_ij
//   mass    f_j = sum_i q_ij
//   ratio   r_ij = p_ij / q_ij = (q_ij / f_j) / t_i,  t_i = sum_j q_ij^2 / f_j
//   loss    l_i = sum_j p log(p/q) = sum_j q_ij (r log r - (r - 1)), since p and q both sum to 1: every term is
//           non-negative and second order in r - 1, so that a small loss keeps its relative accuracy
//   descent dl_i/dd_ij = (p_ij - q_ij) h / (nu + d_ij)
#pragma once

#include <cstdint>

namespace ltood::cluster_kl {

// What a row needs to be assigned again from its distances.
template <typename T>
struct RowStats {
  T* nearest;  // [N] distance of the nearest centroid; 0 for nu = 1, whose weights cannot underflow
  T* total;    // [N] sum_j e_ij
  T* target;   // [N] t_i
};

// x -= origin a row; norms[r] = |x_r|^2 after it, NaN where that is not finite. x [rows, d], origin [d].
void center_rows(float* x, const float* origin, float* norms, int64_t rows, int64_t d);
void center_rows(double* x, const double* origin, double* norms, int64_t rows, int64_t d);

// tile holds <x_r, mu_j> and becomes |x_r - mu_j|^2. Where the subtraction cancels so far that the kernel, which sees
// nu + distance, would feel it, the distance is summed again from the differences.
void squared_distances(float* tile, const float* x, const float* norms, const float* mu, const float* mu_norms,
                       int64_t rows, int64_t k, int64_t d, double nu);
void squared_distances(double* tile, const double* x, const double* norms, const double* mu, const double* mu_norms,
                       int64_t rows, int64_t k, int64_t d, double nu);

// First pass: stats.nearest and stats.total of the rows, and mass [k] += q. scratch [k].
void assign_rows(const float* tile, RowStats<float> stats, float* mass, float* scratch, int64_t rows, int64_t k,
                 double nu);
void assign_rows(const double* tile, RowStats<double> stats, double* mass, double* scratch, int64_t rows, int64_t k,
                 double nu);

// Second pass: stats.target and the loss of the rows; q [rows, k] is written for the caller (q_stride = k) or is a
// scratch row (q_stride = 0). inverse_mass[j] = 1 / f_j.
void row_losses(const float* tile, RowStats<float> stats, const float* inverse_mass, float* loss, float* q,
                int64_t q_stride, int64_t rows, int64_t k, double nu);
void row_losses(const double* tile, RowStats<double> stats, const double* inverse_mass, double* loss, double* q,
                int64_t q_stride, int64_t rows, int64_t k, double nu);

// Backward: weights [rows, k] = -2 grad_loss_r dl_r/dd_rj; row_sums [rows] and column_sums [k] (added to) of them.
// weights is another array than tile.
void descent_weights(float* weights, const float* tile, RowStats<float> stats, const float* inverse_mass,
                     const float* grad_loss, float* row_sums, float* column_sums, int64_t rows, int64_t k, double nu);
void descent_weights(double* weights, const double* tile, RowStats<double> stats, const double* inverse_mass,
                     const double* grad_loss, double* row_sums, double* column_sums, int64_t rows, int64_t k,
                     double nu);

// nearest[r] = the lowest j of the smallest distance in row r.
void nearest_columns(const float* tile, int64_t* nearest, int64_t rows, int64_t k);
void nearest_columns(const double* tile, int64_t* nearest, int64_t rows, int64_t k);

// out_r -= scale_r x_r. out and x [rows, d], scale [rows].
void subtract_scaled_rows(float* out, const float* scale, const float* x, int64_t rows, int64_t d);
void subtract_scaled_rows(double* out, const double* scale, const double* x, int64_t rows, int64_t d);

}  // namespace ltood::cluster_kl
