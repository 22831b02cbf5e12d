// What stands before and behind the int8 layers, on whole tensors and once for each model: batch norms folded into
// convolutions, SmoothQuant's factors, and the measures by which layers are judged. All in float64 inside.
//
//   fold_batch_norm    weight and bias of convolution and norm in one, by the norm's running statistics
//   smoothing_factors  SmoothQuant (Xiao et al., 2022): input_max^alpha / weight_max^(1 - alpha) for each input channel
//   scale_columns      weight times one factor for each input channel (dimension 1)
//   noise_powers       [2, batch]: squared norms of output - reference, and of reference, in each sample
//   output_noise       [batch]: the first over the second
//   top1_correct       [batch]: 1 where the largest of a row of logits is the label's, else 0
//   error_effect       mean over the batch of (gradient . (output - reference))^2: what an error at this place does to
//                      the number that was differentiated, to first order
//   mean_difference    [channels]: mean of reference - output over everything else (bias correction: Nagel et al.,
//   2019)
#include <algorithm>

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "registration.h"

namespace halfstep::torch_ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor wide(const at::Tensor& tensor) {
  return tensor.detach().to(at::kDouble);
}

// [batch, everything else]
at::Tensor by_sample(const at::Tensor& tensor) {
  const at::Tensor values = wide(tensor);
  return values.dim() == 0 ? values.reshape({1, 1}) : values.reshape({values.size(0), -1});
}

void check_alike(const at::Tensor& reference, const at::Tensor& output, const char* op) {
  TORCH_CHECK_VALUE(reference.sizes() == output.sizes(), op, ": output has shape ", output.sizes(), ", expected ",
                    reference.sizes(), ", that of reference");
}

