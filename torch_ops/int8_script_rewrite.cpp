// quantize(): products become int8 ops, take over their activations, and pass int8 on where all readers take it.
#include <algorithm>
#include <array>
#include <set>
#include <unordered_map>

#include <ATen/ops/full.h>
#include <ATen/ops/max_pool2d.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/ir/alias_analysis.h>
#include <torch/csrc/jit/ir/constants.h>

#include "int8_script_graph.h"

namespace halfstep::torch_ops {
namespace {

namespace aten = torch::jit::aten;
using torch::jit::Node;
using torch::jit::Value;

// These move values and change none, so that they commute with quantization.
constexpr auto kMovers = std::to_array<std::string_view>(
    {"aten::contiguous", "aten::detach", "aten::flatten", "aten::movedim", "aten::permute", "aten::reshape",
     "aten::squeeze", "aten::t", "aten::transpose", "aten::unflatten", "aten::unsqueeze"});

// Whether torch's max_pool2d takes int8 on this device, and pads with what is smaller than every value. On the CPU it
// counts the places of a channels-last picture, which int8 convolutions give, in int8: up to 127.
bool pools_int8(at::Device device) {
  const at::Tensor x = at::full({1, 2, 16, 16}, -128, at::TensorOptions(device).dtype(at::kChar))
                           .contiguous(at::MemoryFormat::ChannelsLast);
  try {
    const at::Tensor out = at::max_pool2d(x, {3, 3}, {1, 1}, {1, 1});
    return out.scalar_type() == at::kChar && out.equal(x);
  } catch (const c10::Error&) {  // "not implemented for 'Char'", or too many places
    return false;
  }
}

// "" for a node that is none.
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

struct Site {
  Node* node;  // the float product, until all is decided
  std::size_t layer;
  std::string activation = "none";
  bool residual = false;                // the node's last input, which other sites may replace
  const ScriptSettings* out = nullptr;  // of the readers, where int8 passes on
  bool reads_int8 = false;
};

class Rewriter {
 public:
  Rewriter(torch::jit::Graph& graph, const std::vector<ScriptLayer>& layers,
           const std::map<std::size_t, ScriptSettings>& settings, std::optional<at::ScalarType> out_dtype,
           at::Device device)
      : graph_(graph), layers_(layers), settings_(settings), out_dtype_(out_dtype), pools_int8_(pools_int8(device)) {
    for_each_node(graph.block(), [&](Node* node) {
      const auto layer = noted_layer(node);
      if (layer && settings.contains(*layer)) sites_.push_back({node, *layer});
    });
    for (Site& site : sites_) by_node_[site.node] = &site;
  }

  void take_activations() {
    for (Site& site : sites_) {
      Node* const reader = only_reader(site);
      if (reader == nullptr || site.activation != "none") continue;
      const std::string activation = activation_of(reader);
      if (activation.empty()) continue;
      site.activation = activation;
      take_over(site, reader, activation);
    }
  }

  // The addition of a tensor of the same shape. The product moves to where that is computed, if nothing is written that
  // it reads.
  void take_residuals(const GraphPtr& graph, const std::unordered_set<std::size_t>& alike) {
    std::ranges::for_each(sites_, [&](Site& site) {
      Node* const sum = only_reader(site);
      if (sum == nullptr || site.activation != "none" || site.residual) return;
      const auto number = noted_sum(sum);
      if (!number || !alike.contains(*number)) return;
      const bool first = sum->input(0) == site.node->output();
      if (!first && sum->kind() == aten::add_) return;        // others may see what the addition writes
      torch::jit::AliasDb aliases(graph, /*isFrozen=*/true);  // a new one each time, as nodes are destroyed
      if (!aliases.moveBeforeTopologicallyValid(site.node, sum)) return;
      site.residual = true;
      site.node->addInput(sum->input(first ? 1 : 0));  // it is read, by what is no product
      take_over(site, sum, "residual");
    });
  }

