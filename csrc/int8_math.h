// The epilogue of int8 products for one element, the same bits on the CPU and on the GPU. Contract: halfstep/int8.h.
#pragma once

#include <cmath>

#include "halfstep/int8.h"

namespace halfstep {

// Compilers for the GPU join products and sums to fused operations, which round once and not twice.
HALFSTEP_HOST_DEVICE inline float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
HALFSTEP_HOST_DEVICE inline float rounded_sum(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// A NaN stays a NaN, as in torch.
HALFSTEP_HOST_DEVICE inline float clamp_between(float x, float low, float high) {
  const float above = x < low ? low : x;
  return above > high ? high : above;
}

// sum * x^n + ..., the highest power first, in fused operations. Not a loop, which compilers do not unroll everywhere.
HALFSTEP_HOST_DEVICE [[gnu::always_inline]] inline float polynomial(float, float sum) {
  return sum;
}
template <class... Floats>
HALFSTEP_HOST_DEVICE [[gnu::always_inline]] inline float polynomial(float x, float sum, float next, Floats... rest) {
  return polynomial(x, __builtin_fmaf(sum, x, next), rest...);
}

// gelu is a polynomial in fused operations: the same bits everywhere, in less time than an exponential takes. The
// normal distribution is 1/2 + x q(x^2); q is a minimax fit of the 13th degree on x^2 <= 5.25^2, and beyond that what
// is clamped between 0 and 1. Its error is below 2e-7, so what is left of gelu below -4.5 has no digits.
HALFSTEP_HOST_DEVICE [[gnu::always_inline]] inline float gelu(float x) {
  constexpr float kEnd = 5.25F * 5.25F;
  const float square = x * x;
#ifdef __CUDA_ARCH__
  const float bounded = fminf(square, kEnd);
#else
  const float bounded = square < kEnd ? square : kEnd;
#endif
  const float u = __builtin_fmaf(bounded, 2.0F / kEnd, -1.0F);
  const float q = polynomial(u, -5.609501e-04F, 1.4566111e-03F, -1.3263604e-03F, 1.8694482e-03F, -5.1199673e-03F,
                             9.070371e-03F, -1.2954394e-02F, 1.8326e-02F, -2.4994928e-02F, 3.2064263e-02F,
                             -3.9768633e-02F, 4.9643897e-02F, -6.7126654e-02F, 1.3465936e-01F);
  const float share = __builtin_fmaf(x, q, 0.5F);
#ifdef __CUDA_ARCH__
  return x * __saturatef(share);
#else
  return x * clamp_between(share, 0.0F, 1.0F);
#endif
}

// The GPU's silu and gelu_tanh take its own exponential and reciprocal: (1 + tanh(u)) / 2 is 1 / (1 + e^-2u); their
// error is below 1e-6 of x.
#ifdef __CUDACC__
__device__ inline float short_power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
__device__ inline float short_reciprocal(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}
#endif
HALFSTEP_HOST_DEVICE inline float silu(float x) {
#ifdef __CUDA_ARCH__
  return x * short_reciprocal(1.0F + short_power_of_two(-1.44269504F * x));
#else
  return x / (1.0F + expf(-x));
#endif
}
HALFSTEP_HOST_DEVICE inline float gelu_tanh(float x) {
#ifdef __CUDA_ARCH__
  const float u = -1.59576912160573072F * 1.44269504F * x;
  return x * short_reciprocal(1.0F + short_power_of_two(u + 0.044715F * u * x * x));
#else
  return 0.5F * x * (1.0F + tanhf(0.79788456080286536F * (x + 0.044715F * x * x * x)));
#endif
}

// The activations that are a clamp, which costs nothing beside the rest of an epilogue.
inline bool is_clamp(Activation activation) {
  return activation == Activation::kNone || activation == Activation::kRelu || activation == Activation::kRelu6;
}

// torch.nn.functional's relu, relu6, gelu, gelu(approximate="tanh"), silu and hardswish.
HALFSTEP_HOST_DEVICE inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x < 0.0F ? 0.0F : x;
    case Activation::kRelu6:
      return clamp_between(x, 0.0F, 6.0F);
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kSilu:
      return silu(x);
    case Activation::kHardswish:
      return rounded_product(x, rounded_product(clamp_between(rounded_sum(x, 3.0F), 0.0F, 6.0F), 1.0F / 6.0F));
  }
  return x;
}

// `scale` is input_scale * weight_scale, rounded. bias and residual are 0 where there are none: adding 0 changes no bit
// but the sign of a zero.
HALFSTEP_HOST_DEVICE inline float int8_result(std::int32_t sum, float scale, float bias, float residual,
                                              Activation activation) {
  const float scaled = rounded_product(static_cast<float>(sum), scale);
  return activate(activation, rounded_sum(rounded_sum(scaled, bias), residual));
}

}  // namespace halfstep
