// int8 products on the GPU beside the scalar reference: data, the call on device memory, and a comparison that says
// where the first difference lies.
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include "cuda_fixture.h"
#include "halfstep/int8.h"

namespace halfstep::test {

inline std::vector<std::int8_t> int8_values(std::size_t count, unsigned seed, int lowest = -127, int highest = 127) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> uniform(lowest, highest);
  std::vector<std::int8_t> values(count);
  for (std::int8_t& value : values) value = static_cast<std::int8_t>(uniform(random));
  return values;
}
inline std::vector<float> float_values(std::size_t count, unsigned seed, float lowest, float highest) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(lowest, highest);
  std::vector<float> values(count);
  for (float& value : values) value = uniform(random);
  return values;
}

// `value` in the storage of a dtype, and back.
inline void store_as(DType dtype, float value, char* at) {
  const auto store = [&](auto stored) { std::memcpy(at, &stored, sizeof stored); };
  if (dtype == DType::kFloat32) return store(value);
  if (dtype == DType::kFloat16) return store(narrow<Half>(value));
  store(narrow<BFloat16>(value));
}
inline float load_as(DType dtype, const char* at) {
  const auto load = [&](auto stored) {
    std::memcpy(&stored, at, sizeof stored);
    return widen(stored);
  };
  if (dtype == DType::kFloat32) return load(float{});
  if (dtype == DType::kFloat16) return load(Half{});
  return load(BFloat16{});
}
inline std::vector<char> stored_as(DType dtype, const std::vector<float>& values) {
  std::vector<char> bytes(values.size() * size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) store_as(dtype, values[i], bytes.data() + i * size_of(dtype));
  return bytes;
}

// Bytes on the device, `offset` from a 256-byte boundary, between two borders that nobody may write.
class PlacedBytes {
 public:
  PlacedBytes(const void* data, std::size_t bytes, std::size_t offset, cudaStream_t stream)
      : offset_(kBorder + offset), bytes_(bytes), memory_(surrounded(data, bytes, offset_), stream) {}

  template <class T>
  T* get() const {
    return reinterpret_cast<T*>(memory_.get() + offset_);
  }
  std::vector<char> read(cudaStream_t stream) const {
    const std::vector<char> all = memory_.read(stream);
    for (std::size_t i = 0; i < all.size(); ++i) {
      if ((i < offset_ || i >= offset_ + bytes_) && all[i] != kUnwritten) {
        ADD_FAILURE() << "byte " << static_cast<std::ptrdiff_t>(i) - static_cast<std::ptrdiff_t>(offset_)
                      << " was written, outside of 0 .. " << bytes_;
        break;
      }
    }
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(offset_);
    return {begin, begin + static_cast<std::ptrdiff_t>(bytes_)};
  }

 private:
  static constexpr std::size_t kBorder = 256;
  static constexpr char kUnwritten = 0x5a;
  static std::vector<char> surrounded(const void* data, std::size_t bytes, std::size_t offset) {
    std::vector<char> all(offset + bytes + kBorder, kUnwritten);
    if (data && bytes > 0) std::memcpy(all.data() + offset, data, bytes);
    return all;
  }
  std::size_t offset_;
  std::size_t bytes_;
  DeviceArray<char> memory_;
};

// What is around the sums in a test. The offsets are in elements, away from a 16-byte boundary.
struct Int8Setting {
  std::int32_t zero_point = 0;
  bool row_scales = false;
  bool bias = false;
  std::optional<DType> residual = std::nullopt;
  Activation activation = Activation::kNone;
  Int8OutKind kind = Int8OutKind::kSums;
  DType dtype = DType::kFloat32;
  std::int32_t out_zero_point = 0;
  std::size_t input_offset = 0;
  std::size_t weight_offset = 0;
  std::size_t out_offset = 0;
  bool saturated = false;  // every product is the largest
};

inline std::ostream& operator<<(std::ostream& out, const Int8Setting& s) {
  return out << "zero point " << s.zero_point << ", row scales " << s.row_scales << ", bias " << s.bias << ", residual "
             << (s.residual ? name_of(*s.residual) : "none") << ", activation " << static_cast<int>(s.activation)
             << ", kind " << static_cast<int>(s.kind) << ' ' << name_of(s.dtype) << ", offsets " << s.input_offset
             << ' ' << s.weight_offset << ' ' << s.out_offset << ", saturated " << s.saturated;
}

// One product, linear or convolution, with its shape bound in.
struct Int8Product {
  std::int64_t inputs;
  Int8WeightShape weights;
  std::int64_t rows;
  std::int64_t rows_per_scale;
  std::function<void(const std::int8_t* input, std::int32_t zero_point, const std::int8_t* weight, std::int32_t* sums)>
      reference;
  std::function<void(const std::int8_t* input, const std::int8_t* weight, const std::int32_t* weight_sums,
                     const Int8Epilogue& epilogue, CudaStream stream)>
      call;
};

