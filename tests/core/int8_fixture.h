// int8 products in host memory and what the reference makes of them, for the CPU and the CUDA tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "halfstep/int8.h"

namespace halfstep::test {

inline const std::vector<Activation>& activations() {
  static const std::vector<Activation> all = {Activation::kNone,     Activation::kRelu,     Activation::kRelu6,
                                              Activation::kGelu,     Activation::kGeluTanh, Activation::kSilu,
                                              Activation::kHardswish};
  return all;
}

// Whether processors may differ in its last places.
inline bool is_transcendental(Activation activation) {
  return activation == Activation::kGeluTanh || activation == Activation::kSilu;
}

inline double activate_exactly(Activation activation, double x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x < 0.0 ? 0.0 : x;
    case Activation::kRelu6:
      return std::clamp(x, 0.0, 6.0);
    case Activation::kGelu:
      return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
    case Activation::kGeluTanh:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
    case Activation::kHardswish:
      return x * std::clamp(x + 3.0, 0.0, 6.0) / 6.0;
  }
  return x;
}

enum class Int8Fill {
  kRandom,
  kLargest,   // -128 against -127: the largest sums there are
  kSmallest,  // -128 against 127
  kMixed,     // 127 or -128 against 127 or -127
};

inline std::vector<std::int8_t> int8_values(std::size_t count, unsigned seed, Int8Fill fill, bool weights) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> any(weights ? -127 : -128, 127);
  std::vector<std::int8_t> values(count);
  for (std::int8_t& value : values) {
    const int drawn = any(random);
    switch (fill) {
      case Int8Fill::kRandom:
        value = static_cast<std::int8_t>(drawn);
        break;
      case Int8Fill::kMixed:
        value = static_cast<std::int8_t>(drawn > 0 ? 127 : weights ? -127 : -128);
        break;
      case Int8Fill::kLargest:
        value = static_cast<std::int8_t>(weights ? -127 : -128);
        break;
      case Int8Fill::kSmallest:
        value = static_cast<std::int8_t>(weights ? 127 : -128);
        break;
    }
  }
  return values;
}

// How a product ends. The defaults leave the sums alone.
struct Int8Ending {
  std::int32_t zero_point = 0;
  bool row_scales = false;
  bool bias = false;
  std::optional<DType> residual = std::nullopt;
  Activation activation = Activation::kNone;
  Int8OutKind kind = Int8OutKind::kSums;
  DType dtype = DType::kFloat32;
  std::int32_t out_zero_point = 0;
};

inline std::ostream& operator<<(std::ostream& out, const Int8Ending& e) {
  return out << "zero point " << e.zero_point << ", row scales " << e.row_scales << ", bias " << e.bias << ", residual "
             << (e.residual ? name_of(*e.residual) : "none") << ", activation " << static_cast<int>(e.activation)
             << ", kind " << static_cast<int>(e.kind) << " " << name_of(e.dtype) << ", out zero point "
             << e.out_zero_point;
}

// Every activation with every residual and every form of output, and the rest of the choices in turn.
inline std::vector<Int8Ending> int8_endings() {
  std::vector<Int8Ending> endings;
  const std::vector<std::optional<DType>> residuals = {std::nullopt, DType::kFloat32, DType::kFloat16,
                                                       DType::kBFloat16};
  int count = 0;
  for (const Activation activation : activations()) {
    for (const std::optional<DType>& residual : residuals) {
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64 /* int8 */}) {
        const bool to_int8 = dtype == DType::kFloat64;
        ++count;
        endings.push_back({.zero_point = count % 3 == 0 ? count * 7 % 256 - 128 : 0,
                           .row_scales = count % 3 == 1,
                           .bias = count % 2 == 0,
                           .residual = residual,
                           .activation = activation,
                           .kind = to_int8 ? Int8OutKind::kInt8 : Int8OutKind::kFloat,
                           .dtype = to_int8 ? DType::kFloat32 : dtype,
                           .out_zero_point = count % 5 == 0 ? 0 : count * 11 % 256 - 128});
      }
    }
  }
  return endings;
}

