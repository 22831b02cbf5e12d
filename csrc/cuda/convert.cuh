// halfstep/dtype.h's conversions with the GPU's own instructions: widen_device(storage) -> float or double,
// narrow_device<Storage>(value). Same values as widen and narrow, NaN payloads of float16 excepted.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_fp16.h>

#include "halfstep/dtype.h"

namespace halfstep::cuda {

__device__ inline float widen_device(float x) {
  return x;
}
__device__ inline double widen_device(double x) {
  return x;
}
__device__ inline float widen_device(Half x) {
  return __half2float(__ushort_as_half(x.bits));
}
__device__ inline float widen_device(BFloat16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}

template <class Storage, class Compute>
__device__ Storage narrow_device(Compute x) {
  if constexpr (std::is_same_v<Storage, Half>) {
    return {__half_as_ushort(__float2half_rn(x))};
  } else if constexpr (std::is_same_v<Storage, BFloat16>) {
    const std::uint32_t bits = __float_as_uint(x);
    const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    return {static_cast<std::uint16_t>(isnan(x) ? (bits >> 16) | 0x0040U : rounded)};
  } else {
    return x;
  }
}

}  // namespace halfstep::cuda
