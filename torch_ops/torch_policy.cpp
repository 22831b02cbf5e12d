// Plans for torch::nn models, and layers run in them. Contract: halfstep/torch/policy.h.
#include <algorithm>
#include <string>
#include <unordered_map>

#include <ATen/autocast_mode.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/activation.h>

#include "halfstep/status.h"
#include "halfstep/torch/policy.h"
#include "plan_dtype.h"

namespace halfstep {
namespace {

// `parent`: null for the model itself.
std::string layer_type(const torch::nn::Module& module, const torch::nn::Module* parent, const std::string& key) {
  // Its class in Python, so that one model has one plan.
  if (parent != nullptr && key == "out_proj" && parent->as<torch::nn::MultiheadAttention>() != nullptr)
    return "NonDynamicallyQuantizableLinear";
  constexpr std::string_view kSuffix = "Impl";  // of the class that a ModuleHolder holds
  std::string name = class_name(typeid(module));
  if (name.size() > kSuffix.size() && name.ends_with(kSuffix)) name.resize(name.size() - kSuffix.size());
  return name;
}

using Known = std::unordered_map<const torch::nn::Module*, std::string>;

// Not by named_modules(), which wants the model in a shared_ptr.
void collect(const torch::nn::Module& module, const torch::nn::Module* parent, const std::string& key,
             const std::string& name, Known& known, std::vector<Layer>& layers) {
  const auto children = module.named_children();
  if (children.is_empty() || !module.named_parameters(/*recurse=*/false).is_empty()) {
    const auto [first, is_new] = known.try_emplace(&module, name);
    layers.push_back({name, layer_type(module, parent, key), is_new ? "" : first->second});
  }
  for (const auto& child : children)
    collect(*child.value(), &module, child.key(), name.empty() ? child.key() : name + "." + child.key(), known, layers);
}

// Attention reads the parameters of its out_proj and never calls it.
void collect_uncalled(const torch::nn::Module& module, const std::string& name, std::vector<std::string>& parents) {
  if (module.as<torch::nn::MultiheadAttention>() != nullptr) parents.push_back(name);
  for (const auto& child : module.named_children())
    collect_uncalled(*child.value(), name.empty() ? child.key() : name + "." + child.key(), parents);
}

PrecisionPlan with_inherited(const PrecisionPlan& plan, const torch::nn::Module& model) {
  std::vector<std::string> parents;
  collect_uncalled(model, "", parents);
  if (parents.empty()) return plan;
  std::vector<PlannedLayer> layers(plan.layers().begin(), plan.layers().end());
  for (PlannedLayer& layer : layers) {
    for (const std::string& parent : parents) {
      if (layer.name != (parent.empty() ? "out_proj" : parent + ".out_proj")) continue;
      layer.precision = plan.at(parent).precision;
      if (layer.reason.starts_with("the same module as ")) continue;
      layer.reason = "never called: inherits from " + (parent.empty() ? "the model" : parent);
    }
  }
  return {plan.policy(), std::move(layers)};
}

at::ScalarType dtype_of(const PlannedLayer& layer) {
  const auto dtype = torch_ops::dtype_of(layer.precision);
  HS_CHECK(dtype, "PrecisionPlan::run: layer '", layer.name, "' is planned as ", name_of(layer.precision),
           ", expected float32, float16 or bfloat16");
  return *dtype;
}

}  // namespace

std::vector<Layer> layers_of(const torch::nn::Module& model) {
  Known known;
  std::vector<Layer> layers;
  collect(model, nullptr, "", "", known, layers);
  return layers;
}

PrecisionPlan plan(const torch::nn::Module& model, const PrecisionPolicy& policy) {
  return with_inherited({policy, layers_of(model)}, model);
}

PrecisionPlan plan(const torch::nn::Module& model, const CustomPrecisionPolicy& policy, Precision half) {
  return with_inherited({policy, layers_of(model), half}, model);
}

// A scope that has turned autocast off leaves this as its type, as in Python (scopes.py): it tells a scope within that
// it was not the program that did.
constexpr at::ScalarType kHeldOff = at::kDouble;

LayerScope::LayerScope(const PrecisionPlan& plan, std::string_view layer)
    : dtype_(dtype_of(plan.at(layer))), previous_cache_enabled_(at::autocast::is_autocast_cache_enabled()) {
  for (std::size_t i = 0; i < kDevices.size(); ++i) {
    const Before now{at::autocast::get_autocast_dtype(kDevices[i]), at::autocast::is_autocast_enabled(kDevices[i])};
    const bool held = !now.enabled && now.dtype == kHeldOff;
    if (!(now.enabled || held) || (now.enabled && now.dtype == dtype_)) continue;
    previous_[i] = now;
    at::autocast::set_autocast_enabled(kDevices[i], dtype_ != at::kFloat);
    at::autocast::set_autocast_dtype(kDevices[i], dtype_ == at::kFloat ? kHeldOff : dtype_);
    if (dtype_ != at::kFloat) at::autocast::set_autocast_cache_enabled(false);
  }
}

LayerScope::~LayerScope() {
  for (std::size_t i = 0; i < kDevices.size(); ++i) {
    if (!previous_[i]) continue;
    at::autocast::set_autocast_enabled(kDevices[i], previous_[i]->enabled);
    at::autocast::set_autocast_dtype(kDevices[i], previous_[i]->dtype);
    at::autocast::set_autocast_cache_enabled(previous_cache_enabled_);
  }
}

at::Tensor LayerScope::cast_tensor(const at::Tensor& tensor, at::ScalarType dtype, bool only_within_float32) const {
  if (!tensor.defined() || tensor.scalar_type() == dtype) return tensor;
  const auto device = std::find(kDevices.begin(), kDevices.end(), tensor.device().type());
  if (device == kDevices.end()) return tensor;
  const std::optional<Before>& before = previous_[static_cast<std::size_t>(device - kDevices.begin())];
  if (!before || (only_within_float32 && before->enabled)) return tensor;
  const at::ScalarType type = tensor.scalar_type();
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16 ? tensor.to(dtype) : tensor;
}

}  // namespace halfstep
