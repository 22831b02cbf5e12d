// quantize(): which products of a graph have constant weights, what they are called, and why others stay float.
#include <algorithm>
#include <array>
#include <set>

#include <ATen/core/class_type.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/ir/alias_analysis.h>
#include <torch/csrc/jit/ir/constants.h>

#include "halfstep/int8.h"
#include "int8_script_graph.h"

namespace halfstep::torch_ops {
namespace {

namespace prim = torch::jit::prim;
using torch::jit::Node;
using torch::jit::Value;

const c10::Symbol kLayer = c10::Symbol::attr("halfstep_int8_layer");
const c10::Symbol kSum = c10::Symbol::attr("halfstep_int8_sum");

// Of which the result has the first input's elements, whatever the others are.
constexpr auto kViews = std::to_array<std::string_view>(
    {"chunk",        "contiguous", "detach", "expand",    "narrow",           "numpy_T", "permute",
     "reshape",      "select",     "slice",  "split",     "split_with_sizes", "squeeze", "t",
     "tensor_split", "transpose",  "unbind", "unflatten", "unsqueeze",        "view"});

// Products that have no int8 kernel, and the input that has their weights.
struct Unsupported {
  std::string_view op;
  std::size_t weight;
  std::string_view why;
};
constexpr std::string_view kRecurrent = "a recurrent layer";
constexpr std::string_view kWhole =
    "attention runs as one op; script the model, or trace it after torch.backends.mha.set_fastpath_enabled(False)";
constexpr std::string_view kNone = "no int8 kernel for it";
constexpr std::string_view kPrepared = "torch.jit.optimize_for_inference changed it; give the script as it was before";
constexpr auto kUnsupported = std::to_array<Unsupported>({{"lstm", 2, kRecurrent},
                                                          {"gru", 2, kRecurrent},
                                                          {"rnn_tanh", 2, kRecurrent},
                                                          {"rnn_relu", 2, kRecurrent},
                                                          {"lstm_cell", 2, kRecurrent},
                                                          {"gru_cell", 2, kRecurrent},
                                                          {"rnn_tanh_cell", 2, kRecurrent},
                                                          {"rnn_relu_cell", 2, kRecurrent},
                                                          {"_transformer_encoder_layer_fwd", 3, kWhole},
                                                          {"_native_multi_head_attention", 5, kWhole},
                                                          {"cudnn_convolution_relu", 1, kPrepared},
                                                          {"cudnn_convolution_add_relu", 1, kPrepared},
                                                          {"conv3d", 1, kNone},
                                                          {"conv_transpose1d", 1, kNone},
                                                          {"conv_transpose2d", 1, kNone},
                                                          {"conv_transpose3d", 1, kNone},
                                                          {"bilinear", 2, kNone},
                                                          {"embedding_bag", 0, kNone},
                                                          {"bmm", 1, kNone},
                                                          {"baddbmm", 2, kNone}});

template <std::size_t n>
bool contains(const std::array<std::string_view, n>& names, std::string_view name) {
  return std::ranges::find(names, name) != names.end();
}

std::string_view op_of(const Node* node) {
  return node->kind().is_aten() ? std::string_view(node->kind().toUnqualString()) : std::string_view();
}

// "self.encoder.0.weight.3", as a frozen module calls its constants, is "encoder.0", "weight"; so is what freezing and
// torch.jit.optimize_for_inference make of it, "self.encoder.0.weight_fused_bn_mkldnn.3".
std::optional<AttributePath> path_in(std::string name) {
  if (!name.starts_with("self.")) return std::nullopt;
  name.erase(0, 5);
  const auto last = [&] { return name.substr(name.rfind('.') + 1); };
  while (name.find('.') != std::string::npos &&
         std::ranges::all_of(last(), [](char c) { return c >= '0' && c <= '9'; }))
    name.erase(name.rfind('.'));
  for (const std::string_view suffix : {"_mkldnn", "_fused_bn"})
    if (name.ends_with(suffix)) name.resize(name.size() - suffix.size());
  const std::size_t dot = name.rfind('.');
  if (dot == std::string::npos) return AttributePath{"", name};
  return AttributePath{name.substr(0, dot), name.substr(dot + 1)};
}

// Integers that are known, as a constant or as a list of constants.
std::optional<std::vector<std::int64_t>> integers_of(const Value* value) {
  if (value->node()->kind() != prim::ListConstruct) {
    const auto constant = torch::jit::toIValue(value);
    return constant && constant->isIntList() ? std::optional(constant->toIntVector()) : std::nullopt;
  }
  std::vector<std::int64_t> list;
  for (const Value* const element : value->node()->inputs()) {
    const auto constant = torch::jit::toIValue(element);
    if (!constant || !constant->isInt()) return std::nullopt;
    list.push_back(constant->toInt());
  }
  return list;
}

std::optional<std::array<std::int64_t, 2>> pair_of(const Value* value, bool one_dimension, std::int64_t first) {
  const auto integers = integers_of(value);
  if (!integers) return std::nullopt;
  const std::vector<std::int64_t>& list = *integers;
  if (one_dimension) return list.size() == 1 ? std::optional(std::array{first, list[0]}) : std::nullopt;
  if (list.size() == 1) return std::array{list[0], list[0]};
  return list.size() == 2 ? std::optional(std::array{list[0], list[1]}) : std::nullopt;
}

class Finder {
 public:
  Finder(const GraphPtr& graph, const ModuleObject& root, Reasons& left) : constants_(graph, root), left_(left) {}

