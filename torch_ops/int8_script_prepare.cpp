// quantize(): the graph in the shape in which layers are looked for. Products with constants are aten::linear, batch
// norms are in the convolutions before them, and nothing stands between a layer and its activation.
#include <array>
#include <tuple>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/ir/constants.h>

#include "int8_script_graph.h"

namespace halfstep::torch_ops {
namespace {

namespace aten = torch::jit::aten;
namespace prim = torch::jit::prim;
using torch::jit::Node;
using torch::jit::Value;

bool is_one(const Value* value) {
  const auto constant = torch::jit::toIValue(value);
  return constant && constant->isScalar() && constant->toScalar().toDouble() == 1.0;
}

// The only node that reads the value, but for its sizes; null if it has several, or is in another block.
Node* only_reader(const Value* value) {
  Node* reader = nullptr;
  for (const torch::jit::Use& use : value->uses()) {
    if (reads_shape(use.user)) continue;
    if (reader != nullptr || use.user->owningBlock() != value->node()->owningBlock()) return nullptr;
    reader = use.user;
  }
  return reader;
}

void replace(Node* node, Value* by) {
  node->output()->replaceAllUsesWith(by);
  node->destroy();
}

// The other way round, before the graph's insert point.
Value* transposed(torch::jit::Graph& graph, Value* matrix) {
  Node* const node = matrix->node();
  const bool is_transposed = node->kind() == aten::t || node->kind() == aten::numpy_T;
  return is_transposed ? node->input(0) : graph.insert(aten::t, {matrix});
}

void to_linear(torch::jit::Graph& graph, const Constants& constants, Node* node) {
  const bool addmm = node->kind() == aten::addmm;
  if (!addmm && node->kind() != aten::matmul && node->kind() != aten::mm) return;
  const auto weight = constants(node->input(addmm ? 2 : 1));
  if (!weight || weight->dim() != 2) return;
  if (addmm) {
    const auto bias = constants(node->input(0));
    if (!bias || bias->dim() != 1 || bias->size(0) != weight->size(1)) return;
    if (!is_one(node->input(3)) || !is_one(node->input(4))) return;
  }
  const torch::jit::WithInsertPoint before(node);
  Value* const matrix = transposed(graph, node->input(addmm ? 2 : 1));
  Value* const bias = addmm ? node->input(0) : graph.insertConstant(c10::IValue());
  Value* const linear = graph.insert(aten::linear, {node->input(addmm ? 1 : 0), matrix, bias});
  linear->node()->setSourceRange(node->sourceRange());
  replace(node, linear);
}

// linear(x, w) + b, where b is a constant vector.
void take_bias(torch::jit::Graph& graph, const Constants& constants, Node* node) {
  if (node->kind() != aten::linear || !node->input(2)->mustBeNone()) return;
  const auto weight = constants(node->input(1));
  Node* const add = only_reader(node->output());
  if (!weight || weight->dim() != 2 || add == nullptr || (add->kind() != aten::add && add->kind() != aten::add_))
    return;
  if (add->inputs().size() != 3 || !is_one(add->input(2))) return;
  const bool first = add->input(0) == node->output();
  if (!first && add->kind() == aten::add_) return;
  Value* const other = add->input(first ? 1 : 0);
  const auto bias = constants(other);
  if (!bias || bias->dim() != 1 || bias->size(0) != weight->size(0) || bias->scalar_type() != weight->scalar_type())
    return;
  const torch::jit::WithInsertPoint before(add);
  Value* const linear = graph.insert(aten::linear, {node->input(0), node->input(1), other});
  linear->node()->setSourceRange(node->sourceRange());
  replace(add, linear);
  replace(node, linear);
}

using Folded = std::tuple<at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

Folded call_fold(const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& var,
                 const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::fold_batch_norm", "")
                             .typed<Folded(const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                                           const at::Tensor&, const OptionalTensor&, const OptionalTensor&, double)>();
  return op.call(weight, bias, mean, var, norm_weight, norm_bias, eps);
}

bool is_convolution(const Node* node) {
  const auto kind = node->kind();
  if (kind == aten::_convolution || kind == aten::convolution)
    return torch::jit::toIValue(node->input(6)) == c10::IValue(false);
  return kind == aten::conv1d || kind == aten::conv2d;
}

}  // namespace

void to_linear(const GraphPtr& graph, const ModuleObject& root) {
  const Constants constants(graph, root);
  for_each_node(graph->block(), [&](Node* node) {
    const std::string_view op = node->kind().toQualString();
    const bool dropout = op == "aten::dropout" || op == "aten::feature_dropout" || op == "aten::alpha_dropout" ||
                         op == "aten::dropout_" || op == "aten::feature_dropout_" || op == "aten::alpha_dropout_";
    if (dropout && torch::jit::toIValue(node->input(2)) == c10::IValue(false)) {
      replace(node, node->input(0));
    } else if (node->kind() == aten::view && node->input(1)->type()->kind() == c10::TypeKind::ListType) {
      // int8 convolutions answer in channels last, of which few views can be taken; a reshape is a view where it can
      // be.
      const torch::jit::WithInsertPoint before(node);
      replace(node, graph->insert(aten::reshape, {node->input(0), node->input(1)}));
    } else {
      to_linear(*graph, constants, node);
    }
  });
  std::vector<Node*> linears;
  for_each_node(graph->block(), [&](Node* node) { linears.push_back(node); });
  const Constants again(graph, root);
  std::erase_if(linears, [](const Node* node) { return node->kind() != aten::linear; });
  for (Node* const linear : linears) take_bias(*graph, again, linear);
}

std::vector<std::pair<std::string, std::string>> fold_batch_norms(const GraphPtr& graph, torch::jit::Module& module) {
  const Constants constants(graph, module._ivalue());
  std::vector<Node*> norms;
  for_each_node(graph->block(), [&](Node* node) {
    if (node->kind() == aten::batch_norm) norms.push_back(node);
  });
  std::vector<std::pair<std::string, std::string>> folded;
  for (Node* const norm : norms) {
    Node* const conv = norm->input(0)->node();
    if (!is_convolution(conv) || only_reader(conv->output()) != norm) continue;
    if (torch::jit::toIValue(norm->input(5)) != c10::IValue(false)) continue;  // in training
    const auto eps = torch::jit::toIValue(norm->input(7));
    const auto weight = constants(conv->input(1)), mean = constants(norm->input(3)), var = constants(norm->input(4));
    const auto source = Constants::source_of(conv->input(1)), of_norm = Constants::source_of(norm->input(3));
    const auto optional = [&](Value* value, OptionalTensor& tensor) {
      tensor = constants(value);
      return tensor.has_value() || value->mustBeNone();
    };
    OptionalTensor bias, norm_weight, norm_bias;
    if (!weight || !mean || !var || !source || !eps || !eps->isDouble()) continue;
    if (!optional(conv->input(2), bias) || !optional(norm->input(1), norm_weight) ||
        !optional(norm->input(2), norm_bias))
      continue;
    const auto [new_weight, new_bias] = call_fold(*weight, bias, *mean, *var, norm_weight, norm_bias, eps->toDouble());
    conv->replaceInput(1, insert_attribute(module, *graph, *source, new_weight, /*is_parameter=*/true));
    conv->replaceInput(2, insert_attribute(module, *graph, {source->module, "bias"}, new_bias, /*is_parameter=*/true));
    replace(norm, conv->output());
    folded.emplace_back(of_norm ? of_norm->module : norm->output()->debugName(), source->module);
  }
  return folded;
}

}  // namespace halfstep::torch_ops
