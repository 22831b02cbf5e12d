// The element types of the core: their ranges, sizes and conversions.
//
//   float32   s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm
//   float16   s eeeee mmmmmmmmmm
//   bfloat16  s eeeeeeee mmmmmmm                     the upper half of a float32
//   float64   computes in itself; the others compute in float32
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "halfstep/export.h"
#include "halfstep/status.h"

namespace halfstep {

enum class DType : std::uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Storage of the two half types: bits only, no arithmetic. Widening is exact; narrowing rounds to nearest even,
// overflows to infinity and keeps NaN a (quiet) NaN.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// The smallest normal float16, 2^-14: gradients below it start to lose bits in half precision.
inline constexpr float kHalfMinNormal = 0x1p-14F;

template <DType>
struct DTypeTraits;

template <>
struct DTypeTraits<DType::kFloat32> {
  static constexpr double max = 0x1.fffffep+127;
  static constexpr double min_normal = 0x1p-126;
};

template <>
struct DTypeTraits<DType::kFloat64> {
  static constexpr double max = 0x1.fffffffffffffp+1023;
  static constexpr double min_normal = 0x1p-1022;
};

template <>
struct DTypeTraits<DType::kFloat16> {
  static constexpr double max = 65504.0;
  static constexpr double min_normal = 0x1p-14;
};

template <>
struct DTypeTraits<DType::kBFloat16> {
  static constexpr double max = 0x1.fep+127;
  static constexpr double min_normal = 0x1p-126;
};

inline std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
  }
  HS_UNREACHABLE("dtype ", static_cast<int>(dtype));
}

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
  }
  HS_UNREACHABLE("dtype ", static_cast<int>(dtype));
}

// Conversions, branch-free so that compilers vectorise them. The float16 ones follow the method of the FP16 library
// (Maratyszcza): let the float32 adder do the rounding of subnormals. They use no float32 subnormal as an operand, so
// they also hold where the processor flushes those to zero.
// condition ? a : b by masks: compilers leave no branch of it, which would keep them from vectorising.
[[gnu::always_inline]] inline std::uint32_t select_bits(bool condition, std::uint32_t a, std::uint32_t b) {
  const std::uint32_t mask = 0U - static_cast<std::uint32_t>(condition);
  return (a & mask) | (b & ~mask);
}

[[gnu::always_inline]] inline float widen(float x) {
  return x;
}
[[gnu::always_inline]] inline double widen(double x) {
  return x;
}
[[gnu::always_inline]] inline float widen(BFloat16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
[[gnu::always_inline]] inline float widen(Half x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000U) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffU) << 13;
  // 1. Normal, infinite or NaN: move the exponent's bias from 15 to 127; all-ones goes on to float32's all-ones.
  const std::uint32_t rebias = select_bits(magnitude >= 0x0f800000U, (255U - 31U) << 23, (127U - 15U) << 23);
  // 2. Zero or subnormal: m * 2^-24 == (0.5 + m * 2^-24) - 0.5, exactly.
  const float subnormal = std::bit_cast<float>((magnitude >> 13) | 0x3f000000U) - 0.5F;
  const std::uint32_t bits =
      select_bits(magnitude < 0x00800000U, std::bit_cast<std::uint32_t>(subnormal), magnitude + rebias);
  return std::bit_cast<float>(sign | bits);
}

template <class Storage>
Storage narrow(double x);  // only float64 storage takes a double
template <class Storage>
Storage narrow(float x);

template <>
[[gnu::always_inline]] inline double narrow<double>(double x) {
  return x;
}
template <>
[[gnu::always_inline]] inline float narrow<float>(float x) {
  return x;
}
template <>
[[gnu::always_inline]] inline BFloat16 narrow<BFloat16>(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  // Add half of the last kept place, less one when that place is even: ties go to even. A carry into the exponent is
  // the right answer, up to infinity; a NaN must not carry, so it is made quiet instead.
  const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const std::uint32_t nan = (bits >> 16) | 0x0040U;
  return {static_cast<std::uint16_t>(select_bits((bits & 0x7fffffffU) > 0x7f800000U, nan, rounded))};
}
template <>
[[gnu::always_inline]] inline Half narrow<Half>(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  // 1. Normal results: subtract the difference of the biases and round the 13 dropped bits to nearest even.
  const std::uint32_t rebased = magnitude - ((127U - 15U) << 23);
  const std::uint32_t normal = (rebased + 0x0fffU + ((rebased >> 13) & 1U)) >> 13;
  // 2. Results below 2^-14: 0.5 has its last place at 2^-24, which is float16's; the addition rounds to it.
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(select_bits(magnitude < 0x38800000U, magnitude, 0U)) + 0.5F) -
      0x3f000000U;
  // 3. From 65520 on everything is infinite; NaN keeps its upper payload and is made quiet.
  const std::uint32_t nan = 0x7e00U | ((magnitude >> 13) & 0x03ffU);
  std::uint32_t half = select_bits(magnitude < 0x38800000U, subnormal, normal);
  half = select_bits(magnitude >= 0x477ff000U, 0x7c00U, half);
  half = select_bits(magnitude > 0x7f800000U, nan, half);
  return {static_cast<std::uint16_t>(sign | half)};
}

}  // namespace halfstep