inline std::size_t element_bytes(const Int8Out& out) {
  return out.kind == Int8OutKind::kInt8 ? 1 : out.kind == Int8OutKind::kSums ? 4 : size_of(out.dtype);
}

inline void store_float(DType dtype, float value, void* data, std::int64_t at) {
  if (dtype == DType::kFloat32) static_cast<float*>(data)[at] = value;
  if (dtype == DType::kFloat16) static_cast<Half*>(data)[at] = narrow<Half>(value);
  if (dtype == DType::kBFloat16) static_cast<BFloat16*>(data)[at] = narrow<BFloat16>(value);
}

inline float load_float(DType dtype, const void* data, std::int64_t at) {
  if (dtype == DType::kFloat16) return widen(static_cast<const Half*>(data)[at]);
  if (dtype == DType::kBFloat16) return widen(static_cast<const BFloat16*>(data)[at]);
  return static_cast<const float*>(data)[at];
}

// The operands of a product of `rows` rows and `channels` channels, of which `rows_per_scale` rows share a row scale.
// Scales are such that results are of the order of 1 to 10, where activations bend.
struct Int8Data {
  Int8Data(const Int8LinearShape& shape, const Int8Ending& how, Int8Fill fill = Int8Fill::kRandom)
      : Int8Data(shape.rows, shape.channels, 1, shape.rows * shape.terms, shape.terms, how, fill) {
    reference::int8_linear(shape, input.data(), how.zero_point, weight.data(), sums.data());
  }
  Int8Data(const Int8ConvShape& shape, const Int8Ending& how, Int8Fill fill = Int8Fill::kRandom)
      : Int8Data(shape.out_pixels(), shape.out_channels, shape.out_height * shape.out_width,
                 shape.batch * shape.height * shape.width * shape.channels, shape.terms(), how, fill) {
    reference::int8_conv2d(shape, input.data(), how.zero_point, weight.data(), sums.data());
  }

  // With this object's own pointers, in host memory.
  Int8Epilogue epilogue(void* out) const {
    Int8Epilogue e{.input = {0.02F, ending.zero_point},
                   .weight_scales = weight_scales.data(),
                   .activation = ending.activation,
                   .out = {out, ending.kind, ending.dtype, {0.03F, ending.out_zero_point}}};
    if (ending.row_scales) e.row_scales = row_scales.data();
    if (ending.bias) e.bias = bias.data();
    if (ending.residual) e.residual = residual.data();
    if (ending.residual) e.residual_dtype = *ending.residual;
    return e;
  }

  std::vector<std::uint8_t> empty_out() const {
    return std::vector<std::uint8_t>(sums.size() * element_bytes(epilogue(nullptr).out), 0xa5);
  }

  // What the reference would store.
  std::vector<std::uint8_t> expected() const {
    std::vector<std::uint8_t> out = empty_out();
    const Int8Epilogue e = epilogue(out.data());
    if (out.empty()) return out;
    if (e.out.kind == Int8OutKind::kSums) {
      std::memcpy(out.data(), sums.data(), out.size());
      return out;
    }
    for (std::int64_t at = 0; at < static_cast<std::int64_t>(sums.size()); ++at) {
      const float x = reference::int8_epilogue(e, sums[static_cast<std::size_t>(at)], at / channels / rows_per_scale,
                                               at % channels, at);
      if (e.out.kind == Int8OutKind::kInt8) {
        out[static_cast<std::size_t>(at)] =
            static_cast<std::uint8_t>(quantize_value(x, 1.0F / e.out.parameters.scale, e.out.parameters.zero_point));
      } else {
        store_float(e.out.dtype, x, out.data(), at);
      }
    }
    return out;
  }

  Int8Ending ending;
  std::int64_t channels, rows_per_scale;
  std::vector<std::int8_t> input, weight;
  std::vector<float> weight_scales, bias, row_scales;
  std::vector<std::uint8_t> residual;
  std::vector<std::int32_t> sums;

