// Which layers of a model half precision harms, from statistics of what they compute: a plain state machine per layer.
//
//   HALF --fault--> FLOAT32, held for `hold` intervals --> TRIAL --an interval without a fault--> HALF
//                      ^                                     |
//                      +------ fault: hold doubles ----------+
//
// A layer is at fault if
//   - it is the first in the forward pass whose output is infinite or NaN, and the model's is too, or
//   - gradients are infinite or NaN at a loss scale of at most `lowest_scale` (above that, lowering the scale is the
//     cure), and it is the first whose output is not finite, else the first that sends such a gradient on, else the
//     one around the layer that such a gradient reaches, or
//   - its score exceeds the threshold: the share of the squared norm of its outputs, or of the gradients that it gets
//     and sends on, that half's range may have cost. For float16 that is at most
//         (zeros + elements with 0 < |x| < 2^-14) * 2^-50 / sum of squares,
//     since what is below 2^-14 is rounded to multiples of 2^-24. Gradients are judged as if the loss scale were as
//     high as the largest gradient of the model allows: what more scale cures is not the layer's fault. bfloat16 has
//     float32's range and no such loss.
//
// The machine is deterministic: the same summaries give the same plan. So ranks agree if they combine their summaries,
// element by element, by the maximum. Everything here runs on the host but merge_statistics. The functions of the
// namespaces cpu and cuda are the core's own; programs that link libhalfstep_torch use halfstep/torch/stability.h.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "halfstep/export.h"
#include "halfstep/policy.h"
#include "halfstep/stream.h"

namespace halfstep {

// What is observed of a layer: what it returns, the gradient that reaches that, and the gradient that it sends on to
// what it was given.
enum Observed : int { kOutput, kOutputGradient, kInputGradient, kObserved };

// A row of statistics, float64, of all tensors observed for one of these since it was zeroed.
enum LayerStatistic : int {
  kSeen,            // tensors
  kSeenElements,    // elements of theirs
  kSeenNonFinite,   // infinite or NaN elements
  kEarliest,        // 1 / place of the first tensor with one, in the order of observation; 0 for none
  kSeenMaximum,     // largest finite magnitude
  kEarliestBeyond,  // 1 / place of the first tensor with a finite element that half cannot hold; 0 for none
  kSeenSquares,     // sum of squares of the tensors without infinite or NaN elements
  kSeenZeros,       // elements equal to 0
  kSeenBelowHalf,   // elements with 0 < |x| < 2^-14
  kLayerStatistics,
};
inline constexpr int kValuesPerLayer = int{kObserved} * int{kLayerStatistics};

// Adds the statistics of one tensor, a row of check_gradients' (halfstep/gradients.h), to a row of these. `place`
// counts the observations of a step from 1. `half_limit`: what is as large becomes infinite in half.
namespace cpu {
void merge_statistics(const float* stats, double* row, double place, double half_limit);
}
// On device memory: one launch of one thread, capturable. Merges into one row must be ordered by their streams.
namespace cuda {
void merge_statistics(const float* stats, double* row, double place, double half_limit, CudaStream stream);
}

// What decisions are made of: one row per layer. Larger values of all columns mean more trouble, or earlier, so that
// the maximum over ranks is the summary of all.
enum SummaryColumn : int {
  kLostOutput,    // share of the squared norm that may be lost to half's range, infinite elements apart
  kLostGradient,  // the same of its gradients, the worse of the two, at the loss scale that they were computed with
  kFirstOutput,   // kEarliest of the three
  kFirstOutputGradient,
  kFirstInputGradient,
  kFirstBeyond,  // kEarliestBeyond of the output
  kMaxOutput,    // largest finite magnitudes
  kMaxGradient,  // of both gradients
  kSummaryColumns,
};

// From [layers, kObserved, kLayerStatistics] to [layers, kSummaryColumns].
HALFSTEP_API std::vector<double> summarize(std::span<const double> statistics, Precision half);

// The magnitude from which on a float32 becomes infinite in `half`.
HALFSTEP_API double half_limit_of(Precision half);

enum class LayerState : std::uint8_t { kFixed, kHalf, kFloat32, kTrial };  // fixed: not half in the plan to start from
HALFSTEP_API std::string_view name_of(LayerState state);                   // "fixed", "half", "float32", "trial"

struct StabilityOptions {
  double threshold = 1e-4;     // of the score, > 0
  std::int64_t hold = 1;       // intervals that a layer is held in float32 after its first fault, >= 1
  std::int64_t max_hold = 64;  // where doubling ends, >= hold
  double lowest_scale = 1.0;   // see above, > 0
};

enum class StepKind : std::uint8_t { kUsual, kUnstable, kFloat32 };

// A change of a layer's state, or an event that changed none (from == to), with the numbers behind it.
struct StabilityDecision {
  std::int64_t batch;
  std::string layer;
  LayerState from;
  LayerState to;
  double score;  // infinite for infinite or NaN elements
  std::int64_t hold;
  std::string reason;

