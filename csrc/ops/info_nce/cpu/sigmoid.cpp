// The sigmoid loss of all pairs on the CPU, forward and backward.
//
//   l_ij = logit_scale <x_i, y_j> + logit_bias, loss_i = softplus(-l_ip) + sum over the other j of softplus(l_ij)
// It runs on the tiles of info_nce, with 1 / logit_scale as temperature. One product forward; in the backward one for
// the tile and one for each side that has a gradient, none for logit_scale and logit_bias.
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "ops/info_nce/cpu/gradients.h"
#include "ops/info_nce/cpu/sigmoid_tile.h"

namespace ltood {
namespace {

using SigmoidGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct SigmoidInputs : InfoNceInputs {
  double scale, bias;

  explicit SigmoidInputs(const Arguments& arguments) {
    query = arguments.tensor("image_features");
    positive_key = arguments.tensor("text_features");
    target = arguments.dense("target");
    normalize = arguments.flag("normalize");
    const at::Tensor &logit_scale = arguments.tensor("logit_scale"), &logit_bias = arguments.tensor("logit_bias");
    LTOOD_CHECK_VALUE(logit_scale.dim() == 0 && logit_bias.dim() == 0, "sigmoid_loss", "logit_scale and logit_bias",
                      "numbers or 0-d tensors", "shapes ", logit_scale.sizes(), " and ", logit_bias.sizes());
    scale = logit_scale.item<double>();
    bias = logit_bias.item<double>();
    LTOOD_CHECK_VALUE(scale > 0, "sigmoid_loss", "logit_scale", "positive", scale);
    temperature.number = 1 / scale;
    check_info_nce(*this);
    check_target_range(*this);
  }
};

// softplus(x) = log(1 + exp(x)), never negative.
double softplus(double x) { return (x > 0 ? x : 0) + std::log1p(std::exp(-std::abs(x))); }

template <typename T>
at::Tensor forward(const SigmoidInputs& in, const PairScale& scale) {
  const PairSimilarities<T> pairs(in, scale);
  const int64_t n = in.query.size(0);
  const Logit<T> logit{static_cast<T>(in.scale), static_cast<T>(in.bias)};
  std::vector<double> sum(pairs.schedule().row_slots() * n, 0.0);
  pairs.schedule().run([&](int64_t i, int64_t j, int64_t row_slot, int64_t) {
    add_softplus(pairs.tile(i, j), logit, sum.data() + row_slot * n + pairs.queries().start(i));
  });
  const std::vector<double> positive = pairs.positive_similarities();
  const at::Tensor loss = at::empty({n}, in.query.options().dtype(at::kDouble));
  double* out = loss.mutable_data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) {
    out[i] = softplus(-positive[i] - in.bias);
    for (int64_t at = i; at < static_cast<int64_t>(sum.size()); at += n) out[i] += sum[at];
  }
  return loss.to(in.wide());
}

struct SigmoidNeeds {
  bool image, text;
};

template <typename T>
SigmoidGradients backward(const SigmoidInputs& in, const PairScale& scale, const at::Tensor& grad_loss,
                          SigmoidNeeds needs) {
  const int64_t n = in.query.size(0);
  const at::Tensor doubles = grad_loss.to(at::kDouble).contiguous();
  const double* grad = doubles.const_data_ptr<double>();
  double unit = 0;
  for (int64_t i = 0; i < n; ++i) unit = std::max(unit, std::abs(grad[i]));
  if (!(unit > 0)) unit = 1;
  std::vector<T> weight(n);
  for (int64_t i = 0; i < n; ++i) weight[i] = static_cast<T>(grad[i] / unit);
  const bool need_query = needs.image || !needs.text;  // logit_scale takes its gradient from one side
  PairGradients<T> gradients(in, scale, need_query, needs.text);
  const auto& pairs = gradients.pairs();
  std::vector<double> positive = pairs.positive_similarities(), sum(pairs.schedule().row_slots() * n, 0.0);
  const Logit<T> logit{static_cast<T>(in.scale), static_cast<T>(in.bias)};
  gradients.add_tiles([&](const Tile<T>& tile, int64_t r, int64_t, int64_t row_slot) {
    weight_by_sigmoid(tile, logit, weight.data() + r, sum.data() + row_slot * n + r);
  });
  double of_bias = 0;
  for (const double row : sum) of_bias += row;
  for (int64_t i = 0; i < n; ++i) {
    positive[i] = -grad[i] / unit / (1 + std::exp(positive[i] + in.bias));
    of_bias += positive[i];
  }
  const double factor = unit * in.scale;
  const at::Tensor image = need_query ? gradients.query_gradient(positive) : gradients.none();
  const at::Tensor text = needs.text ? gradients.column_gradient() : gradients.none();
  double radial = 0;
  if (needs.text) {
    gradients.add_to_positives(positive, text);
    radial = gradients.finish(text, pairs.keys(), in.positive_key, scale.positive, factor);
  }
  if (need_query) radial = gradients.finish(image, pairs.queries(), in.query, scale.query, factor);
  const auto number = [&](double value) {
    return at::scalar_tensor(value, in.query.options().dtype(at::kDouble)).to(in.wide());
  };
  return {(needs.image ? image : gradients.none()).to(in.query.scalar_type()), text.to(in.positive_key.scalar_type()),
          number(radial / in.scale), number(unit * of_bias)};
}

at::Tensor sigmoid_loss_cpu(const Arguments& arguments) {
  const SigmoidInputs in(arguments);
  const PairScale scale(in);
  return dispatch_wide(scale.dtype, [&](auto type) { return forward<decltype(type)>(in, scale); });
}

SigmoidGradients sigmoid_loss_bwd_cpu(const Arguments& arguments) {
  const SigmoidInputs in(arguments);
  const PairScale scale(in);
  const at::Tensor& grad = arguments.tensor("grad_loss");
  check_vector("sigmoid_loss_bwd", grad, "grad_loss", in.wide(), in.query.size(0), in.query, "image_features");
  const SigmoidNeeds needs{arguments.flag("need_image_features"), arguments.flag("need_text_features")};
  return dispatch_wide(scale.dtype, [&](auto type) { return backward<decltype(type)>(in, scale, grad, needs); });
}

}  // namespace
}  // namespace ltood

TORCH_LIBRARY_IMPL(ltood_fast, CPU, m) {
  m.impl("sigmoid_loss", ltood::by_name<ltood::sigmoid_loss_cpu>());
  m.impl("sigmoid_loss_bwd", ltood::by_name<ltood::sigmoid_loss_bwd_cpu>());
}
