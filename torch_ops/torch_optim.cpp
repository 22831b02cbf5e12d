// The fused step of torch::optim's optimizers. Contract: torch_optim.h.
#include "torch_optim.h"

#include <algorithm>
#include <typeinfo>

#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

namespace halfstep::torch_ops {
namespace {

using torch::optim::Optimizer;
using torch::optim::OptimizerParamGroup;

template <class Options>
OptimizerGroup adam_group(const OptimizerParamGroup& group, bool decoupled) {
  const auto& options = static_cast<const Options&>(group.options());
  return {.lr = options.lr(),
          .weight_decay = options.weight_decay(),
          .beta1 = std::get<0>(options.betas()),
          .beta2 = std::get<1>(options.betas()),
          .eps = options.eps(),
          .decoupled = decoupled};
}

template <class Options, class State>
struct AdamKind {
  using ParamState = State;
  static constexpr OptimizerKind kind = OptimizerKind::kAdam;
  static OptimizerGroup group(const OptimizerParamGroup& group) {
    return adam_group<Options>(group, std::is_same_v<Options, torch::optim::AdamWOptions>);
  }
  static std::size_t states(const OptimizerParamGroup& group) {
    return static_cast<const Options&>(group.options()).amsgrad() ? 3 : 2;
  }
  static at::Tensor& state(State& state, std::size_t i) {
    // TORCH_ARG's setters take by value; its getters give a reference.
    return i == 0 ? state.exp_avg() : i == 1 ? state.exp_avg_sq() : state.max_exp_avg_sq();
  }
  static std::int64_t step(const State& state) { return state.step(); }
  static void set_step(State& state, std::int64_t step) { state.step(step); }
};

struct SgdKind {
  using ParamState = torch::optim::SGDParamState;
  static constexpr OptimizerKind kind = OptimizerKind::kSgd;
  static OptimizerGroup group(const OptimizerParamGroup& group) {
    const auto& options = static_cast<const torch::optim::SGDOptions&>(group.options());
    return {.lr = options.lr(),
            .weight_decay = options.weight_decay(),
            .momentum = options.momentum(),
            .dampening = options.dampening(),
            .nesterov = options.nesterov()};
  }
  static std::size_t states(const OptimizerParamGroup& group) {
    return static_cast<const torch::optim::SGDOptions&>(group.options()).momentum() != 0 ? 1 : 0;
  }
  static at::Tensor& state(ParamState& state, std::size_t) { return state.momentum_buffer(); }
  static std::int64_t step(const ParamState&) { return 1; }  // it has been stepped if it has a buffer
  static void set_step(ParamState&, std::int64_t) {}
};

using AdamTraits = AdamKind<torch::optim::AdamOptions, torch::optim::AdamParamState>;
using AdamWTraits = AdamKind<torch::optim::AdamWOptions, torch::optim::AdamWParamState>;

// Calls visit(traits) for the optimizer's class.
template <class Visit>
auto dispatch(const Optimizer& optimizer, Visit visit) {
  if (typeid(optimizer) == typeid(torch::optim::Adam)) return visit(AdamTraits{});
  if (typeid(optimizer) == typeid(torch::optim::AdamW)) return visit(AdamWTraits{});
  return visit(SgdKind{});
}

template <class Traits>
typename Traits::ParamState* state_of(Optimizer& optimizer, const at::Tensor& param) {
  const auto found = optimizer.state().find(param.unsafeGetTensorImpl());
  return found == optimizer.state().end() ? nullptr : static_cast<typename Traits::ParamState*>(found->second.get());
}

at::Tensor scalar(double value, at::Device device) {
  return at::full({}, value, at::TensorOptions().dtype(at::kFloat).device(device));
}

}  // namespace

struct TorchOptimStep::Part {
  Part(at::Device where, std::size_t count) : device(where), states(count) {}