  bool operator==(const StabilityDecision&) const = default;
};

class HALFSTEP_API StabilityMonitor {
 public:
  struct LayerEntry {
    LayerState state = LayerState::kHalf;
    std::int64_t hold = 1;  // intervals of the current or the next time in float32
    std::int64_t left = 0;  // of those, still to come
    std::int64_t demotions = 0;
    std::int64_t promotions = 0;
    double score = 0.0;  // at the last decision
    bool masks = false;  // it returned infinite or NaN values where nothing was wrong
    std::string reason;  // of its last change; empty if there was none

    bool operator==(const LayerEntry&) const = default;
  };

  // plan: what is float16 or bfloat16 there (one of both, not a mixture) is monitored; the rest stays as it is.
  // Throws InvalidArgument for a mixture, a plan without a half layer, or options out of range.
  StabilityMonitor(PrecisionPlan plan, const StabilityOptions& options = {});

  // Takes the summary of one step that was looked at. Where the forward pass came to nothing, the layer at fault is
  // demoted at once: that is so if the step is kUnstable, since its loss is not finite, or if the output of the model
  // (the layer "", where it is watched) is not. Other summaries are kept for decide(); infinite or NaN outputs in them
  // (masks) are no fault, nor in an unstable step after it. kFloat32: an unstable step was done again in float32, and
  // this is of that pass. At fault is then the first layer whose output was infinite or NaN in half and is not in
  // float32, or, where the half pass was not looked at, the first whose float32 output half cannot hold. A demotion of
  // this step that turns out to be another layer's fault, or none of half's, is taken back. Returns what happened.
  std::vector<StabilityDecision> observe(std::int64_t batch, std::span<const double> summary,
                                         StepKind kind = StepKind::kUsual);
  // The end of an interval: by the summaries since the last one, layers are demoted, tried and promoted.
  std::vector<StabilityDecision> decide(std::int64_t batch, double loss_scale);

  // The plan of now; layers that were demoted say so in their reason.
  PrecisionPlan plan() const;
  const PrecisionPlan& base() const { return base_; }
  std::span<const LayerEntry> layers() const { return layers_; }  // in the order of base().layers()
  double half_share() const;  // of the monitored layers, those in half now (trials included)
  Precision half() const { return half_; }
  const StabilityOptions& options() const { return options_; }

  // A checkpoint: all layers by name, as JSON. restore throws InvalidArgument, and changes nothing, if the text is not
  // of a monitor of these layers.
  std::string to_json() const;
  void restore(std::string_view json);

 private:
  struct Fault;
  std::optional<Fault> forward_fault(std::span<const double> summary) const;
  std::vector<StabilityDecision> compare_with_float32(std::int64_t batch, std::span<const double> summary,
                                                      bool came_to_nothing);
  std::optional<Fault> gradient_fault(double loss_scale) const;
  std::optional<std::size_t> around(std::size_t layer) const;
  StabilityDecision take_back(std::int64_t batch, std::size_t layer, const std::string& reason);
  std::vector<Fault> interval_faults(double loss_scale) const;
  double pending(std::size_t layer, SummaryColumn column) const;
  StabilityDecision event(std::int64_t batch, const Fault& fault) const;
  StabilityDecision demote(std::int64_t batch, const Fault& fault);

  PrecisionPlan base_;
  StabilityOptions options_;
  Precision half_;
  std::vector<LayerEntry> layers_;
  std::vector<double> pending_;   // the summaries since the last decision, combined; empty if there were none
  std::vector<double> unstable_;  // the summary of the last unstable step, and its batch
  std::int64_t unstable_batch_ = -1;
  std::optional<std::size_t> demoted_then_;  // in that step
};

}  // namespace halfstep
