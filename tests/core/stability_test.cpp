// The state machine of the layers, and the statistics it decides by.
#include "halfstep/stability.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "halfstep/gradients.h"
#include "halfstep/status.h"

namespace halfstep {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

PrecisionPlan plan_of(const std::vector<std::string>& names, Precision precision = Precision::kFloat16) {
  std::vector<PlannedLayer> layers;
  for (const std::string& name : names) layers.push_back({name, "Linear", precision, "test"});
  return {"test", std::move(layers)};
}

// Layers "" (the model), a, b and block with block.c inside.
class StabilityTest : public testing::Test {
 protected:
  static constexpr std::size_t kModel = 0, kA = 1, kB = 2, kBlock = 3, kC = 4;

  StabilityTest() { clear(); }
  void clear() {
    summary_.assign(5 * kSummaryColumns, 0.0);
    for (const std::size_t layer : {kA, kB, kC}) at(layer, kMaxOutput) = 1.0;
  }
  double& at(std::size_t layer, SummaryColumn column) { return summary_[layer * kSummaryColumns + column]; }
  std::vector<StabilityDecision> decide(double scale = 1024.0) {
    EXPECT_TRUE(monitor_.observe(++batch_, summary_).empty());
    return monitor_.decide(batch_, scale);
  }
  std::vector<StabilityDecision> unstable(std::int64_t batch, StepKind kind = StepKind::kUnstable) {
    return monitor_.observe(batch, summary_, kind);
  }
  LayerState state(std::size_t layer) const { return monitor_.layers()[layer].state; }
  // Decides on `layers` quiet intervals and returns how many it took until `layer` is in this state.
  int intervals_until(std::size_t layer, LayerState wanted) {
    clear();
    for (int count = 1; count < 1000; ++count) {
      decide();
      if (state(layer) == wanted) return count;
    }
    return -1;
  }