inline Int8Product linear_product(const Int8LinearShape& shape) {
  return {shape.rows * shape.terms,
          {shape.channels, shape.terms},
          shape.rows,
          1,
          [=](auto... arguments) { reference::int8_linear(shape, arguments...); },
          [=](auto... arguments) { cuda::int8_linear(shape, arguments...); }};
}
inline Int8Product conv_product(const Int8ConvShape& shape) {
  return {shape.batch * shape.height * shape.width * shape.channels,
          {shape.out_channels, shape.terms(), shape.groups},
          shape.out_pixels(),
          shape.out_height * shape.out_width,
          [=](auto... arguments) { reference::int8_conv2d(shape, arguments...); },
          [=](auto... arguments) { cuda::int8_conv2d(shape, arguments...); }};
}

class Int8CudaTest : public CudaTest {
 protected:
  void check(const Int8Product& product, const Int8Setting& s) {
    const auto rows = static_cast<std::size_t>(product.rows);
    const auto channels = static_cast<std::size_t>(product.weights.channels);
    const auto terms = static_cast<std::size_t>(product.weights.terms);
    const auto pixels = static_cast<std::size_t>(product.rows_per_scale);
    const std::size_t outputs = rows * channels;
    // 1. Data on the host. The sums' spread is scaled to a few units, where activations bend.
    const int lowest = s.saturated ? s.zero_point > 0 ? -128 : s.zero_point < 0 ? 127 : -128 : -128;
    const int highest = s.saturated ? lowest : 127;
    const auto input = int8_values(static_cast<std::size_t>(product.inputs), 1, lowest, highest);
    const auto weight = int8_values(channels * terms, 2, s.saturated ? 127 : -127, 127);
    const float unit = 2.0F / (std::sqrt(static_cast<float>(terms) + 1.0F) * 5000.0F);
    const auto weight_scales = float_values(channels, 3, unit, 2 * unit);
    const auto row_scales = float_values(pixels > 0 ? rows / pixels : 0, 4, 0.5F, 1.5F);
    const auto bias = float_values(channels, 5, -2.0F, 2.0F);
    const auto residual_dtype = s.residual.value_or(DType::kFloat32);
    const auto residual = stored_as(residual_dtype, float_values(s.residual ? outputs : 0, 6, -3.0F, 3.0F));
    std::vector<std::int32_t> sums(outputs);
    product.reference(input.data(), s.zero_point, weight.data(), sums.data());

    // 2. The same on the device.
    const std::size_t out_size = s.kind == Int8OutKind::kSums   ? sizeof(std::int32_t)
                                 : s.kind == Int8OutKind::kInt8 ? 1
                                                                : size_of(s.dtype);
    const std::vector<char> unwritten(outputs * out_size, 0x77);
    const PlacedBytes placed_input(input.data(), input.size(), s.input_offset, stream_);
    const PlacedBytes placed_weight(weight.data(), weight.size(), s.weight_offset, stream_);
    const PlacedBytes placed_residual(residual.data(), residual.size(), s.out_offset * size_of(residual_dtype),
                                      stream_);
    const PlacedBytes out(unwritten.data(), unwritten.size(), s.out_offset * out_size, stream_);
    const DeviceArray<float> placed_weight_scales(weight_scales, stream_);
    const DeviceArray<float> placed_row_scales(row_scales, stream_);
    const DeviceArray<float> placed_bias(bias, stream_);
    const DeviceArray<std::int32_t> weight_sums(channels);
    if (s.zero_point != 0)
      cuda::int8_weight_sums(product.weights, placed_weight.get<std::int8_t>(), weight_sums.get(), {stream_});
    Int8Epilogue epilogue{.input = {.scale = 0.75F, .zero_point = s.zero_point},
                          .row_scales = s.row_scales ? placed_row_scales.get() : nullptr,
                          .weight_scales = placed_weight_scales.get(),
                          .bias = s.bias ? placed_bias.get() : nullptr,
                          .residual = s.residual ? placed_residual.get<void>() : nullptr,
                          .residual_dtype = residual_dtype,
                          .activation = s.activation,
                          .out = {out.get<void>(), s.kind, s.dtype, {0.0371F, s.out_zero_point}}};
    product.call(placed_input.get<std::int8_t>(), placed_weight.get<std::int8_t>(),
                 s.zero_point != 0 ? weight_sums.get() : nullptr, epilogue, {stream_});
    const std::vector<char> got = out.read(stream_);

    // 3. Every element.
    epilogue.row_scales = s.row_scales ? row_scales.data() : nullptr;
    epilogue.weight_scales = weight_scales.data();
    epilogue.bias = s.bias ? bias.data() : nullptr;
    epilogue.residual = s.residual ? residual.data() : nullptr;
    const bool exact = s.activation != Activation::kGeluTanh && s.activation != Activation::kSilu;
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < outputs; ++i) {
      const auto row = static_cast<std::int64_t>(i / channels);
      const auto channel = static_cast<std::int64_t>(i % channels);
      const char* const at = got.data() + i * out_size;
      double value = 0.0;
      double expected = 0.0;
      double tolerance = 0.0;
      if (s.kind == Int8OutKind::kSums) {
        std::int32_t sum = 0;
        std::memcpy(&sum, at, sizeof sum);
        value = sum;
        expected = sums[i];
      } else {
        const float result = reference::int8_epilogue(epilogue, sums[i], row / product.rows_per_scale, channel,
                                                      static_cast<std::int64_t>(i));
        if (s.kind == Int8OutKind::kInt8) {
          value = static_cast<std::int8_t>(*at);
          expected = quantize_value(result, 1.0F / epilogue.out.parameters.scale, s.out_zero_point);
          tolerance = exact ? 0.0 : 1.0;
        } else {
          char stored[sizeof(float)];
          store_as(s.dtype, result, stored);
          value = load_as(s.dtype, at);
          expected = load_as(s.dtype, stored);
          const double place = s.dtype == DType::kFloat32 ? 0x1p-21 : s.dtype == DType::kFloat16 ? 0x1p-10 : 0x1p-7;
          // 1 + tanh(x) cancels, and leaves errors of a last place of 1.
          tolerance = exact ? 0.0 : place * std::fabs(expected) + 1e-6;
        }
      }
      if (std::fabs(value - expected) <= tolerance) continue;
      if (wrong++ == 0)
        ADD_FAILURE() << "row " << row << " of " << rows << ", channel " << channel << " of " << channels << " (in a "
                      << "tile of 64: " << row % 64 << ", " << channel % 64 << "), " << terms << " terms: got " << value
                      << ", expected " << expected;
    }
    if (wrong > 0) FAIL() << wrong << " of " << outputs << " elements differ; " << s;
  }

  void check_linear(const Int8LinearShape& shape, const Int8Setting& setting = {}) {
    SCOPED_TRACE(testing::Message() << shape.rows << " rows, " << shape.terms << " terms, " << shape.channels
                                    << " channels");
    check(linear_product(shape), setting);
  }
  void check_conv(const Int8ConvShape& s, const Int8Setting& setting = {}) {
    SCOPED_TRACE(testing::Message() << s.batch << " x " << s.height << " x " << s.width << " x " << s.channels << " to "
                                    << s.out_height << " x " << s.out_width << " x " << s.out_channels << ", kernel "
                                    << s.kernel_height << " x " << s.kernel_width << ", stride " << s.stride_height
                                    << ' ' << s.stride_width << ", padding " << s.pad_height << ' ' << s.pad_width
                                    << ", dilation " << s.dilation_height << ' ' << s.dilation_width << ", " << s.groups
                                    << " groups");
    check(conv_product(s), setting);
  }
};

