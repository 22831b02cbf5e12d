// Plans for TorchScript. Contract: halfstep/torch/lower.h; the steps: lower_graph.h.
#include "halfstep/torch/lower.h"

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include <ATen/core/class_type.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/passes/constant_propagation.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>
#include <torch/csrc/jit/passes/lower_tuples.h>
#include <torch/csrc/jit/passes/peephole.h>
#include <torch/csrc/jit/passes/shape_analysis.h>
#include <torch/library.h>

#include "lower_graph.h"
#include "plan_class.h"
#include "plan_dtype.h"
#include "registration.h"

namespace halfstep {
namespace {

using torch_ops::LayerType;
using torch_ops::LayerTypes;
using torch_ops::ModuleObject;
using torch_ops::TensorIdentity;

// Calls run(name, module) for the module and all below it, a parent before its children.
template <class Run>
void for_each_module(const ModuleObject& module, const std::string& name, const Run& run) {
  run(name, module);
  for (std::size_t i = 0; i < module->slots().size(); ++i) {
    const c10::IValue& slot = module->getSlot(i);
    if (!module->type()->getAttribute(i)->is_module() || !slot.isObject()) continue;
    for_each_module(slot.toObject(), (name.empty() ? "" : name + ".") + module->type()->getAttributeName(i), run);
  }
}

std::string class_of(const ModuleObject& module) {
  return module->type()->name()->name();
}

std::string named(const std::string& name) {
  return name.empty() ? "the module" : "submodule '" + name + "'";
}

void check_module(const torch::jit::Module& module) {
  const auto forward = module.find_method("forward");
  TORCH_CHECK_VALUE(forward, "lower: a ", class_of(module._ivalue()), " without a method forward");
  TORCH_CHECK_VALUE(module.type()->getForwardHooks().empty() && module.type()->getForwardPreHooks().empty(),
                    "lower: the module has forward hooks of its own, which the lowered forward would not call; move "
                    "them into forward, or make it a submodule of another one");
  for_each_module(module._ivalue(), "", [](const std::string& name, const ModuleObject& one) {
    const auto slot = one->type()->findAttributeSlot("training");
    TORCH_CHECK_VALUE(!slot || !one->getSlot(*slot).toBool(), "lower: ", named(name),
                      " is in training mode; call eval() first. What comes out is for inference");
  });
}

at::ScalarType type_of(const PlannedLayer& layer) {
  const auto dtype = torch_ops::dtype_of(layer.precision);
  TORCH_CHECK_VALUE(dtype, "lower: layer '", layer.name, "' is planned as ", name_of(layer.precision),
                    ", expected float32, float16 or bfloat16");
  return *dtype;
}

LayerTypes types_of(const PrecisionPlan& plan, const torch::jit::Module& module) {
  std::unordered_map<std::string, ModuleObject> modules;
  for_each_module(module._ivalue(), "",
                  [&](const std::string& name, const ModuleObject& one) { modules.emplace(name, one); });
  LayerTypes types;
  for (const PlannedLayer& layer : plan.layers()) {
    const auto found = modules.find(layer.name);
    TORCH_CHECK_VALUE(found != modules.end(), "lower: the plan has a ", layer.type, " '", layer.name,
                      "', but in the module there is none");
    TORCH_CHECK_VALUE(class_of(found->second) == layer.type, "lower: the plan has a ", layer.type, " '", layer.name,
                      "', but in the module it is a ", class_of(found->second));
    const at::ScalarType type = type_of(layer);
    if (layer.reason.starts_with("never called")) continue;  // it inherits
    types.emplace(found->second.get(), LayerType{type, layer.name, !layer.reason.ends_with("; never called")});
  }
  return types;
}

at::ScalarType ambient_type(const PrecisionPlan& plan, std::optional<at::ScalarType> autocast_dtype) {
  if (autocast_dtype) {
    TORCH_CHECK_VALUE(*autocast_dtype == at::kHalf || *autocast_dtype == at::kBFloat16, "lower: autocast_dtype is ",
                      *autocast_dtype, ", expected Half or BFloat16");
    return *autocast_dtype;
  }
  at::ScalarType ambient = at::kFloat;
  for (const PlannedLayer& layer : plan.layers()) {
    const at::ScalarType type = type_of(layer);
    if (type == at::kFloat || type == ambient) continue;
    TORCH_CHECK_VALUE(ambient == at::kFloat,
                      "lower: the plan has float16 and bfloat16 layers; autocast_dtype must say what code outside of "
                      "them computes in");
    ambient = type;
  }
  return ambient;
}

at::DeviceType device_of(const torch::jit::Module& module, std::optional<at::DeviceType> device) {
  const bool given = device.has_value();
  const auto look_at = [&](const at::Tensor& tensor) {
    if (given || !tensor.defined()) return;
    TORCH_CHECK_VALUE(!device || *device == tensor.device().type(), "lower: the module has tensors on ", *device,
                      " and on ", tensor.device().type(), "; device must say where it will run");
    device = tensor.device().type();
  };
  for (const at::Tensor& tensor : module.parameters()) look_at(tensor);
  for (const at::Tensor& tensor : module.buffers()) look_at(tensor);
  TORCH_CHECK_VALUE(device, "lower: the module has no parameters or buffers; device must say where it will run");
  TORCH_CHECK_VALUE(*device == at::kCPU || *device == at::kCUDA, "lower: device is ", *device,
                    ", expected cpu or cuda");
  return *device;
}

// Copies of values in which tensors have the types they are wanted in, and one tensor stays one; tensors that show
// parts of one memory share one again, unless they are converted.
class Copier {
 public:
  explicit Copier(const torch_ops::TensorTypes& types) : types_(types) {}

