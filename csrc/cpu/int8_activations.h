// The activations of int8 products for one element, without branches, so that loops over them become vector code.
#pragma once

#include "int8_math.h"

namespace halfstep::cpu::activations {

[[gnu::always_inline]] inline float relu(float x) {
  return x < 0.0F ? 0.0F : x;
}
[[gnu::always_inline]] inline float relu6(float x) {
  return clamp_between(x, 0.0F, 6.0F);
}
[[gnu::always_inline]] inline float hardswish(float x) {
  return x * (clamp_between(x + 3.0F, 0.0F, 6.0F) * (1.0F / 6.0F));
}
[[gnu::always_inline]] inline float gelu(float x) {
  return activate(Activation::kGelu, x);
}
[[gnu::always_inline]] inline float gelu_tanh(float x) {
  return activate(Activation::kGeluTanh, x);
}
[[gnu::always_inline]] inline float silu(float x) {
  return activate(Activation::kSilu, x);
}

}  // namespace halfstep::cpu::activations
