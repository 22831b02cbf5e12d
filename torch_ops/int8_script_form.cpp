// The float form of a scripted or traced module, and the modules that are made of it. Contract: int8_script_graph.h.
#include <ATen/core/class_type.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/common_subexpression_elimination.h>
#include <torch/csrc/jit/passes/constant_propagation.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>
#include <torch/csrc/jit/passes/lower_tuples.h>
#include <torch/csrc/jit/passes/peephole.h>
#include <torch/csrc/jit/passes/shape_analysis.h>

#include "int8_script_graph.h"

namespace halfstep::torch_ops {
namespace {

namespace prim = torch::jit::prim;
using torch::jit::Node;
using torch::jit::Value;

void to_eval(const ModuleObject& module) {
  for (std::size_t i = 0; i < module->slots().size(); ++i) {
    const c10::IValue slot = module->getSlot(i);
    if (module->type()->getAttributeName(i) == "training" && slot.isBool()) module->setSlot(i, false);
    if (module->type()->getAttribute(i)->is_module() && slot.isObject()) to_eval(slot.toObject());
  }
}

}  // namespace

torch::jit::Module copied_for_inference(const torch::jit::Module& module) {
  const std::string name = module.type()->name()->name();
  TORCH_CHECK_VALUE(module.find_method("forward"), "quantize: module is a ", name,
                    " without a method forward, which is what is quantized");
  TORCH_CHECK_VALUE(module.type()->getForwardHooks().empty() && module.type()->getForwardPreHooks().empty(),
                    "quantize: module has forward hooks of its own, which the int8 forward would not call; move them "
                    "into forward, or make it a submodule of another one");
  torch::jit::Module copy = module.deepcopy();
  to_eval(copy._ivalue());
  return copy;
}

c10::IValue call_module(const torch::jit::Module& module, const std::vector<c10::IValue>& arguments) {
  std::vector<c10::IValue> copies;
  for (const c10::IValue& argument : arguments) copies.push_back(argument.deepcopy());
  return module.get_method("forward")(std::move(copies));
}

namespace {

GraphPtr inlined(const torch::jit::Module& module) {
  GraphPtr graph = module.get_method("forward").graph()->copy();
  const ModuleObject root = module._ivalue();
  const Inlining how{"quantize", "quantized", /*split_attention=*/true};
  inline_calls(*graph, root, {}, at::kFloat, c10::DeviceType::CPU, how);
  remove_notes(graph->block());
  torch::jit::EraseShapeInformation(graph);  // tracing notes the types it saw
  settle_attributes(*graph, root);
  for (int i = 0; i < 2; ++i) {
    torch::jit::ConstantPropagationImmutableTypes(graph);
    torch::jit::LowerSimpleTuples(graph);
    torch::jit::PeepholeOptimize(graph, /*disable_shape_peepholes=*/true);
  }
  torch::jit::EliminateDeadCode(graph);
  return graph;
}

// self.method(number, values...) before a node.
void insert_call(torch::jit::Graph& graph, Node* before, Value* self, const char* method, std::size_t number,
                 at::ArrayRef<Value*> values) {
  const torch::jit::WithInsertPoint insert(before);
  std::vector<Value*> inputs{self, graph.insertConstant(static_cast<std::int64_t>(number))};
  inputs.insert(inputs.end(), values.begin(), values.end());
  Node* const call = graph.create(prim::CallMethod, inputs);
  call->s_(c10::attr::name, method);
  call->output()->setType(c10::NoneType::get());
  graph.insertNode(call);
}

}  // namespace

ScriptForm::ScriptForm(const torch::jit::Module& module, bool fold_batch_norm) {
  const at::NoGradGuard inference;  // what the graph asks of grad mode is folded
  const torch::jit::Module copy = copied_for_inference(module);
  graph_ = inlined(copy);
  schema_.push_back(copy.get_method("forward").function().getSchema());
  root_ = with_used_attributes(copy._ivalue(), *graph_);
  to_linear(graph_, root_._ivalue());
  if (fold_batch_norm) folded_ = fold_batch_norms(graph_, root_);
  torch::jit::EliminateDeadCode(graph_);
  layers_ = find_layers(graph_, root_._ivalue(), left_);
  note_sums(*graph_);
  graph_->lint();
}

void ScriptForm::probe(const std::vector<c10::IValue>& arguments) {
  const auto watch = c10::make_intrusive<Watch>();
  watch->compare = [&](std::size_t sum, const at::Tensor& one, const at::Tensor& other) {
    const bool same = one.sizes() == other.sizes() && one.scalar_type() == other.scalar_type();
    // Of a batch of one a constant may have the shape by chance, and be expanded to the next.
    if (!same) different_.insert(sum);
    if (same && one.is_floating_point() && one.dim() > 1 && one.size(0) > 1) alike_.insert(sum);
  };
  const torch::jit::Module probing = finished([&](torch::jit::Module& module, const GraphPtr& graph) {
    Value* const self = insert_attribute(module, *graph, {"", "halfstep_watch"}, c10::IValue(watch));
    for_each_node(graph->block(), [&](Node* node) {
      const auto sum = noted_sum(node);
      if (sum) insert_call(*graph, node, self, "compare", *sum, {node->input(0), node->input(1)});
    });
  });
  const at::NoGradGuard inference;
  call_module(probing, arguments);
  for (const std::size_t sum : different_) alike_.erase(sum);
}

at::Device ScriptForm::device() const {
  return layers_.empty() ? at::Device(at::kCPU) : layers_.front().weight.device();
}

torch::jit::Module ScriptForm::finished(const std::function<void(torch::jit::Module&, const GraphPtr&)>& edit) const {
  const at::NoGradGuard inference;
  const GraphPtr graph = graph_->copy();
  torch::jit::Module whole = with_used_attributes(root_._ivalue(), *graph);
  edit(whole, graph);
  remove_layer_notes(*graph);
  torch::jit::EliminateDeadCode(graph);
  torch::jit::Module module = with_used_attributes(whole._ivalue(), *graph);
  add_forward(module, graph, schema_.front());
  graph->lint();
  return module;
}

torch::jit::Module ScriptForm::watched(const c10::intrusive_ptr<Watch>& watch) const {
  return finished([&](torch::jit::Module& module, const GraphPtr& graph) {
    const c10::IValue object(watch);
    Value* const self = insert_attribute(module, *graph, {"", "halfstep_watch"}, object);
    for_each_node(graph->block(), [&](Node* node) {
      const auto layer = noted_layer(node);
      if (layer) insert_call(*graph, node, self, "see", *layer, {input_of_product(node)});
    });
  });
}

torch::jit::Module ScriptForm::calling() const {
  return finished([&](torch::jit::Module&, const GraphPtr& graph) {
    for_each_node(graph->block(), [&](Node* node) {
      const auto layer = noted_layer(node);
      if (!layer) return;
      const torch::jit::WithInsertPoint before(node);
      Value* const result = graph->insert(c10::Symbol::fromQualString("halfstep::script_layer"),
                                          {input_of_product(node), layers_[*layer].name});
      node->output()->replaceAllUsesWith(result);
      node->destroy();
    });
  });
}

ScriptForm::Built ScriptForm::build(const std::map<std::size_t, ScriptSettings>& settings,
                                    std::optional<at::ScalarType> out_dtype) const {
  Built built;
  built.module = finished([&](torch::jit::Module& module, const GraphPtr& graph) {
    std::map<std::size_t, Value*> values;
    const auto packed_value = [&](std::size_t layer) {
      Value*& value = values[layer];
      if (value == nullptr) {
        value = insert_attribute(module, *graph, {layers_[layer].name, "packed"}, settings.at(layer).packed);
      }
      return value;
    };
    built.regions = make_int8(graph, layers_, settings, out_dtype, alike_, packed_value);
  });
  return built;
}

}  // namespace halfstep::torch_ops
