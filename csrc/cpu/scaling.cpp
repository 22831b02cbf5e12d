// The scale rule on the CPU. Contract: halfstep/scaling.h.
#include "scaling_step.h"

namespace halfstep::cpu {

void update_scale(const ScaleState& state, const ScaleRule& rule, const ScaleInputs& inputs) {
  detail::check_state(state, rule);
  detail::scale_step(state, rule, detail::make_input_table(inputs));
}

void request_scale(const ScaleState& state, const ScaleRule& rule, double requested, double* record) {
  detail::check_request(state, record);
  detail::request_step(state, rule, requested, record);
}

void combine_found(std::span<const float* const> found, float* result) {
  *result = detail::any_found(found.data(), static_cast<int>(found.size())) ? 1.0F : 0.0F;
}

}  // namespace halfstep::cpu
