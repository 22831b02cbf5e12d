// Runs of elements between their storage and float32: halfstep/dtype.h's conversions as vector code.
#pragma once

#include <cstdint>

#include "halfstep/dtype.h"

namespace halfstep::cpu {

// out[i] = element begin + i of `data`, for i < count; and the way back, rounded to nearest even. float64 is refused.
void widen_run(DType dtype, const void* data, std::int64_t begin, std::int64_t count, float* out);
void narrow_run(DType dtype, const float* values, std::int64_t count, void* data, std::int64_t begin);

}  // namespace halfstep::cpu
