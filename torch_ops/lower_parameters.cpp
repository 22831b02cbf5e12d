// lower(), third step: casts of parameters are made once, when the module is lowered.
#include <algorithm>
#include <array>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <unordered_set>

#include <torch/csrc/jit/ir/alias_analysis.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/common_subexpression_elimination.h>

#include "lower_graph.h"

namespace halfstep::torch_ops {
namespace {

namespace prim = torch::jit::prim;
using torch::jit::Node;
using torch::jit::Value;

// Views, of which the first argument is the tensor: they give the same before and after a cast.
constexpr auto kViews =
    std::to_array<std::string_view>({"expand", "flatten", "narrow", "permute", "reshape", "select", "slice", "squeeze",
                                     "t", "transpose", "unflatten", "unsqueeze", "view"});

template <class Run>
void for_each_node(torch::jit::Block* block, const Run& run) {
  for (auto it = block->nodes().begin(); it != block->nodes().end();) {
    Node* const node = *it++;
    for (torch::jit::Block* const inner : node->blocks()) for_each_node(inner, run);
    run(node);
  }
}

bool is_view(const Node* node) {
  if (node->kind() == prim::unchecked_cast) return true;
  return node->kind().is_aten() && std::ranges::find(kViews, node->kind().toUnqualString()) != kViews.end();
}

// The tensor of the module or the constant that a chain of views starts from; null for values that are computed.
const Node* source_of(const Value* value) {
  const Node* const node = value->node();
  if (node->kind() == prim::GetAttr || node->kind() == prim::Constant) return node;
  return is_view(node) ? source_of(node->input(0)) : nullptr;
}

// The type that all uses of a value want, if they are all casts to one. An optional that is known to be a tensor is
// used as what is made of it.
std::optional<at::ScalarType> wanted_type(const Value* value) {
  std::optional<at::ScalarType> type;
  for (const torch::jit::Use& use : value->uses()) {
    const bool named_anew = use.user->kind() == prim::unchecked_cast;
    const auto cast = named_anew ? wanted_type(use.user->output()) : noted(use.user, "cast");
    if (!cast || use.offset != 0 || (type && *type != *cast)) return std::nullopt;
    type = cast;
  }
  return type;
}

void remove_casts(Value* value) {
  const std::vector<torch::jit::Use> uses = value->uses();
  for (const torch::jit::Use& use : uses) {
    if (use.user->kind() == prim::unchecked_cast) {
      remove_casts(use.user->output());
      continue;
    }
    use.user->output()->replaceAllUsesWith(value);
    use.user->destroy();
  }
}

// What forward may write to, itself or views of it: a cast that is made earlier would miss what is written after it.
class Written {
 public:
  Written(const std::shared_ptr<torch::jit::Graph>& graph, const ModuleObject& root) : root_(root) {
    // "Frozen" tells attributes apart, where all of them are one for others; each read is a tensor of its own then.
    const torch::jit::AliasDb aliases(graph, /*isFrozen=*/true);
    std::vector<Value*> given;  // to attributes: what is read from these may be written
    for_each_node(graph->block(), [&](Node* node) {
      if (node->kind() != prim::SetAttr) return;
      assigned_.insert(node->s(c10::attr::name));
      given.push_back(node->input(1));
    });
    for_each_node(graph->block(), [&](Node* node) {
      if (node->kind() == prim::Constant && aliases.hasWriters(node->output())) constants_.insert(node);
      if (node->kind() != prim::GetAttr) return;
      const auto value = attribute_of(node->output(), root_);
      if (!value) return;
      const bool leaves =
          std::ranges::any_of(given, [&](Value* one) { return aliases.mayContainAlias(node->output(), one); });
      if (!leaves && !aliases.hasWriters(node->output())) return;
      if (value->isTensor()) memory_.insert(memory_of(value->toTensor()));
      if (!value->isTensorList()) return;
      for (const at::Tensor& tensor : value->toTensorVector()) memory_.insert(memory_of(tensor));
    });
  }

  // `source` is a constant or the read of an attribute.
  bool contains(const Node* source) const {
    if (source->kind() == prim::Constant) return constants_.contains(source);
    const auto value = attribute_of(source->output(), root_);
    if (!value || assigned_.contains(source->s(c10::attr::name))) return true;
    return value->isTensor() && memory_.contains(memory_of(value->toTensor()));
  }

 private:
  static const void* memory_of(const at::Tensor& tensor) {
    return tensor.defined() ? std::get<0>(TensorIdentity(tensor).key) : nullptr;
  }

