// lower(): which floating-point types the values of a graph may have when it runs.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include <c10/core/ScalarType.h>
#include <torch/csrc/jit/ir/ir.h>

#include "lower_graph.h"

namespace halfstep::torch_ops {

// A set of types, a bit each. `Other` are those that autocast leaves alone: float64, complex, integers, no tensor.
using TypeSet = std::uint8_t;
inline constexpr TypeSet kFloat32Type = 1;
inline constexpr TypeSet kFloat16Type = 2;
inline constexpr TypeSet kBFloat16Type = 4;
inline constexpr TypeSet kOtherType = 8;
inline constexpr TypeSet kAnyType = 15;

constexpr TypeSet type_set(at::ScalarType type) {
  return type == at::kFloat      ? kFloat32Type
         : type == at::kHalf     ? kFloat16Type
         : type == at::kBFloat16 ? kBFloat16Type
                                 : kOtherType;
}

// Whether a cast to `type` changes nothing, and what it makes of a value.
constexpr bool already(TypeSet from, at::ScalarType type) {
  return (from & ~(type_set(type) | kOtherType)) == 0;
}
constexpr TypeSet after_cast(TypeSet from, at::ScalarType type) {
  return static_cast<TypeSet>((from & kOtherType) | ((from & ~kOtherType) != 0 ? type_set(type) : 0));
}

// The set of every value of a graph that has been visited in order; too large where it is not known. Of a list or a
// tuple it is that of its elements.
class TypeInference {
 public:
  TypeInference(torch::jit::Graph& graph, const ModuleObject& root);

  TypeSet of(const torch::jit::Value* value) const;
  void set(const torch::jit::Value* value, TypeSet types) { types_[value] = types; }

  // Of the outputs of a node whose inputs and blocks are known.
  void infer(torch::jit::Node* node);
  // Of the inputs of a block that is about to be visited.
  void enter(torch::jit::Block* block);

  static bool is_tensor(const torch::jit::Value* value);
  static bool is_optional_tensor(const torch::jit::Value* value);
  static bool is_tensor_list(const torch::jit::Value* value);
  // Whether a list may get other elements than it was made of.
  static bool is_written(const torch::jit::Value* list);

 private:
  TypeSet of_op(const torch::jit::Node* node) const;
  TypeSet united(at::ArrayRef<const torch::jit::Value*> values) const;
  TypeSet common(at::ArrayRef<const torch::jit::Value*> values) const;

  const ModuleObject& root_;
  std::unordered_map<const torch::jit::Value*, TypeSet> types_;
  std::unordered_set<std::string> assigned_;  // names of attributes that forward sets
};

}  // namespace halfstep::torch_ops
