// torch.classes.halfstep.PrecisionPlan, for what takes one.
#pragma once

#include <utility>

#include <torch/custom_class.h>

#include "halfstep/policy.h"

namespace halfstep::torch_ops {

struct PlanClass : torch::CustomClassHolder {
  explicit PlanClass(PrecisionPlan the_plan) : plan(std::move(the_plan)) {}
  PrecisionPlan plan;
};

}  // namespace halfstep::torch_ops
