// The CPU check against a float64 reference.
#include "halfstep/gradients.h"

#include <limits>
#include <string>

#include <gtest/gtest.h>

#include "gradient_fixture.h"
#include "threaded_executor.h"

namespace halfstep {
namespace {

using test::GradientList;
using test::Reference;
using test::ThreadedExecutor;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Result {
  float found = 0.0F;
  float norm = -1.0F;
  std::vector<float> stats;
};

Result check(GradientList& list, float scale, const Executor& executor = SerialExecutor()) {
  Result result;
  result.stats.assign(list.size() * kGradientStats, -1.0F);
  cpu::check_gradients(list.views(), {&scale}, {&result.found, &result.norm, result.stats.data()}, executor);
  return result;
}

void expect_matches(const Result& got, const Reference& expected) {
  EXPECT_EQ(got.found, expected.found ? 1.0F : 0.0F);
  EXPECT_NEAR(got.norm, expected.norm, 1e-6 * expected.norm);
  for (std::size_t tensor = 0; tensor < expected.stats.size(); ++tensor) {
    const float* const row = got.stats.data() + tensor * kGradientStats;
    for (const GradientStat exact : {kNonFinite, kMaxMagnitude, kZeros, kBelowHalf, kElements})
      EXPECT_EQ(row[exact], static_cast<float>(expected.stats[tensor][exact])) << "tensor " << tensor << " " << exact;
    EXPECT_NEAR(row[kSumOfSquares], expected.stats[tensor][kSumOfSquares],
                1e-5 * expected.stats[tensor][kSumOfSquares]);
  }
}

TEST(CheckGradients, AgreesWithTheReferenceForAllDtypesAndSizes) {
  for (const float scale : {1.0F, 65536.0F, 3.0F, 0.5F}) {
    // The spread puts a share of the unscaled values on either side of 2^-14.
    GradientList list = test::mixed_list(1e-4 * scale);
    expect_matches(check(list, scale), test::reference_check(list, scale));
  }
}

// A scale that collapsed to 0 makes the multiplier infinite: zeros become NaN, everything else infinite.
TEST(CheckGradients, AScaleOfZeroCountsRealElementsOnly) {
  for (const std::size_t size : {std::size_t{1}, std::size_t{33}, std::size_t{64}}) {
    for (const double value : {1.0, 0.0}) {
      GradientList list;
      list.add(DType::kFloat32, std::vector<double>(size, value));
      const Result result = check(list, 0.0F);
      EXPECT_EQ(result.found, 1.0F);
      EXPECT_EQ(std::isinf(result.norm), value == 1.0);
      EXPECT_EQ(std::isnan(result.norm), value == 0.0);
      EXPECT_EQ(result.stats[kNonFinite], static_cast<float>(size));
      EXPECT_EQ(result.stats[kZeros], 0.0F);
    }
  }
}

TEST(CheckGradients, TheBitsDependNeitherOnThreadsNorOnTheRun) {
  GradientList list = test::mixed_list(10.0);
  const Result serial = check(list, 1024.0F);
  for (int run = 0; run < 3; ++run) {
    const Result threaded = check(list, 1024.0F, ThreadedExecutor());
    EXPECT_EQ(threaded.norm, serial.norm);
    EXPECT_EQ(threaded.stats, serial.stats);
  }
}

class Planted : public testing::TestWithParam<DType> {};

TEST_P(Planted, OneBadElementIsFoundWhereverItIs) {
  constexpr std::size_t kSize = 40000;
  for (const float bad : {kInfinity, -kInfinity, kNan}) {
    for (const std::size_t position : {std::size_t{0}, std::size_t{17}, kSize / 2, kSize - 1}) {
      GradientList list;
      list.add(GetParam(), test::normal_values(100, 1.0, 1));
      list.add(GetParam(), test::normal_values(kSize, 1.0, 2), 1);
      list.set(1, position, bad);
      const Result result = check(list, 2.0F);
      EXPECT_EQ(result.found, 1.0F);
      EXPECT_EQ(std::isnan(result.norm), std::isnan(bad));
      EXPECT_EQ(std::isinf(result.norm), std::isinf(bad));
      EXPECT_EQ(result.stats[kNonFinite], 0.0F);
      EXPECT_EQ(result.stats[kGradientStats + kNonFinite], 1.0F);
    }
  }
}

TEST_P(Planted, TheLargestFiniteValueIsNotFound) {
  const double largest[] = {DTypeTraits<DType::kFloat32>::max, DTypeTraits<DType::kFloat64>::max,
                            DTypeTraits<DType::kFloat16>::max, DTypeTraits<DType::kBFloat16>::max};
  GradientList list;
  list.add(GetParam(), {1.0, -largest[static_cast<int>(GetParam())], 0.0, -0.0});
  const Result result = check(list, 1.0F);
  EXPECT_EQ(result.found, 0.0F);
  EXPECT_EQ(result.stats[kZeros], 2.0F);
}

TEST_P(Planted, UnscaleWritesTheRoundedProduct) {
  for (const float scale : {65536.0F, 3.0F}) {
    GradientList list;
    list.add(GetParam(), test::normal_values(5000, 100.0, 3), 1);
    GradientList expected = list;
    const float inverse = static_cast<float>(1.0 / static_cast<double>(scale));
    for (std::size_t i = 0; i < 5000; ++i) {
      const double g = list.get(0, i);
      expected.set(0, i,
                   GetParam() == DType::kFloat64 ? g * inverse : static_cast<double>(static_cast<float>(g) * inverse));
    }
    float found = 0.0F;
    float norm = 0.0F;
    cpu::unscale(list.views(), {&scale}, {&found, &norm, nullptr}, SerialExecutor());
    EXPECT_EQ(found, 0.0F);
    for (std::size_t i = 0; i < 5000; ++i) ASSERT_EQ(list.get(0, i), expected.get(0, i)) << i;
    EXPECT_NEAR(norm, test::reference_check(expected, 1.0F).norm, 1e-5 * norm);
  }
}

TEST_P(Planted, UnscaleIntoOtherMemoryLeavesTheGradients) {
  GradientList list;
  list.add(GetParam(), test::normal_values(40000, 100.0, 3), 1);
  list.add(DType::kFloat32, {1.0, 2.0});
  const GradientList before = list;
  GradientList in_place = list;
  GradientList out = list;
  for (std::size_t i = 0; i < 40000; ++i) out.set(0, i, 7.0);
  const float scale = 3.0F;
  float found[2] = {};
  float norm[2] = {};
  cpu::unscale(in_place.views(), {&scale}, {&found[0], &norm[0], nullptr}, SerialExecutor());
  cpu::unscale_into(list.views(), out.views(), {&scale}, {&found[1], &norm[1], nullptr}, SerialExecutor());
  EXPECT_EQ(found[0], found[1]);
  EXPECT_EQ(norm[0], norm[1]);
  for (std::size_t i = 0; i < 40000; ++i) {
    ASSERT_EQ(list.get(0, i), before.get(0, i)) << i;
    ASSERT_EQ(out.get(0, i), in_place.get(0, i)) << i;
  }
  EXPECT_EQ(out.get(1, 1), in_place.get(1, 1));
}

TEST(CheckGradients, UnscaleIntoAnotherListIsRefused) {
  GradientList list;
  list.add(DType::kFloat32, {1.0, 2.0});
  GradientList shorter;
  shorter.add(DType::kFloat32, {7.0});
  GradientList half;
  half.add(DType::kFloat16, {7.0, 7.0});
  const float scale = 2.0F;
  float found = 0.0F;
  const CheckOutputs outputs{&found, nullptr, nullptr};
  for (GradientList* const other : {&shorter, &half}) {
    EXPECT_THROW(cpu::unscale_into(list.views(), other->views(), {&scale}, outputs, SerialExecutor()), InvalidArgument);
    EXPECT_EQ(other->get(0, 0), 7.0);
  }
  EXPECT_THROW(cpu::unscale_into(list.views(), {}, {&scale}, outputs, SerialExecutor()), InvalidArgument);
}

INSTANTIATE_TEST_SUITE_P(DTypes, Planted,
                         testing::Values(DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16),
                         [](const auto& param) { return std::string(name_of(param.param)); });

TEST(CheckGradients, AnOverflowMadeByUnscalingIsFound) {
  GradientList list;
  list.add(DType::kFloat32, {1e38});
  EXPECT_EQ(check(list, 1.0F).found, 0.0F);
  EXPECT_EQ(check(list, 0.125F).found, 1.0F);
}

TEST(CheckGradients, UnscaleFindsWhatOverflowsItsOwnDtype) {
  GradientList list;
  list.add(DType::kFloat16, {40000.0});
  const float scale = 0.5F;
  float found = 0.0F;
  cpu::unscale(list.views(), {&scale}, {&found, nullptr, nullptr}, SerialExecutor());
  EXPECT_EQ(found, 1.0F);
  EXPECT_TRUE(std::isinf(list.get(0, 0)));
}

TEST(CheckGradients, FoundIsNeverCleared) {
  GradientList list;
  list.add(DType::kFloat32, {1.0});
  const float scale = 1.0F;
  float found = 1.0F;
  cpu::check_gradients(list.views(), {&scale}, {&found, nullptr, nullptr}, SerialExecutor());
  EXPECT_EQ(found, 1.0F);
}

TEST(CheckGradients, AnEmptyListHasNormZero) {
  GradientList list;
  const Result result = check(list, 1.0F);
  EXPECT_EQ(result.norm, 0.0F);
  EXPECT_EQ(result.found, 0.0F);
}

TEST(CheckGradients, TheInverseIsUsedAsGiven) {
  GradientList list;
  list.add(DType::kFloat32, {6.0});
  const float third = 1.0F / 3.0F;
  float found = 0.0F;
  cpu::unscale(list.views(), {&third, /*inverse=*/true}, {&found, nullptr, nullptr}, SerialExecutor());
  EXPECT_EQ(list.get(0, 0), static_cast<double>(6.0F * third));
}

TEST(CheckGradients, NullOutputsAreRefused) {
  GradientList list;
  float found = 0.0F;
  const float scale = 1.0F;
  EXPECT_THROW(cpu::check_gradients(list.views(), {nullptr}, {&found, nullptr, nullptr}, SerialExecutor()),
               InvalidArgument);
  EXPECT_THROW(cpu::check_gradients(list.views(), {&scale}, {nullptr, nullptr, nullptr}, SerialExecutor()),
               InvalidArgument);
}

}  // namespace
}  // namespace halfstep
