// quantize(): products become int8 ops, take over their activations, and pass int8 on where all readers take it. So do
// layer norms before them.
#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include <torch/csrc/jit/ir/alias_analysis.h>
#include <torch/csrc/jit/ir/constants.h>

#include "int8_script_graph.h"

namespace halfstep::torch_ops {
namespace {

namespace aten = torch::jit::aten;
using torch::jit::Node;
using torch::jit::Value;

struct Site {
  Node* node;  // the float product, until all is decided
  std::size_t layer;
  std::string activation = "none";
  Node* sum = nullptr;                  // the addition that it takes over, likewise until all is decided
  const ScriptSettings* out = nullptr;  // of the readers, where int8 passes on
  bool reads_int8 = false;
  Value* row_scales = nullptr;  // of int8 whose rows have each its own scale

  Value* output() const { return (sum != nullptr ? sum : node)->output(); }
  Value* residual() const { return sum->input(sum->input(0) == node->output() ? 1 : 0); }
};

bool quantize_alike(const ScriptSettings& one, const ScriptSettings& other) {
  return one.input_scale == other.input_scale && one.input_zero_point == other.input_zero_point;
}

class Rewriter {
 public:
  Rewriter(torch::jit::Graph& graph, const std::vector<ScriptLayer>& layers,
           const std::map<std::size_t, ScriptSettings>& settings, std::optional<at::ScalarType> out_dtype)
      : graph_(graph), layers_(layers), settings_(settings), out_dtype_(out_dtype) {
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
      if (sum == nullptr || site.activation != "none" || site.sum != nullptr || sums_.contains(sum)) return;
      const auto number = noted_sum(sum);
      if (!number || !alike.contains(*number)) return;
      const bool first = sum->input(0) == site.node->output();
      if (!first && sum->kind() == aten::add_) return;        // others may see what the addition writes
      torch::jit::AliasDb aliases(graph, /*isFrozen=*/true);  // a new one each time, as nodes are destroyed
      if (!aliases.moveBeforeTopologicallyValid(site.node, sum)) return;
      site.sum = sum->kind() == aten::add_ ? out_of_place(sum) : sum;
      sums_.insert(site.sum);
      note(site, "residual");
    });
  }

  void pass_int8() {
    for (Site& site : sites_) {
      if (is_embedding(site)) continue;
      const std::vector<Site*> readers = int8_readers(site);
      if (readers.empty()) continue;
      site.out = &settings_of(*readers[0]);
      note(site, "int8 out");
      for (Site* const reader : readers) {
        reader->reads_int8 = true;
        join(site.layer, reader->layer);
      }
      take_int8(site.output());
    }
  }

  // Layer norms write int8 for the products that quantize their result alike, and float for what else reads it.
  void take_norms(const GraphPtr& graph) {
    std::vector<TakenNorm> taken;
    for (ScriptNorm& norm : find_norms(graph_)) {
      const auto readers = norm_readers(norm.node->output());
      if (readers) taken.push_back({std::move(norm), *readers});
    }
    if (taken.empty()) return;
    const torch::jit::AliasDb aliases(graph, /*isFrozen=*/true);
    std::erase_if(taken, [&](const TakenNorm& each) {
      std::vector<Node*> products;
      for (const Site* const site : each.readers.sites) products.push_back(site->node);
      return is_written_before(aliases, graph_, each.norm, products);
    });
    for (const TakenNorm& each : taken) take_norm(each);
  }

