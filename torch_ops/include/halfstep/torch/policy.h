// Policies by layer for C++ programs: a plan for a torch::nn model, and layers that run in what it says.
//
//   const halfstep::PrecisionPolicy policy = halfstep::PrecisionPolicy::from_json(text);
//   const halfstep::PrecisionPlan plan = halfstep::plan(*model, policy);
//   ...
//   torch::Tensor forward(torch::Tensor x) {
//     x = plan.run("encoder.fc1", fc1, x).relu();
//     return plan.run("head", [&] { return head(x.to(torch::kFloat)); });
//   }
//
// C++ modules have no attribute `forward` that could be replaced, so the model's own code names its layers.
#pragma once

#include <array>
#include <functional>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "halfstep/export.h"
#include "halfstep/policy.h"

namespace torch::nn {
class Module;
}

namespace halfstep {

// What a plan covers, in the model's order: the modules without children and those with parameters of their own. The
// type is the class without namespace and "Impl": "Linear". Of a module under two names the second says that it is the
// first. The same as in Python, so that one model in both languages has one plan. The model itself is "".
HALFSTEP_API std::vector<Layer> layers_of(const torch::nn::Module& model);

// Decides, or asks, once per layer of the model. `half`: see PrecisionPlan. Throws InvalidArgument.
HALFSTEP_API PrecisionPlan plan(const torch::nn::Module& model, const PrecisionPolicy& policy);
HALFSTEP_API PrecisionPlan plan(const torch::nn::Module& model, const CustomPrecisionPolicy& policy,
                                Precision half = Precision::kFloat16);

// Within the scope's lifetime this thread's autocast computes in the precision of one layer of the plan: kFloat32 turns
// it off, another half type takes the place of autocast's, without the cache of casts, whose key has no dtype. It acts
// on the CPU and on CUDA, on each of them only while autocast is on there and would compute in another type; where the
// program has turned autocast off nothing is changed. Scopes nest: within a float32 one a half one acts all the same,
// and hands float32 back. At its end, also by an exception, everything is as before.
//
// Throws InvalidArgument, and changes nothing, for a layer that the plan has not, and for kTFloat32 and kInt8.
// PrecisionPlan::run is what a program calls.
class HALFSTEP_API LayerScope {
 public:
  LayerScope(const PrecisionPlan& plan, std::string_view layer);
  ~LayerScope();
  LayerScope(const LayerScope&) = delete;
  LayerScope& operator=(const LayerScope&) = delete;

  // `value`, with the float32, float16 and bfloat16 tensors in it in the layer's type, where the scope acts on their
  // device. Looks into optional, pair, tuple and vector; everything else comes back as it is.
  template <class T>
  decltype(auto) cast(T&& value) const;
  // What a layer hands on: those in float32 where the scope stands within a float32 one, whose code has no autocast
  // that would mend a mixture of types.
  template <class T>
  decltype(auto) hand_on(T&& value) const;

 private:
  struct Before {
    at::ScalarType dtype;
    bool enabled;
  };
  at::Tensor cast_tensor(const at::Tensor& tensor, at::ScalarType dtype, bool only_within_float32) const;

  static constexpr std::array kDevices{at::kCPU, at::kCUDA};

  at::ScalarType dtype_;
  bool previous_cache_enabled_;
  std::array<std::optional<Before>, kDevices.size()> previous_;  // autocast's state, where the scope acts
};

namespace detail {

template <class T>
inline constexpr bool kHoldsTensors = false;
template <>
inline constexpr bool kHoldsTensors<at::Tensor> = true;
template <class T>
inline constexpr bool kHoldsTensors<std::optional<T>> = kHoldsTensors<T>;
template <class... T>
inline constexpr bool kHoldsTensors<std::tuple<T...>> = (kHoldsTensors<T> || ...);
template <class A, class B>
inline constexpr bool kHoldsTensors<std::pair<A, B>> = kHoldsTensors<A> || kHoldsTensors<B>;
template <class T>
inline constexpr bool kHoldsTensors<std::vector<T>> = kHoldsTensors<T>;

// `value` with f(tensor) in the place of its tensors.
template <class T, class F>
decltype(auto) map_tensors(T&& value, const F& f);

template <class F>
at::Tensor map_held(const at::Tensor& value, const F& f) {
  return f(value);
}
template <class T, class F>
std::optional<T> map_held(const std::optional<T>& value, const F& f) {
  return value ? std::optional<T>(map_tensors(*value, f)) : std::nullopt;
}
template <class... T, class F>
std::tuple<T...> map_held(const std::tuple<T...>& value, const F& f) {
  return std::apply([&](const T&... items) { return std::tuple<T...>(map_tensors(items, f)...); }, value);
}
template <class A, class B, class F>
std::pair<A, B> map_held(const std::pair<A, B>& value, const F& f) {
  return {map_tensors(value.first, f), map_tensors(value.second, f)};
}
template <class T, class F>
std::vector<T> map_held(const std::vector<T>& value, const F& f) {
  std::vector<T> result;
  result.reserve(value.size());
  for (const T& item : value) result.push_back(map_tensors(item, f));
  return result;
}

template <class T, class F>
decltype(auto) map_tensors(T&& value, const F& f) {
  if constexpr (kHoldsTensors<std::remove_cvref_t<T>>) {
    return map_held(value, f);
  } else {
    return std::forward<T>(value);
  }
}

}  // namespace detail

template <class T>
decltype(auto) LayerScope::cast(T&& value) const {
  return detail::map_tensors(std::forward<T>(value),
                             [this](const at::Tensor& tensor) { return cast_tensor(tensor, dtype_, false); });
}

template <class T>
decltype(auto) LayerScope::hand_on(T&& value) const {
  return detail::map_tensors(std::forward<T>(value),
                             [this](const at::Tensor& tensor) { return cast_tensor(tensor, at::kFloat, true); });
}

// Returns, by value, function(inputs...), or function->forward(inputs...) for a module's holder or pointer, computed
// within a LayerScope and from inputs that it has cast: so a float32 layer can be given half inputs. What a lambda
// captures is not cast: that is up to the program. All that takes some tenths of a microsecond beside the layer.
template <class Function, class... Inputs>
auto PrecisionPlan::run(std::string_view layer, Function&& function, Inputs&&... inputs) const {
  const LayerScope scope(*this, layer);
  const auto call = [&]() -> decltype(auto) {
    if constexpr (requires { function->forward(scope.cast(std::forward<Inputs>(inputs))...); }) {
      return function->forward(scope.cast(std::forward<Inputs>(inputs))...);
    } else {
      return std::invoke(function, scope.cast(std::forward<Inputs>(inputs))...);
    }
  };
  if constexpr (std::is_void_v<decltype(call())>) {
    call();
  } else {
    return scope.hand_on(call());
  }
}

}  // namespace halfstep
