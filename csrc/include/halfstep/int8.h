// int8 inference: quantize, multiply or convolve with exact integer sums, and one fused epilogue.
//
//   q          int8 of a float x:  clamp(round(x / scale) + zero_point, -128, 127), rounded to nearest even, where
//              x / scale is computed as x * (1 / scale) in float32. A NaN becomes zero_point, infinities saturate.
//   weights    int8, -127 .. 127, symmetric, one float32 scale for each output channel
//   sum        int32, of (q - zero_point) * weight: exact, so every kernel gives the same integer
//   out        activation(sum * (input_scale * weight_scale[channel]) + bias[channel] + residual), each step rounded to
//              float32, no fused multiply-add but in gelu's polynomial, which is fused everywhere; then stored as
//              float32, float16, bfloat16, or as int8 by the rule above
//
// So results agree bit for bit between processors, instruction sets and GPUs, but for silu and gelu_tanh, which
// differ by up to 1e-6 of their input.
//
// Sums must fit int32: at most kInt8MaxTerms products each, or kInt8MaxTermsShifted where the zero point is not 0.
//
// The functions of the namespaces cpu and cuda are the core's own; programs that link libhalfstep_torch call the ops in
// halfstep/torch/int8.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "halfstep/dtype.h"
#include "halfstep/export.h"
#include "halfstep/stream.h"
#include "halfstep/tensor_list.h"

namespace halfstep {

// 2^31 / (128 * 127), and 2^31 / (255 * 128).
inline constexpr std::int64_t kInt8MaxTerms = 131071;
inline constexpr std::int64_t kInt8MaxTermsShifted = 65793;

enum class Activation : std::uint8_t { kNone, kRelu, kRelu6, kGelu, kGeluTanh, kSilu, kHardswish };

struct Int8Parameters {
  float scale = 1.0F;
  std::int32_t zero_point = 0;  // -128 .. 127
};

HALFSTEP_HOST_DEVICE inline std::int8_t quantize_value(float x, float inverse_scale, std::int32_t zero_point) {
  const float scaled = x * inverse_scale;
  const auto lowest = static_cast<float>(-128 - zero_point);
  const auto highest = static_cast<float>(127 - zero_point);
  float bounded = scaled > lowest ? scaled : lowest;
  bounded = bounded < highest ? bounded : highest;
  bounded = scaled == scaled ? bounded : 0.0F;
#ifdef __CUDA_ARCH__
  const auto rounded = __float2int_rn(bounded);
#else
  const auto rounded = static_cast<std::int32_t>(std::nearbyint(bounded));
#endif
  return static_cast<std::int8_t>(rounded + zero_point);
}

// The scale of a row that is quantized by its own largest magnitude, given as its float32 bits without the sign (so
// that infinities and NaN are the largest of all): magnitude / 127, at least the smallest normal number. A row that is
// not finite has a NaN scale, and its results are NaN.
HALFSTEP_HOST_DEVICE inline float row_scale(std::uint32_t magnitude_bits) {
#ifdef __CUDA_ARCH__
  const float magnitude = __uint_as_float(magnitude_bits);
  const float scale = __fdiv_rn(magnitude, 127.0F);
#else
  const auto magnitude = std::bit_cast<float>(magnitude_bits);
  const float scale = magnitude / 127.0F;
#endif
  if (magnitude_bits >= 0x7f800000U) return magnitude - magnitude;
  return scale > 0x1p-126F ? scale : 0x1p-126F;
}

// What a product or convolution writes, densely: [rows, channels], or [batch, height, width, channels].
//   kFloat   in `dtype` (float32, float16, bfloat16)
//   kInt8    int8 by `parameters`
//   kSums    the int32 sums themselves; nothing else of the epilogue is applied
enum class Int8OutKind : std::uint8_t { kFloat, kInt8, kSums };

struct Int8Out {
  void* data = nullptr;
  Int8OutKind kind = Int8OutKind::kFloat;
  DType dtype = DType::kFloat32;
  Int8Parameters parameters{};
};

// Null pointers are absent. `residual` has the shape of the output, in `residual_dtype`, densely.
struct Int8Epilogue {
  Int8Parameters input{};                // of the activations; `scale` is not read where row_scales is given
  const float* row_scales = nullptr;     // [rows]: then input.zero_point is 0. Of a convolution: [batch]
  const float* weight_scales = nullptr;  // [channels]
  const float* bias = nullptr;           // [channels]
  const void* residual = nullptr;
  DType residual_dtype = DType::kFloat32;
  Activation activation = Activation::kNone;
  Int8Out out{};
};

// out[row, channel] = sum over terms of input[row, term] * weight[channel, term]
struct Int8LinearShape {
  std::int64_t rows;
  std::int64_t terms;
  std::int64_t channels;
};

// Images lie [batch, height, width, channels]; weights [out_channels, kernel_height, kernel_width, channels / groups].
// Padding holds the zero point. Output sizes are the caller's.
struct Int8ConvShape {
  std::int64_t batch, height, width, channels;
  std::int64_t out_height, out_width, out_channels;
  std::int64_t kernel_height, kernel_width;
  std::int64_t stride_height = 1, stride_width = 1;
  std::int64_t pad_height = 0, pad_width = 0;  // above and at the left
  std::int64_t dilation_height = 1, dilation_width = 1;
  std::int64_t groups = 1;

