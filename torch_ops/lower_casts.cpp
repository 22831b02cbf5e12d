// lower(), second step: the casts that autocast would make, where they are not known to do nothing.
#include <algorithm>
#include <array>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include <c10/util/Exception.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/runtime/operator.h>

#include "autocast_ops.h"
#include "lower_graph.h"
#include "lower_types.h"

namespace halfstep::torch_ops {
namespace {

namespace prim = torch::jit::prim;
using torch::jit::Node;
using torch::jit::Value;

// Made of products, but in no list of a device's where torch's autocast casts within them. In traced modules some stand
// for what autocast sees one level above.
constexpr std::array<std::string_view, 18> kMadeOfProducts{"_convolution",
                                                           "_native_multi_head_attention",
                                                           "_transformer_encoder_layer_fwd",
                                                           "chain_matmul",
                                                           "convolution",
                                                           "einsum",
                                                           "gru",
                                                           "gru_cell",
                                                           "inner",
                                                           "linalg_matmul",
                                                           "linalg_multi_dot",
                                                           "lstm",
                                                           "lstm_cell",
                                                           "rnn_relu",
                                                           "rnn_relu_cell",
                                                           "rnn_tanh",
                                                           "rnn_tanh_cell",
                                                           "tensordot"};

// Their kernels read half and compute in float32.
constexpr std::array<std::string_view, 6> kHalfReductions{"embedding",         "group_norm", "layer_norm",
                                                          "native_layer_norm", "rms_norm",   "softmax"};

AutocastClass class_of(const Node* node, c10::DeviceType device, bool half_reductions) {
  const torch::jit::Operator* const op = node->maybeOperator();
  if (op == nullptr || !node->kind().is_aten()) return AutocastClass::kNone;
  if (half_reductions && std::ranges::find(kHalfReductions, node->kind().toUnqualString()) != kHalfReductions.end())
    return AutocastClass::kLowerPrecision;
  const AutocastClass listed = autocast_class(op->schema().operator_name(), device);
  if (listed != AutocastClass::kNone) return listed;
  const bool products = std::ranges::find(kMadeOfProducts, node->kind().toUnqualString()) != kMadeOfProducts.end();
  return products ? AutocastClass::kLowerPrecision : AutocastClass::kNone;
}

class CastInserter {
 public:
  CastInserter(torch::jit::Graph& graph, const ModuleObject& root, c10::DeviceType device, bool half_reductions)
      : graph_(graph), device_(device), half_reductions_(half_reductions), types_(graph, root) {}

  void visit(torch::jit::Block* block) {
    for (auto it = block->nodes().begin(); it != block->nodes().end();) {
      Node* const node = *it++;  // which may be replaced
      if (const auto border = noted(node, "border")) {
        torch::jit::WithInsertPoint before(node);
        node->output()->replaceAllUsesWith(cast_tensor(node->input(0), *border));
        node->destroy();
        continue;
      }
      const at::ScalarType region = noted(node, "region").value_or(at::kFloat);
      Node* const result = region == at::kFloat ? node : cast_inputs(node, region);
      for (torch::jit::Block* const inner : result->blocks()) {
        types_.enter(inner);
        visit(inner);
      }
      types_.infer(result);
    }
  }

 private:
  // Returns the node, or what took its place.
  Node* cast_inputs(Node* node, at::ScalarType half) {
    torch::jit::WithInsertPoint before(node);
    switch (class_of(node, device_, half_reductions_)) {
      case AutocastClass::kNone:
        return node;
      case AutocastClass::kLowerPrecision:
        return cast_all(node, half);
      case AutocastClass::kFloat32:
        return cast_all(node, at::kFloat);
      case AutocastClass::kFloat32SetDtype:
        return set_dtype(node);
      case AutocastClass::kFloat32AppendDtype:
        return append_dtype(node);
      case AutocastClass::kPromote:
        return promote(node, half);
      case AutocastClass::kBanned:
        TORCH_CHECK_VALUE(false, "lower: ", node->kind().toQualString(),
                          " is unsafe in half precision, and autocast refuses it; plan its layer as float32, or use "
                          "binary_cross_entropy_with_logits");
    }
    return node;
  }

  Node* cast_all(Node* node, at::ScalarType type) {
    const bool indexed = node->kind() == c10::aten::embedding;  // by integers, which no cast needs to look at
    const std::size_t count = indexed ? 1 : node->inputs().size();
    for (std::size_t i = 0; i < count; ++i) node->replaceInput(i, cast(node->input(i), type));
    return node;
  }

  Value* cast(Value* value, at::ScalarType type) {
    if (types_.is_tensor(value)) return cast_tensor(value, type);
    if (types_.is_optional_tensor(value)) return value->mustBeNone() ? value : by_helper("cast_optional", value, type);
    if (!types_.is_tensor_list(value)) return value;
    if (already(types_.of(value), type)) return value;
    if (value->node()->kind() != prim::ListConstruct || types_.is_written(value))
      return by_helper("cast_list", value, type);
    std::vector<Value*> elements;
    for (Value* const element : value->node()->inputs()) elements.push_back(cast_tensor(element, type));
    Node* const list = graph_.insertNode(graph_.createList(c10::TensorType::get(), elements));
    types_.infer(list);
    return list->output();
  }