  void visit(Node* node) {
    const std::string_view op = op_of(node);
    if (op == "linear") {
      add(node, "linear", 1, 2, {});
    } else if (op == "embedding") {
      if (constants_.source_of(node->input(0))) add(node, "embedding", 0, 0, {});
    } else if (op == "conv1d" || op == "conv2d" || op == "_convolution" || op == "convolution" ||
               op == "_convolution_mode") {
      visit_convolution(node);
    }
    for (const Unsupported& one : kUnsupported) {
      if (one.op != op || node->inputs().size() <= one.weight) continue;
      const Value* weight = node->input(one.weight);
      if (weight->node()->kind() == prim::ListConstruct && !weight->node()->inputs().empty())
        weight = weight->node()->input(0);
      if (const auto source = Constants::source_of(weight)) refuse(owner_of(*source), std::string(one.why));
    }
    static const auto kPacked = c10::Symbol::fromQualString("prim::ConstantMKLDNNTensor");
    if (node->kind() == kPacked) refuse_packed(node->output()->debugName());
  }

  std::vector<ScriptLayer> layers() && {
    std::set<std::string> names;
    for (ScriptLayer& layer : layers_) {
      left_.erase(layer.name);  // another use of its weight
      for (std::size_t i = 1; !names.insert(layer.name).second; ++i) layer.name = layer.name + "_" + std::to_string(i);
    }
    return std::move(layers_);
  }

 private:
  // The layer that an unsupported op's weight is of.
  static std::string owner_of(const AttributePath& path) { return path.module.empty() ? path.name : path.module; }

  void refuse(const std::string& name, std::string why) { left_.emplace(name, std::move(why)); }

  // Weights in oneDNN's layout are constants of their own kind.
  void refuse_packed(const std::string& constant) {
    const auto path = path_in(constant);
    if (!path) return refuse(constant, std::string(kPrepared));
    if (path->name == "weight") refuse(owner_of(*path), std::string(kPrepared));
  }

  void visit_convolution(Node* node) {
    const auto weight = constants_(node->input(1));
    const auto source = Constants::source_of(node->input(1));
    if (!weight && !source) return;  // computed: a product like any other
    const std::string name = source ? name_of(*source) : "";
    if (!weight) return refuse(name, "its weight is computed in forward");
    const bool general = op_of(node).ends_with("convolution");
    if (weight->dim() != 3 && weight->dim() != 4) return refuse(name, std::string(kNone));
    if (general && torch::jit::toIValue(node->input(6)) != c10::IValue(false))
      return refuse(name, "a transposed convolution");
    const bool one = weight->dim() == 3;
    const auto stride = pair_of(node->input(3), one, 1);
    const auto padding = padding_of(node, *weight);
    const auto dilation = pair_of(node->input(5), one, 1);
    const auto groups = torch::jit::toIValue(node->input(general ? 8 : 6));
    if (!padding) return refuse(name, "its padding is computed in forward, or differs from side to side");
    if (!stride || !dilation || !groups) return refuse(name, "its geometry is computed in forward");
    add(node, one ? "conv1d" : "conv2d", 1, 2, {*stride, *padding, *dilation, groups->toInt()});
  }

  // "same" only where both sides get as much.
  static std::optional<std::array<std::int64_t, 2>> padding_of(const Node* node, const at::Tensor& weight) {
    const bool one = weight.dim() == 3;
    const auto constant = torch::jit::toIValue(node->input(4));
    if (!constant || !constant->isString()) return pair_of(node->input(4), one, 0);
    if (constant->toStringRef() == "valid") return std::array<std::int64_t, 2>{0, 0};
    const auto dilation = pair_of(node->input(5), one, 1);
    if (!dilation || constant->toStringRef() != "same") return std::nullopt;
    std::array<std::int64_t, 2> padding{0, 0};
    for (std::int64_t d = one ? 1 : 0; d < 2; ++d) {
      const std::int64_t total = (*dilation)[static_cast<std::size_t>(d)] * (weight.size(d + (one ? 1 : 2)) - 1);
      if (total % 2 != 0) return std::nullopt;
      padding[static_cast<std::size_t>(d)] = total / 2;
    }
    return padding;
  }

