// halfstep::GradScaler for torch::optim. Contract: halfstep/torch/scaling.h.
#include <ATen/autocast_mode.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>

#include "halfstep/torch/scaling.h"

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

constexpr const char* kStateKeys[] = {"rule", "scale", "growth_tracker", "hysteresis_left", "counters", "history"};

}  // namespace

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

bool GradScaler::step(torch::optim::Optimizer& optimizer) {
  if (!options_.enabled) {
    optimizer.step();
    at::autocast::clear_cache();
    return true;
  }
  const auto known = optimizers_.find(&optimizer);
  TORCH_CHECK(known == optimizers_.end() || known->second.stage != Stage::kStepped,
              "step() has already been called since the last update().");
  if (known == optimizers_.end()) unscale_(optimizer);
  PerOptimizer& mine = optimizers_.at(&optimizer);

  std::size_t position = 0;
  for_each_parameter(optimizer, [&](const at::Tensor& parameter, std::size_t group, std::size_t index) {
    TORCH_CHECK(position < mine.checked.size() && mine.checked[position].parameter.is_same(parameter) &&
                    mine.checked[position].gradient_elements == gradient_elements(parameter),
                "GradScaler::step: the gradient of parameter ", index, " in group ", group,
                " was freed, resized or added since unscale_(); it has ", gradient_elements(parameter),
                " elements now (-1: none). Nothing was changed.");
    ++position;
  });

  const bool applied = mine.found.item<float>() == 0.0F;
  if (applied) optimizer.step();
  mine.stage = Stage::kStepped;
  at::autocast::clear_cache();  // an enclosing autocast scope must not go on with casts of the old weights
  return applied;
}

void GradScaler::update() {
  if (!options_.enabled) return;
  state_->update();
  optimizers_.clear();
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
}

}  // namespace halfstep
