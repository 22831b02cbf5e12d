// Quantization and int8 embeddings of the CPU against float64 formulas.
#include <numeric>

#include "gradient_fixture.h"
#include "halfstep/status.h"
#include "int8_fixture.h"
#include "threaded_executor.h"

namespace halfstep {
namespace {

constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

// round half to even, by hand, in float64.
double round_to_even(double x) {
  const double below = std::floor(x);
  const double rest = x - below;
  if (rest != 0.5) return rest < 0.5 ? below : below + 1.0;
  return std::fmod(below, 2.0) == 0.0 ? below : below + 1.0;
}

int quantized(double x, float scale, int zero_point) {
  if (std::isnan(x)) return zero_point;
  const float inverse = 1.0F / scale;
  const double scaled = static_cast<double>(static_cast<float>(x * static_cast<double>(inverse)));
  return static_cast<int>(std::clamp(round_to_even(scaled) + zero_point, -128.0, 127.0));
}

int largest_of(const std::int8_t* q, std::size_t count) {
  int largest = 0;
  for (std::size_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(q[i]));
  return largest;
}

// Around all ties, beyond both ends, and what is not finite.
std::vector<double> interesting_values(float scale) {
  std::vector<double> values;
  for (int i = -600; i <= 600; ++i)
    for (const double nudge : {0.0, 1e-4, -1e-4, 0.3}) values.push_back((i / 2.0 + nudge) * static_cast<double>(scale));
  for (const double x : {1e30, -1e30, 1e-40, -1e-40, 0.0, -0.0}) values.push_back(x);
  const double infinity = std::numeric_limits<double>::infinity();
  values.insert(values.end(), {infinity, -infinity, std::numeric_limits<double>::quiet_NaN()});
  return values;
}

TEST(Int8Quantize, IsTheFormulaForEveryDtypeAndZeroPoint) {
  for (const DType dtype : kFloats) {
    for (const float scale : {0.5F, 1.0F, 0.037F, 1e-3F}) {
      for (const int zero_point : {-128, -3, 0, 64, 127}) {
        test::GradientList tensors;
        tensors.add(dtype, interesting_values(scale), /*misaligned_elements=*/1);
        const TensorView input = tensors.views()[0];
        std::vector<std::int8_t> out(static_cast<std::size_t>(input.numel));
        cpu::quantize(input, {}, {scale, zero_point}, out.data(), SerialExecutor());
        for (std::size_t i = 0; i < out.size(); ++i)
          ASSERT_EQ(out[i], quantized(tensors.get(0, i), scale, zero_point))
              << name_of(dtype) << " " << tensors.get(0, i) << " by " << scale << " and " << zero_point;
      }
    }
  }
}

TEST(Int8Quantize, ManyElementsOnManyThreads) {
  for (const DType dtype : kFloats) {
    test::GradientList tensors;
    tensors.add(dtype, test::normal_values(300001, 1.0, 5));
    const TensorView input = tensors.views()[0];
    std::vector<std::int8_t> out(static_cast<std::size_t>(input.numel));
    cpu::quantize(input, {}, {0.02F, 11}, out.data(), test::ThreadedExecutor());
    for (std::size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], quantized(tensors.get(0, i), 0.02F, 11));
    test::GradientList back;
    back.add(dtype, std::vector<double>(out.size()));
    cpu::dequantize(out.data(), {0.02F, 11}, back.views()[0], test::ThreadedExecutor());
    const double rounding = dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
    for (std::size_t i = 0; i < out.size(); ++i) {
      const double exact = (out[i] - 11) * static_cast<double>(0.02F);
      ASSERT_NEAR(back.get(0, i), exact, 1.001 * rounding * std::fabs(exact));
    }
  }
}

TEST(Int8Quantize, RowsHaveTheScaleOfTheirLargestMagnitude) {
  for (const DType dtype : kFloats) {
    for (const std::int64_t width : {1, 7, 64, 100, 5000}) {
      const std::int64_t rows = 40;
      const auto columns = static_cast<std::size_t>(width);
      std::vector<double> values = test::normal_values(static_cast<std::size_t>(rows) * columns, 1.0, 6);
      for (std::size_t i = 0; i < columns; ++i) values[i] = 0.0;                      // row 0: nothing
      values[2 * columns - 1] = std::numeric_limits<double>::quiet_NaN();             // row 1
      values[2 * columns] = -std::numeric_limits<double>::infinity();                 // row 2
      for (std::size_t i = 3 * columns; i < 4 * columns; ++i) values[i] *= 0x1p-140;  // row 3: subnormal, or 0
      test::GradientList tensors;
      tensors.add(dtype, values);
      std::vector<std::int8_t> out(values.size(), 99);
      std::vector<float> scales(static_cast<std::size_t>(rows), -1.0F);
      cpu::quantize_rows(tensors.views()[0], {}, rows, out.data(), scales.data(), test::ThreadedExecutor());
      for (std::size_t row = 0; row < scales.size(); ++row) {
        double largest = 0.0;
        for (std::size_t i = row * columns; i < (row + 1) * columns; ++i)
          largest = std::max(largest, std::fabs(tensors.get(0, i)));
        if (row == 1 || row == 2) {
          EXPECT_TRUE(std::isnan(scales[row]));
          continue;
        }
        ASSERT_EQ(scales[row], std::max(static_cast<float>(largest) / 127.0F, 0x1p-126F)) << row;
        for (std::size_t i = row * columns; i < (row + 1) * columns; ++i)
          ASSERT_EQ(out[i], quantized(tensors.get(0, i), scales[row], 0)) << row << " of " << width;
        if (row > 3) {
          EXPECT_EQ(largest_of(&out[row * columns], columns), 127);
        }
      }
    }
  }
}

double squared_error(const std::vector<double>& weights, double scale, int levels) {
  double error = 0.0;
  for (const double w : weights) {
    const double q = std::clamp<double>(round_to_even(w / scale), -levels, levels);
    error += (w - q * scale) * (w - q * scale);
  }
  return error;
}

TEST(Int8QuantizeWeight, IsSymmetricByTheLargestMagnitudeOfAChannel) {
  for (const DType dtype : kFloats) {
    for (int bits = 2; bits <= 8; ++bits) {
      test::GradientList tensors;
      std::vector<double> values = test::normal_values(6 * 3000, 1.0, 7);
      std::fill(values.begin(), values.begin() + 3000, 0.0);
      tensors.add(dtype, values);
      std::vector<std::int8_t> out(values.size());
      std::vector<float> scales(6);
      cpu::quantize_weight(tensors.views()[0], 6, bits, false, out.data(), scales.data(), test::ThreadedExecutor());
      EXPECT_EQ(scales[0], 1.0F);
      const int levels = (1 << (bits - 1)) - 1;
      for (std::size_t i = 0; i < values.size(); ++i) {
        const std::size_t channel = i / 3000;
        ASSERT_EQ(out[i], std::clamp(quantized(tensors.get(0, i), scales[channel], 0), -levels, levels));
        if (channel > 0) {
          ASSERT_LE(std::fabs(tensors.get(0, i)), scales[channel] * static_cast<double>(levels) * (1 + 1e-6));
        }
      }
      for (std::size_t channel = 1; channel < 6; ++channel) EXPECT_EQ(largest_of(&out[channel * 3000], 3000), levels);
    }
  }
}

TEST(Int8QuantizeWeight, TheSearchFindsTheLeastSquaredError) {
  for (const int bits : {2, 3, 4, 8}) {
    const std::size_t width = 2500;
    std::vector<double> values = test::normal_values(5 * width, 1.0, 8);
    values[3] = 30.0;  // an outlier
    values[width + 5] = -9.0;
    test::GradientList tensors;
    tensors.add(DType::kFloat32, values);
    std::vector<std::int8_t> out(values.size());
    std::vector<float> scales(5);
    cpu::quantize_weight(tensors.views()[0], 5, bits, true, out.data(), scales.data(), SerialExecutor());
    const int levels = (1 << (bits - 1)) - 1;
    for (std::size_t channel = 0; channel < 5; ++channel) {
      std::vector<double> weights;
      for (std::size_t i = 0; i < width; ++i) weights.push_back(tensors.get(0, channel * width + i));
      const double largest = std::fabs(*std::max_element(
          weights.begin(), weights.end(), [](double a, double b) { return std::fabs(a) < std::fabs(b); }));
      double least = std::numeric_limits<double>::infinity();
      for (int i = 0; i < 80; ++i)
        least = std::min(least, squared_error(weights, largest * (0.2 + 0.8 * i / 79.0) / levels, levels));
      const double found = squared_error(weights, static_cast<double>(scales[channel]), levels);
      EXPECT_LE(found, least * (1 + 1e-4)) << bits << " bits, channel " << channel;
      EXPECT_GE(scales[channel] * static_cast<double>(levels), 0.1999 * largest);
      if (bits < 4 && channel >= 2) {  // few levels and no outlier: clipping pays
        EXPECT_LT(found, 0.9 * squared_error(weights, largest / levels, levels));
      }
      for (std::size_t i = 0; i < width; ++i)
        ASSERT_EQ(out[channel * width + i], std::clamp(quantized(weights[i], scales[channel], 0), -levels, levels));
    }
  }
}

TEST(Int8Embedding, IsTheScaledRow) {
  const std::vector<std::int8_t> weight = test::int8_values(50 * 37, 3, test::Int8Fill::kRandom, true);
  std::vector<float> scales(50);
  std::iota(scales.begin(), scales.end(), 1.0F);
  const std::vector<std::int64_t> wide = {0, 49, 7, 7, 12};
  const std::vector<std::int32_t> narrow_indices = {0, 49, 7, 7, 12};
  for (const DType dtype : kFloats) {
    for (const bool is_wide : {true, false}) {
      test::GradientList tensors;
      tensors.add(dtype, std::vector<double>(5 * 37, -7.0));
      const void* const indices = is_wide ? static_cast<const void*>(wide.data()) : narrow_indices.data();
      cpu::int8_embedding({weight.data(), scales.data(), 50, 37, indices, is_wide, 5, tensors.views()[0]},
                          test::ThreadedExecutor());
      for (std::size_t i = 0; i < 5 * 37; ++i) {
        const auto row = static_cast<std::size_t>(wide[i / 37]);
        const double exact = weight[row * 37 + i % 37] * static_cast<double>(scales[row]);  // below 2^13: float32
        const double rounding = dtype == DType::kFloat32 ? 0.0 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
        ASSERT_NEAR(tensors.get(0, i), exact, rounding * std::fabs(exact));
      }
    }
  }
}

TEST(Int8Embedding, RefusesIndicesOutsideOfTheTable) {
  const std::vector<std::int8_t> weight(8);
  const std::vector<float> scales(4, 1.0F);
  std::vector<float> out(6);
  for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{4}, std::int64_t{1} << 40}) {
    const std::vector<std::int64_t> indices = {0, bad, 1};
    try {
      cpu::int8_embedding(
          {weight.data(), scales.data(), 4, 2, indices.data(), true, 3, {out.data(), 6, DType::kFloat32}},
          test::ThreadedExecutor());
      FAIL() << bad;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find("index " + std::to_string(bad) + " at 1"), std::string::npos)
          << error.what();
    }
  }
}

