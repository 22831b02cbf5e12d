// lower(): types of values. Contract: lower_types.h.
#include "lower_types.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/runtime/operator.h>

namespace halfstep::torch_ops {
namespace {

namespace prim = torch::jit::prim;
using torch::jit::Node;
using torch::jit::Value;

// Results of floating-point tensors are floating-point: never indices, conditions or complex numbers.
constexpr std::string_view kFloatsOfFloats =
    " _adaptive_avg_pool2d _convolution abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d add add_ "
    "avg_pool1d avg_pool2d avg_pool3d batch_norm cat celu channel_shuffle chunk clamp clamp_ clamp_max clamp_min "
    "clone constant_pad_nd contiguous cos detach div div_ dropout dropout_ elu elu_ erf exp expand expand_as "
    "feature_dropout flatten flip floor gather gelu gelu_ glu group_norm hardsigmoid hardswish hardswish_ "
    "hardtanh hardtanh_ index_select instance_norm layer_norm leaky_relu leaky_relu_ log log_softmax logsigmoid "
    "masked_fill masked_fill_ max_pool1d max_pool2d max_pool3d mean mish mish_ movedim mul mul_ narrow neg pad "
    "permute pixel_shuffle pow prelu reciprocal relu relu6 relu_ repeat reshape rms_norm roll rsqrt rsub "
    "scaled_dot_product_attention select selu sigmoid sigmoid_ silu silu_ sin slice softmax softplus split "
    "split_with_sizes sqrt square squeeze stack sub sub_ sum t tanh tanh_ tensor_split to transpose tril triu "
    "type_as unbind unflatten unfold unsqueeze upsample_bilinear2d upsample_nearest2d view view_as where ";

// Results have the type of the first argument, whatever the others are.
constexpr std::string_view kOfFirst =
    " batch_norm dropout embedding expand_as gather group_norm index index_fill index_put index_put_ index_select "
    "instance_norm layer_norm masked_fill masked_fill_ masked_select repeat_interleave scatter take "
    "take_along_dim ";

// Arguments have one type, which is the result's, but for masks.
constexpr std::string_view kOfOneType =
    " _convolution addbmm addmm baddbmm bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d convolution einsum gru linear lstm matmul mm rnn_relu rnn_tanh scaled_dot_product_attention ";

// What has the types of its arguments nowhere in its result.
constexpr std::string_view kOfAnyType = " bfloat16 dequantize double float half ";

// Whether one of the lists above has the name, between two spaces.
bool contains(std::string_view names, std::string_view name) {
  for (std::size_t at = names.find(name); at != std::string_view::npos; at = names.find(name, at + 1))
    if (names[at - 1] == ' ' && names[at + name.size()] == ' ') return true;
  return false;
}

TypeSet of_constant(const c10::IValue& value) {
  if (value.isTensor()) return value.toTensor().defined() ? type_set(value.toTensor().scalar_type()) : kOtherType;
  if (!value.isTensorList()) return value.isNone() ? TypeSet{0} : kAnyType;
  TypeSet types = 0;
  for (const at::Tensor& element : value.toTensorVector()) types |= type_set(element.scalar_type());
  return types;
}

// Casts and what makes tensors say their result's type in an argument, if it is given.
std::optional<TypeSet> of_dtype_argument(const Node* node) {
  const auto index = node->schema().argumentIndexWithName("dtype");
  if (!index) return std::nullopt;
  const Value* const argument = node->inputs()[static_cast<std::size_t>(*index)];
  if (argument->mustBeNone()) return std::nullopt;
  const auto value = torch::jit::toIValue(argument);
  return value && value->isInt() ? type_set(static_cast<at::ScalarType>(value->toInt())) : kAnyType;
}

void find_assigned(torch::jit::Block* block, std::unordered_set<std::string>& names) {
  for (Node* const node : block->nodes()) {
    if (node->kind() == prim::SetAttr) names.insert(node->s(c10::attr::name));
    for (torch::jit::Block* const inner : node->blocks()) find_assigned(inner, names);
  }
}

}  // namespace

TypeInference::TypeInference(torch::jit::Graph& graph, const ModuleObject& root) : root_(root) {
  find_assigned(graph.block(), assigned_);
}

bool TypeInference::is_tensor(const Value* value) {
  return value->type()->kind() == c10::TypeKind::TensorType;
}

bool TypeInference::is_optional_tensor(const Value* value) {
  const c10::TypePtr& type = value->type();
  return type->kind() == c10::TypeKind::OptionalType &&
         type->containedTypes().back()->kind() == c10::TypeKind::TensorType;
}

bool TypeInference::is_tensor_list(const Value* value) {
  const c10::TypePtr& type = value->type();
  return type->kind() == c10::TypeKind::ListType && type->containedType(0)->kind() == c10::TypeKind::TensorType;
}

bool TypeInference::is_written(const Value* list) {
  return std::ranges::any_of(list->uses(), [](const torch::jit::Use& use) {
    if (use.user->kind() == prim::ListUnpack) return false;
    const torch::jit::Operator* const op = use.user->maybeOperator();
    if (op == nullptr || !use.user->kind().is_aten()) return true;  // or leaves by another name
    const auto& arguments = op->schema().arguments();
    if (use.offset >= arguments.size()) return true;
    const c10::AliasInfo* const alias = arguments[use.offset].alias_info();
    return alias != nullptr && alias->isWrite();
  });
}

TypeSet TypeInference::of(const Value* value) const {
  const auto found = types_.find(value);
  if (found != types_.end()) return found->second;
  if (const auto constant = torch::jit::toIValue(value)) return of_constant(*constant);
  return kAnyType;
}

TypeSet TypeInference::united(at::ArrayRef<const Value*> values) const {
  TypeSet types = 0;
  for (const Value* const value : values)
    if (is_tensor(value) || is_optional_tensor(value) || is_tensor_list(value) ||
        value->type()->kind() == c10::TypeKind::TupleType)
      types |= of(value);
  return types;
}

TypeSet TypeInference::common(at::ArrayRef<const Value*> values) const {
  TypeSet types = kAnyType;
  for (const Value* const value : values) {
    const TypeSet one = united(value);
    if (one != 0 && one != kOtherType) types &= one;
  }
  return types == 0 ? kAnyType : types;
}

void TypeInference::enter(torch::jit::Block* block) {
  for (const Value* const input : block->inputs()) set(input, kAnyType);
}

void TypeInference::infer(Node* node) {
  if (noted(node, "cast")) return;  // whoever put it in knew
  switch (node->kind()) {
    case prim::Constant:
      return;
    case prim::GetAttr: {
      const auto value = attribute_of(node->output(), root_);
      const bool known = value && !assigned_.contains(node->s(c10::attr::name));
      set(node->output(), known ? of_constant(*value) : kAnyType);
      return;
    }
    case prim::If:
      for (std::size_t i = 0; i < node->outputs().size(); ++i)
        set(node->output(i), of(node->blocks()[0]->outputs()[i]) | of(node->blocks()[1]->outputs()[i]));
      return;
    case prim::Loop:
      for (std::size_t i = 0; i < node->outputs().size(); ++i)
        set(node->output(i), of(node->input(i + 2)) | of(node->blocks()[0]->outputs()[i + 1]));
      return;
    case prim::ListConstruct:
      set(node->output(), is_written(node->output()) ? kAnyType : united(std::as_const(*node).inputs()));
      return;
    case prim::TupleConstruct:
    case prim::TupleUnpack:
    case prim::TupleIndex:
    case prim::ListUnpack:
    case prim::unchecked_cast:
    case prim::unchecked_unwrap_optional:
      for (const Value* const output : node->outputs()) set(output, united(std::as_const(*node).inputs()));
      return;
    case prim::NumToTensor:
      set(node->output(), kOtherType | kFloat32Type);
      return;
    default:
      break;
  }
  const bool known = node->kind().is_aten() && node->maybeOperator() != nullptr;
  const TypeSet types = known ? of_op(node) : kAnyType;
  for (std::size_t i = 0; i < node->outputs().size(); ++i) {
    const bool written = is_tensor_list(node->output(i)) && is_written(node->output(i));
    set(node->output(i), written ? kAnyType : i == 0 ? types : static_cast<TypeSet>(types | kOtherType));
  }
}

// The type of a result is that of an argument, or what they are promoted to, or one of the others.
TypeSet TypeInference::of_op(const Node* node) const {
  const std::string_view name = node->kind().toUnqualString();
  if (const auto given = of_dtype_argument(node)) return *given;
  if (contains(kOfAnyType, name)) return kAnyType;
  if (contains(kOfFirst, name)) return of(node->inputs()[0]);
  if (contains(kOfOneType, name)) return common(node->inputs());
  // The condition of a `where` is no operand.
  TypeSet types = united(name == "where" ? node->inputs().slice(1) : node->inputs());
  if (types == 0) return kAnyType;
  if ((types & kFloat16Type) != 0 && (types & kBFloat16Type) != 0) types |= kFloat32Type;
  if ((types & kOtherType) != 0) types |= kFloat32Type;  // an integer and a Python float
  return contains(kFloatsOfFloats, name) ? types : static_cast<TypeSet>(types | kOtherType);
}

}  // namespace halfstep::torch_ops