// All of the epilogue's choices, each with the others varied: 7 activations by 4 outputs by 4 residuals. Then every
// output, sums too, with nothing to add but a bias, which some kernels have a way of their own for.
inline std::vector<Int8Setting> int8_settings() {
  std::vector<Int8Setting> settings;
  unsigned turn = 0;
  for (int activation = 0; activation <= static_cast<int>(Activation::kHardswish); ++activation) {
    for (int out = 0; out < 4; ++out) {
      for (int residual = 0; residual < 4; ++residual, ++turn) {
        constexpr DType kDtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
        Int8Setting setting;
        setting.activation = static_cast<Activation>(activation);
        setting.kind = out < 3 ? Int8OutKind::kFloat : Int8OutKind::kInt8;
        if (out < 3) setting.dtype = kDtypes[out];
        if (residual < 3) setting.residual = kDtypes[residual];
        setting.bias = turn % 2 == 0;
        setting.row_scales = turn % 3 == 0;
        setting.zero_point = setting.row_scales || turn % 5 == 0 ? 0 : static_cast<std::int32_t>(turn % 256) - 128;
        setting.out_zero_point = static_cast<std::int32_t>(turn * 37 % 256) - 128;
        setting.out_offset = turn / 4 % 3 == 1 ? 1 : 0;
        settings.push_back(setting);
      }
    }
  }
  for (const Activation activation : {Activation::kNone, Activation::kRelu6, Activation::kGelu}) {
    for (const bool bias : {false, true}) {
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
        settings.push_back({.bias = bias, .activation = activation, .kind = Int8OutKind::kFloat, .dtype = dtype});
      settings.push_back({.bias = bias, .activation = activation, .kind = Int8OutKind::kInt8, .out_zero_point = -7});
    }
  }
  settings.push_back({.kind = Int8OutKind::kSums});
  settings.push_back({.zero_point = 9, .kind = Int8OutKind::kSums});
  settings.push_back({.row_scales = true, .kind = Int8OutKind::kSums});
  return settings;
}

}  // namespace halfstep::test
