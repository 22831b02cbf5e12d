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
      return x * 0.5F * (1.0F + erff(x * 0.70710678118654752F));
    case Activation::kGeluTanh:
      return 0.5F * x * (1.0F + tanhf(0.79788456080286536F * (x + 0.044715F * x * x * x)));
    case Activation::kSilu:
      return x / (1.0F + expf(-x));
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
