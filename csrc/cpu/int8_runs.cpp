// Contract: int8_runs.h.
#include "int8_runs.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "clones.h"
#include "convert.h"
#include "halfstep/status.h"
#include "int8_activations.h"

namespace halfstep::cpu {
namespace {

constexpr std::int64_t kTile = 1024;  // elements, which fit the first cache with all that they need
constexpr float kZeros[kTile] = {};

// The sum, to nearest even, of a float32 below 2^22 in size and 1.5 * 2^23 has the rounded integer in its last bits.
constexpr float kRound = 0x1.8p+23F;
constexpr std::int32_t kRoundBits = 0x4b400000;

HS_CLONES void add_corrections(const std::int32_t* __restrict sums, const std::uint32_t* __restrict corrections,
                               std::int64_t count, std::int32_t* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i)
    out[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(sums[i]) - corrections[i]);
}

// The sums of some rows, and what is done with them. An activation that is a clamp is only `low` and `high`.
struct Rescaled {
  const std::int32_t* sums;
  std::int64_t sums_pitch;
  const std::uint32_t* corrections;
  const float* input_scales;  // [rows]
  const float* weight_scales;
  const float* bias;
  const float* residual;
  std::int64_t residual_pitch;
  float low, high;
  Activation activation;
};

// Calls use(activation of one element); the exponentials are this file's own, to a few units in the last place.
template <class Use>
[[gnu::always_inline]] inline void with_activation(Activation activation, const Use& use) {
  switch (activation) {
    case Activation::kNone:
    case Activation::kRelu:
    case Activation::kRelu6:
      return use([](float x) __attribute__((always_inline)) { return x; });
    case Activation::kGelu:
      return use([](float x) __attribute__((always_inline)) { return activations::gelu(x); });
    case Activation::kGeluTanh:
      return use([](float x) __attribute__((always_inline)) { return activations::gelu_tanh(x); });
    case Activation::kSilu:
      return use([](float x) __attribute__((always_inline)) { return activations::silu(x); });
    case Activation::kHardswish:
      return use([](float x) __attribute__((always_inline)) { return activations::hardswish(x); });
  }
  HS_UNREACHABLE("activation ", static_cast<int>(activation));
}

// out[row * pitch + i] = store(result i of the row)
template <class Out, class Store>
[[gnu::always_inline]] inline void rescale_rows(const Rescaled& x, std::int64_t rows, std::int64_t count, Out* out,
                                                std::int64_t pitch, const Store& store) {
  const float low = x.low;
  const float high = x.high;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int32_t* __restrict sums = x.sums + row * x.sums_pitch;
    const std::uint32_t* __restrict corrections = x.corrections;
    const float* __restrict weight_scales = x.weight_scales;
    const float* __restrict bias = x.bias;
    const float* __restrict residual = x.residual + row * x.residual_pitch;
    Out* __restrict to = out + row * pitch;
    const float input_scale = x.input_scales[row];
    for (std::int64_t i = 0; i < count; ++i) {
      const auto sum = static_cast<std::int32_t>(static_cast<std::uint32_t>(sums[i]) - corrections[i]);
      const float result = static_cast<float>(sum) * (input_scale * weight_scales[i]) + bias[i] + residual[i];
      to[i] = store(clamp_between(result, low, high));
    }
  }
}

HS_CLONES void rescale(const Rescaled& x, std::int64_t rows, std::int64_t count, float* out, std::int64_t pitch) {
  with_activation(x.activation, [&](const auto& activate) __attribute__((always_inline)) {
    rescale_rows(x, rows, count, out, pitch, activate);
  });
}

// quantize_value(), by the last bits of what is bounded by the levels. NaN becomes the zero point.
struct Quantized {
  float inverse_scale, lowest, highest;
  std::int32_t offset;

  Quantized(float inverse, std::int32_t zero_point)
      : inverse_scale(inverse),
        lowest(static_cast<float>(-128 - zero_point)),
        highest(static_cast<float>(127 - zero_point)),
        offset(zero_point - kRoundBits) {}

  [[gnu::always_inline]] std::int8_t operator()(float x) const {
    const float scaled = x * inverse_scale;
    float bounded = scaled > lowest ? scaled : lowest;
    bounded = bounded < highest ? bounded : highest;
    bounded = scaled == scaled ? bounded : 0.0F;
    return static_cast<std::int8_t>(std::bit_cast<std::int32_t>(bounded + kRound) + offset);
  }
};