  // `bias` is 0 where there is none.
  void add(Node* node, const std::string& kind, std::size_t weight_at, std::size_t bias_at,
           const PackedInt8::Geometry& geometry) {
    const auto source = Constants::source_of(node->input(weight_at));
    const std::string name = source ? name_of(*source) : kind + "_" + std::to_string(unnamed_);
    const auto weight = constants_(node->input(weight_at));
    if (!weight) {
      if (source) refuse(name, "its weight is computed, or written to, in forward");
      return;
    }
    std::optional<at::Tensor> bias;
    if (bias_at > 0 && !node->input(bias_at)->mustBeNone()) {
      bias = constants_(node->input(bias_at));
      if (!bias && torch::jit::toIValue(node->input(bias_at)) != c10::IValue())
        return refuse(name, "its bias is computed, or written to, in forward");
    }
    if (const std::string why = obstacle(*weight, kind); !why.empty()) return refuse(name, why);
    const auto key = std::tuple(TensorIdentity(*weight).key, bias ? TensorIdentity(*bias).key : Identity(), kind,
                                geometry.stride, geometry.padding, geometry.dilation, geometry.groups);
    const auto [known, is_new] = known_.emplace(key, layers_.size());
    note_layer(node, known->second);
    if (!is_new) return;
    unnamed_ += source ? 0 : 1;
    layers_.push_back({name, kind, kind == "conv1d" ? weight->unsqueeze(2) : *weight, bias, geometry});
  }

  static std::string obstacle(const at::Tensor& weight, const std::string& kind) {
    const at::ScalarType type = weight.scalar_type();
    if ((type != at::kFloat && type != at::kHalf && type != at::kBFloat16) || weight.layout() != at::kStrided)
      return std::string("its weight is ") + c10::toString(type) + ", expected strided float32, float16 or bfloat16";
    if (weight.numel() == 0) return "its weight is empty";
    if (kind == "linear" || kind == "embedding")
      if (weight.dim() != 2) return "its weight has " + std::to_string(weight.dim()) + " dimensions";
    const std::int64_t terms = weight.numel() / weight.size(0);
    constexpr std::int64_t kMostTerms = 65793;  // whose sum fits int32 with any zero point: halfstep/int8.h
    if (kind != "embedding" && terms > kMostTerms)
      return std::to_string(terms) + " products in a sum, more than the " + std::to_string(kMostTerms) +
             " whose sum is sure to fit 32 bits";
    return "";
  }

  using Identity = decltype(TensorIdentity::key);
  using Pair = std::array<std::int64_t, 2>;

