// quantize(): what the nodes of a graph do, as far as the steps on it ask.
#include <algorithm>
#include <array>

#include <torch/csrc/jit/ir/constants.h>

#include "int8_script_graph.h"

namespace halfstep::torch_ops {

namespace aten = torch::jit::aten;
using torch::jit::Node;
using torch::jit::Value;

bool reads_shape(const Node* node) {
  constexpr auto kReaders = std::to_array<std::string_view>({"dim", "len", "numel", "size", "sym_size"});
  return node->kind().is_aten() && std::ranges::find(kReaders, node->kind().toUnqualString()) != kReaders.end();
}

std::vector<Node*> readers_of(const Value* value) {
  std::vector<Node*> readers;
  for (const torch::jit::Use& use : value->uses())
    if (!reads_shape(use.user)) readers.push_back(use.user);
  return readers;
}

std::string activation_of(const Node* node) {
  const auto constant = [&](std::size_t i) { return torch::jit::toIValue(node->input(i)); };
  const std::string_view op = node->kind().toQualString();
  if (op == "aten::relu" || op == "aten::relu_") return "relu";
  if (op == "aten::relu6" || op == "aten::relu6_") return "relu6";
  if (op == "aten::silu" || op == "aten::silu_") return "silu";
  if (op == "aten::hardswish" || op == "aten::hardswish_") return "hardswish";
  if (op == "aten::hardtanh" || op == "aten::hardtanh_") {
    const auto low = constant(1), high = constant(2);
    const bool scalars = low && high && low->isScalar() && high->isScalar();
    return scalars && low->toScalar().toDouble() == 0.0 && high->toScalar().toDouble() == 6.0 ? "relu6" : "";
  }
  if (op == "aten::gelu") {
    const auto way = constant(1);
    if (way && way->isString()) return way->toStringRef() == "tanh" ? "gelu_tanh" : "gelu";
  }
  return "";
}

bool moves_values(const Node* node) {
  // These move values and change none, so that they commute with quantization.
  constexpr auto kMovers = std::to_array<std::string_view>(
      {"aten::contiguous", "aten::detach", "aten::flatten", "aten::movedim", "aten::permute", "aten::reshape",
       "aten::squeeze", "aten::t", "aten::transpose", "aten::unflatten", "aten::unsqueeze"});
  if (node->kind() == aten::max_pool2d) return true;
  return std::ranges::find(kMovers, node->kind().toQualString()) != kMovers.end();
}

Node* move_int8(torch::jit::Graph& graph, Node* node) {
  if (node->kind() != aten::max_pool2d) return node;
  const torch::jit::WithInsertPoint before(node);
  Node* const pool = graph.insertNode(  // of the same arguments
      graph.create(c10::Symbol::fromQualString("halfstep::int8_max_pool2d"), node->inputs(), 1));
  pool->setSourceRange(node->sourceRange());
  node->output()->replaceAllUsesWith(pool->output());
  node->destroy();
  return pool;
}

}  // namespace halfstep::torch_ops
