// Runs of elements of int8 products: the steps of halfstep/int8.h's epilogue as vector code.
#pragma once

#include <cstdint>

#include "halfstep/int8.h"

namespace halfstep::cpu {

// quantize_value() of each element.
void quantize_run(const float* x, std::int64_t count, float inverse_scale, std::int32_t zero_point, std::int8_t* out);

// The bits of the largest magnitude without its sign, for row_scale(): those of a NaN are larger than any. 0 of none.
std::uint32_t largest_magnitude_bits(const float* x, std::int64_t count);

// activate() of each element, in place; the exponentials are this file's own, to a few units in the last place.
void activate_run(Activation activation, float* x, std::int64_t count);

// What a product does with `count` sums of one row, which belong to the channels from `channel` on and to the elements
// from `at` on of the output and the residual. The sum is sums[i] - corrections[i], modulo 2^32.
struct Int8Finish {
  const Int8Epilogue& epilogue;
  const std::int32_t* sums;
  const std::uint32_t* corrections;
  float input_scale;
  std::int64_t channel;
  std::int64_t at;
  std::int64_t count;
};
void finish_run(const Int8Finish& run);

}  // namespace halfstep::cpu
