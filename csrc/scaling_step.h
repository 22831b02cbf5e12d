// The scale rule itself, shared by the CPU and the CUDA build so that there is one rule. Contract: halfstep/scaling.h.
#pragma once

#include <cmath>

#include "halfstep/scaling.h"

namespace halfstep::detail {

// The inputs by value, small enough to be a kernel's parameter.
struct ScaleInputTable {
  const float* found[kMaxScaleInputs];
  const float* norms[kMaxScaleInputs];
  int found_count;
  int norm_count;
};

inline ScaleInputTable make_input_table(const ScaleInputs& inputs) {
  HS_CHECK(!inputs.found.empty(), "update_scale: found is empty, expected at least one flag");
  HS_CHECK(inputs.found.size() <= kMaxScaleInputs && inputs.norms.size() <= kMaxScaleInputs, "update_scale: got ",
           inputs.found.size(), " found flags and ", inputs.norms.size(), " norms, expected at most ", kMaxScaleInputs);
  ScaleInputTable table{};
  for (const float* found : inputs.found) table.found[table.found_count++] = found;
  for (const float* norm : inputs.norms) table.norms[table.norm_count++] = norm;
  return table;
}

inline void check_state(const ScaleState& state, const ScaleRule& rule) {
  HS_CHECK(state.scale && state.growth_tracker, "update_scale: scale and growth_tracker must not be null");
  HS_CHECK(rule.hysteresis == 1 || state.hysteresis_left, "update_scale: hysteresis is ", rule.hysteresis,
           ", which needs hysteresis_left");
  HS_CHECK(!state.history || state.counters, "update_scale: history needs counters");
}

HALFSTEP_HOST_DEVICE inline bool any_found(const float* const* found, int count) {
  bool any = false;
  for (int i = 0; i < count; ++i) any |= !(*found[i] == 0.0F);  // NaN counts as found
  return any;
}

HALFSTEP_HOST_DEVICE inline double combined_norm(const ScaleInputTable& inputs) {
  if (inputs.norm_count == 0) return NAN;
  if (inputs.norm_count == 1) return *inputs.norms[0];
  double sum = 0.0;
  for (int i = 0; i < inputs.norm_count; ++i) sum += static_cast<double>(*inputs.norms[i]) * *inputs.norms[i];
  return std::sqrt(sum);
}

HALFSTEP_HOST_DEVICE inline void scale_step(const ScaleState& state, const ScaleRule& rule,
                                            const ScaleInputTable& inputs) {
  const bool found = any_found(inputs.found, inputs.found_count);
  const float before = *state.scale;
  float scale = before;
  std::int32_t tracker = *state.growth_tracker;
  const auto hysteresis = static_cast<std::int32_t>(rule.hysteresis);
  std::int32_t credit = state.hysteresis_left ? *state.hysteresis_left : hysteresis;
  bool stuck = false;

  if (found) {
    tracker = -static_cast<std::int32_t>(rule.growth_delay);
    if (credit > 0) --credit;  // stays at 0 once spent, so that it cannot wrap
    if (credit <= 0) {
      const auto lowered = static_cast<float>(scale * rule.backoff_factor);
      const auto floor = static_cast<float>(rule.min_scale);
      stuck = scale <= floor;
      if (!stuck) scale = lowered < floor ? floor : lowered;
      if (rule.refill == Refill::kOnCleanStepAndBackoff) credit = hysteresis;
    }
  } else {
    if (rule.refill != Refill::kOnGrowth) credit = hysteresis;
    if (std::int64_t{tracker} + 1 < rule.growth_interval) {
      ++tracker;
    } else {
      tracker = 0;
      const auto grown = static_cast<float>(scale * rule.growth_factor);
      const auto ceiling = static_cast<float>(rule.max_scale);
      if (std::isfinite(grown) && scale < ceiling) scale = grown < ceiling ? grown : ceiling;
      if (rule.refill == Refill::kOnGrowth) credit = hysteresis;
    }
  }

  *state.scale = scale;
  *state.growth_tracker = tracker;
  if (state.hysteresis_left) *state.hysteresis_left = credit;
  if (!state.counters) return;

  std::int64_t* const counters = state.counters;
  const double norm = combined_norm(inputs);
  const std::int64_t step = ++counters[kSteps];
  counters[kConsecutiveSkipped] = found ? counters[kConsecutiveSkipped] + 1 : 0;
  if (found) {
    counters[kSkipped] += 1;
    counters[kAtFloor] += stuck;
    counters[kNanSteps] += inputs.norm_count > 0 && std::isnan(norm);
    counters[kInfSteps] += inputs.norm_count > 0 && std::isinf(norm);
  }
  counters[kGrowths] += scale > before;
  counters[kBackoffs] += scale < before;
  if (!state.history) return;

  // Unsigned, so that no counter, however it came to be negative, leads outside the ring.
  double* const record = state.history + (static_cast<std::uint64_t>(step) - 1) % kHistoryRows * kHistoryColumns;
  record[kHistoryStep] = static_cast<double>(step);
  record[kHistoryScale] = before;
  record[kHistoryFound] = found ? 1.0 : 0.0;
  record[kHistoryNorm] = norm;
}

inline void check_request(const ScaleState& state, const double* record) {
  HS_CHECK(state.scale && state.counters && state.history && record,
           "request_scale: scale, counters, history and record must not be null");
}

HALFSTEP_HOST_DEVICE inline void request_step(const ScaleState& state, const ScaleRule& rule, double requested,
                                              double* record) {
  const std::int64_t step = state.counters[kSteps];
  if (step == 0) return;
  const double* const last = state.history + (static_cast<std::uint64_t>(step) - 1) % kHistoryRows * kHistoryColumns;
  const bool found = last[kHistoryFound] != 0.0;
  const double scale = *state.scale;
  double limit = record[kRequestLimit];
  if (found) {
    const bool at_floor = scale <= static_cast<float>(rule.min_scale);
    if ((scale < last[kHistoryScale] || at_floor) && scale < limit) limit = scale;
  } else {
    const double highest = static_cast<float>(rule.max_scale);
    if (scale > last[kHistoryScale])
      limit = limit * rule.growth_factor < highest ? limit * rule.growth_factor : highest;
    if (requested > 0.0) {
      double granted = requested < limit ? requested : limit;
      if (granted < rule.min_scale) granted = rule.min_scale;
      *state.scale = static_cast<float>(granted < highest ? granted : highest);
    }
  }
  record[kRequestLimit] = limit;
  record[kRequestNorm] = last[kHistoryNorm];
  record[kRequestFound] = last[kHistoryFound];
}

}  // namespace halfstep::detail
