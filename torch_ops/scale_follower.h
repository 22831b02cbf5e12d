// The loss scale that a policy as code asks for. Contract: GradScaler::follow in halfstep/torch/scaling.h.
#pragma once

#include <memory>
#include <optional>

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include "halfstep/policy.h"
#include "halfstep/torch/scaling.h"

namespace halfstep::torch_ops {

class ScaleFollower {
 public:
  // Begins with the norm of the last applied step that the state knows of, on every rank the same (waits).
  ScaleFollower(std::shared_ptr<const CustomPrecisionPolicy> policy, const GradScalerState& state);
  std::shared_ptr<const CustomPrecisionPolicy> policy() const { return policy_; }

  // What the policy answers to the norm of the last applied step that keep() was called for, within the rule's bounds;
  // none if there was no such step or the policy leaves the scale. Waits until that copy has arrived. Throws for an
  // answer that is no scale.
  std::optional<double> ask(const ScaleRule& rule);
  // After an update: sets the scale as far as it is granted, and copies what the step did to the host. Waits for
  // nothing.
  void apply(GradScalerState& state, std::optional<double> answer);

 private:
  std::shared_ptr<const CustomPrecisionPolicy> policy_;
  std::optional<double> norm_;  // of the last applied step that has been read
  at::Tensor record_;           // the host's copy, pinned where it comes from a GPU
  std::optional<c10::Event> arrived_;
  bool pending_ = false;
};

}  // namespace halfstep::torch_ops