  void pass_int8() {
    for (Site& site : sites_) {
      if (is_embedding(site)) continue;
      const std::vector<Site*> readers = int8_readers(site);
      if (readers.empty()) continue;
      site.out = &settings_.at(readers[0]->layer);
      note(site, "int8 out");
      for (Site* const reader : readers) {
        reader->reads_int8 = true;
        join(site.layer, reader->layer);
      }
    }
  }

  void insert_ops(const std::function<Value*(std::size_t)>& packed_value) {
    for (Site& site : sites_) {
      const torch::jit::WithInsertPoint before(site.node);
      Value* const result = insert_op(site, packed_value(site.layer));
      result->node()->setSourceRange(site.node->sourceRange());
      site.node->output()->replaceAllUsesWith(result);
      site.node->destroy();
    }
  }

  std::vector<ScriptRegion> regions() const {
    std::map<std::size_t, ScriptRegion> by_first;
    for (const auto& [layer, each] : settings_) by_first[region_of(layer)].layers.push_back(layer);
    std::vector<ScriptRegion> regions;
    for (auto& [first, region] : by_first) {
      for (const std::size_t layer : region.layers) {
        const auto parts = parts_.find(layer);
        if (parts == parts_.end()) continue;
        std::string line = layers_[layer].name;
        for (const std::string& part : parts->second) line += " + " + part;
        region.fused.emplace(layer, line);
      }
      regions.push_back(region);
    }
    return regions;
  }

 private:
  bool is_embedding(const Site& site) const { return layers_[site.layer].kind == "embedding"; }

  // Who alone reads more of a product than its sizes; null if it is in another block, or the product an embedding.
  Node* only_reader(const Site& site) const {
    if (is_embedding(site)) return nullptr;
    const std::vector<Node*> readers = readers_of(site.node->output());
    const bool one = readers.size() == 1 && readers[0]->owningBlock() == site.node->owningBlock();
    return one && readers[0]->kind() != torch::jit::prim::Return &&
                   std::ranges::count(readers[0]->inputs(), site.node->output()) == 1
               ? readers[0]
               : nullptr;
  }

  void take_over(const Site& site, Node* gone, const std::string& part) {
    note(site, part);
    gone->output()->replaceAllUsesWith(site.node->output());
    gone->destroy();
  }

  void note(const Site& site, const std::string& part) {
    std::vector<std::string>& parts = parts_[site.layer];
    if (std::ranges::find(parts, part) == parts.end()) parts.push_back(part);
  }

  // Who reads more than sizes. A block that gives the value on, and the graph's own return, are readers too.
  static std::vector<Node*> readers_of(const Value* value) {
    std::vector<Node*> readers;
    for (const torch::jit::Use& use : value->uses())
      if (!reads_shape(use.user)) readers.push_back(use.user);
    return readers;
  }

  // The int8 products that read this one, all by one scale; none if anything else does.
  std::vector<Site*> int8_readers(const Site& site) {
    std::vector<Site*> readers;
    std::vector<const Value*> waiting{site.node->output()};
    while (!waiting.empty()) {
      const Value* const value = waiting.back();
      waiting.pop_back();
      const std::vector<Node*> nodes = readers_of(value);
      if (nodes.empty()) return {};
      for (Node* const node : nodes) {
        if (std::ranges::count(node->inputs(), value) != 1) return {};
        const auto reader = by_node_.find(node);
        if (reader != by_node_.end() && !is_embedding(*reader->second)) {
          if (input_of_product(node) != value) return {};
          readers.push_back(reader->second);
        } else if (moves_values(node)) {
          if (node->input(0) != value) return {};
          waiting.push_back(node->output());
        } else {
          return {};
        }
      }
    }
    const ScriptSettings& first = settings_.at(readers.front()->layer);
    const bool alike = std::ranges::all_of(readers, [&](const Site* reader) {
      const ScriptSettings& own = settings_.at(reader->layer);
      return own.input_scale && own.input_scale == first.input_scale &&
             own.input_zero_point == first.input_zero_point && !own.packed->input_factors();
    });
    return alike ? readers : std::vector<Site*>();
  }

