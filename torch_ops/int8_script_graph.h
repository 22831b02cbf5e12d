// The steps of quantize() on the graph of a scripted or traced module. Contract of the whole:
// halfstep/torch/int8_script.h.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/alias_analysis.h>
#include <torch/csrc/jit/ir/ir.h>

#include "halfstep/torch/int8.h"
#include "lower_graph.h"

namespace halfstep::torch_ops {

using GraphPtr = std::shared_ptr<torch::jit::Graph>;

// Calls run(node) for all nodes, those in the blocks of a node before it; it may destroy its node.
template <class Run>
void for_each_node(torch::jit::Block* block, const Run& run) {
  for (auto it = block->nodes().begin(); it != block->nodes().end();) {
    torch::jit::Node* const node = *it++;
    for (torch::jit::Block* const inner : node->blocks()) for_each_node(inner, run);
    run(node);
  }
}

// ------------------------------------------------------------------------------------------------------- modules
// (int8_script_module.cpp)

// Where an attribute of the module lies: "encoder.layers.0", "weight".
struct AttributePath {
  std::string module;
  std::string name;
};
std::optional<AttributePath> path_of(const torch::jit::Value* attribute);

// A module of new classes, one for each submodule, with those attributes of `root` that `graph` reads or writes, and
// `training`. It has no methods yet, and the graph, which is edited, reads it in place of `root`. Parameters share
// their memory with root's, other attributes are copies.
torch::jit::Module with_used_attributes(const ModuleObject& root, torch::jit::Graph& graph);

// Gives the module another attribute and returns its value at the beginning of the graph. `path.module` may name
// submodules that are not there yet; underscores are put behind names that are taken.
torch::jit::Value* insert_attribute(torch::jit::Module& module, torch::jit::Graph& graph, AttributePath path,
                                    const c10::IValue& value, bool is_parameter = false);

void add_forward(torch::jit::Module& module, const GraphPtr& graph, const c10::FunctionSchema& schema);

// ---------------------------------------------------------------------------------------------------------- nodes
// (int8_script_nodes.cpp)

// Whether the node asks its input for sizes alone.
bool reads_shape(const torch::jit::Node* node);

// Who reads more than sizes. A block that gives the value on, and the graph's own return, are readers too.
std::vector<torch::jit::Node*> readers_of(const torch::jit::Value* value);

// The activation of int8 products that the node applies to its first input; "" if it does something else.
std::string activation_of(const torch::jit::Node* node);

// Whether the node computes the same of int8 as of the numbers that they stand for. A maximum pooling does once it is
// int8_max_pool2d.
bool moves_values(const torch::jit::Node* node);

// Lets a node of moves_values() take int8 and give it: the same node, or what has taken its place.
torch::jit::Node* move_int8(torch::jit::Graph& graph, torch::jit::Node* node);

// -------------------------------------------------------------------------------------------------------- layers
// (int8_script_find.cpp)

// "encoder.0" of its "weight", "encoder.0.mix" of another tensor, "encoder.0.in_proj" of an "in_proj_weight".
std::string name_of(const AttributePath& path);

struct ScriptLayer {
  std::string name;
  std::string kind;                // "linear", "conv1d", "conv2d", "embedding"
  at::Tensor weight;               // [out, in] or [out, in / groups, height, width]; a conv1d has height 1
  std::optional<at::Tensor> bias;  // [out]
  PackedInt8::Geometry geometry;

  // The dimension of the channels of input and output, from the end.
  std::int64_t channel_dim() const { return kind == "conv1d" ? -2 : kind == "conv2d" ? -3 : -1; }
};

// Why products stay float, by the names of their layers.
using Reasons = std::map<std::string, std::string>;

// The tensor that a value is in every call: an attribute that forward does not write, a constant, or a transposed one.
class Constants {
 public:
  Constants(const GraphPtr& graph, const ModuleObject& root);
  std::optional<at::Tensor> operator()(const torch::jit::Value* value) const;
  // The attribute, or the constant's hint at one, from which the value is made by views.
  static std::optional<AttributePath> source_of(const torch::jit::Value* value);

 private:
  bool is_written(const torch::jit::Value* attribute, const at::Tensor& tensor) const;

