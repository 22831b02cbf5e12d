// lower(): casts of values of all types, and what has to be decided while the lowered module runs.
#include <c10/util/Exception.h>
#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/jit.h>

#include <algorithm>
#include <string>

#include "lower_graph.h"

namespace halfstep::torch_ops {
namespace {

namespace prim = torch::jit::prim;
using torch::jit::Node;
using torch::jit::Value;

// What is cast is what autocast casts: floating-point tensors but float64 ones. 6 and 7 are float32 and float64, whose
// names scripts in C++ do not know.
constexpr char kHelpers[] = R"(
def is_eligible(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype != 7

def cast(x: Tensor, dtype: int) -> Tensor:
    return x.to(dtype) if is_eligible(x) else x

def cast_optional(x: Optional[Tensor], dtype: int) -> Optional[Tensor]:
    return None if x is None else cast(x, dtype)

def cast_list(values: List[Tensor], dtype: int) -> List[Tensor]:
    result: List[Tensor] = []
    for x in values:
        result.append(cast(x, dtype))
    return result

def cast_str_dict(values: Dict[str, Tensor], dtype: int) -> Dict[str, Tensor]:
    result: Dict[str, Tensor] = {}
    for key, x in values.items():
        result[key] = cast(x, dtype)
    return result

def cast_int_dict(values: Dict[int, Tensor], dtype: int) -> Dict[int, Tensor]:
    result: Dict[int, Tensor] = {}
    for key, x in values.items():
        result[key] = cast(x, dtype)
    return result

def widest(values: List[Tensor], dtype: int) -> int:
    for x in values:
        if is_eligible(x) and x.dtype != dtype:
            dtype = 6
    return dtype

def float32_if_floating(x: Tensor) -> Optional[int]:
    return 6 if is_eligible(x) else None
)";

bool holds_tensors(const c10::TypePtr& type) {
  return type->kind() == c10::TypeKind::TensorType || std::ranges::any_of(type->containedTypes(), holds_tensors);
}

bool holds_tensors_directly(const c10::TypePtr& container) {
  return container->containedTypes().back()->kind() == c10::TypeKind::TensorType;
}

Value* cast_with(torch::jit::Graph& graph, std::string_view helper, Value* value, at::ScalarType type) {
  return insert_helper(graph, helper, {value, graph.insertConstant(static_cast<int>(type))});
}

Value* cast_tuple(torch::jit::Graph& graph, Value* value, at::ScalarType type) {
  std::vector<Value*> elements;
  for (Value* const element : graph.insertNode(graph.createTupleUnpack(value))->outputs())
    elements.push_back(border_cast(graph, element, type));
  auto named = value->type()->cast<c10::TupleType>();  // the class of a named tuple
  if (named->schema() == nullptr) named = nullptr;
  return graph.insertNode(graph.createTuple(elements, named))->output();
}

}  // namespace

Value* insert_helper(torch::jit::Graph& graph, std::string_view name, at::ArrayRef<Value*> arguments) {
  static const std::shared_ptr<torch::jit::CompilationUnit> helpers = torch::jit::compile(kHelpers);
  torch::jit::Function& function = helpers->get_function(std::string(name));
  function.ensure_defined();
  const std::shared_ptr<torch::jit::Graph> inlined = torch::jit::toGraphFunction(function).graph()->copy();
  torch::jit::Inline(*inlined);
  return insertGraph(graph, *inlined, arguments).at(0);
}

Value* border_cast(torch::jit::Graph& graph, Value* value, at::ScalarType type) {
  const c10::TypePtr& of = value->type();
  if (!holds_tensors(of) || value->mustBeNone()) return value;
  switch (of->kind()) {
    case c10::TypeKind::TensorType: {
      Value* const cast = graph.insert(c10::Symbol::aten("_autocast_to_full_precision"), {value, true, true});
      note(cast->node(), "border", type);
      return cast;
    }
    case c10::TypeKind::TupleType:
      return cast_tuple(graph, value, type);
    case c10::TypeKind::OptionalType:
      if (holds_tensors_directly(of)) return cast_with(graph, "cast_optional", value, type);
      break;
    case c10::TypeKind::ListType:
      if (holds_tensors_directly(of)) return cast_with(graph, "cast_list", value, type);
      break;
    case c10::TypeKind::DictType:
      if (!holds_tensors_directly(of)) break;
      if (of->containedType(0)->kind() == c10::TypeKind::StringType)
        return cast_with(graph, "cast_str_dict", value, type);
      if (of->containedType(0)->kind() == c10::TypeKind::IntType) return cast_with(graph, "cast_int_dict", value, type);
      break;
    case c10::TypeKind::ClassType:
      return value;  // as eager scopes hand objects on
    default:
      break;
  }
  TORCH_CHECK_VALUE(false,
                    "lower: a layer that is planned in another precision than the code around it gets a value of type ",
                    of->repr_str(), ", expected tensors, or tuples, lists, dictionaries or optionals of tensors");
}

}  // namespace halfstep::torch_ops