  HALFSTEP_HOST_DEVICE std::int64_t group_channels() const { return channels / groups; }
  HALFSTEP_HOST_DEVICE std::int64_t terms() const { return kernel_height * kernel_width * group_channels(); }
  HALFSTEP_HOST_DEVICE std::int64_t out_pixels() const { return batch * out_height * out_width; }
};

// Element i of an input is multiplied by values[i % channels], rounded to float32, before it is quantized (SmoothQuant;
// null: it is not). `channels` is the innermost dimension.
struct ChannelFactors {
  const float* values = nullptr;
  std::int64_t channels = 1;
};

struct Int8WeightShape {
  std::int64_t channels;    // of all groups
  std::int64_t terms;       // of one channel
  std::int64_t groups = 1;  // as in Int8ConvShape
};

// out[i, :] = weight[indices[i], :] * scales[indices[i]], in out.dtype. `weight` is plain, [entries, width]. Indices
// are int64 or int32. The CPU throws InvalidArgument for an index outside of the table; the GPU traps, as torch's
// embedding does.
struct Int8Embedding {
  const std::int8_t* weight;
  const float* scales;
  std::int64_t entries, width;
  const void* indices;
  bool wide_indices;  // int64
  std::int64_t count;
  TensorView out;
};

// The plain scalar code that every kernel is compared with: [rows, channels] and [batch, out_height, out_width,
// out_channels] int32 sums of plain, unpacked weights.
namespace reference {
HALFSTEP_API void int8_linear(const Int8LinearShape& shape, const std::int8_t* input, std::int32_t zero_point,
                              const std::int8_t* weight, std::int32_t* sums);
HALFSTEP_API void int8_conv2d(const Int8ConvShape& shape, const std::int8_t* input, std::int32_t zero_point,
                              const std::int8_t* weight, std::int32_t* sums);
// The epilogue for the sum of one row and channel, as float32 before it is stored. `at` is the element of `residual`.
HALFSTEP_API float int8_epilogue(const Int8Epilogue& epilogue, std::int32_t sum, std::int64_t row, std::int64_t channel,
                                 std::int64_t at);
}  // namespace reference

// What the kernels of the CPU are written for, from the slowest to the fastest; all give the same bits.
enum class Int8Isa : std::uint8_t { kPortable, kAvx2, kAvxVnni, kAvx512Vnni, kAmx };

namespace cpu {

// The best that this processor has, and that the environment variable HALFSTEP_MAX_INT8_ISA, one of name_of()'s, allows
// when it is first asked for; InvalidArgument for another value of it. And whether the processor has a given one.
HALFSTEP_API Int8Isa best_int8_isa();
HALFSTEP_API bool has_int8_isa(Int8Isa isa);
HALFSTEP_API std::string_view name_of(Int8Isa isa);  // such as "AVX512-VNNI"

// input: float32, float16 or bfloat16. out: input.numel int8.
void quantize(const TensorView& input, const ChannelFactors& factors, const Int8Parameters& parameters,
              std::int8_t* out, const Executor& executor);
// Each of `rows` rows by its own scale, row_scale(), which goes to scales[row]; zero point 0.
void quantize_rows(const TensorView& input, const ChannelFactors& factors, std::int64_t rows, std::int8_t* out,
                   float* scales, const Executor& executor);
// out = (q - zero_point) * scale, in out.dtype; out.numel elements.
void dequantize(const std::int8_t* input, const Int8Parameters& parameters, const TensorView& out,
                const Executor& executor);
// Weights: each of `channels` rows symmetric by its own scale, of (1 << (bits - 1)) - 1 levels a side; bits 2 .. 8.
// `search`: the scale, of 80 between a fifth of it and the largest magnitude, with the least squared error.
// A channel of zeros has scale 1. Throws InvalidArgument if a weight is not finite.
void quantize_weight(const TensorView& weight, std::int64_t channels, int bits, bool search, std::int8_t* out,
                     float* scales, const Executor& executor);

// The packed form of weights, which the products below read: blocks of 16 channels by 4 terms, zeros at the ends, and
// the sum of each channel's weights. Aligned to 64 bytes.
std::size_t int8_packed_bytes(const Int8WeightShape& shape);
void int8_pack(const Int8WeightShape& shape, const std::int8_t* weight, void* packed);

void int8_linear(const Int8LinearShape& shape, const std::int8_t* input, const void* packed,
                 const Int8Epilogue& epilogue, Int8Isa isa, const Executor& executor);
void int8_conv2d(const Int8ConvShape& shape, const std::int8_t* input, const void* packed, const Int8Epilogue& epilogue,
                 Int8Isa isa, const Executor& executor);

void int8_embedding(const Int8Embedding& call, const Executor& executor);

}  // namespace cpu

// The same on device memory. Enqueues on `stream` only: no synchronisation, no host read, capturable in a CUDA graph.
// Weights are plain, [channels, terms], at 16-byte boundaries where rows allow it (any alignment is correct).
namespace cuda {
// Whether products of rows and convolutions can run on Hopper's wgmma on this device, which takes a library built for
// 90a; what its tiles do not take runs on mma.sync.
HALFSTEP_API bool has_int8_wgmma(int device);

void quantize(const TensorView& input, const ChannelFactors& factors, const Int8Parameters& parameters,
              std::int8_t* out, CudaStream stream);
void quantize_rows(const TensorView& input, const ChannelFactors& factors, std::int64_t rows, std::int8_t* out,
                   float* scales, CudaStream stream);
void dequantize(const std::int8_t* input, const Int8Parameters& parameters, const TensorView& out, CudaStream stream);
// `weight_sums`: [channels] sums of each channel's weights, read where the zero point is not 0.
void int8_weight_sums(const Int8WeightShape& shape, const std::int8_t* weight, std::int32_t* weight_sums,
                      CudaStream stream);
void int8_linear(const Int8LinearShape& shape, const std::int8_t* input, const std::int8_t* weight,
                 const std::int32_t* weight_sums, const Int8Epilogue& epilogue, CudaStream stream);
void int8_conv2d(const Int8ConvShape& shape, const std::int8_t* input, const std::int8_t* weight,
                 const std::int32_t* weight_sums, const Int8Epilogue& epilogue, CudaStream stream);
void int8_embedding(const Int8Embedding& call, CudaStream stream);
}  // namespace cuda

}  // namespace halfstep
