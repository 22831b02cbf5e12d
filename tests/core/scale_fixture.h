// The state of a scaler in plain memory, and the peers' presets with a test's parameters.
#pragma once

#include <array>
#include <vector>

#include "golden_trajectories.h"
#include "halfstep/scaling.h"

namespace halfstep::test {

struct ScaleMemory {
  float scale = 0.0F;
  std::int32_t growth_tracker = 0;
  std::int32_t hysteresis_left = 1;
  std::array<std::int64_t, kCounters> counters{};
  std::vector<double> history = std::vector<double>(kHistoryRows * kHistoryColumns);

  explicit ScaleMemory(const ScaleRule& rule)
      : scale(static_cast<float>(rule.init_scale)),
        growth_tracker(-static_cast<std::int32_t>(rule.growth_delay)),
        hysteresis_left(static_cast<std::int32_t>(rule.hysteresis)) {}
  ScaleState state() { return {&scale, &growth_tracker, &hysteresis_left, counters.data(), history.data()}; }
};

// The preset that stands for a peer of the golden trajectories, with the trajectory's parameters.
inline ScaleRule rule_of(const Golden& golden) {
  ScaleRule rule;
  if (golden.peer == "tf_keras") {
    rule = scale_rule("keras");
    rule.min_scale = 1.0;
  } else if (golden.peer == "deepspeed_consecutive") {
    rule = scale_rule("deepspeed");
    rule.refill = Refill::kOnCleanStep;
  } else {
    rule = scale_rule(golden.peer);
  }
  const bool has_hysteresis = rule.hysteresis > 1 || golden.peer == "paddle";
  rule.init_scale = static_cast<double>(golden.init_scale);
  rule.growth_interval = golden.growth_interval;
  if (has_hysteresis) rule.hysteresis = golden.hysteresis;
  return rule;
}

}  // namespace halfstep::test
