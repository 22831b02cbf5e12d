// Norm calls in host memory and a float64 reference of them, for the CPU and the CUDA tests.
#pragma once

#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "gradient_fixture.h"
#include "halfstep/norms.h"

namespace halfstep::test {

struct NormCase {
  NormShape shape;
  bool center = true;
  DType input = DType::kFloat16;
  DType out = DType::kFloat16;
  DType parameters = DType::kFloat32;
  double offset = 0.0;
  double spread = 1.0;
  std::size_t misaligned = 0;  // elements by which every tensor starts off a 16-byte boundary
};

inline std::ostream& operator<<(std::ostream& out, const NormCase& c) {
  return out << c.shape.rows << " rows, " << c.shape.channels << " x " << c.shape.spatial << ", " << c.shape.groups
             << " groups, center " << c.center << ", dtypes " << static_cast<int>(c.input) << static_cast<int>(c.out)
             << static_cast<int>(c.parameters) << ", offset " << c.offset << ", spread " << c.spread << ", misaligned "
             << c.misaligned;
}

// Every path: sizes around the boundaries of lanes, vectors, warps, blocks and of what registers hold; both kinds of
// row; dtypes mixed; offset data; odd alignments; no rows, no columns.
inline std::vector<NormCase> norm_cases() {
  std::vector<NormCase> cases;
  for (const std::int64_t cols : {0, 1, 2, 7, 32, 33, 256, 768, 1000, 1600, 2048, 4096, 4097, 8192, 20000, 40003})
    for (const std::int64_t rows : {0, 1, 3, 70})
      if (rows * cols < 100000) cases.push_back({.shape = {rows, cols}, .center = (rows + cols) % 3 != 0});
  for (const NormShape& shape : {NormShape{6, 3, 49, 2}, NormShape{8, 5, 64, 4}, NormShape{2, 1, 1, 2},
                                 NormShape{6, 2, 5000, 3}, NormShape{4, 16, 8, 1}, NormShape{0, 2, 9, 2}})
    for (const bool center : {true, false}) cases.push_back({.shape = shape, .center = center});
  for (const DType input : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const DType out : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      for (const DType parameters : {DType::kFloat32, input})
        for (const NormShape& shape : {NormShape{5, 520}, NormShape{3, 4104}, NormShape{6, 4, 72, 2}})
          for (const std::size_t misaligned : {std::size_t{0}, std::size_t{3}})
            cases.push_back(
                {shape, /*center=*/true, input, out, parameters, /*offset=*/0.0, /*spread=*/1.0, misaligned});
  for (const std::int64_t cols : {767, 768, 5000, 40000})
    for (const double spread : {1.0, 0.0})  // without any, an error of the mean is multiplied by 1 / sqrt(eps)
      cases.push_back({.shape = {4, cols}, .input = DType::kFloat32, .offset = 1000.1, .spread = spread});
  cases.push_back({.shape = {4, 5000}, .center = false, .input = DType::kFloat32, .offset = 1000.0});
  return cases;
}

// The tensors of a case, with the outputs still unwritten.
struct NormData {
  enum : std::size_t { kInput, kWeight, kBias, kGradOut, kOut, kGradInput };

  explicit NormData(const NormCase& c) : test_case(c) {
    const auto numel = static_cast<std::size_t>(c.shape.rows * c.shape.cols());
    const auto parameters = static_cast<std::size_t>(c.shape.parameters());
    std::vector<double> input = normal_values(numel, 1.0, 1);
    for (double& x : input) x = x * c.spread + c.offset;
    tensors.add(c.input, input, c.misaligned);
    tensors.add(c.parameters, normal_values(parameters, 1.0, 2), c.misaligned);
    tensors.add(c.parameters, normal_values(parameters, 1.0, 3), c.misaligned);
    tensors.add(c.out, normal_values(numel, 1.0, 4), c.misaligned);
    tensors.add(c.out, std::vector<double>(numel, -7.0), c.misaligned);
    tensors.add(c.input, std::vector<double>(numel, -7.0), c.misaligned);
  }

  NormCase test_case;
  GradientList tensors;
};

struct NormResult {
  std::vector<float> mean, rstd, grad_weight, grad_bias;

  explicit NormResult(const NormShape& shape)
      : mean(static_cast<std::size_t>(shape.rows), -7.0F),
        rstd(mean),
        grad_weight(static_cast<std::size_t>(shape.parameters()), -7.0F),
        grad_bias(grad_weight) {}
  friend bool operator==(const NormResult&, const NormResult&) = default;
};

constexpr double kNormEps = 1e-5;

// The contract of halfstep/norms.h in float64, compared with what the call left in `data` and `got`.
inline void expect_norm_matches(const NormData& data, const NormResult& got) {
  const NormShape& shape = data.test_case.shape;
  const GradientList& t = data.tensors;
  const auto rounding = [](DType dtype) {
    return dtype == DType::kFloat32 ? 2e-6 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
  };
  // float32 holds a mean of 1000 to 3e-5; the weights, up to 4, multiply what that leaves.
  const double absolute = 1e-5 + 4 * 3e-8 * data.test_case.offset;
  const auto near = [&](double value, double expected, double relative, double scale) {
    return std::fabs(value - expected) <= relative * std::fabs(expected) + absolute * scale;
  };
  const auto parameters = static_cast<std::size_t>(shape.parameters());
  const auto cols = static_cast<std::size_t>(shape.cols());
  std::vector<double> grad_weight(parameters);
  std::vector<double> grad_bias(parameters);
  for (std::size_t row = 0; row < static_cast<std::size_t>(shape.rows); ++row) {
    const auto x = [&](std::size_t col) { return t.get(NormData::kInput, row * cols + col); };
    const auto dy = [&](std::size_t col) { return t.get(NormData::kGradOut, row * cols + col); };
    const auto parameter = [&](std::size_t col) {
      return row % static_cast<std::size_t>(shape.groups) * static_cast<std::size_t>(shape.channels) +
             col / static_cast<std::size_t>(shape.spatial);
    };
    double mean = 0.0;
    double variance = 0.0;
    for (std::size_t col = 0; col < cols; ++col) mean += x(col) / static_cast<double>(cols);
    if (!data.test_case.center) mean = 0.0;
    for (std::size_t col = 0; col < cols; ++col)
      variance += (x(col) - mean) * (x(col) - mean) / static_cast<double>(cols);
    const double rstd = 1.0 / std::sqrt(variance + kNormEps);
    if (data.test_case.center) {
      EXPECT_NEAR(got.mean[row], mean, 1e-7 * std::fabs(mean) + 1e-6);
    }
    EXPECT_NEAR(got.rstd[row], rstd, 2e-6 * rstd);
    double mean_g = 0.0;
    double mean_gh = 0.0;
    for (std::size_t col = 0; col < cols; ++col) {
      const double h = (x(col) - mean) * rstd;
      const double g = dy(col) * t.get(NormData::kWeight, parameter(col));
      mean_g += data.test_case.center ? g / static_cast<double>(cols) : 0.0;
      mean_gh += g * h / static_cast<double>(cols);
      grad_weight[parameter(col)] += dy(col) * h;
      grad_bias[parameter(col)] += dy(col);
    }
    for (std::size_t col = 0; col < cols; ++col) {
      const double h = (x(col) - mean) * rstd;
      const double weight = t.get(NormData::kWeight, parameter(col));
      const double out = h * weight + t.get(NormData::kBias, parameter(col));
      const double grad = rstd * (dy(col) * weight - mean_g - h * mean_gh);
      const double got_out = t.get(NormData::kOut, row * cols + col);
      const double got_grad = t.get(NormData::kGradInput, row * cols + col);
      ASSERT_TRUE(near(got_out, out, rounding(data.test_case.out), 1.0))
          << "out " << row << ", " << col << ": " << got_out << ", expected " << out;
      ASSERT_TRUE(near(got_grad, grad, rounding(data.test_case.input), std::max(1.0, rstd)))
          << "grad_input " << row << ", " << col << ": " << got_grad << ", expected " << grad;
    }
  }
  const double elements =
      parameters == 0 ? 0.0 : static_cast<double>(shape.rows * shape.cols()) / static_cast<double>(parameters);
  for (std::size_t i = 0; i < parameters; ++i) {
    ASSERT_TRUE(near(got.grad_weight[i], grad_weight[i], 1e-6, 1.0 + elements))
        << "grad_weight " << i << ": " << got.grad_weight[i] << ", expected " << grad_weight[i];
    ASSERT_TRUE(near(got.grad_bias[i], grad_bias[i], 1e-6, 1.0 + std::sqrt(elements)))
        << "grad_bias " << i << ": " << got.grad_bias[i] << ", expected " << grad_bias[i];
  }
}

}  // namespace halfstep::test