HS_CLONES void rescale_to_int8(const Rescaled& x, const Quantized& quantized, std::int64_t rows, std::int64_t count,
                               std::int8_t* out, std::int64_t pitch) {
  const Quantized to = quantized;  // a copy, of which the compiler knows that `out` is none of it
  with_activation(x.activation, [&](const auto& activate) __attribute__((always_inline)) {
    rescale_rows(x, rows, count, out, pitch,
                 [&](float result) __attribute__((always_inline)) { return to(activate(result)); });
  });
}

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
  const Quantized quantized(inverse_scale, zero_point);
  for (std::int64_t i = 0; i < count; ++i) out[i] = quantized(x[i]);
}

namespace {

// Some rows, of channels that fit a tile together. `begin`: the first of the call's channels.
class Finish {
 public:
  explicit Finish(const Int8Finish& call)
      : call_(call),
        epilogue_(call.epilogue),
        quantized_(1.0F / epilogue_.out.parameters.scale, epilogue_.out.parameters.zero_point) {}

  void run(std::int64_t row, std::int64_t rows, std::int64_t begin, std::int64_t count) {
    const std::int64_t at = call_.at + row * call_.pitch + begin;
    const Rescaled x = rescaled(row, rows, begin, count, at);
    void* const out = epilogue_.out.data;
    if (epilogue_.out.kind == Int8OutKind::kInt8)
      return rescale_to_int8(x, quantized_, rows, count, static_cast<std::int8_t*>(out) + at, call_.pitch);
    if (epilogue_.out.dtype == DType::kFloat32)
      return rescale(x, rows, count, static_cast<float*>(out) + at, call_.pitch);
    rescale(x, rows, count, values_, count);
    for (std::int64_t i = 0; i < rows; ++i)
      narrow_run(epilogue_.out.dtype, values_ + i * count, count, out, at + i * call_.pitch);
  }

 private:
  Rescaled rescaled(std::int64_t row, std::int64_t rows, std::int64_t begin, std::int64_t count, std::int64_t at) {
    for (std::int64_t i = 0; i < rows; ++i)
      scales_[i] = epilogue_.row_scales ? epilogue_.row_scales[(call_.row + row + i) / call_.rows_per_scale]
                                        : epilogue_.input.scale;
    const float* residual = kZeros;
    std::int64_t residual_pitch = 0;
    if (epilogue_.residual && epilogue_.residual_dtype == DType::kFloat32) {
      residual = static_cast<const float*>(epilogue_.residual) + at;
      residual_pitch = call_.pitch;
    } else if (epilogue_.residual) {
      for (std::int64_t i = 0; i < rows; ++i)
        widen_run(epilogue_.residual_dtype, epilogue_.residual, at + i * call_.pitch, count, residual_ + i * count);
      residual = residual_;
      residual_pitch = count;
    }
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const bool bounded = epilogue_.activation == Activation::kRelu || epilogue_.activation == Activation::kRelu6;
    return {call_.sums + row * call_.sums_pitch + begin,
            call_.sums_pitch,
            call_.corrections + begin,
            scales_,
            epilogue_.weight_scales + call_.channel + begin,
            epilogue_.bias ? epilogue_.bias + call_.channel + begin : kZeros,
            residual,
            residual_pitch,
            bounded ? 0.0F : -kInfinity,
            epilogue_.activation == Activation::kRelu6 ? 6.0F : kInfinity,
            epilogue_.activation};
  }

  const Int8Finish& call_;
  const Int8Epilogue& epilogue_;
  Quantized quantized_;
  float scales_[kTile];
  float residual_[kTile];
  float values_[kTile];
};

}  // namespace

void finish_rows(const Int8Finish& call) {
  const Int8Out& out = call.epilogue.out;
  if (out.kind == Int8OutKind::kSums) {
    for (std::int64_t row = 0; row < call.rows; ++row)
      add_corrections(call.sums + row * call.sums_pitch, call.corrections, call.channels,
                      static_cast<std::int32_t*>(out.data) + call.at + row * call.pitch);
    return;
  }
  Finish finish(call);
  for (std::int64_t begin = 0; begin < call.channels; begin += kTile) {
    const std::int64_t count = std::min(kTile, call.channels - begin);
    const std::int64_t several = kTile / count;
    for (std::int64_t row = 0; row < call.rows; row += several)
      finish.run(row, std::min(several, call.rows - row), begin, count);
  }
}

}  // namespace halfstep::cpu
