// Presets, names and validation of the scale rule. Each preset's source is named beside it.
#include "halfstep/scaling.h"

#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "halfstep/status.h"

namespace halfstep {
namespace {

using NamedRule = std::pair<std::string_view, ScaleRule>;

// What a preset does not mention is the default, which is torch's.
constexpr std::array<NamedRule, 6> kPresets{{
    // torch/amp/grad_scaler.py, aten/src/ATen/native/cuda/AmpKernels.cu
    {"torch", {}},
    // keras/src/optimizers/loss_scale_optimizer.py (Keras 3; unlike it, the scale stays finite)
    {"keras", {.init_scale = 0x1p15}},
    // megatron/core/optimizer/grad_scaler.py (unlike it, the scale stays finite)
    {"megatron",
     {.init_scale = 0x1p32, .growth_interval = 1000, .min_scale = 1.0, .hysteresis = 2, .refill = Refill::kOnGrowth}},
    // deepspeed/runtime/fp16/loss_scaler.py: DynamicLossScaler as ZeRO uses it. Its window starts one step late.
    {"deepspeed",
     {.growth_interval = 1000, .min_scale = 1.0, .hysteresis = 2, .refill = Refill::kOnGrowth, .growth_delay = 1}},
    // apex csrc/update_scale_hysteresis.cu, with the hysteresis its users (Megatron) give it
    {"apex", {.hysteresis = 2, .refill = Refill::kOnCleanStep}},
    // python/paddle/amp/grad_scaler.py, paddle/phi/kernels/impl/amp_kernel_impl.h; hysteresis is
    // decr_every_n_nan_or_inf
    {"paddle", {.min_scale = 1.0, .refill = Refill::kOnCleanStepAndBackoff}},
}};

constexpr std::array<std::string_view, 3> kRefillNames{"on_growth", "on_clean_step", "on_clean_step_and_backoff"};

template <class Range, class Name>
std::string quoted_list(const Range& range, Name name) {
  std::string list;
  for (const auto& item : range) list += (list.empty() ? "'" : ", '") + std::string(name(item)) + "'";
  return list;
}

}  // namespace

ScaleRule scale_rule(std::string_view preset) {
  for (const auto& [name, rule] : kPresets) {
    if (name == preset) return rule;
  }
  HS_CHECK(false, "scale rule: preset is '", preset, "', expected one of ",
           quoted_list(kPresets, [](const NamedRule& named) { return named.first; }));
  HS_UNREACHABLE("scale_rule");
}

Refill refill_from_name(std::string_view name) {
  for (std::size_t i = 0; i < kRefillNames.size(); ++i) {
    if (kRefillNames[i] == name) return static_cast<Refill>(i);
  }
  HS_CHECK(false, "scale rule: refill is '", name, "', expected one of ",
           quoted_list(kRefillNames, [](std::string_view refill) { return refill; }));
  HS_UNREACHABLE("refill_from_name");
}

std::string_view name_of(Refill refill) {
  return kRefillNames.at(static_cast<std::size_t>(refill));
}

void validate_update(const ScaleRule& rule) {
  constexpr double kMaxFloat = DTypeTraits<DType::kFloat32>::max;
  constexpr std::int64_t kMaxInt = std::numeric_limits<std::int32_t>::max();
  // Comparisons are written so that NaN fails them.
  HS_CHECK(rule.growth_factor >= 1.0 && std::isfinite(rule.growth_factor), "scale rule: growth_factor is ",
           rule.growth_factor, ", expected a finite number >= 1");
  HS_CHECK(rule.backoff_factor > 0.0 && rule.backoff_factor <= 1.0, "scale rule: backoff_factor is ",
           rule.backoff_factor, ", expected a number > 0 and <= 1");
  HS_CHECK(rule.growth_interval >= 1 && rule.growth_interval <= kMaxInt, "scale rule: growth_interval is ",
           rule.growth_interval, ", expected 1 to ", kMaxInt);
  HS_CHECK(rule.min_scale >= 0.0 && rule.min_scale <= kMaxFloat, "scale rule: min_scale is ", rule.min_scale,
           ", expected 0 to ", kMaxFloat);
  HS_CHECK(rule.max_scale >= rule.min_scale && rule.max_scale > 0.0 && rule.max_scale <= kMaxFloat,
           "scale rule: max_scale is ", rule.max_scale, ", expected a number > 0 from min_scale (", rule.min_scale,
           ") to ", kMaxFloat);
  HS_CHECK(rule.hysteresis >= 1 && rule.hysteresis <= kMaxInt, "scale rule: hysteresis is ", rule.hysteresis,
           ", expected 1 to ", kMaxInt);
  HS_CHECK(rule.growth_delay >= 0 && rule.growth_delay <= kMaxInt, "scale rule: growth_delay is ", rule.growth_delay,
           ", expected 0 to ", kMaxInt);
}

void validate(const ScaleRule& rule) {
  validate_update(rule);
  HS_CHECK(rule.growth_factor > 1.0, "scale rule: growth_factor is ", rule.growth_factor, ", expected a number > 1");
  HS_CHECK(rule.backoff_factor < 1.0, "scale rule: backoff_factor is ", rule.backoff_factor,
           ", expected a number between 0 and 1");
  HS_CHECK(static_cast<float>(rule.init_scale) > 0.0F && rule.init_scale >= rule.min_scale &&
               rule.init_scale <= rule.max_scale,
           "scale rule: init_scale is ", rule.init_scale, ", expected a float32 > 0 from min_scale (", rule.min_scale,
           ") to max_scale (", rule.max_scale, ")");
}

}  // namespace halfstep
