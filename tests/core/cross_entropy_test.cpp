// The CPU cross entropy against a float64 reference.
#include "halfstep/cross_entropy.h"

#include "cross_entropy_fixture.h"
#include "threaded_executor.h"

namespace halfstep {
namespace {

using test::LossCase;
using test::LossData;

void run(LossData& data, const Executor& executor = SerialExecutor()) {
  const std::vector<TensorView> views = data.tensors.views();
  const CrossEntropy call = data.call(views[LossData::kLogits], data.targets.data(), data.weight.data());
  cpu::cross_entropy(call, {data.loss.data(), data.lse.data(), data.totals.data()}, executor);
  cpu::cross_entropy_backward(
      call, {data.grad_loss.data(), data.lse.data(), data.totals.data(), views[LossData::kGradLogits].data}, executor);
}

TEST(CrossEntropy, AgreesWithTheReferenceForAllSizesAndSettings) {
  for (const LossCase& c : test::loss_cases()) {
    SCOPED_TRACE(testing::Message() << c);
    LossData data(c);
    run(data);
    test::expect_loss_matches(data);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(CrossEntropy, TheSameBitsWhateverTheThreads) {
  const LossCase c{.rows = 700, .classes = 5003, .weighted = true, .smoothing = 0.1};
  LossData serial(c);
  LossData threaded(c);
  run(serial);
  run(threaded, test::ThreadedExecutor());
  EXPECT_EQ(serial.loss, threaded.loss);
  EXPECT_EQ(serial.lse, threaded.lse);
  const auto bytes = static_cast<std::size_t>(c.rows * c.classes) * 2;
  EXPECT_EQ(std::memcmp(serial.tensors.views()[LossData::kGradLogits].data,
                        threaded.tensors.views()[LossData::kGradLogits].data, bytes),
            0);
}

TEST(CrossEntropy, LargeOffsetsAndMaskedBeginningsCostNothing) {
  for (const double offset : {-1e4, 0.0, 1e4}) {
    LossData data({.rows = 1, .classes = 9000, .dtype = DType::kFloat32});
    for (std::size_t i = 0; i < 9000; ++i)
      data.tensors.set(LossData::kLogits, i, i < 5000 ? -std::numeric_limits<double>::infinity() : offset);
    data.targets[0] = 8999;
    run(data);
    EXPECT_FLOAT_EQ(data.loss[0], std::log(4000.0F));
    EXPECT_EQ(data.tensors.get(LossData::kGradLogits, 0), 0.0);
    EXPECT_NEAR(data.tensors.get(LossData::kGradLogits, 5000), 1.0 / 4000.0, 1e-6);
  }
}

TEST(CrossEntropy, NonFiniteLogitsShowInTheirRowAlone) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const double bad : {kInfinity, std::numeric_limits<double>::quiet_NaN()}) {
    LossData data({.rows = 2, .classes = 5000, .reduction = LossReduction::kNone});
    data.tensors.set(LossData::kLogits, 4999, bad);
    run(data);
    EXPECT_TRUE(std::isnan(data.loss[0]));
    EXPECT_TRUE(std::isfinite(data.loss[1]));
  }
  LossData masked({.rows = 1, .classes = 20});
  for (std::size_t i = 0; i < 20; ++i) masked.tensors.set(LossData::kLogits, i, -kInfinity);
  run(masked);
  EXPECT_TRUE(std::isnan(masked.loss[0])) << "no class is left";
}

TEST(CrossEntropy, AllRowsIgnoredIsNaNForTheMeanAndNoGradient) {
  LossData data({.rows = 2, .classes = 20});
  data.targets = {LossData::kIgnored, LossData::kIgnored};
  run(data);
  EXPECT_TRUE(std::isnan(data.loss[0]));
  for (std::size_t i = 0; i < 40; ++i) EXPECT_EQ(data.tensors.get(LossData::kGradLogits, i), 0.0);
}

TEST(CrossEntropy, ATargetOutOfBoundsIsRefusedBeforeAnythingIsWritten) {
  for (const std::int64_t target : {std::int64_t{20}, std::int64_t{-1}}) {
    LossData data({.rows = 3, .classes = 20});
    data.targets[2] = target;
    try {
      run(data);
      FAIL() << "expected InvalidArgument";
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find("Target " + std::to_string(target) + " is out of bounds."),
                std::string::npos);
    }
    EXPECT_EQ(data.loss[0], -7.0F);
    EXPECT_EQ(data.lse[0], -7.0F);
  }
}

}  // namespace
}  // namespace halfstep
