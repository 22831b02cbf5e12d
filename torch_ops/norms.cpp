// layer_norm, rms_norm, group_norm, and norm_forward and norm_backward, on which they stand: schemas, checks, autograd,
// and the way to the core. Contract: halfstep/torch/norms.h.
#include "halfstep/torch/norms.h"

#include <array>
#include <limits>
#include <tuple>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/rms_norm.h>
#include <torch/csrc/autograd/custom_function.h>

#include "conversions.h"
#include "differentiable.h"
#include "norm_checks.h"
#include "registration.h"
#ifdef HALFSTEP_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace halfstep {
namespace torch_ops {

SymShape last_dimensions(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, std::string_view op) {
  const c10::SymIntArrayRef sizes = input.sym_sizes();
  TORCH_CHECK_VALUE(!normalized_shape.empty() && normalized_shape.size() <= sizes.size() &&
                        sizes.slice(sizes.size() - normalized_shape.size()) == normalized_shape,
                    op, ": input has shape ", sizes, ", expected one that ends in normalized_shape ", normalized_shape);
  SymShape shape{1, 1, 1, 1};
  for (const c10::SymInt& size : sizes.slice(0, sizes.size() - normalized_shape.size())) shape.rows *= size;
  for (const c10::SymInt& size : normalized_shape) shape.channels *= size;
  return shape;
}

void check_affine(const std::optional<at::Tensor>& parameter, std::string_view op, std::string_view argument,
                  const at::Tensor& input, c10::SymIntArrayRef shape) {
  if (!parameter) return;
  check_floating(*parameter, op, argument, input.device());
  TORCH_CHECK_VALUE(parameter->sym_sizes() == shape, op, ": ", argument, " has shape ", parameter->sym_sizes(),
                    ", expected ", shape);
}

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Tensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using torch::autograd::variable_list;

// --------------------------------------------------------------------------------- norm_forward and norm_backward

void check_shape(const at::Tensor& input, const SymShape& shape, std::string_view op) {
  check_floating(input, op, "input", input.device());
  TORCH_CHECK_VALUE(shape.groups > 0 && shape.rows % shape.groups == 0, op, ": got ", shape.rows, " rows and ",
                    shape.groups, " groups, expected a multiple of the groups");
  TORCH_CHECK_VALUE(input.sym_numel() == shape.rows * shape.channels * shape.spatial, op, ": input has ",
                    input.sym_numel(), " elements, expected ", shape.rows, " rows of ", shape.channels, " channels of ",
                    shape.spatial);
}

void check_parameter(const OptionalTensor& parameter, const SymShape& shape, std::string_view op,
                     std::string_view argument, at::Device device) {
  if (!parameter) return;
  check_floating(*parameter, op, argument, device);
  TORCH_CHECK_VALUE(parameter->sym_numel() == shape.parameters(), op, ": ", argument, " has ", parameter->sym_numel(),
                    " elements, expected ", shape.parameters());
}

struct Cpu {
  static void run(const NormForward& call, const at::Tensor&) { cpu::normalize(call, TorchExecutor()); }
  static void run(const NormBackward& call, const at::Tensor&) { cpu::normalize_backward(call, TorchExecutor()); }
};

#ifdef HALFSTEP_CUDA
struct Cuda {
  static void run(const NormForward& call, const at::Tensor& input) {
    const c10::cuda::CUDAGuard guard(input.device());
    cuda::normalize(call, {c10::cuda::getCurrentCUDAStream().stream()});
  }
  static void run(const NormBackward& call, const at::Tensor& input) {
    const c10::cuda::CUDAGuard guard(input.device());
    const bool parameters = call.grad_weight != nullptr || call.grad_bias != nullptr;
    const auto bytes = parameters ? static_cast<std::int64_t>(cuda::norms_workspace_bytes(call.shape)) : 0;
    const at::Tensor workspace = at::empty({bytes}, input.options().dtype(at::kByte));
    cuda::normalize_backward(call, workspace.data_ptr(), {c10::cuda::getCurrentCUDAStream().stream()});
  }
};
#endif

struct Meta {};

template <class Backend>
Tensors norm_forward(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     c10::SymInt rows, c10::SymInt channels, c10::SymInt spatial, std::int64_t groups, bool center,
                     double eps, at::ScalarType out_dtype) {
  constexpr std::string_view op = "norm_forward";
  const SymShape shape{std::move(rows), std::move(channels), std::move(spatial), groups};
  check_shape(input, shape, op);
  check_parameter(weight, shape, op, "weight", input.device());
  check_parameter(bias, shape, op, "bias", input.device());
  TORCH_CHECK_TYPE(out_dtype == at::kFloat || out_dtype == at::kHalf || out_dtype == at::kBFloat16, op,
                   ": out_dtype is ", out_dtype, ", expected Float, Half or BFloat16");
  const auto floats = input.options().dtype(at::kFloat);
  at::Tensor out = at::empty_symint(input.sym_sizes(), input.options().dtype(out_dtype));
  at::Tensor mean = at::empty_symint({center ? shape.rows : c10::SymInt(0)}, floats);
  at::Tensor rstd = at::empty_symint({shape.rows}, floats);
  if constexpr (!std::is_same_v<Backend, Meta>) {
    const at::Tensor x = input.contiguous();
    const OptionalTensor w = dense(weight);
    const OptionalTensor b = dense(bias);
    Backend::run(NormForward{shape.known(), center, eps, view_of(x), view_or_none(w), view_or_none(b), view_of(out),
                             center ? mean.data_ptr<float>() : nullptr, rstd.data_ptr<float>()},
                 input);
  }
  return {out, mean, rstd};
}

template <class Backend>
Tensors norm_backward(const at::Tensor& grad_out, const at::Tensor& input, const OptionalTensor& weight,
                      const at::Tensor& mean, const at::Tensor& rstd, c10::SymInt rows, c10::SymInt channels,
                      c10::SymInt spatial, std::int64_t groups, bool center, std::array<bool, 3> output_mask) {
  constexpr std::string_view op = "norm_backward";
  const SymShape shape{std::move(rows), std::move(channels), std::move(spatial), groups};
  check_shape(input, shape, op);
  check_parameter(weight, shape, op, "weight", input.device());
  check_floating(grad_out, op, "grad_out", input.device());
  TORCH_CHECK_VALUE(grad_out.sym_numel() == input.sym_numel(), op, ": grad_out has ", grad_out.sym_numel(),
                    " elements, expected ", input.sym_numel());
  for (const auto& [tensor, argument, expected] :
       {std::tuple(mean, "mean", center ? shape.rows : c10::SymInt(0)), std::tuple(rstd, "rstd", shape.rows)}) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, op, ": ", argument, " has dtype ", tensor.scalar_type(),
                     ", expected Float");
    check_floating(tensor, op, argument, input.device());
    TORCH_CHECK_VALUE(tensor.sym_numel() == expected, op, ": ", argument, " has ", tensor.sym_numel(),
                      " elements, expected ", expected);
  }
  const auto floats = input.options().dtype(at::kFloat);
  at::Tensor grad_input = output_mask[0] ? at::empty_symint(input.sym_sizes(), input.options()) : at::Tensor();
  at::Tensor grad_weight = output_mask[1] ? at::empty_symint({shape.parameters()}, floats) : at::Tensor();
  at::Tensor grad_bias = output_mask[2] ? at::empty_symint({shape.parameters()}, floats) : at::Tensor();
  if constexpr (!std::is_same_v<Backend, Meta>) {
    const at::Tensor g = grad_out.contiguous();
    const at::Tensor x = input.contiguous();
    const OptionalTensor w = dense(weight);
    Backend::run(NormBackward{shape.known(), center, view_of(g), view_of(x), view_or_none(w),
                              center ? mean.const_data_ptr<float>() : nullptr, rstd.const_data_ptr<float>(),
                              output_mask[0] ? grad_input.data_ptr() : nullptr,
                              output_mask[1] ? grad_weight.data_ptr<float>() : nullptr,
                              output_mask[2] ? grad_bias.data_ptr<float>() : nullptr},
                 input);
  }
  return {grad_input, grad_weight, grad_bias};
}

