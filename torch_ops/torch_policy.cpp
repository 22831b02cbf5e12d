// Plans for torch::nn models, and layers run in them. Contract: halfstep/torch/policy.h.
#include <algorithm>
#include <string>
#include <unordered_map>

#include <ATen/autocast_mode.h>
#include <torch/nn/module.h>

#include "halfstep/status.h"
#include "halfstep/torch/policy.h"

namespace halfstep {
namespace {

std::string layer_type(const torch::nn::Module& module) {
  constexpr std::string_view kSuffix = "Impl";  // of the class that a ModuleHolder holds
  std::string name = class_name(typeid(module));
  if (name.size() > kSuffix.size() && name.ends_with(kSuffix)) name.resize(name.size() - kSuffix.size());
  return name;
}

using Known = std::unordered_map<const torch::nn::Module*, std::string>;

// Not by named_modules(), which wants the model in a shared_ptr.
void collect(const torch::nn::Module& module, const std::string& name, Known& known, std::vector<Layer>& layers) {
  const auto children = module.named_children();
  if (children.is_empty() || !module.named_parameters(/*recurse=*/false).is_empty()) {
    const auto [first, is_new] = known.try_emplace(&module, name);
    layers.push_back({name, layer_type(module), is_new ? "" : first->second});
  }
  for (const auto& child : children)
    collect(*child.value(), name.empty() ? child.key() : name + "." + child.key(), known, layers);
}

at::ScalarType dtype_of(const PlannedLayer& layer) {
  switch (layer.precision) {
    case Precision::kFloat32:
      return at::kFloat;
    case Precision::kFloat16:
      return at::kHalf;
    case Precision::kBFloat16:
      return at::kBFloat16;
    case Precision::kTFloat32:
    case Precision::kInt8:
      break;
  }
  HS_CHECK(false, "PrecisionPlan::run: layer '", layer.name, "' is planned as ", name_of(layer.precision),
           ", expected float32, float16 or bfloat16");
}

}  // namespace

std::vector<Layer> layers_of(const torch::nn::Module& model) {
  Known known;
  std::vector<Layer> layers;
  collect(model, "", known, layers);
  return layers;
}

PrecisionPlan plan(const torch::nn::Module& model, const PrecisionPolicy& policy) {
  return {policy, layers_of(model)};
}

PrecisionPlan plan(const torch::nn::Module& model, const CustomPrecisionPolicy& policy, Precision half) {
  return {policy, layers_of(model), half};
}

LayerScope::LayerScope(const PrecisionPlan& plan, std::string_view layer)
    : dtype_(dtype_of(plan.at(layer))), previous_cache_enabled_(at::autocast::is_autocast_cache_enabled()) {
  for (std::size_t i = 0; i < kDevices.size(); ++i) {
    if (!at::autocast::is_autocast_enabled(kDevices[i])) continue;
    const at::ScalarType now = at::autocast::get_autocast_dtype(kDevices[i]);
    if (now == dtype_) continue;
    previous_[i] = now;
    if (dtype_ == at::kFloat) {
      at::autocast::set_autocast_enabled(kDevices[i], false);
    } else {
      at::autocast::set_autocast_dtype(kDevices[i], dtype_);
      at::autocast::set_autocast_cache_enabled(false);
    }
  }
}

LayerScope::~LayerScope() {
  for (std::size_t i = 0; i < kDevices.size(); ++i) {
    if (!previous_[i]) continue;
    at::autocast::set_autocast_enabled(kDevices[i], true);
    at::autocast::set_autocast_dtype(kDevices[i], *previous_[i]);
    at::autocast::set_autocast_cache_enabled(previous_cache_enabled_);
  }
}

at::Tensor LayerScope::cast_held(const at::Tensor& tensor) const {
  if (!tensor.defined() || tensor.scalar_type() == dtype_) return tensor;
  const auto device = std::find(kDevices.begin(), kDevices.end(), tensor.device().type());
  if (device == kDevices.end() || !previous_[static_cast<std::size_t>(device - kDevices.begin())]) return tensor;
  const at::ScalarType type = tensor.scalar_type();
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16 ? tensor.to(dtype_) : tensor;
}

}  // namespace halfstep