std::tuple<at::Tensor, at::Tensor> fold_batch_norm(const at::Tensor& weight, const OptionalTensor& bias,
                                                   const at::Tensor& running_mean, const at::Tensor& running_var,
                                                   const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                                   double eps) {
  const std::int64_t channels = weight.size(0);
  for (const at::Tensor& statistic : {running_mean, running_var})
    TORCH_CHECK_VALUE(statistic.dim() == 1 && statistic.size(0) == channels, "fold_batch_norm: a statistic has shape ",
                      statistic.sizes(), ", expected [", channels, "], the weight's output channels");
  at::Tensor factor = (wide(running_var) + eps).rsqrt();
  if (norm_weight) factor = factor * wide(*norm_weight);
  at::Tensor shift = bias ? wide(*bias) - wide(running_mean) : -wide(running_mean);
  shift = shift * factor;
  if (norm_bias) shift = shift + wide(*norm_bias);
  std::vector<std::int64_t> column(static_cast<std::size_t>(weight.dim()), 1);
  column[0] = channels;
  return {(wide(weight) * factor.view(column)).to(weight.scalar_type()), shift.to(weight.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor> smoothing_factors(const at::Tensor& input_max, const at::Tensor& weight,
                                                     double alpha) {
  TORCH_CHECK_VALUE(alpha >= 0.0 && alpha <= 1.0, "smoothing_factors: alpha is ", alpha, ", expected 0 to 1");
  TORCH_CHECK_VALUE(weight.dim() >= 2 && input_max.dim() == 1 && input_max.size(0) == weight.size(1),
                    "smoothing_factors: input_max has shape ", input_max.sizes(), ", expected [", weight.size(1),
                    "], one for each input channel of the weight");
  const at::Tensor inputs = wide(input_max);
  const at::Tensor weights = wide(weight).abs().transpose(0, 1).reshape({weight.size(1), -1}).amax(1);
  const at::Tensor factors = inputs.pow(alpha) / weights.pow(1.0 - alpha);
  // A channel without inputs or weights needs none.
  const at::Tensor usable = inputs.gt(0).logical_and(weights.gt(0)).logical_and(factors.isfinite());
  const at::Tensor chosen = at::where(usable, factors, at::scalar_tensor(1.0, factors.options()));
  return {chosen.to(at::kFloat), chosen.reciprocal().to(at::kFloat)};
}

double smoothed_scale(const at::Tensor& input_max, const at::Tensor& input_factors, std::int64_t levels) {
  TORCH_CHECK_VALUE(levels >= 1 && levels <= 255, "smoothed_scale: levels is ", levels, ", expected 1 to 255");
  check_alike(input_max, input_factors, "smoothed_scale");
  const double largest = (wide(input_max) * wide(input_factors)).max().item<double>();
  return std::max(largest / static_cast<double>(levels), 0x1p-126);
}

at::Tensor scale_columns(const at::Tensor& weight, const at::Tensor& factors) {
  TORCH_CHECK_VALUE(weight.dim() >= 2 && factors.dim() == 1 && factors.size(0) == weight.size(1),
                    "scale_columns: factors has shape ", factors.sizes(), ", expected [", weight.size(1), "]");
  std::vector<std::int64_t> row(static_cast<std::size_t>(weight.dim()), 1);
  row[1] = weight.size(1);
  return (wide(weight) * wide(factors).view(row)).to(weight.scalar_type());
}

at::Tensor noise_powers(const at::Tensor& reference, const at::Tensor& output) {
  check_alike(reference, output, "noise_powers");
  const at::Tensor expected = by_sample(reference);
  const at::Tensor noise = (by_sample(output).to(expected.device()) - expected).square().sum(1);
  return at::stack({noise, expected.square().sum(1)}).cpu();
}

at::Tensor output_noise(const at::Tensor& reference, const at::Tensor& output) {
  check_alike(reference, output, "output_noise");
  const at::Tensor powers = noise_powers(reference, output);
  const at::Tensor noise = powers[0];
  const at::Tensor power = powers[1];
  // Nothing of nothing is no noise; something of nothing is all noise; a NaN stays one.
  return at::where(power.ne(0), noise / power, noise.gt(0).to(at::kDouble) + noise * 0);
}

at::Tensor top1_correct(const at::Tensor& output, const at::Tensor& labels) {
  TORCH_CHECK_VALUE(output.dim() == 2 && labels.dim() == 1 && labels.size(0) == output.size(0),
                    "top1_correct: output has shape ", output.sizes(), " and labels ", labels.sizes(),
                    ", expected [batch, classes] and [batch]");
  return output.argmax(1).eq(labels.to(output.device())).to(at::kDouble).cpu();
}

double error_effect(const at::Tensor& gradient, const at::Tensor& reference, const at::Tensor& output) {
  check_alike(reference, output, "error_effect");
  check_alike(gradient, output, "error_effect");
  return (by_sample(gradient) * (by_sample(output) - by_sample(reference))).sum(1).square().mean().item<double>();
}

at::Tensor mean_difference(const at::Tensor& reference, const at::Tensor& output, std::int64_t channel_dim) {
  check_alike(reference, output, "mean_difference");
  const at::Tensor difference = (wide(reference) - wide(output)).transpose(0, channel_dim);
  return difference.reshape({difference.size(0), -1}).mean(1).to(at::kFloat);
}

}  // namespace

void define_int8_prepare(torch::Library& library) {
  library.def(
      "fold_batch_norm(Tensor weight, Tensor? bias, Tensor running_mean, Tensor running_var, Tensor? norm_weight, "
      "Tensor? norm_bias, float eps) -> (Tensor, Tensor)",
      &fold_batch_norm);
  library.def("smoothing_factors(Tensor input_max, Tensor weight, float alpha=0.5) -> (Tensor, Tensor)",
              &smoothing_factors);
  library.def("smoothed_scale(Tensor input_max, Tensor input_factors, int levels) -> float", &smoothed_scale);
  library.def("scale_columns(Tensor weight, Tensor factors) -> Tensor", &scale_columns);
  library.def("noise_powers(Tensor reference, Tensor output) -> Tensor", &noise_powers);
  library.def("output_noise(Tensor reference, Tensor output) -> Tensor", &output_noise);
  library.def("top1_correct(Tensor output, Tensor labels) -> Tensor", &top1_correct);
  library.def("error_effect(Tensor gradient, Tensor reference, Tensor output) -> float", &error_effect);
  library.def("mean_difference(Tensor reference, Tensor output, int channel_dim) -> Tensor", &mean_difference);
}

}  // namespace halfstep::torch_ops