template <class Backend>
void implement(torch::Library& library) {
  library.impl("norm_forward", &norm_forward<Backend>);
  library.impl("norm_backward", &norm_backward<Backend>);
}

// -------------------------------------------------------------------------------------------------------- autograd

struct NormFunction : torch::autograd::Function<NormFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input,
                            const OptionalTensor& weight, const OptionalTensor& bias, const SymShape& shape,
                            bool center, double eps, at::ScalarType out_dtype, const std::string& op) {
    static const auto forward_op = c10::Dispatcher::singleton()
                                       .findSchemaOrThrow("halfstep::norm_forward", "")
                                       .typed<decltype(norm_forward<Cpu>)>();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [out, mean, rstd] = forward_op.call(input, weight, bias, shape.rows, shape.channels, shape.spatial,
                                             shape.groups, center, eps, out_dtype);
    ctx->save_for_backward({input, weight.value_or(at::Tensor()), mean, rstd});
    auto& saved = ctx->saved_data;
    saved["rows"] = shape.rows;
    saved["channels"] = shape.channels;
    saved["spatial"] = shape.spatial;
    saved["groups"] = shape.groups;
    saved["center"] = center;
    saved["has_bias"] = bias.has_value();
    if (bias) {
      saved["bias_dtype"] = bias->scalar_type();
      saved["bias_sizes"] = bias->sym_sizes();
    }
    saved["op"] = op;
    return out;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    static const auto backward_op = c10::Dispatcher::singleton()
                                        .findSchemaOrThrow("halfstep::norm_backward", "")
                                        .typed<decltype(norm_backward<Cpu>)>();
    const variable_list tensors = ctx->get_saved_variables();
    const at::Tensor& weight = tensors[1];
    auto& saved = ctx->saved_data;
    // An absent weight has no place among the inputs that autograd counts.
    const bool has_weight = weight.defined();
    const std::array<bool, 3> mask{ctx->needs_input_grad(0), has_weight && ctx->needs_input_grad(1),
                                   saved["has_bias"].toBool() && ctx->needs_input_grad(has_weight ? 2 : 1)};
    variable_list result(8);  // one for each argument of forward
    {
      const torch::autograd::AutoGradMode no_grad(false);
      auto [grad_input, grad_weight, grad_bias] =
          backward_op.call(grads[0], tensors[0], has_weight ? OptionalTensor(weight) : std::nullopt, tensors[2],
                           tensors[3], saved["rows"].toSymInt(), saved["channels"].toSymInt(),
                           saved["spatial"].toSymInt(), saved["groups"].toInt(), saved["center"].toBool(), mask);
      result[0] = grad_input;
      if (mask[1]) result[1] = grad_weight.view_symint(weight.sym_sizes()).to(weight.scalar_type());
      if (mask[2])
        result[2] = grad_bias.view_symint(saved["bias_sizes"].toSymIntVector()).to(saved["bias_dtype"].toScalarType());
    }
    return differentiable_once(saved["op"].toStringRef(), std::move(result));
  }
};

