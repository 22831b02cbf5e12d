// From the int32 sums in registers to the stored result. Contract: halfstep/int8.h; the arithmetic is int8_math.h's.
#pragma once

#include <cstdint>
#include <type_traits>

#include "halfstep/int8.h"
#include "halfstep/status.h"
#include "int8_math.h"
#include "pack.cuh"

namespace halfstep::cuda {

// What a kernel gets of an epilogue.
struct Int8Finish {
  Int8Epilogue epilogue;
  const std::int32_t* weight_sums;
  std::int64_t channels;        // elements of a row of the output
  std::int64_t rows_per_scale;  // 1, or the pixels of an image
  float inverse_out_scale;
  bool packs;  // 8 channels from a multiple of 8 on can be read and written as one
};

inline Int8Finish int8_finish(const char* name, const Int8Epilogue& epilogue, const std::int32_t* weight_sums,
                              std::int64_t terms, std::int64_t channels, std::int64_t rows_per_scale) {
  const std::int32_t zero_point = epilogue.input.zero_point;
  const std::int64_t most = zero_point == 0 ? kInt8MaxTerms : kInt8MaxTermsShifted;
  HS_CHECK(zero_point >= -128 && zero_point <= 127, name, ": input zero point is ", zero_point,
           ", expected -128 .. 127");
  HS_CHECK(terms >= 0 && terms <= most, name, ": ", terms, " terms in a sum with zero point ", zero_point,
           ", expected at most ", most, ", which fit int32");
  HS_CHECK(!epilogue.row_scales || zero_point == 0, name, ": input zero point is ", zero_point,
           ", expected 0 with row scales");
  HS_CHECK(zero_point == 0 || weight_sums, name, ": weight_sums is null, expected sums with zero point ", zero_point);
  const Int8Out& out = epilogue.out;
  HS_CHECK(out.kind != Int8OutKind::kFloat || out.dtype != DType::kFloat64, name,
           ": output is float64, expected float32, float16 or bfloat16");
  HS_CHECK(!epilogue.residual || epilogue.residual_dtype != DType::kFloat64, name,
           ": residual is float64, expected float32, float16 or bfloat16");
  const bool packs = channels % 8 == 0 && starts_on_16_bytes(out.data) && starts_on_16_bytes(epilogue.residual);
  return {epilogue, weight_sums, channels, rows_per_scale, 1.0F / out.parameters.scale, packs};
}

// What the epilogue reads of neighbouring channels, for all of their rows.
template <int kCount>
struct ChannelTerms {
  float scales[kCount];
  float biases[kCount];
  std::int32_t shifts[kCount];  // zero_point * sum of the weights

  // Channels from first on that are below end.
  __device__ ChannelTerms(const Int8Finish& finish, std::int64_t first, std::int64_t end) {
    const Int8Epilogue& epilogue = finish.epilogue;
    const bool sums_only = epilogue.out.kind == Int8OutKind::kSums;
    const std::int32_t zero_point = epilogue.input.zero_point;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const bool valid = first + e < end;
      scales[e] = valid && !sums_only ? epilogue.weight_scales[first + e] : 0.0F;
      biases[e] = valid && !sums_only && epilogue.bias ? epilogue.bias[first + e] : 0.0F;
      shifts[e] = valid && zero_point != 0 ? zero_point * finish.weight_sums[first + e] : 0;
    }
  }
};

// One switch for all values; the cases are compiled apart.
template <int kCount>
__device__ void activate_all(Activation activation, float (&values)[kCount]) {
  const auto each = [&](auto chosen) {
#pragma unroll
    for (float& value : values) value = activate(decltype(chosen)::value, value);
  };
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      return each(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kRelu6:
      return each(std::integral_constant<Activation, Activation::kRelu6>{});
    case Activation::kGelu:
      return each(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return each(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return each(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kHardswish:
      return each(std::integral_constant<Activation, Activation::kHardswish>{});
  }
}

// Moves of kCount elements at data[at ...], of which those below `count` exist; as one pack where that is allowed.
template <class Storage, int kCount>
__device__ void load_widened(const void* data, std::int64_t at, bool pack, int count, float (&values)[kCount]) {
  if (pack) {
    const auto loaded = load_pack<Storage, kCount>(data, at);
#pragma unroll
    for (int e = 0; e < kCount; ++e) values[e] = widen_device(loaded.elements[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e < count) values[e] = widen_device(static_cast<const Storage*>(data)[at + e]);
  }
}
template <class Storage, class Value, int kCount>
__device__ void store_narrowed(void* data, std::int64_t at, bool pack, int count, const Value (&values)[kCount]) {
  if (pack) {
    store_pack<Storage, kCount>(data, at, values);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e < count) static_cast<Storage*>(data)[at + e] = narrow_device<Storage>(values[e]);
  }
}

// Writes the result of kCount neighbouring channels of one row; those from `end` on do not exist.
template <int kCount>
__device__ void finish_sums(const Int8Finish& finish, const ChannelTerms<kCount>& terms, std::int64_t row,
                            std::int64_t first, std::int64_t end, const std::int32_t (&sums)[kCount]) {
  const Int8Epilogue& epilogue = finish.epilogue;
  const std::int64_t at = row * finish.channels + first;
  const int count = end - first < kCount ? static_cast<int>(end - first) : kCount;
  const bool pack = kCount > 1 && finish.packs && count == kCount && first % kCount == 0;
  void* const out = epilogue.out.data;

  std::int32_t shifted[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) shifted[e] = sums[e] - terms.shifts[e];
  if (epilogue.out.kind == Int8OutKind::kSums) return store_narrowed<std::int32_t>(out, at, pack, count, shifted);

  float residual[kCount] = {};
  if (epilogue.residual) {
    with_storage(epilogue.residual_dtype,
                 [&](auto storage) { load_widened<decltype(storage)>(epilogue.residual, at, pack, count, residual); });
  }
  const float input_scale =
      epilogue.row_scales ? epilogue.row_scales[row / finish.rows_per_scale] : epilogue.input.scale;
  float values[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e)
    values[e] = int8_result(shifted[e], rounded_product(input_scale, terms.scales[e]), terms.biases[e], residual[e],
                            Activation::kNone);
  activate_all(epilogue.activation, values);

  if (epilogue.out.kind == Int8OutKind::kInt8) {
    std::int8_t quantized[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      quantized[e] = quantize_value(values[e], finish.inverse_out_scale, epilogue.out.parameters.zero_point);
    store_narrowed<std::int8_t>(out, at, pack, count, quantized);
  } else {
    with_storage(epilogue.out.dtype,
                 [&](auto storage) { store_narrowed<decltype(storage)>(out, at, pack, count, values); });
  }
}

}  // namespace halfstep::cuda
