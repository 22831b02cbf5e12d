// The loss scale that a policy as code asks for. Contract: scale_follower.h.
#include "scale_follower.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace halfstep::torch_ops {
namespace {

// Into the same memory every time: the copy before has been read.
void copy_to_host(const at::Tensor& tensor, at::Tensor& copy) {
  const bool pinned = !tensor.is_cpu();
  if (!copy.defined()) copy = at::empty_like(tensor, tensor.options().device(at::kCPU).pinned_memory(pinned));
  copy.copy_(tensor, /*non_blocking=*/true);
}

}  // namespace

ScaleFollower::ScaleFollower(std::shared_ptr<const CustomPrecisionPolicy> policy, const GradScalerState& state)
    : policy_(std::move(policy)) {
  const GradScalerState::Snapshot snapshot = state.snapshot();
  if (snapshot.contains("history")) read(snapshot.at("counters"), snapshot.at("history"));
}

void ScaleFollower::read(const at::Tensor& counters, const at::Tensor& history) {
  const std::int64_t* const count = counters.const_data_ptr<std::int64_t>();
  const std::int64_t step = count[kSteps] - count[kConsecutiveSkipped];  // the last one that was applied
  if (step < 1 || count[kConsecutiveSkipped] >= kHistoryRows) return;
  const double* const row = history.const_data_ptr<double>() + (step - 1) % kHistoryRows * kHistoryColumns;
  if (row[kHistoryStep] == static_cast<double>(step) && std::isfinite(row[kHistoryNorm])) norm_ = row[kHistoryNorm];
}

std::optional<double> ScaleFollower::ask(const ScaleRule& rule) {
  if (pending_) {
    if (arrived_) arrived_->synchronize();
    read(counters_, history_);
    pending_ = false;
  }
  const std::optional<double> answer = norm_ ? policy_->get_loss_scale_factor(*norm_) : std::nullopt;
  if (!answer) return std::nullopt;
  const double scale = std::clamp(*answer, rule.min_scale, rule.max_scale);
  TORCH_CHECK_VALUE(std::isfinite(*answer) && *answer > 0 && static_cast<float>(scale) > 0.0F,
                    "GradScaler: ", policy_->name(), ".get_loss_scale_factor(", *norm_, ") returned ", *answer,
                    ", expected a finite float32 > 0");
  return scale;
}

void ScaleFollower::apply(GradScalerState& state, double answer) {
  const at::NoGradGuard no_grad;
  const at::Tensor scale = state.scale_tensor("update");
  scale.masked_fill_(state.counters().select(0, kConsecutiveSkipped).eq(0), answer);
}

void ScaleFollower::keep(GradScalerState& state) {
  const at::NoGradGuard no_grad;
  const at::Device device = state.counters().device();
  const c10::DeviceGuard guard(device);
  copy_to_host(state.counters(), counters_);
  copy_to_host(state.history(), history_);
  if (!device.is_cpu()) {
    if (!arrived_) arrived_.emplace(device.type());
    arrived_->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  }
  pending_ = true;
}

}  // namespace halfstep::torch_ops
