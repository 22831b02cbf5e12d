// quantize(): layer and RMS norms that can write int8, and the op that they become. Which do: int8_script_rewrite.cpp.
#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include <torch/csrc/jit/ir/constants.h>

#include "int8_script_graph.h"

namespace halfstep::torch_ops {
namespace {

namespace prim = torch::jit::prim;
using torch::jit::Node;
using torch::jit::Value;

// The first arguments of both ops, the float one and that to int8: input, normalized_shape, weight, of a layer norm
// bias, eps.
constexpr std::size_t kShape = 1, kWeight = 2, kBias = 3;

bool has_bias(const Node* norm) {
  return norm->kind() == torch::jit::aten::layer_norm;
}

bool is_absent_or_stored(const Value* parameter) {
  const Node* node = parameter->node();
  if (node->kind() == prim::unchecked_cast) node = node->input()->node();
  return node->kind() == prim::GetAttr || node->kind() == prim::Constant;
}

bool has_one_element(const Value* list) {
  if (list->node()->kind() == prim::ListConstruct) return list->node()->inputs().size() == 1;
  const auto constant = torch::jit::toIValue(list);
  return constant && constant->isIntList() && constant->toIntList().size() == 1;
}

bool can_write_int8(const Node* node) {
  const bool norm = node->kind() == torch::jit::aten::layer_norm || node->kind() == torch::jit::aten::rms_norm;
  return norm && has_one_element(node->input(kShape)) && is_absent_or_stored(node->input(kWeight)) &&
         (!has_bias(node) || is_absent_or_stored(node->input(kBias)));
}

}  // namespace

std::vector<ScriptNorm> find_norms(torch::jit::Graph& graph) {
  std::vector<ScriptNorm> norms;
  std::map<std::string, std::size_t> unnamed;
  for_each_node(graph.block(), [&](Node* node) {
    if (!can_write_int8(node)) return;
    auto source = Constants::source_of(node->input(kWeight));
    if (!source && has_bias(node)) source = Constants::source_of(node->input(kBias));
    std::string name = source ? name_of(*source) : node->kind().toUnqualString();
    if (!source && unnamed[name]++ > 0) name.append("_").append(std::to_string(unnamed[name] - 1));
    norms.push_back({node, std::move(name)});
  });
  return norms;
}

bool is_written_before(const torch::jit::AliasDb& aliases, torch::jit::Graph& graph, const ScriptNorm& norm,
                       const std::vector<Node*>& readers) {
  bool written = aliases.hasWriters(norm.node->input(kShape));
  for_each_node(graph.block(), [&](Node* node) {
    if (!node->blocks().empty() || !aliases.writesToAlias(node, {norm.node->output()})) return;
    written = written || std::ranges::any_of(readers, [&](const Node* reader) {
                // In a block of its own, which may run again: what is behind the reader is before its next run.
                return reader->owningBlock() != norm.node->owningBlock() || !node->isAfter(reader);
              });
  });
  return written;
}

Int8NormValues insert_int8_norm(torch::jit::Graph& graph, Node* norm, const std::vector<Node*>& readers,
                                std::optional<double> scale, std::int64_t zero_point) {
  const torch::jit::WithInsertPoint before(norm);
  const auto takes_int8 = [&](Node* node) { return std::ranges::find(readers, node) != readers.end(); };
  const std::vector<Node*> all = readers_of(norm->output());
  const bool keep_float = !std::ranges::all_of(all, takes_int8);
  const std::ptrdiff_t shared = has_bias(norm) ? 5 : 4;
  std::vector<Value*> inputs(norm->inputs().begin(), norm->inputs().begin() + shared);
  for (const c10::IValue& each :
       {scale ? c10::IValue(*scale) : c10::IValue(), c10::IValue(zero_point), c10::IValue(keep_float)})
    inputs.push_back(graph.insertConstant(each));
  const auto op = c10::Symbol::fromQualString(has_bias(norm) ? "halfstep::layer_norm_int8" : "halfstep::rms_norm_int8");
  Node* const made = graph.insertNode(graph.create(op, inputs, 3));
  made->setSourceRange(norm->sourceRange());
  Value* const quantized = made->output(0);
  for (Node* const reader : readers) reader->replaceInputWith(norm->output(), quantized);
  norm->output()->replaceAllUsesWith(keep_float ? made->output(2) : quantized);  // what is left without: sizes
  norm->destroy();
  return {quantized, made->output(1)};
}

}  // namespace halfstep::torch_ops
