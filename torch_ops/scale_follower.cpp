// The loss scale that a policy as code asks for. Contract: scale_follower.h.
#include "scale_follower.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace halfstep::torch_ops {

ScaleFollower::ScaleFollower(std::shared_ptr<const CustomPrecisionPolicy> policy, const GradScalerState& state)
    : policy_(std::move(policy)) {
  const GradScalerState::Snapshot snapshot = state.snapshot();
  if (!snapshot.contains("history")) return;
  const std::int64_t* const counters = snapshot.at("counters").const_data_ptr<std::int64_t>();
  const std::int64_t step = counters[kSteps] - counters[kConsecutiveSkipped];  // the last one that was applied
  if (step < 1 || counters[kConsecutiveSkipped] >= kHistoryRows) return;
  const double* const row =
      snapshot.at("history").const_data_ptr<double>() + (step - 1) % kHistoryRows * kHistoryColumns;
  if (row[kHistoryStep] == static_cast<double>(step)) norm_ = row[kHistoryNorm];
}

std::optional<double> ScaleFollower::ask(const ScaleRule& rule) {
  if (pending_) {
    if (arrived_) arrived_->synchronize();
    const double* const record = record_.const_data_ptr<double>();
    if (record[kRequestFound] == 0.0) norm_ = record[kRequestNorm];
    pending_ = false;
  }
  const bool known = norm_ && std::isfinite(*norm_);  // sharded gradients have none
  const std::optional<double> answer = known ? policy_->get_loss_scale_factor(*norm_) : std::nullopt;
  if (!answer) return std::nullopt;
  const double scale = std::clamp(*answer, rule.min_scale, rule.max_scale);
  TORCH_CHECK_VALUE(std::isfinite(*answer) && *answer > 0 && static_cast<float>(scale) > 0.0F,
                    "GradScaler: ", policy_->name(), ".get_loss_scale_factor(", *norm_, ") returned ", *answer,
                    ", expected a finite float32 > 0");
  return scale;
}

void ScaleFollower::apply(GradScalerState& state, std::optional<double> answer) {
  const at::NoGradGuard no_grad;
  const at::Tensor record = state.request_scale(answer.value_or(NAN));
  const at::Device device = record.device();
  // Into the same memory every time: the copy before has been read.
  if (!record_.defined())
    record_ = at::empty_like(record, record.options().device(at::kCPU).pinned_memory(!device.is_cpu()));
  const c10::DeviceGuard guard(device);
  record_.copy_(record, /*non_blocking=*/true);
  if (!device.is_cpu()) {
    if (!arrived_) arrived_.emplace(device.type());
    arrived_->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  }
  pending_ = true;
}

}  // namespace halfstep::torch_ops
