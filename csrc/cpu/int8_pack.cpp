// The packed form of int8 weights. Contract: halfstep/int8.h; layout: int8_kernels.h and int8_depthwise.h.
#include <cstring>

#include "halfstep/status.h"
#include "int8_depthwise.h"
#include "int8_kernels.h"

namespace halfstep::cpu {
namespace {

void check(const Int8WeightShape& shape) {
  HS_CHECK(shape.groups >= 1, "int8_pack: groups is ", shape.groups, "; expected at least 1");
  HS_CHECK(shape.channels >= 0 && shape.channels % shape.groups == 0, "int8_pack: channels is ", shape.channels,
           "; expected a multiple of groups, ", shape.groups);
  HS_CHECK(shape.terms >= 0 && shape.terms <= kInt8MaxTerms, "int8_pack: terms is ", shape.terms, "; expected 0 .. ",
           kInt8MaxTerms);
}

void pack_block(const std::int8_t* weight, std::int64_t terms, std::int64_t channels, std::int8_t* out) {
  std::int32_t sums[kInt8Block] = {};
  std::memset(out, 0, static_cast<std::size_t>(int8_block_bytes(terms)));
  for (std::int64_t channel = 0; channel < channels; ++channel) {
    for (std::int64_t term = 0; term < terms; ++term) {
      const std::int8_t w = weight[channel * terms + term];
      out[(term / kInt8Quad * kInt8Block + channel) * kInt8Quad + term % kInt8Quad] = w;
      sums[channel] += w;
    }
  }
  std::memcpy(out + int8_quads(terms) * kInt8Block * kInt8Quad, sums, sizeof(sums));
}

}  // namespace

std::size_t int8_packed_bytes(const Int8WeightShape& shape) {
  check(shape);
  if (is_depthwise(shape)) return static_cast<std::size_t>(depthwise_bytes(shape));
  return static_cast<std::size_t>(shape.groups * int8_blocks(shape.channels / shape.groups) *
                                  int8_block_bytes(shape.terms));
}

void int8_pack(const Int8WeightShape& shape, const std::int8_t* weight, void* packed) {
  check(shape);
  if (is_depthwise(shape)) return pack_depthwise(shape, weight, packed);
  auto* out = static_cast<std::int8_t*>(packed);
  const std::int64_t of_group = shape.channels / shape.groups;
  for (std::int64_t group = 0; group < shape.groups; ++group) {
    for (std::int64_t channel = 0; channel < of_group; channel += kInt8Block) {
      pack_block(weight + (group * of_group + channel) * shape.terms, shape.terms,
                 std::min(kInt8Block, of_group - channel), out);
      out += int8_block_bytes(shape.terms);
    }
  }
}

}  // namespace halfstep::cpu
