// One element of each optimizer, shared by the CPU and the CUDA kernels. Contract: halfstep/optimizer.h.
#pragma once

#include <cmath>

#include "halfstep/optimizer.h"

#ifdef __CUDACC__
#define HS_HOST_DEVICE __host__ __device__ inline
#else
#define HS_HOST_DEVICE [[gnu::always_inline]] inline
#endif

namespace halfstep {

// Throws InvalidArgument where a row does not keep the contract.
void check_optimizer_tensors(OptimizerKind kind, std::span<const OptimizerTensor> tensors, std::size_t groups);

// What a tensor's elements have in common: its group's hyperparameters and what follows from its step count.
template <class Compute>
struct AdamConstants {
  double lr, weight_decay, beta1, beta2, eps;
  Compute step_size;              // lr / (1 - beta1^step)
  Compute bias_correction2_sqrt;  // sqrt(1 - beta2^step)
  bool decoupled, maximize;
};

template <class Compute>
struct SgdConstants {
  double lr, weight_decay, momentum, dampening;
  bool first, nesterov, maximize;
};

template <class Compute>
HS_HOST_DEVICE Compute step_size(double lr, double beta1, float step) {
  const auto bias_correction1 = static_cast<Compute>(1 - pow(beta1, static_cast<double>(step)));
  return static_cast<Compute>(lr / static_cast<double>(bias_correction1));
}

template <class Compute>
HS_HOST_DEVICE Compute bias_correction2_sqrt(double beta2, float step) {
  return sqrt(static_cast<Compute>(1 - pow(beta2, static_cast<double>(step))));
}

// A float64 factor makes a product float64; each assignment rounds once, as in torch.
template <class Compute>
HS_HOST_DEVICE Compute decayed_gradient(Compute grad, Compute param, double weight_decay) {
  return static_cast<Compute>(grad + param * weight_decay);
}

template <class Compute>
HS_HOST_DEVICE Compute decayed_parameter(Compute param, double lr, double weight_decay) {
  return static_cast<Compute>(param - lr * weight_decay * param);
}

// After the decay.
template <bool amsgrad, class Compute>
HS_HOST_DEVICE void adam_element(Compute& param, Compute grad, Compute& exp_avg, Compute& exp_avg_sq,
                                 Compute& max_exp_avg_sq, const AdamConstants<Compute>& c) {
  exp_avg = static_cast<Compute>(c.beta1 * exp_avg + (1 - c.beta1) * grad);
  exp_avg_sq = static_cast<Compute>(c.beta2 * exp_avg_sq + (1 - c.beta2) * grad * grad);
  Compute second = exp_avg_sq;
  if constexpr (amsgrad) second = max_exp_avg_sq = max_exp_avg_sq < exp_avg_sq ? exp_avg_sq : max_exp_avg_sq;
  const auto denom = static_cast<Compute>(sqrt(second) / c.bias_correction2_sqrt + c.eps);
  param -= c.step_size * exp_avg / denom;
}

// The momentum buffer of this step, and the direction that follows from it. torch goes on with the buffer's value
// before it is rounded.
template <bool first, bool nesterov, class Compute>
HS_HOST_DEVICE Compute sgd_direction(Compute grad, Compute& momentum_buffer, const SgdConstants<Compute>& c) {
  double buffer = grad;
  if constexpr (!first) buffer = c.momentum * momentum_buffer + (1 - c.dampening) * grad;
  momentum_buffer = static_cast<Compute>(buffer);
  return static_cast<Compute>(nesterov ? grad + c.momentum * buffer : buffer);
}

template <class Compute>
HS_HOST_DEVICE Compute sgd_element(Compute param, Compute direction, double lr) {
  return static_cast<Compute>(param - lr * direction);
}

// The two factors of the gradient, from one float each.
struct GradientFactors {
  float inverse_scale;
  float clip;
};
HS_HOST_DEVICE GradientFactors gradient_factors(const StepControl& control) {
  GradientFactors factors{1.0F, 1.0F};
  if (control.scale) factors.inverse_scale = static_cast<float>(1.0 / static_cast<double>(*control.scale));
  if (control.norm) {
    const float clip = control.max_norm / (*control.norm + 1e-6F);
    factors.clip = clip < 1.0F ? clip : 1.0F;
  }
  return factors;
}

}  // namespace halfstep