  Value* by_helper(std::string_view helper, Value* value, at::ScalarType type) {
    Value* const result = insert_helper(graph_, helper, {value, graph_.insertConstant(static_cast<int>(type))});
    types_.set(result, after_cast(types_.of(value), type));
    return result;
  }

  // One op where it is known what it has to do, or can do it by itself.
  Value* cast_tensor(Value* value, at::ScalarType type) {
    const TypeSet from = types_.of(value);
    if (already(from, type)) return value;
    const TypeSet to = type_set(type);
    Value* result = nullptr;
    if ((from & (to | kOtherType)) == 0) {
      result = graph_.insert(c10::aten::to, {value, static_cast<int>(type), false, false, c10::IValue()});
    } else if (type == at::kFloat) {
      result = graph_.insert(c10::Symbol::aten("_autocast_to_full_precision"), {value, true, true});
    } else if ((from & ~(to | kFloat32Type | kOtherType)) == 0) {
      result = graph_.insert(c10::Symbol::aten("_autocast_to_reduced_precision"),
                             {value, true, true, static_cast<int>(type), static_cast<int>(type)});
    } else {
      return by_helper("cast", value, type);
    }
    note(result->node(), "cast", type);
    types_.set(result, after_cast(from, type));
    return result;
  }

  Node* set_dtype(Node* node) {
    const int index = node->schema().argumentIndexWithName("dtype").value_or(-1);
    TORCH_INTERNAL_ASSERT(index >= 0, node->kind().toQualString());
    const TypeSet first = types_.of(node->input(0));
    if (!node->input(static_cast<std::size_t>(index))->mustBeNone() || first == kOtherType) return node;
    Value* const dtype = (first & kOtherType) != 0 ? insert_helper(graph_, "float32_if_floating", {node->input(0)})
                                                   : graph_.insertConstant(static_cast<int>(at::kFloat));
    node->replaceInput(static_cast<std::size_t>(index), dtype);
    return node;
  }

  // aten::norm: the overload that takes a dtype has one more argument, the last one.
  Node* append_dtype(Node* node) {
    if ((types_.of(node->input(0)) & kOtherType) != 0) return cast_all(node, at::kFloat);
    Node* const with_dtype = graph_.create(node->kind(), node->inputs());
    with_dtype->addInput(graph_.insertConstant(static_cast<int>(at::kFloat)));
    with_dtype->copyMetadata(node);
    with_dtype->output()->copyMetadata(node->output());
    graph_.insertNode(with_dtype);
    TORCH_INTERNAL_ASSERT(with_dtype->maybeOperator() != nullptr, node->schema());
    note(with_dtype, "region", *noted(node, "region"));
    node->output()->replaceAllUsesWith(with_dtype->output());
    node->destroy();
    return with_dtype;
  }

  Node* promote(Node* node, at::ScalarType half) {
    std::vector<Value*> voters;  // optionals have no vote
    bool all_half = true, one_float = false;
    for (Value* const input : node->inputs()) {
      if (!types_.is_tensor(input) && !types_.is_tensor_list(input)) continue;
      voters.push_back(input);
      const TypeSet of = types_.of(input);
      all_half = all_half && already(of, half);
      one_float = one_float || surely_float32(input);
    }
    if (all_half) return node;
    if (one_float) return cast_all(node, at::kFloat);
    Value* dtype = graph_.insertConstant(static_cast<int>(half));
    std::vector<Value*> tensors;
    for (Value* const voter : voters) {
      if (types_.is_tensor(voter))
        tensors.push_back(voter);
      else
        dtype = insert_helper(graph_, "widest", {voter, dtype});
    }
    if (!tensors.empty()) {
      Value* const list = graph_.insertNode(graph_.createList(c10::TensorType::get(), tensors))->output();
      dtype = insert_helper(graph_, "widest", {list, dtype});
    }
    for (std::size_t i = 0; i < node->inputs().size(); ++i) {
      Value* const input = node->input(i);
      const bool optional = types_.is_optional_tensor(input) && !input->mustBeNone();
      if (!types_.is_tensor(input) && !types_.is_tensor_list(input) && !optional) continue;
      const char* const helper = optional ? "cast_optional" : types_.is_tensor(input) ? "cast" : "cast_list";
      Value* const result = insert_helper(graph_, helper, {input, dtype});
      types_.set(result, (types_.of(input) & kOtherType) | type_set(half) | kFloat32Type);
      node->replaceInput(i, result);
    }
    return node;
  }

  bool surely_float32(Value* value) const {
    if (types_.is_tensor(value)) return types_.of(value) == kFloat32Type;
    const auto elements = value->node()->inputs();
    return value->node()->kind() == prim::ListConstruct && !types_.is_written(value) &&
           std::ranges::any_of(elements, [&](Value* element) { return types_.of(element) == kFloat32Type; });
  }

  torch::jit::Graph& graph_;
  c10::DeviceType device_;
  bool half_reductions_;
  TypeInference types_;
};

}  // namespace

void insert_casts(torch::jit::Graph& graph, const ModuleObject& root, c10::DeviceType device, bool half_reductions) {
  CastInserter(graph, root, device, half_reductions).visit(graph.block());
}

}  // namespace halfstep::torch_ops