  // Once for every value before the first copy.
  void look_at(const c10::IValue& value) {
    if (value.isTensor() && value.toTensor().defined()) seen_.emplace(value.toTensor());
    if (!value.isTensorList()) return;
    for (const at::Tensor& tensor : value.toTensorVector()) seen_.emplace(tensor);
  }

  c10::IValue copy(const c10::IValue& value) {
    if (value.isTensor()) return value.toTensor().defined() ? copy(value.toTensor()) : value;
    if (!value.isTensorList()) return value.deepcopy();
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(copy(tensor));
    return list;
  }

 private:
  at::Tensor copy(const at::Tensor& tensor) {
    const TensorIdentity identity(tensor);
    const auto known = copies_.find(identity);
    if (known != copies_.end()) return known->second;
    const auto type = types_.find(identity);
    const at::Tensor copied = type != types_.end() ? tensor.detach().to(type->second, false, /*copy=*/true)
                              : is_part(tensor)    ? copy_part(tensor)
                                                   : tensor.detach().clone();
    return copies_.emplace(identity, copied).first->second;
  }

  // Whether another tensor shows the same memory.
  bool is_part(const at::Tensor& tensor) const {
    if (!tensor.has_storage() || tensor.layout() != at::kStrided || tensor.is_quantized()) return false;
    if (tensor.is_conj() || tensor.is_neg()) return false;
    const void* const memory = std::get<0>(TensorIdentity(tensor).key);
    return std::ranges::count(seen_, memory, [](const TensorIdentity& one) { return std::get<0>(one.key); }) > 1;
  }

