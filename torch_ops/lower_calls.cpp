// lower(): layers of the plan that are not called where their precision would have to act.
#include <algorithm>

#include <ATen/core/class_type.h>
#include <c10/util/Exception.h>

#include "lower_graph.h"

namespace halfstep::torch_ops {
namespace {

namespace prim = torch::jit::prim;
using Called = std::unordered_set<const c10::ivalue::Object*>;

// Attention's out_proj: torch reads its parameters in attention's own code, fused or not, and eager plans say that it
// inherits. Plans of scripted modules do not know.
bool is_read_alone(const c10::ivalue::Object& module) {
  return module.type()->name()->name() == "NonDynamicallyQuantizableLinear";
}

void check_reads(torch::jit::Block* block, const ModuleObject& root, const LayerTypes& layers, const Called& called) {
  for (torch::jit::Node* const node : block->nodes()) {
    for (torch::jit::Block* const inner : node->blocks()) check_reads(inner, root, layers, called);
    if (node->kind() != prim::GetAttr) continue;
    const auto value = attribute_of(node->output(), root);
    const auto region = noted(node, "region");
    if (!value || !region || !(value->isTensor() || value->isTensorList())) continue;
    const ModuleObject owner = attribute_of(node->input(), root)->toObject();
    const auto layer = layers.find(owner.get());
    if (owner == root || layer == layers.end() || !layer->second.called || called.contains(owner.get())) continue;
    TORCH_CHECK_VALUE(layer->second.type == *region || is_read_alone(*owner), "lower: layer '", layer->second.name,
                      "' is planned as ", layer->second.type, ", but forward only reads its tensors, in code that is ",
                      *region,
                      ", and never calls it. Is the module lowered already, or optimized? If not so, plan the "
                      "layer as the code that reads it");
  }
}

}  // namespace

bool has_other_layers(const ModuleObject& module, at::ScalarType type, const LayerTypes& layers) {
  for (std::size_t i = 0; i < module->slots().size(); ++i) {
    const c10::IValue& slot = module->getSlot(i);
    if (!module->type()->getAttribute(i)->is_module() || !slot.isObject()) continue;
    const ModuleObject inner = slot.toObject();
    const auto planned = layers.find(inner.get());
    if (planned != layers.end() && planned->second.type != type && !is_read_alone(*inner)) return true;
    if (has_other_layers(inner, type, layers)) return true;
  }
  return false;
}

void check_calls(torch::jit::Graph& graph, const ModuleObject& root, const LayerTypes& layers, const Called& called,
                 at::ScalarType ambient) {
  check_reads(graph.block(), root, layers, called);
  const auto itself = layers.find(root.get());
  const at::ScalarType around = itself == layers.end() ? ambient : itself->second.type;
  const LayerType* other = nullptr;
  for (const auto& [module, layer] : layers) {
    if (module == root.get()) continue;
    if (called.contains(module)) return;
    if (layer.called && layer.type != around && (other == nullptr || layer.name < other->name)) other = &layer;
  }
  TORCH_CHECK_VALUE(other == nullptr, "lower: layer '", other->name, "' is planned as ", other->type,
                    ", but forward calls no layer of the plan. Is the module lowered already, or optimized?");
}

}  // namespace halfstep::torch_ops
