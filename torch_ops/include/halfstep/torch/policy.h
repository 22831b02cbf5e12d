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
// program has turned autocast off nothing is changed. At its end, also by an exception, everything is as before.
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

 private:
  at::Tensor cast_held(const at::Tensor& tensor) const;
  template <class T>
  std::optional<T> cast_held(const std::optional<T>& value) const;
  template <class... T>
  std::tuple<T...> cast_held(const std::tuple<T...>& value) const;
  template <class A, class B>
  std::pair<A, B> cast_held(const std::pair<A, B>& value) const;
  template <class T>
  std::vector<T> cast_held(const std::vector<T>& value) const;

  static constexpr std::array kDevices{at::kCPU, at::kCUDA};

  at::ScalarType dtype_;
  bool previous_cache_enabled_;
  std::array<std::optional<at::ScalarType>, kDevices.size()> previous_;  // autocast's dtypes, where the scope acts
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

}  // namespace detail

template <class T>
decltype(auto) LayerScope::cast(T&& value) const {
  if constexpr (detail::kHoldsTensors<std::remove_cvref_t<T>>) {
    return cast_held(value);
  } else {
    return std::forward<T>(value);
  }
}

template <class T>
std::optional<T> LayerScope::cast_held(const std::optional<T>& value) const {
  return value ? std::optional<T>(cast(*value)) : std::nullopt;
}

template <class... T>
std::tuple<T...> LayerScope::cast_held(const std::tuple<T...>& value) const {
  return std::apply([&](const T&... items) { return std::tuple<T...>(cast(items)...); }, value);
}

template <class A, class B>
std::pair<A, B> LayerScope::cast_held(const std::pair<A, B>& value) const {
  return {cast(value.first), cast(value.second)};
}

template <class T>
std::vector<T> LayerScope::cast_held(const std::vector<T>& value) const {
  std::vector<T> result;
  result.reserve(value.size());
  for (const T& item : value) result.push_back(cast(item));
  return result;
}

// Returns, by value, function(inputs...), or function->forward(inputs...) for a module's holder or pointer, computed
// within a LayerScope and from inputs that it has cast: so a float32 layer can be given half inputs. What a lambda
// captures is not cast: that is up to the program. All that takes some tenths of a microsecond beside the layer.
template <class Function, class... Inputs>
auto PrecisionPlan::run(std::string_view layer, Function&& function, Inputs&&... inputs) const {
  const LayerScope scope(*this, layer);
  if constexpr (requires { function->forward(scope.cast(std::forward<Inputs>(inputs))...); }) {
    return function->forward(scope.cast(std::forward<Inputs>(inputs))...);
  } else {
    return std::invoke(function, scope.cast(std::forward<Inputs>(inputs))...);
  }
}

}  // namespace halfstep
