// Norms that write int8, in host memory, and a float64 reference of them, for the CPU and the CUDA tests.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "halfstep/int8_norms.h"
#include "norm_fixture.h"

namespace halfstep::test {

// What a call writes, or the two calls that it stands for: the floats are in NormData's kOut.
struct Int8NormResult {
  std::vector<std::int8_t> quantized;
  std::vector<float> scales;  // NaN are written as -1, so that results can be compared

  explicit Int8NormResult(const NormShape& shape, bool by_rows)
      : quantized(static_cast<std::size_t>(shape.rows * shape.channels), 99),
        scales(by_rows ? static_cast<std::size_t>(shape.rows) : 0, -7.0F) {}
  friend bool operator==(const Int8NormResult&, const Int8NormResult&) = default;
};

inline std::vector<NormCase> int8_norm_cases() {
  std::vector<NormCase> cases;
  for (const NormCase& c : norm_cases())
    if (c.shape.spatial == 1 && c.shape.groups == 1) cases.push_back(c);
  return cases;
}

// A scale that reaches most results, and a zero point, that differ from case to case.
inline Int8Parameters int8_norm_parameters(const NormCase& c) {
  return {0.02F + 0.0007F * static_cast<float>(c.shape.channels % 13),
          static_cast<std::int32_t>((c.shape.rows * 37 + c.shape.channels) % 256) - 128};
}

// The contract of halfstep/int8_norms.h in float64.
inline void expect_int8_norm_matches(const NormData& data, const Int8NormResult& got, const Int8Parameters& given) {
  const NormCase& c = data.test_case;
  const auto cols = static_cast<std::size_t>(c.shape.channels);
  const double rounding = c.out == DType::kFloat32 ? 2e-6 : c.out == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
  const double absolute = 1e-5 + 4 * 3e-8 * c.offset;  // as in expect_norm_matches()
  for (std::size_t row = 0; row < static_cast<std::size_t>(c.shape.rows); ++row) {
    const auto x = [&](std::size_t col) { return data.tensors.get(NormData::kInput, row * cols + col); };
    double mean = 0.0;
    double variance = 0.0;
    for (std::size_t col = 0; c.center && col < cols; ++col) mean += x(col) / static_cast<double>(cols);
    for (std::size_t col = 0; col < cols; ++col)
      variance += (x(col) - mean) * (x(col) - mean) / static_cast<double>(cols);
    std::vector<double> results(cols);
    double largest = 0.0;
    for (std::size_t col = 0; col < cols; ++col) {
      results[col] = (x(col) - mean) / std::sqrt(variance + kNormEps) * data.tensors.get(NormData::kWeight, col) +
                     data.tensors.get(NormData::kBias, col);
      largest = std::max(largest, std::fabs(results[col]));
    }
    const bool by_rows = !got.scales.empty();
    const double scale = by_rows ? got.scales[row] : given.scale;
    const double zero_point = by_rows ? 0 : given.zero_point;
    if (by_rows) {
      ASSERT_NEAR(scale, std::max(largest / 127.0, 0x1p-126), (rounding * largest + absolute) / 127.0) << row;
    }
    for (std::size_t col = 0; col < cols; ++col) {
      const double level = std::clamp(results[col] / scale + zero_point, -128.0, 127.0);
      const double tolerance = 0.5 + (rounding * std::fabs(results[col]) + absolute) / scale + 1e-4;
      ASSERT_NEAR(got.quantized[row * cols + col], level, tolerance) << row << ", " << col;
    }
  }
}

// As quantize() and quantize_rows() have it: NaN becomes the zero point; a row that is not finite has a NaN scale.
// fused(data, parameters, by_rows, keep_float) is the call, composed(data, parameters, by_rows) the two it stands for.
template <class Fused, class Composed>
void check_non_finite_rows(std::int64_t cols, const Fused& fused, const Composed& composed) {
  for (const double bad : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    NormData data({.shape = {3, cols}});
    data.tensors.set(NormData::kInput, static_cast<std::size_t>(2 * cols - 1), bad);
    const auto middle = static_cast<std::size_t>(cols);
    const Int8NormResult by_one = fused(data, Int8Parameters{0.03F, 11}, false, false);
    for (std::size_t i = middle; i < 2 * middle; ++i) ASSERT_EQ(by_one.quantized[i], 11);
    const Int8NormResult by_rows = fused(data, Int8Parameters{}, true, false);
    EXPECT_GT(by_rows.scales[0], 0.0F);
    EXPECT_EQ(by_rows.scales[1], -1.0F);  // NaN
    EXPECT_GT(by_rows.scales[2], 0.0F);
    EXPECT_EQ(by_rows, composed(data, Int8Parameters{}, true));
  }
}

}  // namespace halfstep::test
