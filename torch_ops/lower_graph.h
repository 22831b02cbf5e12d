// The steps of lower(), on the graph of forward. Contract of the whole: halfstep/torch/lower.h.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include <ATen/core/ivalue.h>
#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>
#include <torch/csrc/jit/ir/ir.h>

namespace halfstep::torch_ops {

using ModuleObject = c10::intrusive_ptr<c10::ivalue::Object>;
// What the plan has of a submodule; at::kFloat for float32.
struct LayerType {
  at::ScalarType type;
  std::string name;
  bool called;  // as far as the plan knows
};
using LayerTypes = std::unordered_map<const c10::ivalue::Object*, LayerType>;

// The steps note what they know at nodes, as attributes; the last one removes them.
//   "region": the type that the node's region computes in, at::kFloat, at::kHalf or at::kBFloat16.
//   "border": at a cast of an input of a layer, the type that it stands for. Not resolved yet.
//   "cast": at a cast that lower() has put in, the type it casts to.
void note(torch::jit::Node* node, std::string_view what, at::ScalarType type);
std::optional<at::ScalarType> noted(const torch::jit::Node* node, std::string_view what);
void remove_notes(torch::jit::Block* block);

// The value of the attribute that a GetAttr node reads, if its object is a fixed submodule of `root`, the `self` of
// the graph; nullopt for all other values.
std::optional<c10::IValue> attribute_of(const torch::jit::Value* value, const ModuleObject& root);

// Whether `module`, which computes in `type`, has layers inside that are planned otherwise and are called by slow code,
// where torch's fused kernels of attention read their parameters.
bool has_other_layers(const ModuleObject& module, at::ScalarType type, const LayerTypes& layers);

// Who inlines, for messages, and whether attention takes its slow path, which calls its layers, whatever their types.
struct Inlining {
  std::string_view caller = "lower";
  std::string_view done = "lowered";
  bool split_attention = false;
};

// Inlines all calls in `graph`, the forward of `root`, notes the region of every node, and puts border casts to the
// inputs of layers that compute in another type than what is around them. Returns the modules whose forward was called.
std::unordered_set<const c10::ivalue::Object*> inline_calls(torch::jit::Graph& graph, const ModuleObject& root,
                                                            const LayerTypes& layers, at::ScalarType ambient,
                                                            c10::DeviceType device, const Inlining& how = {});

// Throws where inlined code leaves no call that would have to run in the precision of its layer.
void check_calls(torch::jit::Graph& graph, const ModuleObject& root, const LayerTypes& layers,
                 const std::unordered_set<const c10::ivalue::Object*>& called, at::ScalarType ambient);

// Casts the inputs of each op in a half region as autocast would, and resolves border casts. With `half_reductions`
// norms, softmax and embeddings are cast as products are.
void insert_casts(torch::jit::Graph& graph, const ModuleObject& root, c10::DeviceType device, bool half_reductions);

// A tensor by what it shows of which memory: files and lists of parameters hold several objects of one tensor.
struct TensorIdentity {
  explicit TensorIdentity(const at::Tensor& tensor);
  bool operator<(const TensorIdentity& other) const { return key < other.key; }
  std::tuple<const void*, int, std::int64_t, std::vector<std::int64_t>, std::vector<std::int64_t>> key;
};
using TensorTypes = std::map<TensorIdentity, at::ScalarType>;

// Reads of attributes that decide which code runs, and that forward does not assign, become constants: conditions, and
// tensors that may be None. Lists of the module's tensors, as recurrent layers keep them, are read one by one.
void settle_attributes(torch::jit::Graph& graph, const ModuleObject& root);

// Removes the casts of the module's tensors that are used through casts to one type alone, and returns these with the
// type in which they have to be stored. Constants of the graph are replaced.
TensorTypes hoist_casts(const std::shared_ptr<torch::jit::Graph>& graph, const ModuleObject& root);

// `value` in `type`, by border casts before the graph's insert point; optionals, lists, tuples and dictionaries are
// looked into, and what holds no tensors comes back as it is.
torch::jit::Value* border_cast(torch::jit::Graph& graph, torch::jit::Value* value, at::ScalarType type);

// Inserts a function of lower_values.cpp, given by name, and returns its result.
torch::jit::Value* insert_helper(torch::jit::Graph& graph, std::string_view name,
                                 at::ArrayRef<torch::jit::Value*> arguments);

}  // namespace halfstep::torch_ops
