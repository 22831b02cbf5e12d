// Where a value lies in a histogram of ranges, the same integers on the CPU and on the GPU. Contract:
// halfstep/calibration.h. No floating-point arithmetic: a processor that flushes subnormals to zero changes nothing.
#pragma once

#include <cstdint>

#include "halfstep/calibration.h"

namespace halfstep {

inline constexpr std::uint32_t kInfinityBits = 0x7f800000U;
inline constexpr int kLowestRangeExponent = -126;
inline constexpr int kHighestRangeExponent = 128;

// Its own inverse. The key of -0 is -1, that of 0 is 0.
HALFSTEP_HOST_DEVICE inline std::int32_t range_key(std::uint32_t bits) {
  const auto value = static_cast<std::int32_t>(bits);
  return value ^ ((value >> 31) & 0x7fffffff);
}

// The least e, -126 at least, with |x| < 2^e.
HALFSTEP_HOST_DEVICE inline int range_exponent(std::uint32_t magnitude_bits) {
  return static_cast<int>(magnitude_bits >> 23) + kLowestRangeExponent;
}

// The bin of a finite |x| < 2^exponent. |x| is significand * 2^(biased - 150), and a bin is 2^(exponent - 11) wide.
HALFSTEP_HOST_DEVICE inline std::uint32_t range_bin(std::uint32_t bits, int exponent) {
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  const std::uint32_t biased = magnitude >> 23;
  const std::uint32_t normal = biased != 0 ? 1U : 0U;
  const std::uint32_t significand = (magnitude & 0x007fffffU) | (normal << 23);
  const std::uint32_t shift = static_cast<std::uint32_t>(139 + exponent) - (biased + 1U - normal);  // 12 .. 266
  const std::uint32_t from_zero = significand >> (shift < 31U ? shift : 31U);
  return bits > 0x80000000U ? kRangeBinsPerSide - 1U - from_zero : kRangeBinsPerSide + from_zero;
}

}  // namespace halfstep
