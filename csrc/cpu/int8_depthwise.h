// Convolutions of many groups with one or two output channels each: no matrix product fills a vector there, but
// neighbouring channels do.
//
// Packed weights are [terms][pitch] int8 and then [pitch] sums, int32; the pitch is the channels, up to whole lines.
#pragma once

#include <cstdint>

#include "halfstep/int8.h"

namespace halfstep::cpu {

constexpr bool is_depthwise(const Int8WeightShape& shape) {
  return shape.groups >= 8 && shape.channels <= 2 * shape.groups;
}
constexpr std::int64_t depthwise_pitch(std::int64_t channels) {
  return (channels + 63) / 64 * 64;
}
constexpr std::int64_t depthwise_bytes(const Int8WeightShape& shape) {
  return depthwise_pitch(shape.channels) * (shape.terms + static_cast<std::int64_t>(sizeof(std::int32_t)));
}

void pack_depthwise(const Int8WeightShape& shape, const std::int8_t* weight, void* packed);

void depthwise_conv2d(const Int8ConvShape& shape, const std::int8_t* input, const void* packed,
                      const Int8Epilogue& epilogue, Int8Isa isa, const Executor& executor);

}  // namespace halfstep::cpu
