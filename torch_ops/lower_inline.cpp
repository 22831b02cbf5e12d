// lower(), first step: one graph without calls, in which each node knows what type its region computes in.
#include <algorithm>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include <ATen/core/class_type.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/constants.h>

#include "lower_graph.h"

namespace halfstep::torch_ops {
namespace {

namespace prim = torch::jit::prim;
using torch::jit::Node;
using torch::jit::Value;

c10::Symbol note_named(std::string_view what) {
  return c10::Symbol::attr("halfstep_" + std::string(what));
}

// Tracing calls a layer's second call "forward1", scripting an overloaded forward "forward__0".
bool is_forward(std::string_view method) {
  constexpr std::string_view kForward = "forward";
  if (!method.starts_with(kForward)) return false;
  method.remove_prefix(kForward.size());
  if (method.starts_with("__")) method.remove_prefix(2);
  return std::ranges::all_of(method, [](char c) { return c >= '0' && c <= '9'; });
}

// The name of a fixed submodule.
std::string path_of(const Value* module) {
  if (module->node()->kind() != prim::GetAttr) return "";
  const std::string outer = path_of(module->node()->input());
  return (outer.empty() ? "" : outer + ".") + module->node()->s(c10::attr::name);
}

class Inliner {
 public:
  Inliner(torch::jit::Graph& graph, const ModuleObject& root, const LayerTypes& layers, c10::DeviceType device,
          const Inlining& how)
      : graph_(graph), root_(root), layers_(layers), device_(device), how_(how) {}

  // All nodes from `node` up to `end`, which stays. `name` is that of the module whose code it is, for messages.
  void visit(Node* node, const Node* end, at::ScalarType region, const std::string& name) {
    while (node != end) {
      Node* const next = node->next();
      visit_one(node, region, name);
      node = next;
    }
  }

  // The region of a module within another one, whatever that one's is: layers within a float32 one keep their half.
  at::ScalarType region_of(const ModuleObject& module, at::ScalarType around) const {
    const auto planned = layers_.find(module.get());
    return planned == layers_.end() ? around : planned->second.type;
  }

  std::unordered_set<const c10::ivalue::Object*> called() && { return std::move(called_); }

 private:
  void visit_one(Node* node, at::ScalarType region, const std::string& name) {
    switch (node->kind()) {
      case prim::CallFunction: {
        const auto type = node->input(0)->type()->cast<c10::FunctionType>();
        refuse_if(type == nullptr, node, name, "calls a function that is chosen at run time");
        if (type->function()->name() == "get_fastpath_enabled" &&
            (how_.split_attention || has_other_layers(modules_.back(), region, layers_))) {
          slow_.insert(modules_.back().get());
          replace(node, false);
          return;
        }
        inline_call(node, *type->function(), region, name);
        return;
      }
      case prim::CallMethod:
        inline_method(node, region, name);
        return;
      case prim::fork:
      case prim::awaitable:
      case prim::rpc_async:
      case prim::rpc_sync:
      case prim::rpc_remote:
      case prim::PythonOp:
        refuse_if(true, node, name, "uses " + std::string(node->kind().toQualString()));
        return;
      case prim::Enter: {
        const auto type = node->input(0)->type()->cast<c10::ClassType>();
        const bool autocast = type != nullptr && type->name()->name().find("autocast") != std::string::npos;
        refuse_if(autocast, node, name, "enters an autocast region of its own");
        break;
      }
      default:
        break;
    }
    const std::string_view op = node->kind().toQualString();
    if (op == "aten::is_autocast_enabled") {  // without an argument it asks for CUDA
      replace(node, region != at::kFloat && (device_ == c10::DeviceType::CUDA || !node->inputs().empty()));
      return;
    }
    if (op == "aten::is_autocast_cpu_enabled") {
      replace(node, region != at::kFloat && device_ == c10::DeviceType::CPU);
      return;
    }
    if (op == "aten::_transformer_encoder_layer_fwd" || op == "aten::_native_multi_head_attention") {
      const bool reached = !slow_.contains(modules_.back().get());
      refuse_if(reached && has_other_layers(modules_.back(), region, layers_), node, name,
                std::string("runs as one op, ") + std::string(op) +
                    ", but layers inside are planned otherwise; script the model, or trace it after "
                    "torch.backends.mha.set_fastpath_enabled(False)");
    }
    note(node, "region", region);
    for (torch::jit::Block* block : node->blocks()) visit(*block->nodes().begin(), block->return_node(), region, name);
  }

