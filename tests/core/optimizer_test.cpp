#include "halfstep/optimizer.h"

#include <gtest/gtest.h>

#include <limits>

#include "optimizer_fixture.h"

namespace halfstep::test {
namespace {

const std::vector<std::size_t> kSizes = {0, 1, 3, 63, 64, 65, 1000, 16384, 16389};

class OptimizerCpu : public testing::TestWithParam<OptimizerCase> {};

// What one step does to every element, against float64 from the same stored state. The error is that of the roundings
// in a step: one unit in the last place of the value, and some of the terms that cancel in it (about 1 in size: a
// gradient that L2 decay takes almost to 0 still makes Adam move by lr).
TEST_P(OptimizerCpu, FollowsTheReference) {
  ParameterSet set(GetParam(), kSizes, /*misaligned=*/1);
  float found = 0.0F, scale = 1024.0F, norm = 8.0F;
  const float max_norm = 2.0F;
  for (int step = 1; step <= 5; ++step) {
    set.new_gradients(static_cast<unsigned>(100 * step), 300.0);
    std::vector<std::vector<ElementState>> expected(set.size());
    for (std::size_t i = 0; i < set.size(); ++i) {
      for (std::size_t k = 0; k < static_cast<std::size_t>(set.values().shapes()[i].numel); ++k) {
        const ElementState e{set.values().get(i, k),
                             {set.state(0).get(i, k), set.state(1).get(i, k), set.state(2).get(i, k)}};
        const double grad = set.gradients().get(i, k) / 1024.0 * (2.0 / (8.0 + 1e-6));
        expected[i].push_back(reference_step(GetParam(), e, grad, step));
      }
    }
    cpu::optimizer_step(GetParam().kind, set.rows(), set.gradient_addresses(), std::span(&GetParam().group, 1),
                        {&found, &scale, &norm, max_norm}, SerialExecutor());
    for (std::size_t i = 0; i < set.size(); ++i) {
      const DType dtype = set.storage(i).values;
      // The clip factor is a float32, so float64 values see its relative error of 2^-24 too.
      const double relative = dtype == DType::kFloat64 ? 0x1p-22 : 0x1p-21;
      EXPECT_EQ(set.steps()[i], step);
      for (std::size_t k = 0; k < expected[i].size(); ++k) {
        const ElementState& e = expected[i][k];
        const double got = set.values().get(i, k);
        ASSERT_NEAR(got, e.value, ulp(dtype, e.value) + relative * 0.5)
            << GetParam().name << " tensor " << i << " of " << name_of(dtype) << ", element " << k << ", step " << step;
        for (int s = 0; s < set.used_states(); ++s) {
          const double state = set.state(s).get(i, k);
          ASSERT_NEAR(state, e.state[s], ulp(dtype, e.state[s]) + relative * 0.2)
              << GetParam().name << " state " << s << " of " << name_of(dtype);
        }
        if (set.storage(i).with_copy) {
          const auto value = static_cast<float>(got);
          const double half =
              set.storage(i).copy == DType::kFloat16 ? widen(narrow<Half>(value)) : widen(narrow<BFloat16>(value));
          ASSERT_EQ(set.copies().get(i, k), half);
        } else {
          ASSERT_EQ(set.copies().get(i, k), 7.0);
        }
      }
    }
  }
}

TEST_P(OptimizerCpu, ASkippedStepChangesNoByte) {
  for (const float found : {1.0F, 2.0F, std::numeric_limits<float>::quiet_NaN()}) {
    ParameterSet set(GetParam(), kSizes);
    ParameterSet untouched = set;
    cpu::optimizer_step(GetParam().kind, set.rows(), set.gradient_addresses(), std::span(&GetParam().group, 1),
                        {&found, nullptr, nullptr, 0.0F}, SerialExecutor());
    EXPECT_EQ(set.steps(), untouched.steps());
    for (std::size_t i = 0; i < set.size(); ++i) {
      const auto same = [&](GradientList& a, GradientList& b) {
        return std::memcmp(a.buffer(i), b.buffer(i), a.bytes(i)) == 0;
      };
      EXPECT_TRUE(same(set.values(), untouched.values()));
      EXPECT_TRUE(same(set.copies(), untouched.copies()));
      for (int s = 0; s < 3; ++s) EXPECT_TRUE(same(set.state(s), untouched.state(s)));
    }
  }
}

TEST_P(OptimizerCpu, GradientsAreNeverWritten) {
  ParameterSet set(GetParam(), kSizes);
  ParameterSet untouched = set;
  const float found = 0.0F, scale = 3.0F;
  cpu::optimizer_step(GetParam().kind, set.rows(), set.gradient_addresses(), std::span(&GetParam().group, 1),
                      {&found, &scale, nullptr, 0.0F}, SerialExecutor());
  for (std::size_t i = 0; i < set.size(); ++i)
    EXPECT_EQ(std::memcmp(set.gradients().buffer(i), untouched.gradients().buffer(i), set.gradients().bytes(i)), 0);
}

INSTANTIATE_TEST_SUITE_P(All, OptimizerCpu, testing::ValuesIn(optimizer_cases()),
                         [](const auto& param) { return param.param.name; });

TEST(Optimizer, ASkippedFirstStepDoesNotCountAsTheFirst) {
  const OptimizerCase which = optimizer_cases()[6];  // momentum with dampening, which the first step leaves out
  ParameterSet set(which, {4});
  const float skip = 1.0F, apply = 0.0F;
  for (const float* found : {&skip, &apply})
    cpu::optimizer_step(which.kind, set.rows(), set.gradient_addresses(), std::span(&which.group, 1),
                        {found, nullptr, nullptr, 0.0F}, SerialExecutor());
  for (std::size_t k = 0; k < 4; ++k) EXPECT_EQ(set.state(0).get(0, k), set.gradients().get(0, k));
}

TEST(Optimizer, ClippingLeavesSmallNormsAlone) {
  const OptimizerCase which = optimizer_cases()[4];
  const float found = 0.0F;
  for (const float norm : {0.0F, 0.5F, 1.0F}) {
    ParameterSet clipped(which, {5});
    ParameterSet plain(which, {5});
    cpu::optimizer_step(which.kind, clipped.rows(), clipped.gradient_addresses(), std::span(&which.group, 1),
                        {&found, nullptr, &norm, 2.0F}, SerialExecutor());
    cpu::optimizer_step(which.kind, plain.rows(), plain.gradient_addresses(), std::span(&which.group, 1),
                        {&found, nullptr, nullptr, 0.0F}, SerialExecutor());
    for (std::size_t k = 0; k < 5; ++k) EXPECT_EQ(clipped.values().get(0, k), plain.values().get(0, k));
  }
}

TEST(Optimizer, TheLearningRateMayBeATensor) {
  const OptimizerCase which = optimizer_cases()[0];
  const float found = 0.0F, lr = 0.25F;
  ParameterSet by_tensor(which, {5});
  ParameterSet by_number(which, {5});
  OptimizerGroup group = which.group;
  group.lr = 0.25;
  cpu::optimizer_step(which.kind, by_number.rows(), by_number.gradient_addresses(), std::span(&group, 1),
                      {&found, nullptr, nullptr, 0.0F}, SerialExecutor());
  group.lr = 1e6;
  group.lr_tensor = &lr;
  cpu::optimizer_step(which.kind, by_tensor.rows(), by_tensor.gradient_addresses(), std::span(&group, 1),
                      {&found, nullptr, nullptr, 0.0F}, SerialExecutor());
  for (std::size_t k = 0; k < 5; ++k) EXPECT_EQ(by_tensor.values().get(0, k), by_number.values().get(0, k));
}

TEST(Optimizer, BadRowsAreRefusedBeforeAnythingChanges) {
  const OptimizerCase which = optimizer_cases()[0];
  const float found = 0.0F;
  const auto message = [&](auto spoil) {
    ParameterSet set(which, {4});
    auto rows = set.rows();
    spoil(rows.back());
    try {
      cpu::optimizer_step(which.kind, rows, set.gradient_addresses(), std::span(&which.group, 1),
                          {&found, nullptr, nullptr, 0.0F}, SerialExecutor());
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(set.steps().front(), 0.0F);
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_NE(message([](OptimizerTensor& t) { t.group = 1; }).find("group is 1, expected 0 to 1 - 1"),
            std::string::npos);
  EXPECT_NE(message([](OptimizerTensor& t) {
              t.gradient_dtype = DType::kFloat32;
            }).find("has dtype bfloat16 and a gradient of dtype float32"),
            std::string::npos);
  EXPECT_NE(message([](OptimizerTensor& t) { t.half_copy = t.values; }).find("a copy of dtype bfloat16"),
            std::string::npos);
  EXPECT_NE(message([](OptimizerTensor& t) { t.step = nullptr; }).find("step must not be null"), std::string::npos);
  EXPECT_NE(message([](OptimizerTensor& t) { t.state[1] = nullptr; }).find("Adam needs exp_avg and exp_avg_sq"),
            std::string::npos);
}

}  // namespace
}  // namespace halfstep::test