// -------------------------------------------------------------------------------------------------- the public ops

at::ScalarType check_dtypes(const at::Tensor& input, std::optional<at::ScalarType> out_dtype, std::string_view op) {
  check_floating(input, op, "input", input.device());
  const at::ScalarType dtype = out_dtype.value_or(input.scalar_type());
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op, ": out_dtype is ", dtype,
                   ", expected Float, Half or BFloat16");
  return dtype;
}

at::Tensor layer_norm_op(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, std::optional<at::ScalarType> out_dtype) {
  constexpr const char* op = "layer_norm";
  const at::ScalarType dtype = check_dtypes(input, out_dtype, op);
  const SymShape shape = last_dimensions(input, normalized_shape, op);
  check_affine(weight, op, "weight", input, normalized_shape);
  check_affine(bias, op, "bias", input, normalized_shape);
  if (must_decompose({input, weight, bias})) {
    const NoAutocast no_autocast;
    return at::layer_norm_symint(widened(input), normalized_shape, widened(weight), widened(bias), eps).to(dtype);
  }
  return NormFunction::apply(input, weight, bias, shape, /*center=*/true, eps, dtype, std::string(op));
}

at::Tensor rms_norm_op(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                       std::optional<double> eps, std::optional<at::ScalarType> out_dtype) {
  constexpr const char* op = "rms_norm";
  const at::ScalarType dtype = check_dtypes(input, out_dtype, op);
  const SymShape shape = last_dimensions(input, normalized_shape, op);
  check_affine(weight, op, "weight", input, normalized_shape);
  const double epsilon = eps.value_or(std::numeric_limits<float>::epsilon());
  if (must_decompose({input, weight})) {
    const NoAutocast no_autocast;
    return at::rms_norm_symint(widened(input), normalized_shape, widened(weight), epsilon).to(dtype);
  }
  return NormFunction::apply(input, weight, OptionalTensor(), shape, /*center=*/false, epsilon, dtype, std::string(op));
}

