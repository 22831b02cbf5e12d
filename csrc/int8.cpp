// The reference of int8 products. Contract: halfstep/int8.h.
#include "halfstep/int8.h"

#include "halfstep/status.h"
#include "int8_math.h"

namespace halfstep::reference {
namespace {

float residual_at(const Int8Epilogue& epilogue, std::int64_t at) {
  if (!epilogue.residual) return 0.0F;
  switch (epilogue.residual_dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(epilogue.residual)[at];
    case DType::kFloat16:
      return widen(static_cast<const Half*>(epilogue.residual)[at]);
    case DType::kBFloat16:
      return widen(static_cast<const BFloat16*>(epilogue.residual)[at]);
    case DType::kFloat64:
      break;
  }
  HS_UNREACHABLE("int8 residual of dtype ", name_of(epilogue.residual_dtype));
}

}  // namespace

void int8_linear(const Int8LinearShape& shape, const std::int8_t* input, std::int32_t zero_point,
                 const std::int8_t* weight, std::int32_t* sums) {
  for (std::int64_t row = 0; row < shape.rows; ++row) {
    for (std::int64_t channel = 0; channel < shape.channels; ++channel) {
      std::int32_t sum = 0;
      for (std::int64_t term = 0; term < shape.terms; ++term)
        sum += (input[row * shape.terms + term] - zero_point) * weight[channel * shape.terms + term];
      sums[row * shape.channels + channel] = sum;
    }
  }
}

void int8_conv2d(const Int8ConvShape& s, const std::int8_t* input, std::int32_t zero_point, const std::int8_t* weight,
                 std::int32_t* sums) {
  const std::int64_t group_channels = s.group_channels();
  const std::int64_t group_outputs = s.out_channels / s.groups;
  for (std::int64_t image = 0; image < s.batch; ++image) {
    for (std::int64_t y = 0; y < s.out_height; ++y) {
      for (std::int64_t x = 0; x < s.out_width; ++x) {
        for (std::int64_t channel = 0; channel < s.out_channels; ++channel) {
          const std::int64_t first = channel / group_outputs * group_channels;
          std::int32_t sum = 0;
          for (std::int64_t ky = 0; ky < s.kernel_height; ++ky) {
            const std::int64_t row = y * s.stride_height - s.pad_height + ky * s.dilation_height;
            if (row < 0 || row >= s.height) continue;
            for (std::int64_t kx = 0; kx < s.kernel_width; ++kx) {
              const std::int64_t column = x * s.stride_width - s.pad_width + kx * s.dilation_width;
              if (column < 0 || column >= s.width) continue;
              const std::int8_t* const pixel = input + ((image * s.height + row) * s.width + column) * s.channels;
              const std::int8_t* const taps =
                  weight + ((channel * s.kernel_height + ky) * s.kernel_width + kx) * group_channels;
              for (std::int64_t c = 0; c < group_channels; ++c) sum += (pixel[first + c] - zero_point) * taps[c];
            }
          }
          sums[((image * s.out_height + y) * s.out_width + x) * s.out_channels + channel] = sum;
        }
      }
    }
  }
}

float int8_epilogue(const Int8Epilogue& epilogue, std::int32_t sum, std::int64_t row, std::int64_t channel,
                    std::int64_t at) {
  const float input_scale = epilogue.row_scales ? epilogue.row_scales[row] : epilogue.input.scale;
  return int8_result(sum, rounded_product(input_scale, epilogue.weight_scales[channel]),
                     epilogue.bias ? epilogue.bias[channel] : 0.0F, residual_at(epilogue, at), epilogue.activation);
}

}  // namespace halfstep::reference