  bool moves_values(const Node* node) const {
    if (node->kind() == aten::max_pool2d) return pools_int8_;
    return std::ranges::find(kMovers, node->kind().toQualString()) != kMovers.end();
  }

  Value* insert_op(const Site& site, Value* packed) {
    const ScriptSettings& own = settings_.at(site.layer);
    const std::string& kind = layers_[site.layer].kind;
    Value* input = input_of_product(site.node);
    const auto op = [](const char* name) { return c10::Symbol::fromQualString(name); };
    const at::ScalarType type = out_dtype_.value_or(layers_[site.layer].weight.scalar_type());
    if (kind == "embedding")
      return graph_.insert(op("halfstep::int8_embedding"), {input, packed, static_cast<std::int64_t>(type)});
    // A product that reads int8 would not know what is around it.
    const bool is_float = site.out == nullptr;
    const c10::IValue out_dtype = is_float && site.reads_int8 ? c10::IValue(type) : c10::IValue();
    const c10::IValue out_scale = is_float ? c10::IValue() : c10::IValue(*site.out->input_scale);
    const c10::IValue scale = own.input_scale ? c10::IValue(*own.input_scale) : c10::IValue();
    Value* residual = site.residual ? site.node->inputs().back() : nullptr;
    if (kind == "conv1d") {
      input = graph_.insert(aten::unsqueeze, {input, -2});
      if (residual != nullptr) residual = graph_.insert(aten::unsqueeze, {residual, -2});
    }
    if (residual == nullptr) residual = graph_.insertConstant(c10::IValue());
    Value* result = graph_.insert(op(kind == "linear" ? "halfstep::int8_linear" : "halfstep::int8_conv2d"),
                                  {input, packed, scale, own.input_zero_point, residual, site.activation, out_dtype,
                                   out_scale, is_float ? 0 : site.out->input_zero_point});
    return kind == "conv1d" ? graph_.insert(aten::squeeze, {result, -2}) : result;
  }

  std::size_t region_of(std::size_t layer) const {
    const auto found = region_.find(layer);
    return found == region_.end() ? layer : found->second;
  }
  void join(std::size_t one, std::size_t other) {
    const std::size_t from = std::max(region_of(one), region_of(other));
    const std::size_t to = std::min(region_of(one), region_of(other));
    for (const auto& [layer, each] : settings_)
      if (region_of(layer) == from) region_[layer] = to;
  }

  torch::jit::Graph& graph_;
  const std::vector<ScriptLayer>& layers_;
  const std::map<std::size_t, ScriptSettings>& settings_;
  std::optional<at::ScalarType> out_dtype_;
  bool pools_int8_;
  std::vector<Site> sites_;
  std::unordered_map<const Node*, Site*> by_node_;
  std::map<std::size_t, std::vector<std::string>> parts_;
  std::map<std::size_t, std::size_t> region_;  // by its first layer
};

}  // namespace

std::vector<ScriptRegion> make_int8(const GraphPtr& graph, const std::vector<ScriptLayer>& layers,
                                    const std::map<std::size_t, ScriptSettings>& settings,
                                    std::optional<at::ScalarType> out_dtype, at::Device device,
                                    const std::unordered_set<std::size_t>& alike,
                                    const std::function<Value*(std::size_t layer)>& packed_value) {
  Rewriter rewriter(*graph, layers, settings, out_dtype, device);
  rewriter.take_activations();
  rewriter.take_residuals(graph, alike);
  rewriter.take_activations();
  rewriter.pass_int8();
  rewriter.insert_ops(packed_value);
  return rewriter.regions();
}

}  // namespace halfstep::torch_ops
