// Runs of elements of int8 products: the steps of halfstep/int8.h's epilogue as vector code.
#pragma once

#include <cstdint>

#include "halfstep/int8.h"

namespace halfstep::cpu {

// quantize_value() of each element.
void quantize_run(const float* x, std::int64_t count, float inverse_scale, std::int32_t zero_point, std::int8_t* out);

// The bits of the largest magnitude without its sign, for row_scale(): those of a NaN are larger than any. 0 of none.
std::uint32_t largest_magnitude_bits(const float* x, std::int64_t count);

// What a product does with its sums of some rows and neighbouring channels. Row i has those from i * sums_pitch on,
// and the elements from at + i * pitch on of the output and the residual. A sum is sums[j] - corrections[j], modulo
// 2^32.
struct Int8Finish {
  const Int8Epilogue& epilogue;
  const std::int32_t* sums;
  std::int64_t sums_pitch;
  const std::uint32_t* corrections;  // [channels]
  std::int64_t rows;
  std::int64_t channels;
  std::int64_t channel;  // the first one
  std::int64_t at;
  std::int64_t pitch;
  std::int64_t row = 0;  // the first one's number, and how many rows share one of the epilogue's row_scales
  std::int64_t rows_per_scale = 1;
};
void finish_rows(const Int8Finish& call);

}  // namespace halfstep::cpu