  ModuleObject root_;
  std::unordered_set<const torch::jit::Value*> written_;
  std::unordered_set<const void*> memory_;  // of tensors that are written to
};

// Matrix products with a constant become aten::linear, with the addition of a constant bias behind them.
void to_linear(const GraphPtr& graph, const ModuleObject& root);

// Folds batch norms into the convolutions before them, if nothing else reads these. Returns (norm, convolution).
std::vector<std::pair<std::string, std::string>> fold_batch_norms(const GraphPtr& graph, torch::jit::Module& module);

// Notes at each product which layer it calls. Layers are in the order of the graph.
std::vector<ScriptLayer> find_layers(const GraphPtr& graph, const ModuleObject& root, Reasons& left);
void note_layer(torch::jit::Node* node, std::size_t layer);
std::optional<std::size_t> noted_layer(const torch::jit::Node* node);
// The same for sums of two tensors, to which an int8 product may add what it gives.
void note_sums(torch::jit::Graph& graph);
std::optional<std::size_t> noted_sum(const torch::jit::Node* node);
void remove_layer_notes(torch::jit::Graph& graph);

// "" or why a layer with such an input cannot be int8.
std::string refused_input(const ScriptLayer& layer, const at::Tensor& input);

// What a product multiplies, or looks up.
torch::jit::Value* input_of_product(const torch::jit::Node* node);

// ----------------------------------------------------------------------------------------------------------- norms
// (int8_script_norms.cpp)

// A layer or RMS norm over the last dimension alone, whose weight and bias are attributes or constants, if it has them.
struct ScriptNorm {
  torch::jit::Node* node;
  std::string name;  // as a layer's, by its weight or bias; without any "layer_norm", "layer_norm_1", "rms_norm"
};
std::vector<ScriptNorm> find_norms(torch::jit::Graph& graph);

// Whether anything may write to what the norm gives before one of these readers reads it, or to the list of its sizes.
bool is_written_before(const torch::jit::AliasDb& aliases, torch::jit::Graph& graph, const ScriptNorm& norm,
                       const std::vector<torch::jit::Node*>& readers);

// A norm becomes halfstep::layer_norm_int8 or rms_norm_int8, which gives int8 to these readers, and float to what else
// reads it. The scales are those of the rows, where `scale` is absent.
struct Int8NormValues {
  torch::jit::Value* quantized;
  torch::jit::Value* scales;
};
Int8NormValues insert_int8_norm(torch::jit::Graph& graph, torch::jit::Node* norm,
                                const std::vector<torch::jit::Node*>& readers, std::optional<double> scale,
                                std::int64_t zero_point);

// ------------------------------------------------------------------------------------------------------- rewriting
// (int8_script_rewrite.cpp)

struct ScriptSettings {
  c10::intrusive_ptr<PackedInt8> packed;
  std::optional<double> input_scale;  // none: by row
  std::int64_t input_zero_point = 0;
};

// A product by itself, in float and in int8 (int8_script_products.cpp). An int8 input has no type of its own to write.
at::Tensor float_product(const ScriptLayer& layer, const at::Tensor& input);
at::Tensor int8_product(const ScriptLayer& layer, const ScriptSettings& settings, const at::Tensor& input,
                        std::optional<at::ScalarType> out_dtype = std::nullopt,
                        const std::optional<at::Tensor>& row_scales = std::nullopt);

// Layers between which values stay int8, by their numbers, and what each took over, such as "fc1 + norm ln2 + relu +
// int8 out".
struct ScriptRegion {
  std::vector<std::size_t> layers;
  std::map<std::size_t, std::string> fused;
};

// Makes these layers int8, in the graph of a module that with_used_attributes() gave. `out_dtype` is the type of what
// is not int8; none: that of each layer's weight. `alike`: the noted sums whose summands are always of one shape.
std::vector<ScriptRegion> make_int8(const GraphPtr& graph, const std::vector<ScriptLayer>& layers,
                                    const std::map<std::size_t, ScriptSettings>& settings,
                                    std::optional<at::ScalarType> out_dtype,
                                    const std::unordered_set<std::size_t>& alike,
                                    const std::function<torch::jit::Value*(std::size_t layer)>& packed_value);

// ------------------------------------------------------------------------------------------------------- the whole
// (int8_script_form.cpp)

// A copy of the module in eval mode. Throws where it has no forward, or hooks around it.
torch::jit::Module copied_for_inference(const torch::jit::Module& module);

// The result of forward on copies of the arguments, to which it may write.
c10::IValue call_module(const torch::jit::Module& module, const std::vector<c10::IValue>& arguments);

// The float form of a module, in which its layers become int8.
class ScriptForm {
 public:
  // Of a copy of `module`. Throws what quantize() says.
  ScriptForm(const torch::jit::Module& module, bool fold_batch_norm);

  const std::vector<ScriptLayer>& layers() const { return layers_; }
  const Reasons& left() const { return left_; }
  const std::vector<std::pair<std::string, std::string>>& folded() const { return folded_; }
  at::Device device() const;  // of the first layer; the CPU without layers

  // Learns from a call which sums are of tensors of one shape: without it no layer takes over an addition.
  void probe(const std::vector<c10::IValue>& arguments);

  // Each of these gives a module of its own that shares the parameters' memory. A watch is called with each layer's
  // input before the layer is.
  struct Watch : torch::CustomClassHolder {  // torch.classes.halfstep.ScriptWatch
    std::function<void(std::size_t layer, const at::Tensor& input)> see;
    std::function<void(std::size_t sum, const at::Tensor& one, const at::Tensor& other)> compare;
  };
  torch::jit::Module watched(const c10::intrusive_ptr<Watch>& watch) const;
  // Calls halfstep::script_layer(input, name) in place of each layer: for Python, which implements it.
  torch::jit::Module calling() const;
  struct Built {
    torch::jit::Module module;
    std::vector<ScriptRegion> regions;
  };
  Built build(const std::map<std::size_t, ScriptSettings>& settings,
              std::optional<at::ScalarType> out_dtype = std::nullopt) const;

 private:
  torch::jit::Module finished(const std::function<void(torch::jit::Module&, const GraphPtr&)>& edit) const;

  torch::jit::Module root_;
  GraphPtr graph_;
  std::vector<ScriptLayer> layers_;
  Reasons left_;
  std::vector<std::pair<std::string, std::string>> folded_;
  std::vector<c10::FunctionSchema> schema_;            // forward's; one
  std::unordered_set<std::size_t> alike_, different_;  // sums, by what was probed
};

}  // namespace halfstep::torch_ops
