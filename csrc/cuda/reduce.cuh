// Sums and maxima over a warp or a block, in a fixed order and without atomics: the same values give the same bits.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace halfstep::cuda {

constexpr int kWarp = 32;

struct Add {
  template <class Value>
  __device__ Value operator()(Value a, Value b) const {
    return a + b;
  }
  __device__ float2 operator()(float2 a, float2 b) const { return {a.x + b.x, a.y + b.y}; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Of float32 bits without the sign: they compare as magnitudes do, and a NaN is the largest.
struct MaxBits {
  __device__ std::uint32_t operator()(std::uint32_t a, std::uint32_t b) const { return a > b ? a : b; }
};

template <class Value>
__device__ Value shuffle_xor(Value value, int offset) {
  return __shfl_xor_sync(0xffffffffU, value, offset);
}
__device__ inline float2 shuffle_xor(float2 value, int offset) {
  return {shuffle_xor(value.x, offset), shuffle_xor(value.y, offset)};
}

// The warp's result, valid in every thread.
template <class Value, class Combine>
__device__ Value reduce_warp(Value value, Combine combine) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = combine(value, shuffle_xor(value, offset));
  return value;
}

// The block's result, valid in every thread. All threads of the block call it; they are whole warps.
template <class Value, class Combine>
__device__ Value reduce_block(Value value, Combine combine, Value neutral) {
  __shared__ Value warps[kWarp];  // a block has at most 32 warps
  value = reduce_warp(value, combine);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarp;
  value = reduce_warp(lane < blockDim.x / kWarp ? warps[lane] : neutral, combine);
  __syncthreads();  // the next call for the same type reuses `warps`
  return value;
}

// Over kThreads threads that work on one row: a warp, or the whole block.
template <int kThreads, class Value, class Combine>
__device__ Value reduce_row(Value value, Combine combine, Value neutral) {
  if constexpr (kThreads == kWarp) {
    return reduce_warp(value, combine);
  } else {
    return reduce_block(value, combine, neutral);
  }
}

}  // namespace halfstep::cuda
