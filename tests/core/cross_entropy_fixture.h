// Cross entropy calls in host memory and a float64 reference of them, for the CPU and the CUDA tests.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "gradient_fixture.h"
#include "halfstep/cross_entropy.h"

namespace halfstep::test {

struct LossCase {
  std::int64_t rows;
  std::int64_t classes;
  DType dtype = DType::kFloat16;
  bool weighted = false;
  LossReduction reduction = LossReduction::kMean;
  double smoothing = 0.0;
  std::size_t misaligned = 0;  // elements by which the logits start off a 16-byte boundary
};

inline std::ostream& operator<<(std::ostream& out, const LossCase& c) {
  return out << c.rows << " x " << c.classes << ", dtype " << static_cast<int>(c.dtype) << ", weighted " << c.weighted
             << ", reduction " << static_cast<int>(c.reduction) << ", smoothing " << c.smoothing << ", misaligned "
             << c.misaligned;
}

// Sizes around the boundaries of vectors, warps, blocks and buffers; odd ones, whose rows are unaligned; every setting.
inline std::vector<LossCase> loss_cases() {
  std::vector<LossCase> cases;
  for (const std::int64_t classes : {1, 2, 7, 8, 10, 31, 33, 256, 1000, 1024, 1025, 4096, 4097, 5003, 50257})
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      cases.push_back({.rows = 5, .classes = classes, .dtype = dtype});
  for (const LossReduction reduction : {LossReduction::kNone, LossReduction::kMean, LossReduction::kSum})
    for (const bool weighted : {false, true})
      for (const double smoothing : {0.0, 0.1, 1.0})
        for (const std::int64_t classes : {17, 4099})
          cases.push_back({11, classes, DType::kBFloat16, weighted, reduction, smoothing, /*misaligned=*/3});
  cases.push_back({.rows = 0, .classes = 9, .reduction = LossReduction::kSum});
  cases.push_back({.rows = 3000, .classes = 40, .weighted = true});
  return cases;
}

// Logits (a few of them -inf), targets (every fourth row ignored), and the tensors of both directions.
struct LossData {
  enum : std::size_t { kLogits, kGradLogits };
  static constexpr std::int64_t kIgnored = -100;

  explicit LossData(const LossCase& c) : test_case(c) {
    const auto rows = static_cast<std::size_t>(c.rows);
    const auto classes = static_cast<std::size_t>(c.classes);
    std::vector<double> logits = normal_values(rows * classes, 4.0, 1);
    for (std::size_t row = 0; row < rows; ++row)
      targets.push_back(row % 4 == 3 ? kIgnored : static_cast<std::int64_t>(row * 7919 % classes));
    if (c.smoothing == 0.0 && classes > 2)
      for (std::size_t row = 0; row < rows; ++row)
        logits[row * classes + (row * 7919 + 1) % classes] = -std::numeric_limits<double>::infinity();
    tensors.add(c.dtype, logits, c.misaligned);
    tensors.add(c.dtype, std::vector<double>(logits.size(), -7.0), c.misaligned);
    for (std::size_t i = 0; c.weighted && i < classes; ++i) weight.push_back(0.25F + static_cast<float>(i % 5));
    const bool each = c.reduction == LossReduction::kNone;
    for (std::size_t i = 0; i < (each ? rows : 1); ++i) grad_loss.push_back(1.0F + 0.5F * static_cast<float>(i % 3));
    loss.assign(grad_loss.size(), -7.0F);
    lse.assign(rows, -7.0F);
    totals.assign(kLossTotals, -7.0F);
  }

  // The call on host memory, or with the logits, targets and weights of another place.
  CrossEntropy call(const TensorView& logits, const std::int64_t* at_targets, const float* at_weight) const {
    return {test_case.rows,
            test_case.classes,
            logits,
            at_targets,
            test_case.weighted ? at_weight : nullptr,
            test_case.reduction,
            kIgnored,
            test_case.smoothing};
  }