  at::Device device;
  std::size_t states;
  std::vector<at::Tensor> params, steps, idle;
  std::vector<std::vector<at::Tensor>> state_lists{3};
  std::vector<std::int64_t> groups;
  std::optional<FusedOptimizer> fused;
  std::vector<std::int64_t> stepped;  // positions of the last step
};

namespace {

// What the optimizer is made of now. A state loaded from a file shows by its address, its tensors or its count.
template <class Traits, class Seen>
std::vector<Seen> look(Optimizer& optimizer) {
  std::vector<Seen> seen;
  std::int64_t number = 0;
  for (const OptimizerParamGroup& group : optimizer.param_groups()) {
    const std::size_t states = Traits::states(group);
    for (const at::Tensor& param : group.params()) {
      auto* const state = state_of<Traits>(optimizer, param);
      seen.push_back({param, state, state && states > 0 ? Traits::state(*state, 0) : at::Tensor(),
                      state ? Traits::step(*state) : 0, states, number});
    }
    ++number;
  }
  return seen;
}

}  // namespace

bool TorchOptimStep::supports(const Optimizer& optimizer) {
  const std::type_info& type = typeid(optimizer);
  return type == typeid(torch::optim::Adam) || type == typeid(torch::optim::AdamW) || type == typeid(torch::optim::SGD);
}

void TorchOptimStep::rebuild(Optimizer& optimizer) {
  if (!parts_.empty()) write_back(optimizer);
  parts_.clear();
  dispatch(optimizer, [&](auto traits) {
    using Traits = decltype(traits);
    using ParamState = typename Traits::ParamState;
    std::int64_t number = 0;
    for (const OptimizerParamGroup& group : optimizer.param_groups()) {
      const std::size_t states = Traits::states(group);
      for (const at::Tensor& param : group.params()) {
        const auto same = [&](const auto& part) { return part->device == param.device() && part->states == states; };
        auto part = std::find_if(parts_.begin(), parts_.end(), same);
        if (part == parts_.end()) part = parts_.insert(part, std::make_shared<Part>(param.device(), states));
        auto* state = state_of<Traits>(optimizer, param);
        if (!state && !param.grad().defined()) {
          (*part)->idle.push_back(param);
          continue;
        }
        double applied = state ? static_cast<double>(Traits::step(*state)) : 0.0;
        if (!state && states > 0) {
          auto made = std::make_unique<ParamState>();
          state = made.get();
          optimizer.state()[param.unsafeGetTensorImpl()] = std::move(made);
        }
        for (std::size_t i = 0; i < states; ++i) {
          at::Tensor& tensor = Traits::state(*state, i);
          if (!tensor.defined()) {
            tensor = at::zeros_like(param, at::MemoryFormat::Preserve);
            if (Traits::kind == OptimizerKind::kSgd) applied = 0.0;
          }
          (*part)->state_lists[i].push_back(tensor);
        }
        (*part)->params.push_back(param);
        (*part)->steps.push_back(scalar(applied, param.device()));
        (*part)->groups.push_back(number);
      }
      ++number;
    }
    for (const auto& part : parts_)
      part->fused.emplace(Traits::kind, part->params, part->state_lists, part->steps, part->groups, part->idle);
    seen_ = std::make_shared<std::vector<Seen>>(look<Traits, Seen>(optimizer));
  });
}

std::string TorchOptimStep::collect_parts(bool allow_float16) {
  for (const auto& part : parts_) {
    std::string reason = part->fused->collect(allow_float16);
    if (!reason.empty()) return reason;
  }
  return "";
}

std::string TorchOptimStep::collect(Optimizer& optimizer, bool allow_float16) {
  const at::NoGradGuard no_grad;
  if (parts_.empty() || outdated(optimizer)) {
    TORCH_CHECK(!for_capture_, "the optimizer has changed since the step before the capture");
    rebuild(optimizer);
  }
  std::string reason = collect_parts(allow_float16);
  if (reason == FusedOptimizer::kNoLongerIdle) {
    TORCH_CHECK(!for_capture_, "a parameter has its first gradient in the capture");
    rebuild(optimizer);
    reason = collect_parts(allow_float16);
  }
  return reason;
}

bool TorchOptimStep::has_gradients() const {
  return std::any_of(parts_.begin(), parts_.end(), [](const auto& part) { return part->fused->count() > 0; });
}

TorchOptimStep::Checked TorchOptimStep::check(const at::Tensor& scale) {
  Checked result;
  for (const auto& part : parts_) {
    result.found.push_back(scalar(0.0, part->device));
    result.norm.push_back(scalar(0.0, part->device));
    part->fused->check(scale.to(part->device, /*non_blocking=*/!part->device.is_cpu()), result.found.back(),
                       result.norm.back(), std::nullopt);
  }
  return result;
}

void TorchOptimStep::step(Optimizer& optimizer, const at::Tensor& found, const std::optional<at::Tensor>& scale,
                          const std::optional<at::Tensor>& norm, double max_norm) {
  dispatch(optimizer, [&](auto traits) {
    using Traits = decltype(traits);
    std::vector<OptimizerGroup> groups;
    for (const OptimizerParamGroup& group : optimizer.param_groups()) groups.push_back(Traits::group(group));
    for (const auto& part : parts_) {
      const auto near = [&](const at::Tensor& tensor) {
        return tensor.to(part->device, /*non_blocking=*/!part->device.is_cpu());
      };
      const auto near_if = [&](const std::optional<at::Tensor>& tensor) {
        return tensor ? std::optional(near(*tensor)) : std::nullopt;
      };
      part->stepped = part->fused->collected();
      part->fused->step(groups, near(found), near_if(scale), near_if(norm), max_norm);
    }
  });
  ++steps_;
  if (!for_capture_) count_on_host(optimizer);  // a capture steps nothing
}

void TorchOptimStep::count_on_host(Optimizer& optimizer) {
  dispatch(optimizer, [&](auto traits) {
    using Traits = decltype(traits);
    for (const auto& part : parts_)
      for (const std::int64_t position : part->stepped)
        if (auto* const state = state_of<Traits>(optimizer, part->params[static_cast<std::size_t>(position)]))
          Traits::set_step(*state, Traits::step(*state) + 1);
    *seen_ = look<Traits, Seen>(optimizer);
  });
}

std::unique_ptr<TorchOptimStep> TorchOptimStep::for_capture(const Optimizer& optimizer) const {
  auto copy = std::make_unique<TorchOptimStep>();
  copy->for_capture_ = true;
  copy->seen_ = seen_;
  dispatch(optimizer, [&](auto traits) {
    for (const auto& part : parts_) {
      auto mine = std::make_shared<Part>(part->device, part->states);
      mine->params = part->params;
      mine->steps = part->steps;
      mine->idle = part->idle;
      mine->state_lists = part->state_lists;
      mine->groups = part->groups;
      mine->fused.emplace(decltype(traits)::kind, mine->params, mine->state_lists, mine->steps, mine->groups,
                          mine->idle);
      mine->fused->reserve(static_cast<std::int64_t>(optimizer.param_groups().size()));
      copy->parts_.push_back(std::move(mine));
    }
  });
  return copy;
}

bool TorchOptimStep::outdated(Optimizer& optimizer) const {
  return dispatch(optimizer, [&](auto traits) { return look<decltype(traits), Seen>(optimizer) != *seen_; });
}

void TorchOptimStep::follow(Optimizer& optimizer) {
  dispatch(optimizer, [&](auto traits) {
    std::vector<OptimizerGroup> groups;
    for (const OptimizerParamGroup& group : optimizer.param_groups()) groups.push_back(decltype(traits)::group(group));
    for (const auto& part : parts_) part->fused->set_groups(groups);
  });
  count_on_host(optimizer);
}

void TorchOptimStep::write_back(Optimizer& optimizer) {
  dispatch(optimizer, [&](auto traits) {
    using Traits = decltype(traits);
    for (const auto& part : parts_) {
      if (part->states == 0 || part->params.empty()) continue;
      const at::Tensor counts = at::stack(part->steps).cpu();
      for (std::size_t i = 0; i < part->params.size(); ++i) {
        auto* const state = state_of<Traits>(optimizer, part->params[i]);
        // Another state than ours, loaded since: it has its own count.
        if (!state || !Traits::state(*state, 0).is_same(part->state_lists[0][i])) continue;
        const auto applied = static_cast<std::int64_t>(counts.const_data_ptr<float>()[i]);
        Traits::set_step(*state, applied);
        if (applied == 0 && Traits::kind == OptimizerKind::kSgd)
          optimizer.state().erase(part->params[i].unsafeGetTensorImpl());
      }
    }
    parts_.clear();
    seen_->clear();
  });
}

}  // namespace halfstep::torch_ops
