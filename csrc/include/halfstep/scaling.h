// The dynamic loss scale: one rule with parameters, of which every peer's rule is a setting.
//
// After each step, with `found` telling whether any gradient was infinite or NaN:
//
//   found:      growth_tracker = -growth_delay;  hysteresis_left -= 1
//               if hysteresis_left <= 0:  scale = max(scale * backoff_factor, min_scale)
//                                         (refill kOnCleanStepAndBackoff: hysteresis_left = hysteresis)
//   not found:  growth_tracker += 1
//               if growth_tracker >= growth_interval:
//                   grown = scale * growth_factor;  if finite(grown): scale = min(grown, max_scale)
//                   growth_tracker = 0              (refill kOnGrowth: hysteresis_left = hysteresis)
//               (refill kOnCleanStep, kOnCleanStepAndBackoff: hysteresis_left = hysteresis)
//
// The product is taken in float64 and rounded once to float32, as torch's _amp_update_scale_ does: with the preset
// "torch" scale and growth_tracker are equal to torch's bit for bit (but for >=: an interval lowered below the tracker
// stops torch's growth until the next overflow). The scale never becomes infinite. A scale that a user has set outside
// the bounds is not pulled in: growth never lowers it, an overflow never raises it.
//
// The functions of the namespaces cpu and cuda are the core's own; programs that link libhalfstep_torch call the ops in
// halfstep/torch/.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "halfstep/dtype.h"
#include "halfstep/export.h"
#include "halfstep/stream.h"

namespace halfstep {

// When the credit of tolerated overflows is restored to `hysteresis`.
enum class Refill : std::int32_t { kOnGrowth, kOnCleanStep, kOnCleanStepAndBackoff };

struct ScaleRule {
  double init_scale = 65536.0;
  double growth_factor = 2.0;
  double backoff_factor = 0.5;
  std::int64_t growth_interval = 2000;  // clean steps in a row before the scale grows
  double min_scale = 0.0;
  double max_scale = DTypeTraits<DType::kFloat32>::max;
  std::int64_t hysteresis = 1;  // the scale backs off on this many-th overflow of a credit
  Refill refill = Refill::kOnCleanStep;
  std::int64_t growth_delay = 0;  // clean steps after a start or an overflow that do not count towards growth

  bool operator==(const ScaleRule&) const = default;
};

// "torch", "keras", "megatron", "deepspeed", "apex" or "paddle": the named peer's rule with its default parameters.
// Throws InvalidArgument for another name.
HALFSTEP_API ScaleRule scale_rule(std::string_view preset);

HALFSTEP_API Refill refill_from_name(std::string_view name);  // throws InvalidArgument
HALFSTEP_API std::string_view name_of(Refill refill);

// Throw InvalidArgument that names the first parameter outside its range: for a new scaler, or for an update, which
// does not use init_scale and may have a growth or backoff factor of 1 (torch's way to freeze a scale).
HALFSTEP_API void validate(const ScaleRule& rule);
HALFSTEP_API void validate_update(const ScaleRule& rule);

// The counters, in the order in which they lie in memory.
enum Counter : int {
  kSteps,               // updates
  kSkipped,             // of those, with an infinite or NaN gradient
  kConsecutiveSkipped,  // skipped updates since the last clean one
  kGrowths,             // updates that raised the scale
  kBackoffs,            // updates that lowered it
  kAtFloor,             // skipped updates that could not lower it: it stood at min_scale
  kNanSteps,            // skipped updates whose gradient norm was NaN
  kInfSteps,            // skipped updates whose gradient norm was infinite
  kCounters,
};

// The history is a ring: the record of update number s (from 1) stands in row (s - 1) % kHistoryRows.
inline constexpr int kHistoryRows = 1024;
enum HistoryColumn : int { kHistoryStep, kHistoryScale, kHistoryFound, kHistoryNorm, kHistoryColumns };

// The state, on the device that updates it. Only the first two are required; the rest may be null, and then hysteresis
// must be 1, and a history needs counters.
struct ScaleState {
  float* scale;
  std::int32_t* growth_tracker;
  std::int32_t* hysteresis_left;
  std::int64_t* counters;  // [kCounters]
  double* history;         // [kHistoryRows, kHistoryColumns]; scale is the one in force during the step
};

// What the step's checks wrote, one pointer per check (optimizers, devices). A step counts as found if any flag is
// not 0, however many there are. Norms (of the unscaled gradients) are combined as the root of the sum of squares;
// without any, the history says NaN and nan_steps and inf_steps stand still.
struct ScaleInputs {
  std::span<const float* const> found;
  std::span<const float* const> norms;
};

// At most this many flags and as many norms in one call; InvalidArgument beyond.
inline constexpr std::size_t kMaxScaleInputs = 64;

// A scale that somebody asks for, such as a policy that derives it from gradient norms, beside the rule. To be called
// after an update_scale with the same state; `record` is [kRequestColumns] doubles that live as long as the state.
//
//   the update backed off, or could not at min_scale:  limit = scale
//   it raised the scale:   limit = limit * growth_factor, at most max_scale
//   it found nothing:      scale = min(requested, limit), within min_scale and max_scale
//
// So an overflow limits what can be asked for, and the rule's growth lifts that limit. A `requested` that is not > 0
// (NaN for none) leaves the scale to the rule. Norm and flag of the update are left in `record`, for the next request.
enum RequestColumn : int { kRequestLimit, kRequestNorm, kRequestFound, kRequestColumns };

namespace cpu {
void request_scale(const ScaleState& state, const ScaleRule& rule, double requested, double* record);
void update_scale(const ScaleState& state, const ScaleRule& rule, const ScaleInputs& inputs);
// *result = 1 if any flag is not 0, else 0.
void combine_found(std::span<const float* const> found, float* result);
}  // namespace cpu

// The same on device memory: one launch each, no synchronisation, capturable in a CUDA graph.
namespace cuda {
void request_scale(const ScaleState& state, const ScaleRule& rule, double requested, double* record, CudaStream stream);
void update_scale(const ScaleState& state, const ScaleRule& rule, const ScaleInputs& inputs, CudaStream stream);
void combine_found(std::span<const float* const> found, float* result, CudaStream stream);
}  // namespace cuda

}  // namespace halfstep
