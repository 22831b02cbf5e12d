// What a captured step works on besides its inputs, whether that is still what it was, and what a step that runs does
// on the host. Parts of StepGraph (halfstep/torch/step_graph.h), which a program uses instead.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <typeinfo>
#include <unordered_set>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/sum.h>
#include <c10/util/Type.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include "halfstep/torch/scaling.h"

namespace halfstep {

// Parameters of optimizers and modules, buffers of modules, and the modules' modes. Tensors are known by identity, by
// their address and by whether they are trained. A member of a module that is assigned another tensor is not seen: the
// module's registry, all that there is to look at, keeps the old one.
class StepWatch {
 public:
  using Optimizers = std::vector<torch::optim::Optimizer*>;
  using Modules = std::vector<std::shared_ptr<torch::nn::Module>>;

  StepWatch(Optimizers optimizers, Modules modules) : optimizers_(std::move(optimizers)), modules_(std::move(modules)) {
    for (const auto& module : modules_) {
      for (const auto& part : module->named_modules())
        parts_.push_back(
            {part.key().empty() ? "a module" : "module " + part.key(), part.value(), part.value()->is_training()});
      for (const auto& entry : module->named_parameters()) add(entry.key(), entry.value());
    }
    for (std::size_t i = 0; i < optimizers_.size(); ++i) {
      for (const auto& group : optimizers_[i]->param_groups())
        for (const at::Tensor& parameter : group.params()) {
          add(c10::str("parameter ", stepped_.size(), " of the optimizers"), parameter);
          stepped_.push_back(parameter);
        }
    }
    parameters_ = tensors_.size();
    for (const auto& module : modules_)
      for (const auto& entry : module->named_buffers()) add(entry.key(), entry.value());
  }

  // Each tensor once, parameters first; names are for people.
  std::size_t parameters() const { return parameters_; }
  std::size_t size() const { return tensors_.size(); }
  const at::Tensor& tensor(std::size_t i) const { return tensors_[i].tensor; }
  const std::string& name(std::size_t i) const { return tensors_[i].name; }

  // "" or what has changed since this was made.
  std::string changed() const {
    std::size_t place = 0;
    for (const torch::optim::Optimizer* const optimizer : optimizers_)
      for (const auto& group : optimizer->param_groups())
        for (const at::Tensor& parameter : group.params()) {
          if (place == stepped_.size()) return "an optimizer has more parameters";
          if (!parameter.is_same(stepped_[place]))
            return c10::str("parameter ", place, " of the optimizers was replaced");
          ++place;
        }
    if (place != stepped_.size()) return "an optimizer has fewer parameters";
    place = 0;
    for (const auto& module : modules_)
      for (const auto& part : module->modules()) {
        if (place == parts_.size() || part != parts_[place].module) return "a module was added or replaced";
        if (part->is_training() != parts_[place].training)
          return parts_[place].name + (part->is_training() ? " was set to train()" : " was set to eval()");
        ++place;
      }
    if (place != parts_.size()) return "a module was removed";
    for (const Watched& watched : tensors_) {
      if (address(watched.tensor) != watched.address) return watched.name + " has moved";
      if (watched.tensor.requires_grad() != watched.trained)
        return watched.name + (watched.trained ? " was frozen" : " was unfrozen");
    }
    return "";
  }

 private:
  // Held, all of them, so that no other can have their place.
  struct Watched {
    std::string name;
    at::Tensor tensor;
    const void* address;
    bool trained;
  };
  struct Part {
    std::string name;
    std::shared_ptr<torch::nn::Module> module;
    bool training;
  };

  static const void* address(const at::Tensor& tensor) {
    return tensor.has_storage() ? tensor.const_data_ptr() : nullptr;
  }

  void add(const std::string& name, const at::Tensor& tensor) {
    if (tensor.defined() && known_.insert(tensor.unsafeGetTensorImpl()).second)
      tensors_.push_back({name, tensor, address(tensor), tensor.requires_grad()});
  }

  Optimizers optimizers_;
  Modules modules_;
  std::vector<Part> parts_;
  std::vector<at::Tensor> stepped_;  // by the optimizers, in their order
  std::vector<Watched> tensors_;
  std::unordered_set<const at::TensorImpl*> known_;
  std::size_t parameters_ = 0;
};

// Made before a step runs and asked after it.
class StepTrace {
 public:
  // With `sums` it also sees writes by torch's optimizers, which leave no trace on the host: it adds up the parameters,
  // and waits for the device if there is an optimizer that the scaler does not step.
  StepTrace(const GradScaler& scaler, const StepWatch::Optimizers& optimizers, bool sums)
      : scaler_(scaler), optimizers_(optimizers), syncs_(scaler.host_syncs()), before_(look()) {
    if (sums)
      for (torch::optim::Optimizer* const optimizer : optimizers_) sums_.push_back(sum(*optimizer));
  }

  // "" or why the step cannot be replayed.
  std::string unfit() const {
    if (scaler_.host_syncs() != syncs_) return "an optimizer is stepped by torch, after a read on the host";
    if (CapturedOptimizers::awaits_update(scaler_)) return "the step leaves the scaler's update() to others";
    const std::vector<Look> now = look();
    for (std::size_t i = 0; i < now.size(); ++i) {
      if (now[i].steps == before_[i].steps && !sums_.empty() && differ(sums_[i], sum(*optimizers_[i])))
        return "parameters of " + c10::demangle(typeid(*optimizers_[i]).name()) +
               " are written, but not by the scaler's step(): what torch reads on the host would be constant";
      if (now[i].rates.size() == before_[i].rates.size() && now[i].rates != before_[i].rates)
        return "the step changes learning rates; call the scheduler's step() after it";
    }
    return "";
  }

 private:
  struct Look {
    std::int64_t steps;
    std::vector<double> rates;  // only of optimizers that halfstep steps: others may have none
  };

  std::vector<Look> look() const {
    std::vector<Look> all;
    for (torch::optim::Optimizer* const optimizer : optimizers_) {
      all.push_back({CapturedOptimizers::steps(scaler_, *optimizer), {}});
      if (all.back().steps < 0) continue;
      for (const auto& group : optimizer->param_groups()) all.back().rates.push_back(group.options().get_lr());
    }
    return all;
  }

  // In float64: a learning rate may be small beside the weights.
  static at::Tensor sum(const torch::optim::Optimizer& optimizer) {
    const at::NoGradGuard no_grad;
    at::Tensor total;
    for (const auto& group : optimizer.param_groups())
      for (const at::Tensor& parameter : group.params())
        if (parameter.is_floating_point()) {
          const at::Tensor one = at::sum(parameter, at::kDouble);
          total = total.defined() ? total.add(one) : one;
        }
    return total;
  }
  static bool differ(const at::Tensor& before, const at::Tensor& after) {
    if (!before.defined() || !after.defined()) return false;
    const auto first = before.item<double>(), second = after.item<double>();
    return first != second && !(std::isnan(first) && std::isnan(second));
  }

  const GradScaler& scaler_;
  const StepWatch::Optimizers& optimizers_;
  std::int64_t syncs_;
  std::vector<Look> before_;
  std::vector<at::Tensor> sums_;
};

}  // namespace halfstep
