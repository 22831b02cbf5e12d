// halfstep/dtype.h's conversions with the GPU's own instructions: widen_device(storage) -> float or double,
// narrow_device<Storage>(value), narrow_pair<Storage>(first, second) -> both as they lie in memory. Same values as
// widen and narrow, NaN payloads of half precision excepted.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
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
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else {
    return x;
  }
}

template <class Storage>
__device__ std::uint32_t narrow_pair(float first, float second) {
  static_assert(sizeof(Storage) == 2);
  if constexpr (std::is_same_v<Storage, Half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return __half_as_ushort(pair.x) | static_cast<std::uint32_t>(__half_as_ushort(pair.y)) << 16;
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return __bfloat16_as_ushort(pair.x) | static_cast<std::uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
  }
}

}  // namespace halfstep::cuda
