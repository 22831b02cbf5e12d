// The effective autocast lists. The dispatcher knows which ops have a kernel under autocast, not what it does: for CUDA
// that is in torch's header, in macros that torch registers from as well, for CPU in a source file of torch alone.
#include "autocast_ops.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include "registration.h"

namespace halfstep::torch_ops {
namespace {

// The macros name an op as `name` or `name, overload`; the one with other signatures as "name.overload".
#define HALFSTEP_NAME(...) #__VA_ARGS__,
#define HALFSTEP_REGISTERED_NAME(function, name, ...) name,

// The first three are in torch's sources alone.
constexpr std::string_view kCudaLowerPrecision[] = {"cudnn_convolution", "cudnn_convolution_transpose", "_cudnn_rnn",
                                                    AT_FORALL_LOWER_PRECISION_FP(HALFSTEP_NAME)};
constexpr std::string_view kCudaFloat32SetDtype[] = {AT_FORALL_FP32_SET_OPT_DTYPE(HALFSTEP_NAME)};
constexpr std::string_view kCudaFloat32AppendDtype[] = {
    AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(HALFSTEP_REGISTERED_NAME)};
constexpr std::string_view kCudaPromote[] = {AT_FORALL_PROMOTE(HALFSTEP_NAME)};
constexpr std::string_view kCudaBanned[] = {"binary_cross_entropy"};

// From torch's aten/src/ATen/autocast_mode.cpp; tests/python/test_autocast_ops.py calls the ops and looks.
constexpr std::string_view kCpuLowerPrecision[] = {"_addmm_activation",
                                                   "_convolution, deprecated",
                                                   "_native_multi_head_attention",
                                                   "addbmm",
                                                   "addmm",
                                                   "baddbmm",
                                                   "bmm",
                                                   "conv1d",
                                                   "conv1d, padding",
                                                   "conv2d",
                                                   "conv2d, padding",
                                                   "conv3d",
                                                   "conv3d, padding",
                                                   "conv_tbc",
                                                   "conv_transpose1d",
                                                   "conv_transpose2d, input",
                                                   "conv_transpose3d, input",
                                                   "linalg_vecdot",
                                                   "linear",
                                                   "matmul",
                                                   "mkldnn_rnn_layer",
                                                   "mm",
                                                   "prelu",
                                                   "scaled_dot_product_attention"};
constexpr std::string_view kCpuPromote[] = {"cat", "index_copy", "index_copy, dimname", "stack"};

constexpr std::string_view kAten = "aten::";

c10::DispatchKey autocast_key(c10::DeviceType device) {
  TORCH_CHECK_VALUE(device == c10::DeviceType::CPU || device == c10::DeviceType::CUDA, "autocast_ops: device is ",
                    device, ", expected cpu or cuda");
  return device == c10::DeviceType::CPU ? c10::DispatchKey::AutocastCPU : c10::DispatchKey::AutocastCUDA;
}

bool has_autocast_kernel(const c10::OperatorName& op, c10::DispatchKey key) {
  const auto found = c10::Dispatcher::singleton().findOp(op);
  return found && found->hasKernelForDispatchKey(key) && !found->isKernelFallthroughKernel(key);
}

const char* name_of(AutocastClass autocast_class) {
  switch (autocast_class) {
    case AutocastClass::kNone:
      return "none";
    case AutocastClass::kLowerPrecision:
      return "lower_precision";
    case AutocastClass::kFloat32:
      return "float32";
    case AutocastClass::kFloat32SetDtype:
      return "float32_set_dtype";
    case AutocastClass::kFloat32AppendDtype:
      return "float32_append_dtype";
    case AutocastClass::kPromote:
      return "promote";
    case AutocastClass::kBanned:
      return "banned";
  }
  return "none";
}

c10::Dict<std::string, std::string> autocast_ops(const std::string& device) {
  TORCH_CHECK_VALUE(device == "cpu" || device == "cuda", "autocast_ops: device is '", device,
                    "', expected 'cpu' or 'cuda'");
  const c10::DeviceType type = device == "cpu" ? c10::DeviceType::CPU : c10::DeviceType::CUDA;
  std::vector<std::pair<std::string, std::string>> ops;
  for (const c10::OperatorName& op : c10::Dispatcher::singleton().getRegistrationsForDispatchKey(autocast_key(type))) {
    const AutocastClass found = autocast_class(op, type);
    if (found == AutocastClass::kNone) continue;
    const bool ours =
        type == c10::DeviceType::CUDA && op.name == "aten::cross_entropy_loss" && cross_entropy_autocast_is_ours();
    ops.emplace_back(c10::toString(op), ours ? "halfstep" : name_of(found));
  }
  std::sort(ops.begin(), ops.end());
  c10::Dict<std::string, std::string> sorted;  // keeps the order
  for (const auto& [op, name] : ops) sorted.insert(op, name);
  return sorted;
}

}  // namespace

AutocastClass autocast_class(const c10::OperatorName& op, c10::DeviceType device) {
  if (!has_autocast_kernel(op, autocast_key(device)) || !op.name.starts_with(kAten)) return AutocastClass::kNone;
  const std::string base = op.name.substr(kAten.size());
  const std::string name = op.overload_name.empty() ? base : base + ", " + op.overload_name;
  const auto is_in = [&](const auto& names) { return std::ranges::find(names, name) != std::end(names); };
  if (device == c10::DeviceType::CPU) {
    if (is_in(kCpuLowerPrecision)) return AutocastClass::kLowerPrecision;
    if (is_in(kCpuPromote)) return AutocastClass::kPromote;
    return AutocastClass::kFloat32;
  }
  if (is_in(kCudaLowerPrecision)) return AutocastClass::kLowerPrecision;
  if (is_in(kCudaFloat32SetDtype)) return AutocastClass::kFloat32SetDtype;
  if (std::ranges::find(kCudaFloat32AppendDtype, base + "." + op.overload_name) != std::end(kCudaFloat32AppendDtype))
    return AutocastClass::kFloat32AppendDtype;
  if (is_in(kCudaPromote)) return AutocastClass::kPromote;
  if (is_in(kCudaBanned)) return AutocastClass::kBanned;
  return AutocastClass::kFloat32;  // AT_FORALL_FP32, and the safe answer for what a later torch has beside its macros
}

void define_autocast_ops(torch::Library& library) {
  library.def("autocast_ops(str device) -> Dict(str, str)", &autocast_ops);
}

}  // namespace halfstep::torch_ops
