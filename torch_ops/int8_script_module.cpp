// quantize(): modules that hold what a graph reads, and nothing else.
#include <algorithm>
#include <unordered_map>

#include <ATen/core/class_type.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/api/function_impl.h>

#include "int8_script_graph.h"

namespace halfstep::torch_ops {
namespace {

namespace prim = torch::jit::prim;
using torch::jit::Node;
using torch::jit::Value;

bool is_module(const c10::TypePtr& type) {
  const auto of = type->cast<c10::ClassType>();
  return of != nullptr && of->is_module();
}

bool is_attribute_access(const Node* node) {
  return node->kind() == prim::GetAttr || node->kind() == prim::SetAttr;
}

// Whether a value is an object of a TorchScript class, whose methods live in the original's compilation unit.
bool has_objects(torch::jit::Graph& graph) {
  bool found = false;
  for_each_node(graph.block(), [&](const Node* node) {
    found = found || std::ranges::any_of(node->outputs(), [](const Value* value) {
              return value->type()->kind() == c10::TypeKind::ClassType && !is_module(value->type());
            });
  });
  return found;
}

// Copies one submodule, as far as the graph uses it, and retypes the values of the graph that are the submodule.
class Rebuilder {
 public:
  explicit Rebuilder(torch::jit::Graph& graph) {
    for_each_node(graph.block(), [&](Node* node) {
      for (std::size_t i = 0; i < node->inputs().size(); ++i) {
        const bool known = i == 0 && is_attribute_access(node);
        TORCH_CHECK_VALUE(known || !is_module(node->input(i)->type()), "quantize: forward hands the module ",
                          node->input(i)->debugName(), " to ", node->kind().toQualString(),
                          "; that cannot be quantized");
      }
      if (is_attribute_access(node)) accesses_[node->input(0)].push_back(node);
    });
  }

  torch::jit::Module rebuild(const ModuleObject& of, const std::vector<Value*>& values,
                             const std::shared_ptr<torch::jit::CompilationUnit>& unit) {
    std::map<std::string, std::vector<Node*>> used;
    for (Value* const value : values)
      for (Node* const node : accesses_[value]) used[node->s(c10::attr::name)].push_back(node);
    torch::jit::Module copy(*of->type()->name(), unit, /*shouldMangle=*/true);
    for (std::size_t i = 0; i < of->slots().size(); ++i) {
      const std::string& name = of->type()->getAttributeName(i);
      const auto found = used.find(name);
      const c10::TypePtr& type = of->type()->getAttribute(i);
      if (found == used.end()) {
        if (name == "training") copy.register_attribute(name, type, of->getSlot(i));
        continue;
      }
      if (!is_module(type)) {
        add(copy, of, i);
        continue;
      }
      std::vector<Value*> inner;
      for (Node* const node : found->second) inner.push_back(node->output());
      copy.register_module(name, rebuild(of->getSlot(i).toObject(), inner, unit));
    }
    for (Value* const value : values) value->setType(copy.type());
    return copy;
  }

 private:
  void add(torch::jit::Module& copy, const ModuleObject& of, std::size_t i) {
    const std::string& name = of->type()->getAttributeName(i);
    const c10::IValue& value = of->getSlot(i);
    const bool is_parameter = of->type()->is_parameter(i);
    if (is_parameter && value.isTensor() && value.toTensor().defined()) {
      copy.register_parameter(name, value.toTensor().detach(), /*is_buffer=*/false);
      return;
    }
    // Objects of C++ classes have no state that forward changes: packed weights, and what watches.
    copy.register_attribute(name, of->type()->getAttribute(i), value.isCustomClass() ? value : value.deepcopy(copies_),
                            is_parameter, of->type()->is_buffer(i));
  }

  std::unordered_map<const Value*, std::vector<Node*>> accesses_;
  c10::IValue::HashIdentityIValueMap copies_;  // what is one object stays one
};

}  // namespace

std::optional<AttributePath> path_of(const Value* attribute) {
  const Node* const node = attribute->node();
  if (node->kind() != prim::GetAttr) return std::nullopt;
  AttributePath path{"", node->s(c10::attr::name)};
  for (const Node* at = node->input()->node(); at->kind() == prim::GetAttr; at = at->input()->node())
    path.module = at->s(c10::attr::name) + (path.module.empty() ? "" : "." + path.module);
  return path;
}

torch::jit::Module with_used_attributes(const ModuleObject& root, torch::jit::Graph& graph) {
  Rebuilder rebuilder(graph);
  // A unit keeps the classes that are made in it, so that of the original would grow with every copy.
  return rebuilder.rebuild(
      root, {graph.inputs().at(0)},
      has_objects(graph) ? root->compilation_unit() : std::make_shared<torch::jit::CompilationUnit>());
}

Value* insert_attribute(torch::jit::Module& module, torch::jit::Graph& graph, AttributePath path,
                        const c10::IValue& value, bool is_parameter) {
  const torch::jit::WithInsertPoint at_the_beginning(*graph.nodes().begin());
  Value* owner = graph.inputs().at(0);
  torch::jit::Module inner = module;
  for (std::size_t begin = 0; begin < path.module.size();) {
    const std::size_t end = std::min(path.module.find('.', begin), path.module.size());
    std::string name = path.module.substr(begin, end - begin);
    while (inner.hasattr(name) && !is_module(inner.type()->getAttribute(name))) name += "_";
    if (!inner.hasattr(name)) {
      torch::jit::Module empty(c10::QualifiedName("__torch__.Int8Layer"), inner._ivalue()->compilation_unit(),
                               /*shouldMangle=*/true);
      empty.register_attribute("training", c10::BoolType::get(), false);
      inner.register_module(name, empty);
    }
    owner = graph.insertGetAttr(owner, name);
    inner = inner.attr(name).toModule();
    begin = end + 1;
  }
  while (inner.hasattr(path.name)) path.name += "_";
  if (is_parameter) {
    inner.register_parameter(path.name, value.toTensor(), /*is_buffer=*/false);
  } else {
    inner.register_attribute(path.name, value.type(), value);
  }
  return graph.insertGetAttr(owner, path.name);
}

void add_forward(torch::jit::Module& module, const GraphPtr& graph, const c10::FunctionSchema& schema) {
  const c10::TypePtr own = module.type();
  const c10::TypePtr before = schema.arguments().at(0).type();
  torch::jit::Function* const function = module._ivalue()->compilation_unit()->create_function(
      c10::QualifiedName(*module.type()->name(), "forward"), graph);
  module.type()->addMethod(function);
  function->setSchema(
      schema.cloneWithRemappedTypes([&](const c10::TypePtr& type) { return *type == *before ? own : type; }));
}

}  // namespace halfstep::torch_ops
