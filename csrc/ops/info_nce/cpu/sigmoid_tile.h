// The sigmoid loss of one tile of similarities. Torch-free; T is float or double.
//
// A tile holds v_rc = <x_r, y_c>, and l_rc = scale v_rc + bias are the logits of pairs that do not belong together:
// their loss is softplus(l). The pairs that do are -inf, which counts as 0.
#pragma once

#include <cstdint>

#include "common/topk.h"

namespace ltood {

template <typename T>
struct Logit {
  T scale, bias;
};

// row_sum[r] += sum over the columns of softplus(l).
void add_softplus(Tile<float> tile, Logit<float> logit, double* row_sum);
void add_softplus(Tile<double> tile, Logit<double> logit, double* row_sum);

// v_rc <- weight_r sigmoid(l), and row_sum[r] += their sum.
void weight_by_sigmoid(Tile<float> tile, Logit<float> logit, const float* weight, double* row_sum);
void weight_by_sigmoid(Tile<double> tile, Logit<double> logit, const double* weight, double* row_sum);

}  // namespace ltood