  LossCase test_case;
  GradientList tensors;
  std::vector<std::int64_t> targets;
  std::vector<float> weight, grad_loss, loss, lse, totals;
};

// The contract of halfstep/cross_entropy.h in float64, compared with what the calls left in `data`.
inline void expect_loss_matches(const LossData& data) {
  const LossCase& c = data.test_case;
  const auto classes = static_cast<std::size_t>(c.classes);
  const auto weight = [&](std::size_t i) { return c.weighted ? static_cast<double>(data.weight[i]) : 1.0; };
  double weight_sum = 0.0;
  for (std::size_t i = 0; i < classes; ++i) weight_sum += weight(i);
  std::vector<double> losses;
  std::vector<double> lses;
  double total = 0.0;
  double loss = 0.0;
  for (std::size_t row = 0; row < static_cast<std::size_t>(c.rows); ++row) {
    const auto x = [&](std::size_t i) { return data.tensors.get(LossData::kLogits, row * classes + i); };
    double largest = -std::numeric_limits<double>::infinity();
    double sum = 0.0;
    for (std::size_t i = 0; i < classes; ++i) largest = std::max(largest, x(i));
    for (std::size_t i = 0; i < classes; ++i) sum += std::exp(x(i) - largest);
    lses.push_back(largest + std::log(sum));
    losses.push_back(0.0);
    if (data.targets[row] == LossData::kIgnored) continue;
    const auto target = static_cast<std::size_t>(data.targets[row]);
    total += weight(target);
    losses.back() = (1.0 - c.smoothing) * weight(target) * (lses.back() - x(target));
    for (std::size_t i = 0; c.smoothing > 0.0 && i < classes; ++i)
      losses.back() += c.smoothing / static_cast<double>(classes) * weight(i) * (lses.back() - x(i));
    loss += losses.back();
  }
  if (c.reduction == LossReduction::kNone) {
    for (std::size_t row = 0; row < losses.size(); ++row)
      EXPECT_NEAR(data.loss[row], losses[row], 1e-6 * std::fabs(losses[row]) + 2e-6);
  } else {
    const double expected = c.reduction == LossReduction::kMean ? loss / total : loss;
    EXPECT_NEAR(data.loss[0], expected, 1e-6 * std::fabs(expected) + 2e-6);
  }
  EXPECT_NEAR(data.totals[0], total, 1e-6 * total);
  EXPECT_NEAR(data.totals[1], weight_sum, 1e-6 * weight_sum);

  const double rounding = c.dtype == DType::kFloat32 ? 4e-6 : c.dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
  const double subnormal = c.dtype == DType::kFloat16 ? 0x1p-25 : 0.0;
  for (std::size_t row = 0; row < losses.size(); ++row) {
    const bool ignored = data.targets[row] == LossData::kIgnored;
    EXPECT_NEAR(data.lse[row], ignored ? 0.0 : lses[row], 1e-6 * std::fabs(lses[row]) + 1e-6);
    double scale = data.grad_loss[c.reduction == LossReduction::kNone ? row : 0];
    if (c.reduction == LossReduction::kMean) scale /= total;
    for (std::size_t i = 0; i < classes; ++i) {
      double expected = 0.0;
      if (!ignored) {
        const auto target = static_cast<std::size_t>(data.targets[row]);
        const double p = std::exp(data.tensors.get(LossData::kLogits, row * classes + i) - lses[row]);
        expected = scale * ((1.0 - c.smoothing) * weight(target) * (p - (i == target ? 1.0 : 0.0)) +
                            c.smoothing / static_cast<double>(classes) * (p * weight_sum - weight(i)));
      }
      const double got = data.tensors.get(LossData::kGradLogits, row * classes + i);
      ASSERT_NEAR(got, expected, rounding * std::fabs(expected) + 2e-6 * std::fabs(scale) + subnormal)
          << "row " << row << ", class " << i;
    }
  }
}

}  // namespace halfstep::test
