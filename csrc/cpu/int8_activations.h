// The activations of int8 products for one element, without branches, so that loops over them become vector code.
#pragma once

#include <bit>
#include <cstdint>

#include "int8_math.h"

namespace halfstep::cpu::activations {

[[gnu::always_inline]] inline float hardswish(float x) {
  return x * (clamp_between(x + 3.0F, 0.0F, 6.0F) * (1.0F / 6.0F));
}

// e^x = 2^n e^r, with the polynomial of Cephes' expf (Stephen Moshier): 1e-7 of the result. Infinite and 0 beyond
// float32; a NaN stays one.
[[gnu::always_inline]] inline float exponential(float x) {
  constexpr float kRound = 0x1.8p+23F;  // leaves the rounded integer in the last bits of a sum
  const float bounded = clamp_between(x, -150.0F, 150.0F);
  const float shifted = bounded * 1.44269504F + kRound;
  const float n = shifted - kRound;
  const float r = bounded - n * 0.693359375F - n * -2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  const float power = p * (r * r) + r + 1.0F;
  // 2^n by two factors, neither of which leaves the normal numbers.
  const auto exponent = static_cast<std::int32_t>(std::bit_cast<std::uint32_t>(shifted) - 0x4b400000U);
  const std::int32_t half = exponent >> 1;
  const auto two_to = [](std::int32_t k) __attribute__((always_inline)) {
    return std::bit_cast<float>((static_cast<std::uint32_t>(k) + 127U) << 23);
  };
  return power * two_to(half) * two_to(exponent - half);
}

[[gnu::always_inline]] inline float silu(float x) {
  return x / (1.0F + exponential(-x));
}

// (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)
[[gnu::always_inline]] inline float gelu_tanh(float x) {
  const float u = 0.79788456080286536F * (x + 0.044715F * x * x * x);
  return x / (1.0F + exponential(-2.0F * u));
}

using halfstep::gelu;

}  // namespace halfstep::cpu::activations