  void inline_method(Node* node, at::ScalarType region, const std::string& name) {
    const std::string& method = node->s(c10::attr::name);
    const auto type = node->input(0)->type()->cast<c10::ClassType>();
    refuse_if(type == nullptr, node, name, "calls the method '" + method + "' of an interface");
    const auto self = attribute_of(node->input(0), root_);
    refuse_if(type->is_module() && !self, node, name,
              "calls the method '" + method + "' of a module that is chosen at run time");
    std::string inner = name;
    if (type->is_module()) inner = path_of(node->input(0));
    at::ScalarType own = region;
    if (type->is_module() && is_forward(method)) {
      own = region_of(self->toObject(), region);
      called_.insert(self->toObject().get());
    }
    if (own != region) {
      torch::jit::WithInsertPoint before(node);
      std::unordered_map<Value*, Value*> casts;  // attention asks whether query, key and value are the same
      for (std::size_t i = 1; i < node->inputs().size(); ++i) {
        const auto [cast, is_new] = casts.emplace(node->input(i), nullptr);
        if (is_new) cast->second = border_cast(graph_, node->input(i), own);
        node->replaceInput(i, cast->second);
      }
    }
    // The code of a float32 layer knows no casts that would mend a mixture of types.
    if (type->is_module()) modules_.push_back(self->toObject());
    inline_call(node, type->getMethod(method), own, inner, region == at::kFloat && own != region);
    if (type->is_module()) modules_.pop_back();
  }

  void inline_call(Node* node, torch::jit::Function& function, at::ScalarType region, const std::string& name,
                   bool hands_on_float32 = false) {
    refuse_if(!function.isGraphFunction(), node, name, "calls '" + function.name() + "', which is not TorchScript");
    refuse_if(std::ranges::find(active_, &function) != active_.end(), node, name,
              "calls '" + function.name() + "', which calls itself");
    function.ensure_defined();
    const std::size_t skipped = node->kind() == prim::CallFunction ? 1 : 0;
    torch::jit::WithInsertPoint before(node);
    Node* const last_before = node->prev();
    const std::vector<Value*> results =
        insertGraph(graph_, *torch::jit::toGraphFunction(function).graph(), node->inputs().slice(skipped));
    TORCH_INTERNAL_ASSERT(results.size() == node->outputs().size());
    for (std::size_t i = 0; i < results.size(); ++i)
      node->output(i)->replaceAllUsesWith(hands_on_float32 ? border_cast(graph_, results[i], at::kFloat) : results[i]);
    active_.push_back(&function);
    visit(last_before->next(), node, region, name);
    active_.pop_back();
    node->destroy();
  }

  void replace(Node* node, bool value) {
    torch::jit::WithInsertPoint before(node);
    node->output()->replaceAllUsesWith(graph_.insertConstant(value));
    node->destroy();
  }

  void refuse_if(bool refused, const Node* node, const std::string& name, const std::string& what) const {
    if (!refused) return;
    std::ostringstream where;
    node->sourceRange().highlight(where);
    TORCH_CHECK_VALUE(false, how_.caller, ": ", name.empty() ? "the module" : "submodule '" + name + "'", " ", what,
                      "; that cannot be ", how_.done, ".\n", where.str());
  }

  torch::jit::Graph& graph_;
  const ModuleObject& root_;
  const LayerTypes& layers_;
  c10::DeviceType device_;
  const Inlining& how_;
  std::vector<const torch::jit::Function*> active_;
  std::vector<ModuleObject> modules_{root_};  // whose code it is; the last one's
  std::unordered_set<const c10::ivalue::Object*> called_;
  std::unordered_set<const c10::ivalue::Object*> slow_;  // told not to take their fused path
};

}  // namespace

void note(Node* node, std::string_view what, at::ScalarType type) {
  node->i_(note_named(what), static_cast<int>(type));
}

std::optional<at::ScalarType> noted(const Node* node, std::string_view what) {
  const c10::Symbol name = note_named(what);
  if (!node->hasAttribute(name)) return std::nullopt;
  return static_cast<at::ScalarType>(node->i(name));
}

void remove_notes(torch::jit::Block* block) {
  for (Node* node : block->nodes()) {
    for (const std::string_view what : {"region", "border", "cast"})
      if (noted(node, what)) node->removeAttribute(note_named(what));
    for (torch::jit::Block* inner : node->blocks()) remove_notes(inner);
  }
}

std::optional<c10::IValue> attribute_of(const Value* value, const ModuleObject& root) {
  const Node* const node = value->node();
  if (value == value->owningGraph()->inputs()[0]) return c10::IValue(root);
  if (node->kind() != prim::GetAttr) return std::nullopt;
  const auto owner = attribute_of(node->input(), root);
  if (!owner || !owner->isObject()) return std::nullopt;
  return owner->toObject()->getAttr(node->s(c10::attr::name));
}

std::unordered_set<const c10::ivalue::Object*> inline_calls(torch::jit::Graph& graph, const ModuleObject& root,
                                                            const LayerTypes& layers, at::ScalarType ambient,
                                                            c10::DeviceType device, const Inlining& how) {
  Inliner inliner(graph, root, layers, device, how);
  Node* const first = *graph.nodes().begin();
  const at::ScalarType region = inliner.region_of(root, ambient);
  inliner.visit(first, graph.return_node(), region, "");
  if (region == ambient) return std::move(inliner).called();
  torch::jit::WithInsertPoint before(*graph.nodes().begin());  // the module itself is a layer
  for (std::size_t i = 1; i < graph.inputs().size(); ++i) {
    Value* const input = graph.inputs()[i];
    const std::vector<torch::jit::Use> uses = input->uses();
    Value* const cast = border_cast(graph, input, region);
    if (cast == input) continue;
    for (const torch::jit::Use& use : uses) use.user->replaceInput(use.offset, cast);
  }
  return std::move(inliner).called();
}

}  // namespace halfstep::torch_ops
