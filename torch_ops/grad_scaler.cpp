// halfstep::GradScaler for torch::optim. Contract: halfstep/torch/scaling.h.
#include <typeinfo>

#include <ATen/autocast_mode.h>
#include <ATen/ops/ones.h>
#include <c10/util/Type.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>

#include "halfstep/torch/scaling.h"
#include "scale_follower.h"
#include "torch_optim.h"

namespace halfstep {
namespace {

// Calls visit(parameter, group, index) for every parameter of the optimizer.
template <class Visit>
void for_each_parameter(torch::optim::Optimizer& optimizer, Visit visit) {
  for (std::size_t group = 0; group < optimizer.param_groups().size(); ++group) {
    const auto& params = optimizer.param_groups()[group].params();
    for (std::size_t i = 0; i < params.size(); ++i) visit(params[i], group, i);
  }
}

std::int64_t gradient_elements(const at::Tensor& parameter) {
  const at::Tensor& grad = parameter.grad();
  return grad.defined() ? grad.numel() : -1;
}

constexpr const char* kStateKeys[] = {"rule",     "scale",   "growth_tracker", "hysteresis_left",
                                      "counters", "history", "request"};

}  // namespace

GradScaler::GradScaler(GradScaler&&) noexcept = default;
GradScaler& GradScaler::operator=(GradScaler&&) noexcept = default;
GradScaler::~GradScaler() = default;

GradScaler::GradScaler(const GradScalerOptions& options)
    : options_(options), state_(c10::make_intrusive<GradScalerState>(options.rule)) {}

at::Tensor GradScaler::scale(const at::Tensor& loss) {
  return options_.enabled ? state_->scale(loss) : loss;
}

void GradScaler::unscale_(torch::optim::Optimizer& optimizer) {
  if (!options_.enabled) return;
  const auto known = optimizers_.find(&optimizer);
  const Stage stage = known == optimizers_.end() ? Stage::kReady : known->second.stage;
  TORCH_CHECK(stage != Stage::kUnscaled,
              "unscale_() has already been called on this optimizer since the last update().");
  TORCH_CHECK(stage != Stage::kStepped, "unscale_() is being called after step().");

  PerOptimizer result;
  result.stage = Stage::kUnscaled;
  std::vector<at::Tensor> grads;
  for_each_parameter(optimizer, [&](const at::Tensor& parameter, std::size_t, std::size_t) {
    result.checked.push_back({parameter, gradient_elements(parameter)});
    at::Tensor grad = parameter.grad();
    if (!grad.defined()) return;
    TORCH_CHECK_VALUE(options_.allow_fp16_gradients || grad.scalar_type() != at::kHalf,
                      "Attempting to unscale FP16 gradients.");
    if (grad.is_sparse()) {
      // Duplicate indices of float16 values can overflow only when they are summed.
      if (grad.scalar_type() == at::kHalf) parameter.mutable_grad() = grad = grad.coalesce();
      grad = grad._values();
    }
    grads.push_back(grad);
  });
  TORCH_CHECK(!grads.empty(), "No inf checks were recorded for this optimizer.");
  result.found = state_->check(grads, /*write=*/true);
  optimizers_.insert_or_assign(&optimizer, std::move(result));
}

// The step by halfstep's kernels; nullopt, and nothing done, where torch must take it.
std::optional<StepResult> GradScaler::fused_step(torch::optim::Optimizer& optimizer, std::optional<double> max_norm) {
  if (!torch_ops::TorchOptimStep::supports(optimizer)) return std::nullopt;
  TORCH_CHECK(!capturing_ || fused_.contains(&optimizer),
              "an optimizer is stepped for the first time, or StepGraph was not given it");
  auto& fused = fused_[&optimizer];
  if (!fused) fused = std::make_unique<torch_ops::TorchOptimStep>();
  if (!fused->collect(optimizer, options_.allow_fp16_gradients).empty()) {
    release(optimizer);
    return std::nullopt;
  }
  if (!fused->has_gradients()) return std::nullopt;  // the error of unscale_
  const at::Tensor scale = state_->scale_tensor("step");

  PerOptimizer& mine = optimizers_[&optimizer];
  const bool ready = mine.stage == Stage::kReady;
  std::vector<at::Tensor> norms;
  if (ready) {
    const auto checked = fused->check(scale);
    mine.found = state_->record(checked.found, checked.norm);
    norms = checked.norm;
  } else if (max_norm) {
    norms = fused->check(at::ones({}, scale.options())).norm;  // of the gradients as they are now
  }
  fused->step(optimizer, mine.found, ready ? std::optional(scale) : std::nullopt,
              max_norm ? std::optional(combine_norms(norms)) : std::nullopt, max_norm.value_or(0.0));
  mine.stage = Stage::kStepped;
  return StepResult(mine.found);
}

StepResult GradScaler::step(torch::optim::Optimizer& optimizer, std::optional<double> max_norm) {
  TORCH_CHECK_VALUE(!max_norm || *max_norm > 0, "GradScaler::step: max_norm is ", *max_norm, ", expected a number > 0");
  const auto clip = [&] {
    if (!max_norm) return;
    std::vector<at::Tensor> parameters;
    for_each_parameter(optimizer, [&](const at::Tensor& parameter, std::size_t, std::size_t) {
      if (parameter.grad().defined()) parameters.push_back(parameter);
    });
    if (!parameters.empty()) torch::nn::utils::clip_grad_norm_(parameters, *max_norm);
  };
  if (!options_.enabled) {
    clip();
    optimizer.step();
    at::autocast::clear_cache();
    return StepResult(at::Tensor());
  }
  const auto known = optimizers_.find(&optimizer);
  TORCH_CHECK(known == optimizers_.end() || known->second.stage != Stage::kStepped,
              "step() has already been called since the last update().");
  if (known != optimizers_.end()) check_unchanged(optimizer, known->second);
  if (auto result = fused_step(optimizer, max_norm)) {
    at::autocast::clear_cache();  // an enclosing autocast scope must not go on with casts of the old weights
    return *result;
  }
  if (known == optimizers_.end()) unscale_(optimizer);
  PerOptimizer& mine = optimizers_.at(&optimizer);
  clip();
  ++host_syncs_;
  StepResult result(mine.found);
  if (result) optimizer.step();
  mine.stage = Stage::kStepped;
  at::autocast::clear_cache();
  return result;
}

void GradScaler::check_unchanged(torch::optim::Optimizer& optimizer, const PerOptimizer& mine) {
  std::size_t position = 0;
  for_each_parameter(optimizer, [&](const at::Tensor& parameter, std::size_t group, std::size_t index) {
    TORCH_CHECK(position < mine.checked.size() && mine.checked[position].parameter.is_same(parameter) &&
                    mine.checked[position].gradient_elements == gradient_elements(parameter),
                "GradScaler::step: the gradient of parameter ", index, " in group ", group,
                " was freed, resized or added since unscale_(); it has ", gradient_elements(parameter),
                " elements now (-1: none). Nothing was changed.");
    ++position;
  });
}

void GradScaler::release(torch::optim::Optimizer& optimizer) {
  const auto known = fused_.find(&optimizer);
  if (known == fused_.end()) return;
  known->second->write_back(optimizer);
  fused_.erase(known);
}

void GradScaler::update() {
  if (!options_.enabled) return;
  const bool asks = follower_ && !capturing_;  // a capture leaves it to each replay
  const std::optional<double> answer = asks ? follower_->ask(state_->rule()) : std::nullopt;
  state_->update();
  if (asks) follower_->apply(*state_, answer);
  updated_ = true;
  optimizers_.clear();
}

void GradScaler::follow(std::shared_ptr<const CustomPrecisionPolicy> policy) {
  follower_ = policy ? std::make_unique<torch_ops::ScaleFollower>(std::move(policy), *state_) : nullptr;
}

void GradScaler::update(double new_scale) {
  if (!options_.enabled) return;
  state_->set_scale(new_scale);
  optimizers_.clear();
}

double GradScaler::get_scale() const {
  return options_.enabled ? state_->get_scale() : 1.0;
}

void GradScaler::save(torch::serialize::OutputArchive& archive) const {
  for (const auto& [key, tensor] : state_->snapshot()) archive.write("halfstep." + key, tensor);
}

void GradScaler::load(torch::serialize::InputArchive& archive) {
  GradScalerState::Snapshot snapshot;
  for (const char* key : kStateKeys) {
    at::Tensor tensor;
    if (archive.try_read("halfstep." + std::string(key), tensor)) snapshot.emplace(key, tensor);
  }
  state_ = GradScalerState::restore(snapshot);  // throws before anything has changed
  options_.rule = state_->rule();
  optimizers_.clear();
  if (follower_) follow(follower_->policy());
}

// ------------------------------------------------------------------------------------------------- in a CUDA graph

CapturedOptimizers::CapturedOptimizers(GradScaler& scaler, const std::vector<torch::optim::Optimizer*>& optimizers)
    : scaler_(scaler), state_(scaler.state_), rule_(scaler.state_->rule()) {
  // Only these: others that the scaler has ever stepped may be gone.
  for (torch::optim::Optimizer* const optimizer : optimizers)
    if (const auto known = scaler.fused_.find(optimizer); known != scaler.fused_.end())
      steps_.try_emplace(optimizer, known->second->for_capture(*optimizer));
}

CapturedOptimizers::~CapturedOptimizers() = default;

void CapturedOptimizers::enter() {
  optimizers_ = scaler_.optimizers_;
  found_ = state_->found_;
  norm_ = state_->norm_;
  std::swap(scaler_.fused_, steps_);
  scaler_.capturing_ = true;
  scaler_.updated_ = false;
}

void CapturedOptimizers::leave(bool keep) {
  std::swap(scaler_.fused_, steps_);
  scaler_.capturing_ = false;
  updates_ = scaler_.updated_;
  if (!keep) {
    scaler_.optimizers_ = std::move(optimizers_);
    state_->found_ = std::move(found_);
    state_->norm_ = std::move(norm_);
  }
  optimizers_.clear();
  found_.clear();
  norm_.clear();
}

bool CapturedOptimizers::awaits_update(const GradScaler& scaler) {
  return !scaler.optimizers_.empty() || !scaler.state_->found_.empty();
}

std::int64_t CapturedOptimizers::steps(const GradScaler& scaler, torch::optim::Optimizer& optimizer) {
  const auto known = scaler.fused_.find(&optimizer);
  return known == scaler.fused_.end() ? -1 : known->second->steps();
}

std::string CapturedOptimizers::outdated() const {
  if (scaler_.state_ != state_) return "the scaler's state was loaded or replaced";
  if (!(state_->rule() == rule_)) return "the scaler's rule changed";
  for (const auto& [optimizer, step] : steps_)
    if (step->outdated(*optimizer))
      return "parameters, states or groups of " + c10::demangle(typeid(*optimizer).name()) + " changed";
  return "";
}

void CapturedOptimizers::follow() {
  for (const auto& [optimizer, step] : steps_) step->follow(*optimizer);
}

void CapturedOptimizers::replayed() {
  if (updates_ && scaler_.follower_) scaler_.follower_->apply(*state_, scaler_.follower_->ask(state_->rule()));
}

}  // namespace halfstep