  const ModuleObject& root_;
  std::unordered_set<std::string> assigned_;
  std::unordered_set<const Node*> constants_;
  std::unordered_set<const void*> memory_;
};

// A cast of a view of a parameter becomes a view of the parameter's cast.
void move_before_views(torch::jit::Graph& graph, const Written& written) {
  std::vector<Node*> views;
  for_each_node(graph.block(), [&](Node* node) {
    if (!is_view(node) || node->kind() == prim::unchecked_cast) return;  // what comes before it may be an optional
    const Node* const source = source_of(node->output());
    if (source != nullptr && !written.contains(source)) views.push_back(node);
  });
  std::set<Node*> moved;
  for (bool again = true; again;) {
    again = false;
    for (Node* const view : views) {
      const auto type = moved.contains(view) ? std::nullopt : wanted_type(view->output());
      if (!type) continue;
      remove_casts(view->output());
      torch::jit::WithInsertPoint before(view);
      Value* const cast =
          graph.insert(c10::aten::to, {view->input(0), static_cast<int>(*type), false, false, c10::IValue()});
      note(cast->node(), "cast", *type);
      view->replaceInput(0, cast);
      moved.insert(view);
      again = true;
    }
  }
}

void collect_identities(const ModuleObject& module, const std::unordered_set<std::string>& names,
                        std::set<TensorIdentity>& found) {
  for (std::size_t i = 0; i < module->slots().size(); ++i) {
    const c10::IValue& slot = module->getSlot(i);
    if (slot.isTensor() && slot.toTensor().defined() && names.contains(module->type()->getAttributeName(i)))
      found.emplace(slot.toTensor());
    if (slot.isObject() && slot.toObject()->type()->is_module()) collect_identities(slot.toObject(), names, found);
  }
}

// The names of the attributes that forward assigns, whatever module they are of.
std::unordered_set<std::string> assigned_names(torch::jit::Graph& graph) {
  std::unordered_set<std::string> names;
  for_each_node(graph.block(), [&](Node* node) {
    if (node->kind() == prim::SetAttr) names.insert(node->s(c10::attr::name));
  });
  return names;
}

// A list of tensors, made of the module's attributes that are these tensors; null if one of them is none.
Value* insert_elements(torch::jit::Graph& graph, Value* owner, const ModuleObject& module, const c10::IValue& list) {
  std::map<TensorIdentity, std::string> names;
  for (std::size_t i = 0; i < module->slots().size(); ++i) {
    const c10::IValue& slot = module->getSlot(i);
    if (slot.isTensor() && slot.toTensor().defined())
      names.emplace(slot.toTensor(), module->type()->getAttributeName(i));
  }
  std::vector<Value*> elements;
  for (const at::Tensor& tensor : list.toTensorVector()) {
    const auto name = names.find(TensorIdentity(tensor));
    if (name == names.end()) return nullptr;
    elements.push_back(graph.insertGetAttr(owner, name->second));
  }
  return graph.insertNode(graph.createList(c10::TensorType::get(), elements))->output();
}

void cast_constant(torch::jit::Graph& graph, Node* constant) {
  const auto type = wanted_type(constant->output());
  if (!type) return;
  remove_casts(constant->output());
  torch::jit::WithInsertPoint before(constant);
  Value* const cast = graph.insertConstant(torch::jit::toIValue(constant->output())->toTensor().to(*type));
  constant->output()->replaceAllUsesWith(cast);
  constant->destroy();
}

}  // namespace

TensorIdentity::TensorIdentity(const at::Tensor& tensor)
    : key(tensor.has_storage() ? static_cast<const void*>(tensor.storage().unsafeGetStorageImpl())
                               : tensor.unsafeGetTensorImpl(),
          static_cast<int>(tensor.scalar_type()), tensor.has_storage() ? tensor.storage_offset() : 0,
          tensor.sizes().vec(),
          tensor.layout() == at::kStrided ? tensor.strides().vec() : std::vector<std::int64_t>()) {}

void settle_attributes(torch::jit::Graph& graph, const ModuleObject& root) {
  const std::unordered_set<std::string> assigned = assigned_names(graph);
  for_each_node(graph.block(), [&](Node* node) {
    if (node->kind() != prim::GetAttr || assigned.contains(node->s(c10::attr::name))) return;
    const auto value = attribute_of(node->output(), root);
    if (!value) return;
    torch::jit::WithInsertPoint after(node->next());
    Value* settled = nullptr;
    if (value->isBool() || value->isNone()) {
      settled = graph.insertConstant(*value);
    } else if (value->isTensorList()) {
      settled = insert_elements(graph, node->input(), attribute_of(node->input(), root)->toObject(), *value);
    } else if (value->isTensor() && node->output()->type()->kind() == c10::TypeKind::OptionalType) {
      settled = graph.insertUncheckedCast(graph.insertGetAttr(node->input(), node->s(c10::attr::name)),
                                          c10::TensorType::get());
    }
    if (settled != nullptr) node->output()->replaceAllUsesWith(settled);
  });
}

TensorTypes hoist_casts(const std::shared_ptr<torch::jit::Graph>& graph, const ModuleObject& root) {
  const Written written(graph, root);
  move_before_views(*graph, written);
  torch::jit::EliminateCommonSubexpression(graph);
  std::map<TensorIdentity, std::vector<Node*>> reads;
  std::vector<Node*> constants;
  for_each_node(graph->block(), [&](Node* node) {
    if (node->kind() == prim::Constant && node->output()->type()->kind() == c10::TypeKind::TensorType &&
        !written.contains(node))
      constants.push_back(node);
    if (node->kind() != prim::GetAttr || !node->hasUses()) return;
    const auto value = attribute_of(node->output(), root);
    if (value && value->isTensor() && value->toTensor().defined())
      reads[TensorIdentity(value->toTensor())].push_back(node);
  });
  for (Node* const constant : constants) cast_constant(*graph, constant);

  std::set<TensorIdentity> assigned;
  collect_identities(root, assigned_names(*graph), assigned);
  TensorTypes types;
  for (const auto& [tensor, nodes] : reads) {
    const auto type = wanted_type(nodes.front()->output());
    const bool all = std::ranges::all_of(
        nodes, [&](Node* node) { return wanted_type(node->output()) == type && !written.contains(node); });
    if (!type || !all || assigned.contains(tensor)) continue;
    for (Node* const node : nodes) remove_casts(node->output());
    types.emplace(tensor, *type);
  }
  return types;
}

}  // namespace halfstep::torch_ops