  Constants constants_;
  Reasons& left_;
  std::vector<ScriptLayer> layers_;
  std::map<std::tuple<Identity, Identity, std::string, Pair, Pair, Pair, std::int64_t>, std::size_t> known_;
  std::size_t unnamed_ = 0;
};

}  // namespace

std::string name_of(const AttributePath& path) {
  constexpr std::string_view kSuffix = "_weight";
  std::string name = path.name;
  while (name.size() > 1 && name.back() == '_') name.pop_back();  // insert_attribute() may have put them there
  if (name == "weight" && !path.module.empty()) return path.module;
  if (name.ends_with(kSuffix)) name.resize(name.size() - kSuffix.size());
  return path.module.empty() ? name : path.module + "." + name;
}

Constants::Constants(const GraphPtr& graph, const ModuleObject& root) : root_(root) {
  std::set<std::string> assigned;
  for_each_node(graph->block(), [&](const Node* node) {
    if (node->kind() == prim::SetAttr) assigned.insert(node->s(c10::attr::name));
  });
  // "Frozen" tells attributes apart, where all of them are one for others.
  const torch::jit::AliasDb aliases(graph, /*isFrozen=*/true);
  for_each_node(graph->block(), [&](const Node* node) {
    if (node->kind() != prim::GetAttr && node->kind() != prim::Constant) return;
    const Value* const value = node->output();
    if (value->type()->kind() != c10::TypeKind::TensorType) return;
    const bool is_assigned = node->kind() == prim::GetAttr && assigned.contains(node->s(c10::attr::name));
    if (!is_assigned && !aliases.hasWriters(value)) return;
    written_.insert(value);
    const auto tensor = node->kind() == prim::GetAttr ? attribute_of(value, root_) : torch::jit::toIValue(value);
    if (tensor && tensor->isTensor() && tensor->toTensor().has_storage())
      memory_.insert(tensor->toTensor().storage().unsafeGetStorageImpl());
  });
}

bool Constants::is_written(const Value* attribute, const at::Tensor& tensor) const {
  return written_.contains(attribute) ||
         (tensor.has_storage() && memory_.contains(tensor.storage().unsafeGetStorageImpl()));
}

std::optional<at::Tensor> Constants::operator()(const Value* value) const {
  const Node* const node = value->node();
  if (node->kind() == prim::GetAttr || node->kind() == prim::Constant) {
    const auto constant = node->kind() == prim::GetAttr ? attribute_of(value, root_) : torch::jit::toIValue(value);
    if (!constant || !constant->isTensor() || !constant->toTensor().defined()) return std::nullopt;
    if (is_written(value, constant->toTensor())) return std::nullopt;
    return constant->toTensor().detach();
  }
  const std::string_view op = op_of(node);
  if (node->kind() == prim::unchecked_cast || op == "detach" || op == "contiguous") return (*this)(node->input(0));
  if (op != "t" && op != "numpy_T" && op != "transpose") return std::nullopt;
  const auto inner = (*this)(node->input(0));
  if (!inner || inner->dim() != 2) return std::nullopt;
  if (op == "transpose") {
    const auto from = torch::jit::toIValue(node->input(1)), to = torch::jit::toIValue(node->input(2));
    if (!from || !to || !from->isInt() || !to->isInt()) return std::nullopt;
    return inner->transpose(from->toInt(), to->toInt());
  }
  return inner->t();
}

std::optional<AttributePath> Constants::source_of(const Value* value) {
  const Node* const node = value->node();
  if (node->kind() == prim::GetAttr) return path_of(value);
  if (node->kind() == prim::Constant) return path_in(value->debugName());
  const bool view = node->kind() == prim::unchecked_cast || node->kind() == prim::ListUnpack ||
                    node->kind() == prim::ConstantChunk || contains(kViews, op_of(node));
  return view && !node->inputs().empty() ? source_of(node->input(0)) : std::nullopt;
}

std::vector<ScriptLayer> find_layers(const GraphPtr& graph, const ModuleObject& root, Reasons& left) {
  Finder finder(graph, root, left);
  std::vector<Node*> nodes;  // in the order of the graph, a node before those in its blocks
  const auto collect = [&](const auto& self, torch::jit::Block* block) -> void {
    for (Node* const node : block->nodes()) {
      nodes.push_back(node);
      for (torch::jit::Block* const inner : node->blocks()) self(self, inner);
    }
  };
  collect(collect, graph->block());
  for (Node* const node : nodes) finder.visit(node);
  return std::move(finder).layers();
}

void note_layer(Node* node, std::size_t layer) {
  node->i_(kLayer, static_cast<std::int64_t>(layer));
}

std::optional<std::size_t> noted_layer(const Node* node) {
  if (!node->hasAttribute(kLayer)) return std::nullopt;
  return static_cast<std::size_t>(node->i(kLayer));
}

void note_sums(torch::jit::Graph& graph) {
  std::int64_t sums = 0;
  for_each_node(graph.block(), [&](Node* node) {
    const std::string_view op = op_of(node);
    if ((op != "add" && op != "add_") || node->inputs().size() != 3) return;
    const auto is_tensor = [&](std::size_t i) { return node->input(i)->type()->kind() == c10::TypeKind::TensorType; };
    const auto alpha = torch::jit::toIValue(node->input(2));
    if (!is_tensor(0) || !is_tensor(1) || !alpha || !alpha->isScalar()) return;
    if (alpha->toScalar().toDouble() == 1.0) node->i_(kSum, sums++);
  });
}

std::optional<std::size_t> noted_sum(const Node* node) {
  if (!node->hasAttribute(kSum)) return std::nullopt;
  return static_cast<std::size_t>(node->i(kSum));
}

void remove_layer_notes(torch::jit::Graph& graph) {
  for_each_node(graph.block(), [](Node* node) {
    for (const c10::Symbol note : {kLayer, kSum})
      if (node->hasAttribute(note)) node->removeAttribute(note);
  });
}

std::string refused_input(const ScriptLayer& layer, const at::Tensor& input) {
  if (layer.kind == "embedding") return "";
  const std::int64_t dims = layer.kind == "conv1d" ? 3 : 4;
  if (layer.kind != "linear" && input.dim() != dims) return "it is called without a batch dimension";
  const at::ScalarType type = input.scalar_type();
  const bool taken = type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
  return taken ? "" : std::string("its input is ") + c10::toString(type);
}

Value* input_of_product(const Node* node) {
  return const_cast<Node*>(node)->input(op_of(node) == "embedding" ? 1 : 0);
}

}  // namespace halfstep::torch_ops