TEST(Int8Quantize, RefusesWhatItCannotCompute) {
  std::vector<double> doubles(8);
  std::vector<float> floats(8);
  std::vector<std::int8_t> out(8);
  std::vector<float> scales(8);
  const std::int64_t index = 0;
  const TensorView float64{doubles.data(), 8, DType::kFloat64};
  const TensorView float32{floats.data(), 8, DType::kFloat32};
  const SerialExecutor executor;
  EXPECT_THROW(cpu::quantize(float64, {}, {}, out.data(), executor), InvalidArgument);
  EXPECT_THROW(cpu::quantize(float32, {}, {1.0F, 128}, out.data(), executor), InvalidArgument);
  EXPECT_THROW(cpu::quantize(float32, {}, {0.0F, 0}, out.data(), executor), InvalidArgument);
  EXPECT_THROW(cpu::quantize(float32, {}, {std::numeric_limits<float>::quiet_NaN(), 0}, out.data(), executor),
               InvalidArgument);
  EXPECT_THROW(cpu::quantize_rows(float64, {}, 2, out.data(), scales.data(), executor), InvalidArgument);
  EXPECT_THROW(cpu::quantize_rows(float32, {}, 3, out.data(), scales.data(), executor), InvalidArgument);
  EXPECT_THROW(cpu::dequantize(out.data(), {}, float64, executor), InvalidArgument);
  EXPECT_THROW(cpu::quantize_weight(float64, 2, 8, false, out.data(), scales.data(), executor), InvalidArgument);
  for (const int bits : {1, 9})
    EXPECT_THROW(cpu::quantize_weight(float32, 2, bits, false, out.data(), scales.data(), executor), InvalidArgument);
  floats[5] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(cpu::quantize_weight(float32, 2, 8, true, out.data(), scales.data(), executor), InvalidArgument);
  EXPECT_THROW(cpu::int8_embedding({out.data(), scales.data(), 1, 8, &index, true, 1, float64}, executor),
               InvalidArgument);
  EXPECT_THROW(cpu::int8_embedding({out.data(), scales.data(), 1, 7, &index, true, 1, float32}, executor),
               InvalidArgument);
}

}  // namespace
}  // namespace halfstep