 private:
  Int8Data(std::int64_t rows, std::int64_t channel_count, std::int64_t rows_of_scale, std::int64_t inputs,
           std::int64_t terms, const Int8Ending& how, Int8Fill fill)
      : ending(how),
        channels(channel_count),
        rows_per_scale(rows_of_scale),
        input(int8_values(static_cast<std::size_t>(inputs), 1, fill, /*weights=*/false)),
        weight(int8_values(static_cast<std::size_t>(channels * terms), 2, fill, /*weights=*/true)),
        sums(static_cast<std::size_t>(rows * channels), -7) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal(0.0F, 1.0F);
    const float size = 4.0F / (0.02F * 5400.0F * std::sqrt(static_cast<float>(terms + 1)));
    for (std::int64_t i = 0; i < channels; ++i) {
      weight_scales.push_back(size * (0.5F + std::fabs(normal(random))));
      bias.push_back(normal(random));
    }
    for (std::int64_t i = 0; i < rows; ++i) row_scales.push_back(0.02F * (0.5F + std::fabs(normal(random))));
    residual.resize(sums.size() * 4);
    if (!ending.residual) return;
    for (std::size_t i = 0; i < sums.size(); ++i)
      store_float(*ending.residual, 2.0F * normal(random), residual.data(), static_cast<std::int64_t>(i));
  }
};

// Compares bit for bit, or, after gelu_tanh and silu, to the last places of an output.
inline void expect_int8_result(const Int8Data& data, const std::vector<std::uint8_t>& got) {
  const std::vector<std::uint8_t> expected = data.expected();
  const Int8Out out = data.epilogue(nullptr).out;
  const std::size_t size = element_bytes(out);
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < data.sums.size(); ++i) {
    if (std::memcmp(&got[i * size], &expected[i * size], size) == 0) continue;
    ASSERT_TRUE(out.kind != Int8OutKind::kSums && is_transcendental(data.ending.activation))
        << "element " << i << " of " << data.channels << " channels, sum " << data.sums[i] << ", got "
        << static_cast<int>(got[i * size]) << ", expected " << static_cast<int>(expected[i * size]) << " (lowest byte)";
    if (out.kind == Int8OutKind::kInt8) {
      ASSERT_LE(std::abs(static_cast<std::int8_t>(got[i]) - static_cast<std::int8_t>(expected[i])), 1);
    } else {
      const float value = load_float(out.dtype, got.data(), static_cast<std::int64_t>(i));
      const float wanted = load_float(out.dtype, expected.data(), static_cast<std::int64_t>(i));
      const float rounding = out.dtype == DType::kFloat32   ? 0x1p-21F
                             : out.dtype == DType::kFloat16 ? 0x1p-10F
                                                            : 0x1p-7F;
      ASSERT_NEAR(value, wanted, rounding * std::fabs(wanted) + 2e-6F) << "element " << i;
    }
  }
}

// Memory for packed weights, aligned as torch aligns its own, with a margin that must stay as it was.
class Int8Packed {
 public:
  explicit Int8Packed(const Int8WeightShape& shape, const std::int8_t* weight)
      : bytes_(cpu::int8_packed_bytes(shape)), memory_(bytes_ + 128, 0x5b) {
    cpu::int8_pack(shape, weight, data());
    EXPECT_TRUE(std::all_of(data() + bytes_, memory_.data() + memory_.size(), [](auto x) { return x == 0x5b; }));
  }
  std::uint8_t* data() {
    return reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(memory_.data()) + 63) / 64 * 64);
  }

 private:
  std::size_t bytes_;
  std::vector<std::uint8_t> memory_;
};

inline std::vector<Int8Isa> int8_isas() {
  std::vector<Int8Isa> isas;
  for (const Int8Isa isa : {Int8Isa::kPortable, Int8Isa::kAvx2, Int8Isa::kAvxVnni, Int8Isa::kAvx512Vnni, Int8Isa::kAmx})
    if (cpu::has_int8_isa(isa)) isas.push_back(isa);
  return isas;
}