at::Tensor group_norm_op(const at::Tensor& input, std::int64_t num_groups, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, std::optional<at::ScalarType> out_dtype) {
  constexpr const char* op = "group_norm";
  const at::ScalarType dtype = check_dtypes(input, out_dtype, op);
  TORCH_CHECK_VALUE(input.dim() >= 2, op, ": input has shape ", input.sym_sizes(),
                    ", expected at least two dimensions, samples and channels");
  const c10::SymInt channels = input.sym_size(1);
  TORCH_CHECK_VALUE(num_groups > 0 && channels % num_groups == 0, op, ": num_groups is ", num_groups,
                    ", expected a divisor of the ", channels, " channels of input");
  check_affine(weight, op, "weight", input, {channels});
  check_affine(bias, op, "bias", input, {channels});
  if (must_decompose({input, weight, bias})) {
    const NoAutocast no_autocast;
    return at::group_norm(widened(input), num_groups, widened(weight), widened(bias), eps).to(dtype);
  }
  SymShape shape{input.sym_size(0) * num_groups, channels / num_groups, 1, num_groups};
  for (const c10::SymInt& size : input.sym_sizes().slice(2)) shape.spatial *= size;
  return NormFunction::apply(input, weight, bias, shape, /*center=*/true, eps, dtype, std::string(op));
}

}  // namespace

void define_norms(torch::Library& library) {
  library.def(
      "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, "
      "ScalarType? out_dtype=None) -> Tensor",
      &layer_norm_op);
  library.def(
      "rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, *, "
      "ScalarType? out_dtype=None) -> Tensor",
      &rms_norm_op);
  library.def(
      "group_norm(Tensor input, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, *, "
      "ScalarType? out_dtype=None) -> Tensor",
      &group_norm_op);
  library.def(
      "norm_forward(Tensor input, Tensor? weight, Tensor? bias, SymInt rows, SymInt channels, SymInt spatial, "
      "int groups, bool center, float eps, ScalarType out_dtype) -> (Tensor out, Tensor mean, Tensor rstd)");
  library.def(
      "norm_backward(Tensor grad_out, Tensor input, Tensor? weight, Tensor mean, Tensor rstd, SymInt rows, "
      "SymInt channels, SymInt spatial, int groups, bool center, bool[3] output_mask) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
}

void implement_norms_cpu(torch::Library& library) {
  implement<Cpu>(library);
}

void implement_norms_meta(torch::Library& library) {
  implement<Meta>(library);
}

void implement_norms_cuda(torch::Library& library) {
#ifdef HALFSTEP_CUDA
  implement<Cuda>(library);
#else
  library.impl("norm_forward", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  library.impl("norm_backward", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
#endif
}

}  // namespace torch_ops

at::Tensor layer_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                      const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps,
                      std::optional<at::ScalarType> out_dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::layer_norm", "")
                             .typed<decltype(torch_ops::layer_norm_op)>();
  return op.call(input, normalized_shape, weight, bias, eps, out_dtype);
}

at::Tensor rms_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                    const std::optional<at::Tensor>& weight, std::optional<double> eps,
                    std::optional<at::ScalarType> out_dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::rms_norm", "")
                             .typed<decltype(torch_ops::rms_norm_op)>();
  return op.call(input, normalized_shape, weight, eps, out_dtype);
}

at::Tensor group_norm(const at::Tensor& input, std::int64_t num_groups, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, double eps, std::optional<at::ScalarType> out_dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::group_norm", "")
                             .typed<decltype(torch_ops::group_norm_op)>();
  return op.call(input, num_groups, weight, bias, eps, out_dtype);
}

}  // namespace halfstep