  StabilityMonitor monitor_{plan_of({"", "a", "b", "block", "block.c"}), {.threshold = 1e-4, .hold = 1, .max_hold = 8}};
  std::vector<double> summary_;
  std::int64_t batch_ = 0;
};

TEST_F(StabilityTest, NothingHappensWithoutAFault) {
  EXPECT_TRUE(decide().empty());
  EXPECT_EQ(monitor_.plan(), monitor_.base());
  EXPECT_EQ(monitor_.half_share(), 1.0);
}

TEST_F(StabilityTest, AnUnstableBatchDemotesTheFirstLayerAlone) {
  at(kB, kFirstOutput) = 1.0 / 3;
  at(kC, kFirstOutput) = 1.0 / 5;
  const auto decisions = unstable(7);
  ASSERT_EQ(decisions.size(), 1U);
  EXPECT_EQ(decisions[0], (StabilityDecision{7, "b", LayerState::kHalf, LayerState::kFloat32, kInfinity, 1,
                                             "the first infinite or NaN output"}));
  EXPECT_EQ(state(kB), LayerState::kFloat32);
  EXPECT_EQ(state(kA), LayerState::kHalf);
  EXPECT_EQ(state(kC), LayerState::kHalf);
  EXPECT_EQ(monitor_.plan().at("b").precision, Precision::kFloat32);
  EXPECT_EQ(monitor_.plan().at("b").reason, "the first infinite or NaN output");
  EXPECT_EQ(monitor_.plan().at("a").precision, Precision::kFloat16);
  EXPECT_DOUBLE_EQ(monitor_.half_share(), 2.0 / 3.0) << "of a, b and block.c: the others compute by these";
}

TEST_F(StabilityTest, HeldTriedAndPromoted) {
  at(kA, kLostOutput) = 0.5;
  ASSERT_EQ(decide().size(), 1U);
  EXPECT_EQ(state(kA), LayerState::kFloat32);
  clear();
  auto decisions = decide();
  ASSERT_EQ(decisions.size(), 1U);
  EXPECT_EQ(decisions[0].to, LayerState::kTrial);
  EXPECT_EQ(monitor_.plan().at("a").precision, Precision::kFloat16) << "a trial runs in half";
  decisions = decide();
  ASSERT_EQ(decisions.size(), 1U);
  EXPECT_EQ(decisions[0].to, LayerState::kHalf);
  EXPECT_EQ(monitor_.layers()[kA].promotions, 1);
}

TEST_F(StabilityTest, EveryFailedTrialDoublesTheHoldUpToTheLimit) {
  at(kA, kLostOutput) = 0.5;
  decide();
  for (const int hold : {1, 2, 4, 8, 8}) {
    EXPECT_EQ(monitor_.layers()[kA].hold, hold);
    EXPECT_EQ(intervals_until(kA, LayerState::kTrial), hold);
    at(kA, kLostOutput) = 0.5;
    decide();
    EXPECT_EQ(state(kA), LayerState::kFloat32);
  }
  EXPECT_EQ(monitor_.layers()[kA].demotions, 6);
}

TEST_F(StabilityTest, TheHoldIsForgottenAfterAsLongInHalf) {
  at(kA, kLostOutput) = 0.5;
  decide();
  intervals_until(kA, LayerState::kTrial);
  at(kA, kLostOutput) = 0.5;
  decide();
  EXPECT_EQ(monitor_.layers()[kA].hold, 2);
  intervals_until(kA, LayerState::kHalf);
  EXPECT_EQ(monitor_.layers()[kA].hold, 2);
  decide();
  EXPECT_EQ(monitor_.layers()[kA].hold, 2);
  decide();
  EXPECT_EQ(monitor_.layers()[kA].hold, 1);
}

TEST_F(StabilityTest, ALayerInFloat32ThatHalfCouldNotHoldIsNotTried) {
  at(kA, kFirstOutput) = 1.0;
  unstable(1);
  clear();
  at(kA, kFirstBeyond) = 1.0;
  at(kA, kMaxOutput) = 1e6;
  EXPECT_TRUE(decide().empty()) << "the interval that had begun does not count";
  const auto decisions = decide();
  ASSERT_EQ(decisions.size(), 1U);
  EXPECT_EQ(decisions[0].to, LayerState::kFloat32);
  EXPECT_EQ(decisions[0].hold, 2);
  EXPECT_NE(decisions[0].reason.find("1e+06"), std::string::npos) << decisions[0].reason;
}

TEST_F(StabilityTest, ATrialThatWasNotSeenGoesOn) {
  at(kA, kLostOutput) = 0.5;
  decide();
  clear();
  decide();
  ASSERT_EQ(state(kA), LayerState::kTrial);
  at(kA, kMaxOutput) = 0.0;
  EXPECT_TRUE(decide().empty());
  EXPECT_EQ(state(kA), LayerState::kTrial);
}

TEST_F(StabilityTest, ALayerInFloat32ThatIsFirstBlamesTheOneAroundIt) {
  at(kC, kFirstOutput) = 1.0;
  unstable(1);
  EXPECT_EQ(state(kC), LayerState::kFloat32);
  unstable(2);
  EXPECT_EQ(state(kBlock), LayerState::kFloat32);
  unstable(3);
  EXPECT_EQ(state(kModel), LayerState::kFloat32);
  const auto decisions = unstable(4);
  ASSERT_EQ(decisions.size(), 1U);
  EXPECT_EQ(decisions[0].from, decisions[0].to);
  EXPECT_NE(decisions[0].reason.find("in float32 too"), std::string::npos);
}

TEST_F(StabilityTest, APassInFloat32BlamesTheFirstOutputBeyondHalf) {
  at(kB, kFirstBeyond) = 1.0 / 2;
  at(kB, kMaxOutput) = 1e5;
  at(kC, kFirstBeyond) = 1.0 / 3;
  const auto decisions = unstable(1, StepKind::kFloat32);
  ASSERT_EQ(decisions.size(), 1U);
  EXPECT_EQ(decisions[0].layer, "b");
  clear();
  at(kModel, kFirstOutput) = 0.1;
  at(kA, kFirstOutput) = 1.0;
  const auto hopeless = unstable(2, StepKind::kFloat32);
  ASSERT_EQ(hopeless.size(), 1U);
  EXPECT_EQ(hopeless[0].to, LayerState::kHalf) << "float32 is no better, so nothing changes";
}

TEST_F(StabilityTest, InfiniteOutputsOfGoodStepsAreMasks) {
  at(kA, kFirstOutput) = 1.0;
  EXPECT_TRUE(decide().empty());
  at(kB, kFirstOutput) = 0.5;
  const auto decisions = unstable(2);
  ASSERT_EQ(decisions.size(), 1U);
  EXPECT_EQ(decisions[0].layer, "b") << "a's are no news";
}

TEST_F(StabilityTest, WhereTheModelIsWatchedItsOutputSaysWhetherAStepCameToNothing) {
  at(kA, kFirstOutput) = 1.0;
  at(kModel, kMaxOutput) = 5.0;
  EXPECT_TRUE(unstable(1).empty()) << "the loss overflowed by itself";
  EXPECT_EQ(state(kA), LayerState::kHalf);
  at(kModel, kFirstOutput) = 0.1;
  at(kB, kFirstOutput) = 0.5;
  const auto decisions = monitor_.observe(2, summary_);
  ASSERT_EQ(decisions.size(), 1U) << "nobody has looked at the loss";
  EXPECT_EQ(decisions[0].layer, "b") << "a's infinite values did no harm before";
}

TEST_F(StabilityTest, SummariesOfAnIntervalAreCombined) {
  at(kA, kLostOutput) = 0.5;
  monitor_.observe(1, summary_);
  clear();
  at(kB, kLostOutput) = 0.25;
  monitor_.observe(2, summary_);
  EXPECT_EQ(monitor_.decide(3, 1.0).size(), 2U);
  EXPECT_TRUE(monitor_.decide(4, 1.0).size() == 2U) << "without a sample both are tried";
  EXPECT_TRUE(monitor_.decide(5, 1.0).empty()) << "and go on being tried until they were seen";
}

TEST_F(StabilityTest, GradientsThatOverflowAreTheScalesMatterUntilItIsLow) {
  at(kC, kFirstOutputGradient) = 1.0 / 10;
  at(kB, kFirstInputGradient) = 1.0 / 9;
  EXPECT_TRUE(decide(1024.0).empty());
  ASSERT_EQ(decide(1.0).size(), 1U);
  EXPECT_EQ(state(kB), LayerState::kFloat32);
  EXPECT_EQ(decide(1.0).size(), 2U) << "tried while its gradients are infinite, and said that float32 is no better";
}

TEST_F(StabilityTest, AGradientThatCameInfiniteFromOutsideIsTheFaultOfWhatIsAround) {
  at(kC, kFirstOutputGradient) = 1.0 / 9;
  at(kC, kFirstInputGradient) = 1.0 / 10;
  EXPECT_TRUE(decide(2.0).empty());
  ASSERT_EQ(decide(1.0).size(), 1U);
  EXPECT_EQ(state(kBlock), LayerState::kFloat32);
  EXPECT_EQ(state(kC), LayerState::kHalf);
}

TEST_F(StabilityTest, InfiniteOutputsAreNoMasksWhereGradientsStayInfinite) {
  at(kB, kFirstOutput) = 1.0 / 4;  // exp(-x) makes 0 of it, and NaN of its gradient
  at(kC, kFirstOutputGradient) = 1.0 / 9;
  ASSERT_EQ(decide(1.0).size(), 1U);
  EXPECT_EQ(state(kB), LayerState::kFloat32);
}

TEST_F(StabilityTest, Float32TellsMasksFromOverflows) {
  at(kA, kFirstOutput) = 1.0;  // a mask, which nobody has seen yet
  at(kB, kFirstOutput) = 0.5;  // the fault
  at(kC, kFirstOutput) = 0.25;
  at(kModel, kFirstOutput) = 0.1;
  ASSERT_EQ(unstable(1).size(), 1U);
  EXPECT_EQ(state(kA), LayerState::kFloat32) << "the first, as far as this pass tells";
  clear();
  at(kA, kFirstOutput) = 1.0;
  at(kModel, kMaxOutput) = 3.0;
  const auto decisions = unstable(1, StepKind::kFloat32);
  ASSERT_EQ(decisions.size(), 2U);
  EXPECT_EQ(decisions[0].layer, "a");
  EXPECT_EQ(decisions[0].to, LayerState::kHalf);
  EXPECT_EQ(decisions[1].layer, "b");
  EXPECT_EQ(decisions[1].to, LayerState::kFloat32);
  EXPECT_EQ(monitor_.layers()[kA].demotions, 0);
  EXPECT_TRUE(monitor_.layers()[kA].masks);
}

TEST_F(StabilityTest, ABatchThatIsNoBetterInFloat32DemotesNobody) {
  for (const std::size_t layer : {kModel, kA, kB}) at(layer, kFirstOutput) = layer == kA ? 1.0 : 0.1;
  ASSERT_EQ(unstable(1).size(), 1U);
  const auto decisions = unstable(1, StepKind::kFloat32);
  ASSERT_EQ(decisions.size(), 1U);
  EXPECT_EQ(decisions[0].to, LayerState::kHalf);
  EXPECT_EQ(monitor_.half_share(), 1.0);
  EXPECT_FALSE(monitor_.layers()[kA].masks);
}

TEST_F(StabilityTest, AMaskThatTurnsOutToOverflowIsFound) {
  at(kB, kFirstOutput) = 0.5;  // rows that do not count overflow
  at(kModel, kMaxOutput) = 1.0;
  monitor_.observe(1, summary_);
  at(kModel, kFirstOutput) = 0.1;  // now they count
  at(kC, kFirstOutput) = 0.25;
  ASSERT_EQ(unstable(2).size(), 1U);
  clear();
  at(kModel, kMaxOutput) = 1.0;
  const auto decisions = unstable(2, StepKind::kFloat32);
  ASSERT_EQ(decisions.size(), 2U);
  EXPECT_EQ(state(kB), LayerState::kFloat32);
  EXPECT_EQ(state(kC), LayerState::kHalf);
}

TEST_F(StabilityTest, SmallGradientsAreAFaultWhereTheScaleCannotGrow) {
  at(kA, kLostGradient) = 0.01;
  at(kA, kMaxGradient) = 1e-6;
  EXPECT_TRUE(decide().empty()) << "a larger scale would cure it";
  at(kC, kMaxGradient) = 60000.0;  // but the gradients of c are at the edge
  const auto decisions = decide();
  ASSERT_EQ(decisions.size(), 1U);
  EXPECT_EQ(decisions[0].layer, "a");
  EXPECT_DOUBLE_EQ(decisions[0].score, 0.01 / std::pow(65520.0 / 60000.0, 2));
}

TEST_F(StabilityTest, WhatThePlanHasInFloat32StaysSo) {
  std::vector<PlannedLayer> layers{{"a", "Linear", Precision::kFloat32, ""}, {"b", "Linear", Precision::kBFloat16, ""}};
  StabilityMonitor monitor(PrecisionPlan("p", layers));
  EXPECT_EQ(monitor.half(), Precision::kBFloat16);
  EXPECT_EQ(monitor.half_share(), 1.0) << "of what can be half";
  std::vector<double> summary(2 * kSummaryColumns, 0.0);
  summary[kLostOutput] = 1.0;
  monitor.observe(1, summary);
  EXPECT_TRUE(monitor.decide(1, 1.0).empty());
  EXPECT_EQ(monitor.plan(), monitor.base());
}

TEST_F(StabilityTest, TheSameSummariesGiveTheSamePlan) {
  StabilityMonitor other(monitor_.base(), monitor_.options());
  for (int step = 0; step < 50; ++step) {
    clear();
    at(static_cast<std::size_t>(step * 7 % 5), kLostOutput) = step % 3 == 0 ? 0.1 : 0.0;
    if (step % 11 == 0) at(static_cast<std::size_t>(step % 5), kFirstOutput) = 1.0;
    const auto kind = step % 11 == 0 ? StepKind::kUnstable : StepKind::kUsual;
    ASSERT_EQ(monitor_.observe(step, summary_, kind), other.observe(step, summary_, kind));
    ASSERT_EQ(monitor_.decide(step, 1.0), other.decide(step, 1.0));
    ASSERT_EQ(monitor_.plan(), other.plan());
  }
}

TEST_F(StabilityTest, ACheckpointGoesOnWhereItWas) {
  at(kA, kLostOutput) = 0.5;
  decide();
  intervals_until(kA, LayerState::kTrial);
  at(kA, kLostOutput) = 0.5;
  decide();
  StabilityMonitor restored(monitor_.base(), monitor_.options());
  restored.restore(monitor_.to_json());
  EXPECT_EQ(restored.to_json(), monitor_.to_json());
  EXPECT_EQ(restored.plan(), monitor_.plan());
  clear();
  for (int i = 0; i < 5; ++i) {
    restored.observe(i, summary_);
    monitor_.observe(i, summary_);
    EXPECT_EQ(restored.decide(i, 1.0), monitor_.decide(i, 1.0));
  }
}

TEST_F(StabilityTest, ForeignCheckpointsAreRefusedAndChangeNothing) {
  at(kA, kLostOutput) = 0.5;
  decide();
  const std::string before = monitor_.to_json();
  const StabilityMonitor other(plan_of({"", "a", "b", "block", "other"}));
  std::string negative = before;
  negative.replace(negative.find("\"hold\": \"1\""), 11, "\"hold\": \"-1\"");
  std::string state = before;
  state.replace(state.find("\"state\": \"half\""), 15, "\"state\": \"fixed\"");
  for (const std::string& text : {other.to_json(), std::string("{}"), std::string("[1"), negative, state,
                                  StabilityMonitor(plan_of({"a"})).to_json()}) {
    EXPECT_THROW(monitor_.restore(text), InvalidArgument) << text;
    EXPECT_EQ(monitor_.to_json(), before);
  }
}

TEST_F(StabilityTest, BadArguments) {
  EXPECT_THROW(StabilityMonitor(plan_of({"a"}, Precision::kFloat32)), InvalidArgument);
  std::vector<PlannedLayer> both{{"a", "L", Precision::kFloat16, ""}, {"b", "L", Precision::kBFloat16, ""}};
  EXPECT_THROW(StabilityMonitor(PrecisionPlan("p", both)), InvalidArgument);
  EXPECT_THROW(StabilityMonitor(plan_of({"a"}), {.threshold = 0.0}), InvalidArgument);
  EXPECT_THROW(StabilityMonitor(plan_of({"a"}), {.threshold = NAN}), InvalidArgument);
  EXPECT_THROW(StabilityMonitor(plan_of({"a"}), {.hold = 0}), InvalidArgument);
  EXPECT_THROW(StabilityMonitor(plan_of({"a"}), {.hold = 4, .max_hold = 3}), InvalidArgument);
  EXPECT_THROW(StabilityMonitor(plan_of({"a"}), {.lowest_scale = 0.0}), InvalidArgument);
  EXPECT_THROW(monitor_.observe(1, std::vector<double>(3)), InvalidArgument);
  EXPECT_THROW(summarize(std::vector<double>(5), Precision::kFloat16), InvalidArgument);
  EXPECT_THROW(half_limit_of(Precision::kFloat32), InvalidArgument);
}

TEST(LayerStatistics, MergeAndSummary) {
  // Two outputs of one layer: 1, 2, 0 and then infinity, 70000, 0, and an input gradient of smallest numbers.
  std::vector<double> rows(kValuesPerLayer, 0.0);
  float stats[kGradientStats] = {};
  stats[kMaxMagnitude] = 2;
  stats[kSumOfSquares] = 5;
  stats[kZeros] = 1;
  stats[kElements] = 3;
  cpu::merge_statistics(stats, rows.data(), 1.0, 65520.0);
  EXPECT_EQ(rows[kEarliest], 0.0);
  stats[kNonFinite] = 1;
  stats[kMaxMagnitude] = 70000;
  stats[kSumOfSquares] = INFINITY;
  cpu::merge_statistics(stats, rows.data(), 4.0, 65520.0);
  const float small[kGradientStats] = {0, 0x1p-24F, 8 * 0x1p-48F, 2, 8, 10};
  cpu::merge_statistics(small, &rows[int{kInputGradient} * int{kLayerStatistics}], 9.0, 65520.0);
  EXPECT_EQ(rows[kSeen], 2.0);
  EXPECT_EQ(rows[kSeenElements], 6.0);
  EXPECT_EQ(rows[kSeenNonFinite], 1.0);
  EXPECT_EQ(rows[kEarliest], 0.25);
  EXPECT_EQ(rows[kEarliestBeyond], 0.25);
  EXPECT_EQ(rows[kSeenSquares], 5.0);
  EXPECT_EQ(rows[kSeenZeros], 1.0);

  const std::vector<double> summary = summarize(rows, Precision::kFloat16);
  EXPECT_EQ(summary[kFirstOutput], 0.25);
  EXPECT_EQ(summary[kMaxOutput], 70000.0);
  EXPECT_DOUBLE_EQ(summary[kLostOutput], 0x1p-50 / 5.0);
  EXPECT_DOUBLE_EQ(summary[kLostGradient], 10 * 0x1p-50 / (8 * 0x1p-48)) << "a quarter of 10 / 8";
  EXPECT_EQ(summary[kMaxGradient], 0x1p-24);
  rows[int{kInputGradient} * int{kLayerStatistics} + int{kSeenSquares}] = 1.0;
  cpu::merge_statistics(small, &rows[int{kOutputGradient} * int{kLayerStatistics}], 9.0, 65520.0);
  EXPECT_DOUBLE_EQ(summarize(rows, Precision::kFloat16)[kLostGradient], 10 * 0x1p-50 / (8 * 0x1p-48))
      << "what it gets counts as well: it is rounded to the type of its output";
  EXPECT_EQ(summarize(rows, Precision::kBFloat16)[kLostGradient], 0.0) << "bfloat16 has float32's range";
}

// The bound holds: rounding to float16's grid below 2^-14 costs no more of the squared norm than it says.
TEST(LayerStatistics, TheLostShareBoundsWhatRoundingCosts) {
  for (const double magnitude : {0x1p-13, 0x1p-16, 0x1p-20, 0x1p-23, 0x1p-24, 0x1p-26}) {
    double squares = 0.0, lost = 0.0, kept = 0.0, small = 0.0, zeros = 0.0;
    for (int i = 1; i <= 1000; ++i) {
      const double x = magnitude * i / 1000.0;
      const double rounded = x < 0x1p-14 ? std::nearbyint(x * 0x1p24) * 0x1p-24 : x;
      squares += x * x;
      lost += (x - rounded) * (x - rounded);
      kept += rounded * rounded;
      small += rounded != 0.0 && rounded < 0x1p-14;
      zeros += rounded == 0.0;
    }
    std::vector<double> rows(kValuesPerLayer, 0.0);
    rows[kSeenSquares] = kept;  // what is seen is what is left
    rows[kSeenZeros] = zeros;
    rows[kSeenBelowHalf] = small;
    const double bound = summarize(rows, Precision::kFloat16)[kLostOutput];
    if (kept > 0.0) {
      EXPECT_GE(std::max(bound * kept, bound * squares), lost) << magnitude;
    }
  }
}

}  // namespace
}  // namespace halfstep