inline Int8ConvShape int8_conv_shape(std::int64_t batch, std::int64_t size, std::int64_t channels,
                                     std::int64_t out_channels, std::int64_t kernel, std::int64_t groups = 1) {
  return {.batch = batch,
          .height = size,
          .width = size,
          .channels = channels,
          .out_height = 0,
          .out_width = 0,
          .out_channels = out_channels,
          .kernel_height = kernel,
          .kernel_width = kernel,
          .pad_height = kernel / 2,
          .pad_width = kernel / 2,
          .groups = groups};
}

// Fills in the output sizes, with as much padding below and at the right as there is above and at the left.
inline Int8ConvShape sized(Int8ConvShape s) {
  const auto size = [](std::int64_t in, std::int64_t pad, std::int64_t dilation, std::int64_t kernel,
                       std::int64_t stride) { return (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1; };
  s.out_height = size(s.height, s.pad_height, s.dilation_height, s.kernel_height, s.stride_height);
  s.out_width = size(s.width, s.pad_width, s.dilation_width, s.kernel_width, s.stride_width);
  return s;
}

// Kernel sizes, strides, dilations, asymmetry, groups, depthwise, odd channels, single pixels.
inline std::vector<Int8ConvShape> int8_conv_shapes() {
  std::vector<Int8ConvShape> shapes;
  for (const std::int64_t kernel : {1, 3, 5, 7})
    for (const std::int64_t channels : {1, 3, 16, 33}) shapes.push_back(int8_conv_shape(2, 11, channels, 19, kernel));
  for (const std::int64_t groups : {2, 3, 4})
    shapes.push_back(int8_conv_shape(2, 9, 5 * groups, 18 * groups, 3, groups));
  for (const std::int64_t channels : {8, 24, 31, 32, 33, 70})
    for (const std::int64_t multiplier : {1, 2})
      shapes.push_back(int8_conv_shape(2, 9, channels, channels * multiplier, 3, channels));
  for (const std::int64_t groups : {1, 2, 4}) shapes.push_back(int8_conv_shape(2, 9, 8, 16, 3, groups));  // one block
  for (const std::int64_t outputs : {16, 48, 64, 128}) shapes.push_back(int8_conv_shape(3, 7, 16, outputs, 3));
  shapes.push_back(int8_conv_shape(1, 9, 24, 12, 3, 12));  // one output of two inputs each
  shapes.push_back(int8_conv_shape(1, 9, 36, 24, 3, 12));  // two of three
  shapes.push_back(int8_conv_shape(1, 9, 9, 27, 5, 9));    // three of one
  shapes.push_back(int8_conv_shape(3, 1, 8, 40, 1));
  shapes.push_back(int8_conv_shape(1, 1, 40, 8, 3));     // one pixel, most of it padding
  shapes.push_back(int8_conv_shape(1, 14, 130, 65, 3));  // terms beyond two chunks
  shapes.push_back(int8_conv_shape(0, 5, 8, 8, 3));
  std::vector<Int8ConvShape> all;
  for (Int8ConvShape shape : shapes) {
    all.push_back(sized(shape));
    if (shape.height < 9) continue;
    shape.stride_height = 2;
    shape.stride_width = 3;
    all.push_back(sized(shape));
    shape.dilation_height = 1;
    shape.dilation_width = 2;
    shape.pad_height = 3;
    shape.pad_width = 0;
    shape.width = 13;
    if (shape.kernel_width < 7) all.push_back(sized(shape));
    shape.kernel_height = 2;
    shape.kernel_width = 1;
    shape.stride_width = 1;
    all.push_back(sized(shape));
  }
  return all;
}

inline std::string described(const Int8ConvShape& s) {
  std::ostringstream out;
  out << s.batch << " x " << s.height << " x " << s.width << " x " << s.channels << ", kernel " << s.kernel_height
      << " x " << s.kernel_width << ", out " << s.out_height << " x " << s.out_width << " x " << s.out_channels
      << ", stride " << s.stride_height << " x " << s.stride_width << ", pad " << s.pad_height << " x " << s.pad_width
      << ", dilation " << s.dilation_height << " x " << s.dilation_width << ", groups " << s.groups;
  return out.str();
}

}  // namespace halfstep::test
