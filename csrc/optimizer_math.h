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

// What a tensor's elements have in common: its group's hyperparameters, rounded to the compute type as torch does, and
// what follows from its step count.
template <class Compute>
struct AdamConstants {
  Compute lr, weight_decay, beta1, beta2, eps;
  Compute step_size;              // lr / (1 - beta1^step)
  Compute bias_correction2_sqrt;  // sqrt(1 - beta2^step)
  bool decoupled, maximize;
};

template <class Compute>
struct SgdConstants {
  Compute lr, weight_decay, momentum, dampening;
  bool first, nesterov, maximize;
};

// a * b + c, rounded once, where torch's compiler fuses the product and the sum. Processors without the instruction
// (older than 2013) call the C library, slowly, for the same bits.
HS_HOST_DEVICE float multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
HS_HOST_DEVICE double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

template <class Compute>
HS_HOST_DEVICE Compute bias_correction(Compute beta, float step) {
  return Compute{1} - pow(beta, static_cast<Compute>(step));
}

template <class Compute>
HS_HOST_DEVICE Compute step_size(Compute lr, Compute beta1, float step) {
  return lr / bias_correction(beta1, step);
}

template <class Compute>
HS_HOST_DEVICE Compute bias_correction2_sqrt(Compute beta2, float step) {
  return sqrt(bias_correction(beta2, step));
}

template <class Compute>
HS_HOST_DEVICE Compute decayed_gradient(Compute grad, Compute param, Compute weight_decay) {
  return multiply_add(weight_decay, param, grad);
}

template <class Compute>
HS_HOST_DEVICE Compute decayed_parameter(Compute param, Compute lr, Compute weight_decay) {
  return multiply_add(-(lr * weight_decay), param, param);
}

// After the decay.
template <bool amsgrad, class Compute>
HS_HOST_DEVICE void adam_element(Compute& param, Compute grad, Compute& exp_avg, Compute& exp_avg_sq,
                                 Compute& max_exp_avg_sq, const AdamConstants<Compute>& c) {
  exp_avg = multiply_add(c.beta1, exp_avg, (1 - c.beta1) * grad);
  exp_avg_sq = multiply_add(c.beta2, exp_avg_sq, (1 - c.beta2) * (grad * grad));
  Compute second = exp_avg_sq;
  if constexpr (amsgrad) second = max_exp_avg_sq = max_exp_avg_sq < exp_avg_sq ? exp_avg_sq : max_exp_avg_sq;
  const Compute denom = sqrt(second) / c.bias_correction2_sqrt + c.eps;
  param -= c.step_size * exp_avg / denom;
}

// The momentum buffer of this step, and the direction that follows from it.
template <bool first, bool nesterov, class Compute>
HS_HOST_DEVICE Compute sgd_direction(Compute grad, Compute& momentum_buffer, const SgdConstants<Compute>& c) {
  momentum_buffer = first ? grad : multiply_add(1 - c.dampening, grad, c.momentum * momentum_buffer);
  return nesterov ? multiply_add(c.momentum, momentum_buffer, grad) : momentum_buffer;
}

template <class Compute>
HS_HOST_DEVICE Compute sgd_element(Compute param, Compute direction, Compute lr) {
  return multiply_add(-lr, direction, param);
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
