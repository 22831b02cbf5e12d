// The scale rule against the peers' trajectories, which come from simulators that share no code with it
// (tests/peers.py), and its own promises beyond them.
#include "halfstep/scaling.h"

#include <cmath>
#include <limits>
#include <string>

#include <gtest/gtest.h>

#include "scale_fixture.h"

namespace halfstep {
namespace {

using test::Golden;
using test::ScaleMemory;

// One update with the given flags and, unless it is NaN, a norm.
void update(ScaleMemory& memory, const ScaleRule& rule, std::vector<float> flags, std::vector<float> norms = {}) {
  std::vector<const float*> found;
  std::vector<const float*> norm;
  for (const float& flag : flags) found.push_back(&flag);
  for (const float& value : norms) norm.push_back(&value);
  cpu::update_scale(memory.state(), rule, {found, norm});
}

class GoldenTrajectory : public testing::TestWithParam<Golden> {};

TEST_P(GoldenTrajectory, IsFollowedBitForBit) {
  const Golden& golden = GetParam();
  const ScaleRule rule = test::rule_of(golden);
  ScaleMemory memory(rule);
  ASSERT_EQ(golden.found.size(), golden.scales.size());
  for (std::size_t i = 0; i < golden.scales.size(); ++i) {
    update(memory, rule, {golden.found[i] == '1' ? 1.0F : 0.0F});
    ASSERT_EQ(memory.scale, golden.scales[i]) << golden.peer << " after step " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Peers, GoldenTrajectory, testing::ValuesIn(test::kGolden), [](const auto& param) {
  return std::string(param.param.peer) + "_" + std::to_string(param.index);
});

TEST(ScaleRule, PresetsHaveTheirPeersDefaults) {
  EXPECT_EQ(scale_rule("torch").init_scale, 65536.0);
  EXPECT_EQ(scale_rule("torch").min_scale, 0.0);
  EXPECT_EQ(scale_rule("keras").init_scale, 32768.0);
  EXPECT_EQ(scale_rule("megatron").init_scale, 4294967296.0);
  EXPECT_EQ(scale_rule("megatron").growth_interval, 1000);
  EXPECT_EQ(scale_rule("deepspeed").growth_delay, 1);
  EXPECT_EQ(scale_rule("paddle").refill, Refill::kOnCleanStepAndBackoff);
  EXPECT_THROW(scale_rule("Torch"), InvalidArgument);
}

TEST(ScaleRule, RefillNamesRoundTrip) {
  for (const Refill refill : {Refill::kOnGrowth, Refill::kOnCleanStep, Refill::kOnCleanStepAndBackoff})
    EXPECT_EQ(refill_from_name(name_of(refill)), refill);
  EXPECT_THROW(refill_from_name("never"), InvalidArgument);
}

TEST(ScaleRule, ValidationNamesTheParameter) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double infinity = std::numeric_limits<double>::infinity();
  const auto names = [](const char* parameter, auto change) {
    ScaleRule rule;
    change(rule);
    try {
      validate(rule);
      ADD_FAILURE() << parameter << " was accepted";
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(parameter), std::string::npos) << error.what();
    }
  };
  EXPECT_NO_THROW(validate(ScaleRule{}));
  for (const double bad : {0.0, -1.0, nan, infinity, 1e39, 1e-60})
    names("init_scale", [&](ScaleRule& rule) { rule.init_scale = bad; });
  for (const double bad : {1.0, -2.0, nan, infinity})
    names("growth_factor", [&](ScaleRule& rule) { rule.growth_factor = bad; });
  for (const double bad : {0.0, 1.0, nan}) names("backoff_factor", [&](ScaleRule& rule) { rule.backoff_factor = bad; });
  for (const std::int64_t bad : {std::int64_t{0}, std::int64_t{-1}, std::int64_t{1} << 31})
    names("growth_interval", [&](ScaleRule& rule) { rule.growth_interval = bad; });
  for (const double bad : {-1.0, nan, infinity}) names("min_scale", [&](ScaleRule& rule) { rule.min_scale = bad; });
  for (const double bad : {0.0, nan, infinity}) names("max_scale", [&](ScaleRule& rule) { rule.max_scale = bad; });
  names("from min_scale (1e+06)", [](ScaleRule& rule) { rule.min_scale = 1e6; });
  names("to max_scale (1)", [](ScaleRule& rule) { rule.max_scale = 1.0; });
  names("hysteresis", [](ScaleRule& rule) { rule.hysteresis = 0; });
  names("growth_delay", [](ScaleRule& rule) { rule.growth_delay = -1; });
}

TEST(ScaleRule, MaxScaleIsACeiling) {
  const ScaleRule rule{.init_scale = 8.0, .growth_interval = 1, .max_scale = 20.0};
  ScaleMemory memory(rule);
  update(memory, rule, {0.0F});
  EXPECT_EQ(memory.scale, 16.0F);
  update(memory, rule, {0.0F});
  EXPECT_EQ(memory.scale, 20.0F);
  update(memory, rule, {0.0F});
  EXPECT_EQ(memory.scale, 20.0F);
  EXPECT_EQ(memory.counters[kGrowths], 2);
}

TEST(ScaleRule, AnyFlagCountsOnceAndNanIsFound) {
  const ScaleRule rule;
  for (const std::vector<float>& flags : {std::vector<float>{0.0F, 1.0F}, {1.0F, 1.0F}, {NAN}, {0.0F, 3.0F, 0.0F}}) {
    ScaleMemory memory(rule);
    update(memory, rule, flags);
    EXPECT_EQ(memory.scale, 32768.0F);
    EXPECT_EQ(memory.counters[kSkipped], 1);
  }
}

TEST(ScaleRule, CountersTellWhatHappened) {
  const ScaleRule rule{.init_scale = 4.0, .growth_interval = 2, .min_scale = 2.0};
  ScaleMemory memory(rule);
  update(memory, rule, {1.0F}, {INFINITY});   // 4 -> 2
  update(memory, rule, {1.0F}, {NAN});        // stuck at 2
  update(memory, rule, {1.0F}, {NAN, 1.0F});  // stuck
  update(memory, rule, {0.0F}, {3.0F, 4.0F});
  update(memory, rule, {0.0F}, {5.0F});  // 2 -> 4
  update(memory, rule, {1.0F});          // 4 -> 2, no norm known
  const auto& counters = memory.counters;
  EXPECT_EQ(counters[kSteps], 6);
  EXPECT_EQ(counters[kSkipped], 4);
  EXPECT_EQ(counters[kConsecutiveSkipped], 1);
  EXPECT_EQ(counters[kGrowths], 1);
  EXPECT_EQ(counters[kBackoffs], 2);
  EXPECT_EQ(counters[kAtFloor], 2);
  EXPECT_EQ(counters[kNanSteps], 2);
  EXPECT_EQ(counters[kInfSteps], 1);

  const double* const fourth = memory.history.data() + 3 * kHistoryColumns;
  EXPECT_EQ(fourth[kHistoryStep], 4.0);
  EXPECT_EQ(fourth[kHistoryScale], 2.0);
  EXPECT_EQ(fourth[kHistoryFound], 0.0);
  EXPECT_EQ(fourth[kHistoryNorm], 5.0);
  EXPECT_TRUE(std::isnan(memory.history[5 * kHistoryColumns + kHistoryNorm]));
}

TEST(ScaleRule, TheHistoryIsARing) {
  const ScaleRule rule;
  ScaleMemory memory(rule);
  for (int i = 0; i < kHistoryRows + 3; ++i) update(memory, rule, {0.0F}, {static_cast<float>(i)});
  EXPECT_EQ(memory.history[2 * kHistoryColumns + kHistoryStep], kHistoryRows + 3.0);
  EXPECT_EQ(memory.history[3 * kHistoryColumns + kHistoryStep], 4.0);
}

// A user may set the scale outside the bounds: growth must not lower it, nor an overflow raise it.
TEST(ScaleRule, AScaleOutsideTheBoundsIsNotPulledIn) {
  const ScaleRule rule{.init_scale = 8.0, .growth_interval = 1, .min_scale = 4.0, .max_scale = 16.0};
  ScaleMemory memory(rule);
  memory.scale = 64.0F;
  update(memory, rule, {0.0F});
  EXPECT_EQ(memory.scale, 64.0F);
  update(memory, rule, {1.0F});
  EXPECT_EQ(memory.scale, 32.0F);
  memory.scale = 1.0F;
  update(memory, rule, {1.0F});
  EXPECT_EQ(memory.scale, 1.0F);
  EXPECT_EQ(memory.counters[kGrowths], 0);
  EXPECT_EQ(memory.counters[kBackoffs], 1);
  EXPECT_EQ(memory.counters[kAtFloor], 1);
}

TEST(ScaleRule, AnIntervalLoweredBelowTheTrackerGrowsAtTheNextCleanStep) {
  ScaleRule rule{.init_scale = 8.0, .growth_interval = 100};
  ScaleMemory memory(rule);
  for (int i = 0; i < 5; ++i) update(memory, rule, {0.0F});
  rule.growth_interval = 3;
  update(memory, rule, {0.0F});
  EXPECT_EQ(memory.scale, 16.0F);
  EXPECT_EQ(memory.growth_tracker, 0);
}

TEST(ScaleRule, TheLargestTrackerDoesNotOverflow) {
  ScaleRule rule{.init_scale = 8.0};
  rule.growth_interval = std::numeric_limits<std::int32_t>::max();
  ScaleMemory memory(rule);
  memory.growth_tracker = std::numeric_limits<std::int32_t>::max();
  update(memory, rule, {0.0F});
  EXPECT_EQ(memory.growth_tracker, 0);
  EXPECT_EQ(memory.scale, 16.0F);
}

// torch's way to freeze a scale: factors of 1, which a new scaler may not have but an update may.
TEST(ScaleRule, FactorsOfOneFreezeTheScale) {
  const ScaleRule rule{.init_scale = 8.0, .growth_factor = 1.0, .backoff_factor = 1.0, .growth_interval = 1};
  EXPECT_NO_THROW(validate_update(rule));
  EXPECT_THROW(validate(rule), InvalidArgument);
  ScaleMemory memory(rule);
  update(memory, rule, {0.0F});
  update(memory, rule, {1.0F});
  EXPECT_EQ(memory.scale, 8.0F);
}

TEST(ScaleRule, ForeignStateStaysInsideItsMemory) {
  const ScaleRule rule{.init_scale = 8.0};
  ScaleMemory memory(rule);
  memory.counters[kSteps] = -5;
  std::vector<double> guarded(memory.history.size() + 64 * kHistoryColumns, 7.0);
  ScaleState state = memory.state();
  state.history = guarded.data() + 32 * kHistoryColumns;
  memory.hysteresis_left = -1;  // spent, so every overflow backs off
  const float flag = 1.0F;
  const float* const found[] = {&flag};
  cpu::update_scale(state, rule, {found, {}});
  EXPECT_EQ(memory.scale, 4.0F);
  for (std::size_t i = 0; i < 32 * kHistoryColumns; ++i) {
    ASSERT_EQ(guarded[i], 7.0);
    ASSERT_EQ(guarded[guarded.size() - 1 - i], 7.0);
  }
}

TEST(ScaleRule, LongRunsOfOverflowsDoNotWrapTheCredit) {
  const ScaleRule rule{.min_scale = 1.0, .hysteresis = 2, .refill = Refill::kOnGrowth};
  ScaleMemory memory(rule);
  for (int i = 0; i < 100; ++i) update(memory, rule, {1.0F});
  EXPECT_EQ(memory.hysteresis_left, 0);
  EXPECT_EQ(memory.scale, 1.0F);
}

TEST(ScaleRule, RequiredStateAndInputsAreChecked) {
  const ScaleRule rule;
  ScaleMemory memory(rule);
  const float flag = 0.0F;
  const float* const found[] = {&flag};
  EXPECT_THROW(cpu::update_scale(memory.state(), rule, {{}, {}}), InvalidArgument);
  ScaleState state = memory.state();
  state.counters = nullptr;
  EXPECT_THROW(cpu::update_scale(state, rule, {found, {}}), InvalidArgument);  // history without counters
  state.history = nullptr;
  EXPECT_NO_THROW(cpu::update_scale(state, rule, {found, {}}));
  state.hysteresis_left = nullptr;
  EXPECT_THROW(cpu::update_scale(state, ScaleRule{.hysteresis = 2}, {found, {}}), InvalidArgument);
  const std::vector<const float*> many(kMaxScaleInputs + 1, &flag);
  EXPECT_THROW(cpu::update_scale(memory.state(), rule, {many, {}}), InvalidArgument);
}

// What is asked for after each update, with the scale that follows: an overflow limits it, growth lifts the limit.
TEST(RequestScale, IsGrantedUpToWhatTheRuleAllows) {
  ScaleRule rule{.init_scale = 1024.0, .growth_interval = 3, .min_scale = 4.0, .max_scale = 8192.0};
  ScaleMemory memory(rule);
  double record[kRequestColumns] = {rule.max_scale, NAN, NAN};
  struct Step {
    float found, norm;
    double requested;
    float scale;
    double limit;
  };
  const Step steps[] = {{0, 1.0F, 4096.0, 4096.0F, 8192.0}, {1, INFINITY, 4096.0, 2048.0F, 2048.0},
                        {0, 2.0F, 4096.0, 2048.0F, 2048.0}, {0, 3.0F, 64.0, 64.0F, 2048.0},
                        {0, 4.0F, NAN, 128.0F, 4096.0},  // the rule's growth
                        {0, 5.0F, 1e9, 4096.0F, 4096.0},    {0, 5.0F, 1.0, 4.0F, 4096.0},
                        {1, INFINITY, 1e9, 4.0F, 4.0},  // at the floor
                        {0, 6.0F, 0.0, 4.0F, 4.0},          {0, 6.0F, -1.0, 4.0F, 4.0}};
  for (const Step& step : steps) {
    update(memory, rule, {step.found}, {step.norm});
    cpu::request_scale(memory.state(), rule, step.requested, record);
    const auto number = memory.counters[kSteps];
    EXPECT_EQ(memory.scale, step.scale) << "after step " << number;
    EXPECT_EQ(record[kRequestLimit], step.limit) << "after step " << number;
    EXPECT_EQ(record[kRequestNorm], step.norm);
    EXPECT_EQ(record[kRequestFound], step.found);
  }
}

TEST(RequestScale, ATolerantOverflowLimitsNothingAndNothingHappensBeforeTheFirstUpdate) {
  ScaleRule rule{.init_scale = 1024.0, .hysteresis = 2};
  ScaleMemory memory(rule);
  double record[kRequestColumns] = {rule.max_scale, NAN, NAN};
  cpu::request_scale(memory.state(), rule, 2.0, record);
  EXPECT_EQ(memory.scale, 1024.0F);
  update(memory, rule, {1.0F}, {INFINITY});
  cpu::request_scale(memory.state(), rule, 2.0, record);
  EXPECT_EQ(memory.scale, 1024.0F);
  EXPECT_EQ(record[kRequestLimit], rule.max_scale);
  EXPECT_THROW(cpu::request_scale(memory.state(), rule, 2.0, nullptr), InvalidArgument);
}

}  // namespace
}  // namespace halfstep
