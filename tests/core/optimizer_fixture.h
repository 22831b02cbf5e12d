// Parameters with their states in host memory, and a float64 reference of the optimizers that shares no code with them.
#pragma once

#include <cmath>
#include <ostream>
#include <string>
#include <vector>

#include "gradient_fixture.h"
#include "halfstep/optimizer.h"

namespace halfstep::test {

struct OptimizerCase {
  std::string name;
  OptimizerKind kind;
  OptimizerGroup group;
  bool amsgrad = false;
};
inline std::ostream& operator<<(std::ostream& out, const OptimizerCase& which) {
  return out << which.name;
}

// Every option of every optimizer at least once.
inline std::vector<OptimizerCase> optimizer_cases() {
  const OptimizerGroup adam{.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8};
  const OptimizerGroup sgd{.lr = 1e-2};
  const auto with = [](OptimizerGroup group, auto change) {
    change(group);
    return group;
  };
  using G = OptimizerGroup;
  return {
      {"adam", OptimizerKind::kAdam, adam},
      {"adam_decay", OptimizerKind::kAdam, with(adam, [](G& g) { g.weight_decay = 0.1; })},
      {"adamw", OptimizerKind::kAdam, with(adam, [](G& g) { g.weight_decay = 0.1, g.decoupled = true; })},
      {"adam_maximize_amsgrad", OptimizerKind::kAdam, with(adam, [](G& g) { g.maximize = true; }), true},
      {"sgd", OptimizerKind::kSgd, sgd},
      {"sgd_decay_maximize", OptimizerKind::kSgd, with(sgd, [](G& g) { g.weight_decay = 0.1, g.maximize = true; })},
      {"momentum", OptimizerKind::kSgd, with(sgd, [](G& g) { g.momentum = 0.9, g.dampening = 0.1; })},
      {"nesterov", OptimizerKind::kSgd, with(sgd, [](G& g) { g.momentum = 0.9, g.nesterov = true; })},
  };
}

// How a parameter is stored. Half copies go with float32 values only.
struct Storage {
  DType values;
  DType gradient;
  DType copy;
  bool with_copy;
};
inline constexpr Storage kStorages[] = {
    {DType::kFloat32, DType::kFloat32, DType::kFloat16, false},
    {DType::kFloat32, DType::kFloat16, DType::kFloat16, true},
    {DType::kFloat32, DType::kBFloat16, DType::kBFloat16, true},
    {DType::kFloat32, DType::kFloat32, DType::kBFloat16, true},
    {DType::kFloat64, DType::kFloat64, DType::kFloat16, false},
    {DType::kFloat16, DType::kFloat16, DType::kFloat16, false},
    {DType::kBFloat16, DType::kBFloat16, DType::kBFloat16, false},
};

// A set of parameters of all storages and awkward sizes; rows() gives the core's view of it.
class ParameterSet {
 public:
  static constexpr int kStates = 3;

  ParameterSet(const OptimizerCase& which, std::vector<std::size_t> sizes, std::size_t misaligned = 0) : case_(which) {
    unsigned seed = 1;
    for (const Storage& storage : kStorages) {
      for (const std::size_t size : sizes) {
        storages_.push_back(storage);
        values_.add(storage.values, normal_values(size, 1.0, seed++), misaligned);
        gradients_.add(storage.gradient, normal_values(size, 1.0, seed++), misaligned);
        copies_.add(storage.copy, std::vector<double>(size, 7.0), misaligned);
        for (GradientList& state : states_) state.add(storage.values, std::vector<double>(size, 0.0), misaligned);
      }
    }
    steps_.resize(storages_.size());
  }

  void new_gradients(unsigned seed, double spread) {
    for (std::size_t i = 0; i < storages_.size(); ++i) {
      const auto values = normal_values(static_cast<std::size_t>(gradients_.shapes()[i].numel), spread, seed + i);
      for (std::size_t k = 0; k < values.size(); ++k) gradients_.set(i, k, values[k]);
    }
  }

  std::vector<OptimizerTensor> rows() {
    const auto values = values_.views();
    const auto copies = copies_.views();
    const std::vector<TensorView> states[kStates] = {states_[0].views(), states_[1].views(), states_[2].views()};
    std::vector<OptimizerTensor> result;
    for (std::size_t i = 0; i < storages_.size(); ++i) {
      result.push_back({values[i].data,
                        {},
                        storages_[i].with_copy ? copies[i].data : nullptr,
                        &steps_[i],
                        values[i].numel,
                        0,
                        storages_[i].values,
                        storages_[i].gradient,
                        storages_[i].copy});
      for (int k = 0; k < used_states(); ++k) result.back().state[k] = states[k][i].data;
    }
    return result;
  }

  std::vector<const void*> gradient_addresses() {
    std::vector<const void*> result;
    for (const TensorView& view : gradients_.views()) result.push_back(view.data);
    return result;
  }

  int used_states() const {
    if (case_.kind == OptimizerKind::kAdam) return case_.amsgrad ? 3 : 2;
    return case_.group.momentum != 0 ? 1 : 0;
  }

  std::size_t size() const { return storages_.size(); }
  const Storage& storage(std::size_t i) const { return storages_[i]; }
  std::vector<float>& steps() { return steps_; }
  GradientList& values() { return values_; }
  GradientList& gradients() { return gradients_; }
  GradientList& copies() { return copies_; }
  GradientList& state(int k) { return states_[k]; }

 private:
  OptimizerCase case_;
  std::vector<Storage> storages_;
  GradientList values_, gradients_, copies_, states_[kStates];
  std::vector<float> steps_;
};

// One element in float64 throughout, by the papers' formulas; `step` counts this one.
struct ElementState {
  double value, state[3];
};
inline ElementState reference_step(const OptimizerCase& which, ElementState e, double grad, double step) {
  const OptimizerGroup& g = which.group;
  if (g.maximize) grad = -grad;
  if (which.kind == OptimizerKind::kAdam) {
    if (g.decoupled) {
      e.value *= 1 - g.lr * g.weight_decay;
    } else {
      grad += g.weight_decay * e.value;
    }
    e.state[0] = g.beta1 * e.state[0] + (1 - g.beta1) * grad;
    e.state[1] = g.beta2 * e.state[1] + (1 - g.beta2) * grad * grad;
    e.state[2] = std::max(e.state[2], e.state[1]);
    const double first = e.state[0] / (1 - std::pow(g.beta1, step));
    const double second = (which.amsgrad ? e.state[2] : e.state[1]) / (1 - std::pow(g.beta2, step));
    e.value -= g.lr * first / (std::sqrt(second) + g.eps);
    return e;
  }
  grad += g.weight_decay * e.value;
  if (g.momentum != 0) {
    e.state[0] = step == 1 ? grad : g.momentum * e.state[0] + (1 - g.dampening) * grad;
    grad = g.nesterov ? grad + g.momentum * e.state[0] : e.state[0];
  }
  e.value -= g.lr * grad;
  return e;
}

// The spacing of `dtype`'s numbers at x.
inline double ulp(DType dtype, double x) {
  const int digits = dtype == DType::kFloat64 ? 53 : dtype == DType::kFloat32 ? 24 : dtype == DType::kFloat16 ? 11 : 8;
  const int lowest = dtype == DType::kFloat64   ? -1074
                     : dtype == DType::kFloat32 ? -149
                     : dtype == DType::kFloat16 ? -24
                                                : -133;
  int exponent = 0;
  std::frexp(x, &exponent);
  return std::ldexp(1.0, std::max(exponent - digits, lowest));
}

}  // namespace halfstep::test