  at::Tensor copy_part(const at::Tensor& tensor) {
    at::Tensor& memory = memories_[tensor.storage().unsafeGetStorageImpl()];
    if (!memory.defined()) {
      const at::Tensor bytes = at::empty({0}, tensor.options().dtype(at::kByte)).set_(tensor.storage());
      memory = bytes.clone();
    }
    return at::empty({0}, tensor.options().requires_grad(false))
        .set_(memory.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
  }

  std::set<TensorIdentity> seen_;
  std::unordered_map<const void*, at::Tensor> memories_;
  const torch_ops::TensorTypes& types_;
  std::map<TensorIdentity, at::Tensor> copies_;
};

// A module of new classes with the attributes of `module`, and no methods.
torch::jit::Module copy_without_methods(const torch::jit::Module& module, const torch_ops::TensorTypes& types) {
  std::unordered_set<std::string> methods;
  for_each_module(module._ivalue(), "", [&](const std::string&, const ModuleObject& one) {
    for (const torch::jit::Function* method : one->type()->methods()) methods.insert(method->name());
  });
  torch::jit::Module copied = module.clone(/*inplace=*/true, methods, {});
  Copier copier(types);
  for_each_module(copied._ivalue(), "", [&](const std::string&, const ModuleObject& one) {
    for (const c10::IValue& slot : one->slots()) copier.look_at(slot);
  });
  for_each_module(copied._ivalue(), "", [&](const std::string&, const ModuleObject& one) {
    for (std::size_t i = 0; i < one->slots().size(); ++i)
      if (!one->type()->getAttribute(i)->is_module()) one->setSlot(i, copier.copy(one->getSlot(i)));
  });
  return copied;
}

void add_forward(torch::jit::Module& copied, const torch::jit::Module& original,
                 const std::shared_ptr<torch::jit::Graph>& graph) {
  std::vector<c10::TypePtr> originals;
  std::unordered_map<c10::TypePtr, c10::TypePtr> classes;
  for_each_module(original._ivalue(), "",
                  [&](const std::string&, const ModuleObject& one) { originals.push_back(one->type()); });
  std::size_t i = 0;
  for_each_module(copied._ivalue(), "",
                  [&](const std::string&, const ModuleObject& one) { classes[originals[i++]] = one->type(); });
  const auto remap = [&](c10::TypePtr type) {
    const auto found = classes.find(type);
    return found == classes.end() ? type : found->second;
  };
  graph->remapTypes(remap);
  const c10::FunctionSchema schema =
      original.get_method("forward").function().getSchema().cloneWithRemappedTypes(remap);
  torch::jit::Function* const function = copied._ivalue()->compilation_unit()->create_function(
      c10::QualifiedName(*copied.type()->name(), "forward"), graph);
  copied.type()->addMethod(function);
  function->setSchema(schema);
}

}  // namespace

std::vector<Layer> layers_of(const torch::jit::Module& module) {
  std::vector<Layer> layers;
  for_each_module(module._ivalue(), "", [&](const std::string& name, const ModuleObject& one) {
    bool has_children = false, has_parameters = false;
    for (std::size_t i = 0; i < one->slots().size(); ++i) {
      has_children = has_children || one->type()->getAttribute(i)->is_module();
      has_parameters = has_parameters || one->type()->is_parameter(i);
    }
    if (!has_children || has_parameters) layers.push_back({name, class_of(one), ""});
  });
  return layers;
}

PrecisionPlan plan(const torch::jit::Module& module, const PrecisionPolicy& policy) {
  return {policy, layers_of(module)};
}

PrecisionPlan plan(const torch::jit::Module& module, const CustomPrecisionPolicy& policy, Precision half) {
  return {policy, layers_of(module), half};
}

torch::jit::Module lower(const torch::jit::Module& module, const PrecisionPlan& plan,
                         std::optional<at::ScalarType> autocast_dtype, std::optional<at::DeviceType> device,
                         bool half_reductions) {
  check_module(module);
  const LayerTypes layers = types_of(plan, module);
  const at::ScalarType ambient = ambient_type(plan, autocast_dtype);
  const at::DeviceType runs_on = device_of(module, device);

  const at::NoGradGuard inference;  // what the graph asks of grad mode is folded
  const ModuleObject root = module._ivalue();
  std::shared_ptr<torch::jit::Graph> graph = module.get_method("forward").graph()->copy();
  const auto called = torch_ops::inline_calls(*graph, root, layers, ambient, runs_on);
  torch_ops::check_calls(*graph, root, layers, called, ambient);
  torch::jit::EraseShapeInformation(graph);  // tracing notes the types it saw
  torch_ops::settle_attributes(*graph, root);
  for (int i = 0; i < 2; ++i) {
    torch::jit::ConstantPropagationImmutableTypes(graph);
    torch::jit::LowerSimpleTuples(graph);
    torch::jit::PeepholeOptimize(graph, /*disable_shape_peepholes=*/true);
  }
  torch::jit::EliminateDeadCode(graph);
  torch_ops::insert_casts(*graph, root, runs_on, half_reductions);
  torch::jit::EliminateDeadCode(graph);
  const torch_ops::TensorTypes types = torch_ops::hoist_casts(graph, root);
  torch::jit::EliminateDeadCode(graph);
  torch_ops::remove_notes(graph->block());

  torch::jit::Module lowered = copy_without_methods(module, types);
  add_forward(lowered, module, graph);
  graph->lint();
  return lowered;
}

namespace torch_ops {
namespace {

// Boxed, since the module is an argument of any type.
void lower_boxed(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const std::vector<c10::IValue> arguments = torch::jit::pop(*stack, 5);
  const c10::IValue& module = arguments[0];
  TORCH_CHECK_TYPE(module.isObject() && module.toObject()->type()->is_module(), "lower: module is a ", module.tagKind(),
                   ", expected a scripted or traced module");
  const auto device = arguments[3].toOptional<at::Device>();
  const torch::jit::Module lowered =
      halfstep::lower(torch::jit::Module(module.toObject()), arguments[1].toCustomClass<PlanClass>()->plan,
                      arguments[2].toOptional<at::ScalarType>(),
                      device ? std::make_optional(device->type()) : std::nullopt, arguments[4].toBool());
  torch::jit::push(*stack, lowered._ivalue());
}

}  // namespace

void define_lower(torch::Library& library) {
  library.def(
      "lower(Any module, __torch__.torch.classes.halfstep.PrecisionPlan plan, ScalarType? autocast_dtype=None, "
      "Device? device=None, bool half_reductions=False) -> Any",
      torch::CppFunction::makeFromBoxedFunction<&lower_boxed>());
}

}  // namespace torch_ops
}  // namespace halfstep
