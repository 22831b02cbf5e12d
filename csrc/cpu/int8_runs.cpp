// Contract: int8_runs.h.
#include "int8_runs.h"

#include <algorithm>
#include <bit>

#include "clones.h"
#include "convert.h"
#include "halfstep/status.h"
#include "int8_activations.h"

namespace halfstep::cpu {
namespace {

constexpr std::int64_t kTile = 256;
constexpr float kZeros[kTile] = {};

// The sum, to nearest even, of a float32 below 2^22 in size and 1.5 * 2^23 has the rounded integer in its last bits.
constexpr float kRound = 0x1.8p+23F;
constexpr std::int32_t kRoundBits = 0x4b400000;

HS_CLONES void add_corrections(const std::int32_t* __restrict sums, const std::uint32_t* __restrict corrections,
                               std::int64_t count, std::int32_t* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i)
    out[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(sums[i]) - corrections[i]);
}

HS_CLONES void rescale(const std::int32_t* __restrict sums, const std::uint32_t* __restrict corrections,
                       float input_scale, const float* __restrict weight_scales, const float* __restrict bias,
                       const float* __restrict residual, std::int64_t count, float* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) {
    const auto sum = static_cast<std::int32_t>(static_cast<std::uint32_t>(sums[i]) - corrections[i]);
    out[i] = static_cast<float>(sum) * (input_scale * weight_scales[i]) + bias[i] + residual[i];
  }
}

#define HS_ACTIVATE_RUN(name)                                                \
  HS_CLONES void name##_run(float* x, std::int64_t count) {                  \
    for (std::int64_t i = 0; i < count; ++i) x[i] = activations::name(x[i]); \
  }
HS_ACTIVATE_RUN(relu)
HS_ACTIVATE_RUN(relu6)
HS_ACTIVATE_RUN(gelu)
HS_ACTIVATE_RUN(gelu_tanh)
HS_ACTIVATE_RUN(silu)
HS_ACTIVATE_RUN(hardswish)
#undef HS_ACTIVATE_RUN

}  // namespace

HS_CLONES std::uint32_t largest_magnitude_bits(const float* x, std::int64_t count) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x[i]) & 0x7fffffffU;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

HS_CLONES void quantize_run(const float* __restrict x, std::int64_t count, float inverse_scale, std::int32_t zero_point,
                            std::int8_t* __restrict out) {
  const auto lowest = static_cast<float>(-128 - zero_point);
  const auto highest = static_cast<float>(127 - zero_point);
  const std::int32_t offset = zero_point - kRoundBits;
  for (std::int64_t i = 0; i < count; ++i) {
    const float scaled = x[i] * inverse_scale;
    float bounded = scaled > lowest ? scaled : lowest;
    bounded = bounded < highest ? bounded : highest;
    bounded = scaled == scaled ? bounded : 0.0F;
    out[i] = static_cast<std::int8_t>(std::bit_cast<std::int32_t>(bounded + kRound) + offset);
  }
}

void activate_run(Activation activation, float* x, std::int64_t count) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      return relu_run(x, count);
    case Activation::kRelu6:
      return relu6_run(x, count);
    case Activation::kGelu:
      return gelu_run(x, count);
    case Activation::kGeluTanh:
      return gelu_tanh_run(x, count);
    case Activation::kSilu:
      return silu_run(x, count);
    case Activation::kHardswish:
      return hardswish_run(x, count);
  }
  HS_UNREACHABLE("activation ", static_cast<int>(activation));
}

void finish_run(const Int8Finish& run) {
  const Int8Epilogue& e = run.epilogue;
  if (e.out.kind == Int8OutKind::kSums)
    return add_corrections(run.sums, run.corrections, run.count, static_cast<std::int32_t*>(e.out.data) + run.at);
  float x[kTile];
  float residual[kTile];
  for (std::int64_t begin = 0; begin < run.count; begin += kTile) {
    const std::int64_t count = std::min(kTile, run.count - begin);
    const std::int64_t channel = run.channel + begin;
    const std::int64_t at = run.at + begin;
    if (e.residual) widen_run(e.residual_dtype, e.residual, at, count, residual);
    rescale(run.sums + begin, run.corrections + begin, run.input_scale, e.weight_scales + channel,
            e.bias ? e.bias + channel : kZeros, e.residual ? residual : kZeros, count, x);
    activate_run(e.activation, x, count);
    if (e.out.kind == Int8OutKind::kInt8) {
      quantize_run(x, count, 1.0F / e.out.parameters.scale, e.out.parameters.zero_point,
                   static_cast<std::int8_t*>(e.out.data) + at);
    } else {
      narrow_run(e.out.dtype, x, count, e.out.data, at);
    }
  }
}

}  // namespace halfstep::cpu