  void insert_ops(const std::function<Value*(std::size_t)>& packed_value) {
    for (Site& site : sites_) {
      const torch::jit::WithInsertPoint before(site.node);
      Value* const result = insert_op(site, packed_value(site.layer));
      result->node()->setSourceRange(site.node->sourceRange());
      site.output()->replaceAllUsesWith(result);
      if (site.sum != nullptr) site.sum->destroy();
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
  const ScriptSettings& settings_of(const Site& site) const { return settings_.at(site.layer); }
  bool is_embedding(const Site& site) const { return layers_[site.layer].kind == "embedding"; }

  // Who alone reads more of a product than its sizes; null if it is in another block, or the product an embedding.
  Node* only_reader(const Site& site) const {
    if (is_embedding(site)) return nullptr;
    const std::vector<Node*> readers = readers_of(site.output());
    const bool one = readers.size() == 1 && readers[0]->owningBlock() == site.node->owningBlock();
    return one && readers[0]->kind() != torch::jit::prim::Return &&
                   std::ranges::count(readers[0]->inputs(), site.output()) == 1
               ? readers[0]
               : nullptr;
  }

  void take_over(const Site& site, Node* gone, const std::string& part) {
    note(site, part);
    gone->output()->replaceAllUsesWith(site.output());
    gone->destroy();
  }

  // What it writes to is a product that nothing else reads.
  Node* out_of_place(Node* sum) {
    const torch::jit::WithInsertPoint before(sum);
    Node* const made = graph_.insertNode(graph_.create(aten::add, sum->inputs(), 1));
    made->output()->copyMetadata(sum->output());
    made->setSourceRange(sum->sourceRange());
    sum->output()->replaceAllUsesWith(made->output());
    sum->destroy();
    return made;
  }

  void note(const Site& site, const std::string& part) {
    std::vector<std::string>& parts = parts_[site.layer];
    if (std::ranges::find(parts, part) == parts.end()) parts.push_back(part);
  }

  // The int8 products that read this one, all by one scale; none if anything else does.
  std::vector<Site*> int8_readers(const Site& site) {
    const std::vector<Site*> readers = behind(site.output());
    const bool alike = std::ranges::all_of(readers, [&](const Site* reader) {
      const ScriptSettings& own = settings_of(*reader);
      return own.input_scale && quantize_alike(own, settings_of(*readers.front())) && !own.packed->input_factors();
    });
    return alike ? readers : std::vector<Site*>();
  }

  // The int8 products to which all of a value goes, also through what only moves it; else none.
  std::vector<Site*> behind(const Value* value) {
    std::vector<Site*> sites;
    for (Node* const reader : readers_of(value)) {
      const std::vector<Site*> found = beyond(value, reader);
      if (found.empty()) return {};
      sites.insert(sites.end(), found.begin(), found.end());
    }
    return sites;
  }

  // Those to which this reader takes the value; none if it does anything else with it.
  std::vector<Site*> beyond(const Value* value, Node* reader) {
    if (std::ranges::count(reader->inputs(), value) != 1) return {};
    const auto site = by_node_.find(reader);
    if (site != by_node_.end() && !is_embedding(*site->second))
      return input_of_product(reader) == value ? std::vector{site->second} : std::vector<Site*>();
    return moves_values(reader) && reader->input(0) == value ? behind(reader->output()) : std::vector<Site*>();
  }

  // What moves a value to int8 products takes int8.
  void take_int8(const Value* value) {
    for (Node* const reader : readers_of(value))
      if (!by_node_.contains(reader)) take_int8(move_int8(graph_, reader)->output());
  }

  // What reads a norm and leads to nothing but int8 products that quantize alike, and these.
  struct NormReaders {
    std::vector<Node*> nodes;
    std::vector<Site*> sites;
  };
  struct TakenNorm {
    ScriptNorm norm;
    NormReaders readers;
  };

  // Those of the scale by which most products quantize the value; of as many each, the scale of the first one's.
  std::optional<NormReaders> norm_readers(const Value* value) {
    std::vector<NormReaders> all;
    for (Node* const node : readers_of(value)) {
      std::vector<Site*> sites = beyond(value, node);
      if (takes_one_int8(node, sites)) all.push_back({{node}, std::move(sites)});
    }
    std::ranges::sort(all, {}, [](const NormReaders& each) { return each.sites.front(); });  // as in the float graph
    std::vector<NormReaders> kinds;
    for (const NormReaders& each : all) {
      const auto kind = std::ranges::find_if(kinds, [&](const NormReaders& known) {
        return quantize_alike(settings_of(*known.sites.front()), settings_of(*each.sites.front()));
      });
      if (kind == kinds.end()) {
        kinds.push_back(each);
      } else {
        kind->nodes.push_back(each.nodes.front());
        kind->sites.insert(kind->sites.end(), each.sites.begin(), each.sites.end());
      }
    }
    const auto most = std::ranges::max_element(kinds, {}, [](const NormReaders& kind) { return kind.sites.size(); });
    return most == kinds.end() ? std::nullopt : std::optional(*most);
  }

  // Whether a reader of a norm, and the products to which it leads, take the same int8. By rows only a product of rows
  // does, and as they are.
  bool takes_one_int8(const Node* reader, const std::vector<Site*>& sites) const {
    return !sites.empty() && std::ranges::all_of(sites, [&](const Site* site) {
      const ScriptSettings& own = settings_of(*site);
      const bool rows = site->node == reader && layers_[site->layer].kind == "linear";
      return quantize_alike(own, settings_of(*sites.front())) && !own.packed->input_factors() &&
             (own.input_scale || rows);
    });
  }

  void take_norm(const TakenNorm& taken) {
    const auto& [nodes, sites] = taken.readers;
    const ScriptSettings& settings = settings_of(*sites.front());
    const Int8NormValues values =
        insert_int8_norm(graph_, taken.norm.node, nodes, settings.input_scale, settings.input_zero_point);
    take_int8(values.quantized);
    for (Site* const site : sites) {
      site->reads_int8 = true;
      if (!settings.input_scale) site->row_scales = values.scales;
      join(sites.front()->layer, site->layer);
      const std::string part = "norm " + taken.norm.name;
      std::vector<std::string>& parts = parts_[site->layer];
      if (std::ranges::find(parts, part) == parts.end()) parts.insert(parts.begin(), part);
    }
  }

  Value* insert_op(const Site& site, Value* packed) {
    const ScriptSettings& own = settings_of(site);
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
    Value* residual = site.sum != nullptr ? site.residual() : nullptr;
    if (kind == "conv1d") {
      input = graph_.insert(aten::unsqueeze, {input, -2});
      if (residual != nullptr) residual = graph_.insert(aten::unsqueeze, {residual, -2});
    }
    if (residual == nullptr) residual = graph_.insertConstant(c10::IValue());
    std::vector<torch::jit::NamedValue> inputs{input,
                                               packed,
                                               scale,
                                               own.input_zero_point,
                                               residual,
                                               site.activation,
                                               out_dtype,
                                               out_scale,
                                               is_float ? 0 : site.out->input_zero_point};
    if (site.row_scales != nullptr) inputs.emplace_back(site.row_scales);
    Value* result = graph_.insert(op(kind == "linear" ? "halfstep::int8_linear" : "halfstep::int8_conv2d"), inputs);
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
  std::vector<Site> sites_;
  std::unordered_map<const Node*, Site*> by_node_;
  std::unordered_set<const Node*> sums_;  // that products have taken over
  std::map<std::size_t, std::vector<std::string>> parts_;
  std::map<std::size_t, std::size_t> region_;  // by its first layer
};

}  // namespace

std::vector<ScriptRegion> make_int8(const GraphPtr& graph, const std::vector<ScriptLayer>& layers,
                                    const std::map<std::size_t, ScriptSettings>& settings,
                                    std::optional<at::ScalarType> out_dtype,
                                    const std::unordered_set<std::size_t>& alike,
                                    const std::function<Value*(std::size_t layer)>& packed_value) {
  Rewriter rewriter(*graph, layers, settings, out_dtype);
  rewriter.take_activations();
  rewriter.take_residuals(graph, alike);
  rewriter.take_activations();
  rewriter.pass_int8();
  rewriter.take_norms(graph);
  rewriter.insert_ops(packed_value);
  return rewriter.regions();
}

}  // namespace halfstep::torch_ops
