// int8_linear and int8_conv2d: schemas, checks, quantization of the input, and the way to the core. Contract:
// halfstep/torch/int8.h.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include "conversions.h"
#include "errors.h"
#include "halfstep/torch/int8.h"
#include "int8_checks.h"
#include "registration.h"
#ifdef HALFSTEP_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace halfstep {
namespace torch_ops {
namespace {

using Weight = c10::intrusive_ptr<PackedInt8>;
using OptionalTensor = std::optional<at::Tensor>;

bool is_float(at::ScalarType type) {
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
}

Activation activation_named(std::string_view name, std::string_view op) {
  constexpr std::array<std::pair<std::string_view, Activation>, 7> names{{{"none", Activation::kNone},
                                                                          {"relu", Activation::kRelu},
                                                                          {"relu6", Activation::kRelu6},
                                                                          {"gelu", Activation::kGelu},
                                                                          {"gelu_tanh", Activation::kGeluTanh},
                                                                          {"silu", Activation::kSilu},
                                                                          {"hardswish", Activation::kHardswish}}};
  for (const auto& [known, activation] : names)
    if (known == name) return activation;
  TORCH_CHECK_VALUE(false, op, ": activation is '", name,
                    "', expected none, relu, relu6, gelu, gelu_tanh, silu or hardswish");
}

at::ScalarType checked_out_dtype(const at::Tensor& input, std::optional<at::ScalarType> out_dtype,
                                 std::optional<double> out_scale, std::string_view op) {
  if (out_scale) {
    TORCH_CHECK_VALUE(!out_dtype || *out_dtype == at::kChar, op, ": out_dtype is ", *out_dtype,
                      ", expected Char where out_scale is given");
    return at::kChar;
  }
  const at::ScalarType dtype = out_dtype.value_or(is_float(input.scalar_type()) ? input.scalar_type() : at::kFloat);
  TORCH_CHECK_TYPE(is_float(dtype) || dtype == at::kInt, op, ": out_dtype is ", dtype,
                   ", expected Float, Half, BFloat16, Int, or Char with out_scale");
  return dtype;
}

void check_input(const at::Tensor& input, std::optional<double> input_scale, std::int64_t input_zero_point,
                 std::string_view op, bool row_scales = false) {
  TORCH_CHECK_VALUE(input.layout() == at::kStrided, op, ": input has layout ", input.layout(), ", expected strided");
  TORCH_CHECK_TYPE(is_float(input.scalar_type()) || input.scalar_type() == at::kChar, op, ": input has dtype ",
                   input.scalar_type(), ", expected Float, Half, BFloat16 or Char");
  TORCH_CHECK_VALUE(input.scalar_type() != at::kChar || input_scale || row_scales, op,
                    ": input is int8, which needs input_scale");
  TORCH_CHECK_VALUE(input_scale || input_zero_point == 0, op, ": input_zero_point is ", input_zero_point,
                    ", expected 0 where input_scale is absent");
}

void check_row_scales(const OptionalTensor& row_scales, const at::Tensor& input, std::optional<double> input_scale,
                      std::string_view op) {
  if (!row_scales) return;
  TORCH_CHECK_VALUE(input.scalar_type() == at::kChar && !input_scale, op, ": got input_row_scales",
                    input_scale ? " beside input_scale" : "", ", expected them for an int8 input without input_scale");
  TORCH_CHECK_TYPE(row_scales->scalar_type() == at::kFloat, op, ": input_row_scales has dtype ",
                   row_scales->scalar_type(), ", expected Float");
  const auto sizes = input.sym_sizes().slice(0, input.dim() - 1);
  TORCH_CHECK_VALUE(row_scales->sym_sizes() == sizes, op, ": input_row_scales has shape ", row_scales->sym_sizes(),
                    ", expected ", sizes, ", one for each row of input");
  TORCH_CHECK_VALUE(row_scales->device() == input.device(), op, ": input_row_scales is on ", row_scales->device(),
                    ", expected ", input.device(), ", the device of input");
}

void check_residual(const OptionalTensor& residual, const at::Tensor& input, c10::SymIntArrayRef sizes,
                    std::string_view op) {
  if (!residual) return;
  TORCH_CHECK_TYPE(is_float(residual->scalar_type()), op, ": residual has dtype ", residual->scalar_type(),
                   ", expected Float, Half or BFloat16");
  TORCH_CHECK_VALUE(residual->sym_sizes() == sizes, op, ": residual has shape ", residual->sym_sizes(), ", expected ",
                    sizes);
  TORCH_CHECK_VALUE(residual->device() == input.device(), op, ": residual is on ", residual->device(), ", expected ",
                    input.device(), ", the device of input");
}

struct Cpu {
  using Executor = TorchExecutor;
  static void quantize(const at::Tensor& input, const ChannelFactors& factors, const Int8Parameters& parameters,
                       std::int8_t* out) {
    cpu::quantize(view_of(input), factors, parameters, out, TorchExecutor());
  }
  static void quantize_rows(const at::Tensor& input, const ChannelFactors& factors, std::int64_t rows, std::int8_t* out,
                            float* scales) {
    cpu::quantize_rows(view_of(input), factors, rows, out, scales, TorchExecutor());
  }
  template <class Shape>
  static void run(const Shape& shape, const std::int8_t* input, const PackedInt8::Form& form,
                  const Int8Epilogue& epilogue) {
    static const Int8Isa isa = cpu::best_int8_isa();
    if constexpr (std::is_same_v<Shape, Int8LinearShape>) {
      cpu::int8_linear(shape, input, form.packed.const_data_ptr(), epilogue, isa, TorchExecutor());
    } else {
      cpu::int8_conv2d(shape, input, form.packed.const_data_ptr(), epilogue, isa, TorchExecutor());
    }
  }
};

#ifdef HALFSTEP_CUDA
struct Cuda {
  static CudaStream stream() { return {c10::cuda::getCurrentCUDAStream().stream()}; }

  static void quantize(const at::Tensor& input, const ChannelFactors& factors, const Int8Parameters& parameters,
                       std::int8_t* out) {
    cuda::quantize(view_of(input), factors, parameters, out, stream());
  }
  static void quantize_rows(const at::Tensor& input, const ChannelFactors& factors, std::int64_t rows, std::int8_t* out,
                            float* scales) {
    cuda::quantize_rows(view_of(input), factors, rows, out, scales, stream());
  }
  template <class Shape>
  static void run(const Shape& shape, const std::int8_t* input, const PackedInt8::Form& form,
                  const Int8Epilogue& epilogue) {
    const auto* const weight = form.weight.const_data_ptr<std::int8_t>();
    const auto* const sums = form.packed.const_data_ptr<std::int32_t>();
    if constexpr (std::is_same_v<Shape, Int8LinearShape>) {
      cuda::int8_linear(shape, input, weight, sums, epilogue, stream());
    } else {
      cuda::int8_conv2d(shape, input, weight, sums, epilogue, stream());
    }
  }
};
#endif

// Quantizes a dense input of `rows` rows (of a convolution: images) if it is not int8 yet, and multiplies.
// `row_scales`: those of an int8 input whose rows have each its own.
template <class Backend, class Shape>
void multiply(const Shape& shape, std::int64_t rows, const at::Tensor& input, const Weight& weight,
              std::optional<double> input_scale, std::int64_t input_zero_point, const OptionalTensor& residual,
              Activation activation, const at::Tensor& out, const Int8Parameters& out_parameters, std::string_view op,
              at::Tensor row_scales = {}) {
  const auto form = weight->form(input.device());
  Int8Epilogue epilogue;
  epilogue.weight_scales = form->scales.template const_data_ptr<float>();
  if (form->bias) epilogue.bias = form->bias->template const_data_ptr<float>();
  if (residual) {
    epilogue.residual = residual->const_data_ptr();
    epilogue.residual_dtype = *to_dtype(residual->scalar_type());
  }
  epilogue.activation = activation;
  epilogue.out.data = out.data_ptr();
  if (out.scalar_type() == at::kChar) {
    epilogue.out.kind = Int8OutKind::kInt8;
    epilogue.out.parameters = out_parameters;
  } else if (out.scalar_type() == at::kInt) {
    epilogue.out.kind = Int8OutKind::kSums;
  } else {
    epilogue.out.kind = Int8OutKind::kFloat;
    epilogue.out.dtype = *to_dtype(out.scalar_type());
  }

  at::Tensor quantized = input;
  if (input_scale) epilogue.input = checked_parameters(*input_scale, input_zero_point, op, "input_scale");
  if (input.scalar_type() != at::kChar) {
    quantized = at::empty({input.numel()}, input.options().dtype(at::kChar));
    auto* const q = quantized.template data_ptr<std::int8_t>();
    ChannelFactors factors;
    if (form->input_factors)
      factors = {form->input_factors->template const_data_ptr<float>(), form->input_factors->numel()};
    if (input_scale) {
      Backend::quantize(input, factors, epilogue.input, q);
    } else {
      row_scales = at::empty({rows}, input.options().dtype(at::kFloat));
      Backend::quantize_rows(input, factors, rows, q, row_scales.template data_ptr<float>());
    }
  }
  if (row_scales.defined()) epilogue.row_scales = row_scales.template const_data_ptr<float>();
  as_value_error([&] { Backend::run(shape, quantized.template const_data_ptr<std::int8_t>(), *form, epilogue); });
}

template <class Backend>
at::Tensor linear(const at::Tensor& input, const Weight& weight, std::optional<double> input_scale,
                  std::int64_t input_zero_point, const OptionalTensor& residual, std::string_view activation_name,
                  std::optional<at::ScalarType> out_dtype, std::optional<double> out_scale, std::int64_t out_zero_point,
                  const OptionalTensor& input_row_scales) {
  constexpr std::string_view op = "int8_linear";
  check_input(input, input_scale, input_zero_point, op, input_row_scales.has_value());
  TORCH_CHECK_VALUE(!weight->is_convolution(), op, ": weight is of a convolution, expected [out, in]");
  const std::int64_t channels = weight->weight().size(0);
  const std::int64_t terms = weight->weight().size(1);
  TORCH_CHECK_VALUE(input.dim() >= 1 && input.sym_size(-1) == terms, op, ": input has shape ", input.sym_sizes(),
                    ", expected one that ends in ", terms);
  check_row_scales(input_row_scales, input, input_scale, op);
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.back() = channels;
  check_residual(residual, input, sizes, op);
  const Activation activation = activation_named(activation_name, op);
  const at::ScalarType dtype = checked_out_dtype(input, out_dtype, out_scale, op);
  const Int8Parameters out_parameters = checked_parameters(out_scale.value_or(1.0), out_zero_point, op, "out_scale");
  at::Tensor out = at::empty_symint(sizes, input.options().dtype(dtype));
  if (out.numel() == 0) return out;
  const std::int64_t rows = out.numel() / channels;
  multiply<Backend>(Int8LinearShape{rows, terms, channels}, rows, input.contiguous(), weight, input_scale,
                    input_zero_point, residual ? OptionalTensor(residual->contiguous()) : std::nullopt, activation, out,
                    out_parameters, op, input_row_scales ? input_row_scales->contiguous() : at::Tensor());
  return out;
}

template <class Backend>
at::Tensor conv2d(const at::Tensor& input, const Weight& weight, std::optional<double> input_scale,
                  std::int64_t input_zero_point, const OptionalTensor& residual, std::string_view activation_name,
                  std::optional<at::ScalarType> out_dtype, std::optional<double> out_scale,
                  std::int64_t out_zero_point) {
  constexpr std::string_view op = "int8_conv2d";
  check_input(input, input_scale, input_zero_point, op);
  TORCH_CHECK_VALUE(weight->is_convolution(), op,
                    ": weight has two dimensions, expected [out, in / groups, height, width]");
  const auto& w = weight->weight();
  const auto& g = weight->geometry();
  const std::int64_t in_channels = w.size(1) * g.groups;
  TORCH_CHECK_VALUE(input.dim() == 4 && input.sym_size(1) == in_channels, op, ": input has shape ", input.sym_sizes(),
                    ", expected [batch, ", in_channels, ", height, width]");
  const auto out_size = [&](std::size_t i) {
    const auto d = static_cast<std::int64_t>(i);
    const c10::SymInt padded = input.sym_size(2 + d) + 2 * g.padding[i];
    const std::int64_t reach = g.dilation[i] * (w.size(2 + d) - 1) + 1;
    TORCH_CHECK_VALUE(padded >= reach, op, ": the padded input is ", padded, " ", i == 0 ? "high" : "wide",
                      ", expected at least ", reach, ", the kernel's reach");
    return (padded - reach) / g.stride[i] + 1;
  };
  const c10::SymDimVector sizes{input.sym_size(0), w.size(0), out_size(0), out_size(1)};
  check_residual(residual, input, sizes, op);
  const Activation activation = activation_named(activation_name, op);
  const at::ScalarType dtype = checked_out_dtype(input, out_dtype, out_scale, op);
  const Int8Parameters out_parameters = checked_parameters(out_scale.value_or(1.0), out_zero_point, op, "out_scale");
  constexpr auto channels_last = at::MemoryFormat::ChannelsLast;
  at::Tensor out = at::empty_symint(sizes, input.options().dtype(dtype).memory_format(channels_last), std::nullopt);
  if (out.numel() == 0) return out;
  const Int8ConvShape shape{input.size(0), input.size(2), input.size(3), in_channels, out.size(2), out.size(3),
                            out.size(1),   w.size(2),     w.size(3),     g.stride[0], g.stride[1], g.padding[0],
                            g.padding[1],  g.dilation[0], g.dilation[1], g.groups};
  multiply<Backend>(shape, shape.batch, input.contiguous(channels_last), weight, input_scale, input_zero_point,
                    residual ? OptionalTensor(residual->contiguous(channels_last)) : std::nullopt, activation, out,
                    out_parameters, op);
  return out;
}

#ifdef HALFSTEP_CUDA
// On the device of the input.
template <auto function, class... Arguments>
at::Tensor guarded(const at::Tensor& input, Arguments... arguments) {
  const c10::cuda::CUDAGuard guard(input.device());
  return function(input, arguments...);
}
at::Tensor cuda_linear(const at::Tensor& input, const Weight& weight, std::optional<double> input_scale,
                       std::int64_t input_zero_point, const OptionalTensor& residual, std::string_view activation,
                       std::optional<at::ScalarType> out_dtype, std::optional<double> out_scale,
                       std::int64_t out_zero_point, const OptionalTensor& input_row_scales) {
  return guarded<&linear<Cuda>>(input, weight, input_scale, input_zero_point, residual, activation, out_dtype,
                                out_scale, out_zero_point, input_row_scales);
}
at::Tensor cuda_conv2d(const at::Tensor& input, const Weight& weight, std::optional<double> input_scale,
                       std::int64_t input_zero_point, const OptionalTensor& residual, std::string_view activation,
                       std::optional<at::ScalarType> out_dtype, std::optional<double> out_scale,
                       std::int64_t out_zero_point) {
  return guarded<&conv2d<Cuda>>(input, weight, input_scale, input_zero_point, residual, activation, out_dtype,
                                out_scale, out_zero_point);
}
#endif

// The same of a PackedInt8 by its id.
template <auto function, class Signature = decltype(function)>
struct ById;
template <auto function, class... Arguments>
struct ById<function, at::Tensor (*)(const at::Tensor&, const Weight&, Arguments...)> {
  static at::Tensor call(const at::Tensor& input, std::int64_t weight, Arguments... arguments) {
    return function(input, PackedInt8::with_id(weight), arguments...);
  }
};

// The name of the kernels that the products run on a device, for reports.
std::string int8_kernel(const at::Device& device) {
#ifdef HALFSTEP_CUDA
  if (device.is_cuda()) {
    const auto index = device.has_index() ? device.index() : c10::cuda::current_device();
    return cuda::has_int8_wgmma(index) ? "halfstep wgmma, mma.sync" : "halfstep mma.sync";
  }
#else
  TORCH_CHECK_NOT_IMPLEMENTED(!device.is_cuda(), "int8_kernel: this halfstep was built without CUDA");
#endif
  return std::string("halfstep ").append(cpu::name_of(cpu::best_int8_isa()));
}

}  // namespace

void define_int8_products(torch::Library& library) {
  library.def("int8_kernel(Device device) -> str", &int8_kernel);
  // by_id: what the layers of Python's package call outside of graphs, in which a number would name nothing.
  const std::string call =
      "float? input_scale=None, int input_zero_point=0, Tensor? residual=None, str activation=\"none\", "
      "ScalarType? out_dtype=None, float? out_scale=None, int out_zero_point=0";
  const auto define = [&](const std::string& name, const std::string& more) {
    const std::string object = "(Tensor input, __torch__.torch.classes.halfstep.PackedInt8 weight, ";
    library.def((name + object + call + more + ") -> Tensor").c_str());
    library.def((name + "_by_id(Tensor input, int weight, " + call + more + ") -> Tensor").c_str());
  };
  define("int8_linear", ", Tensor? input_row_scales=None");
  define("int8_conv2d", "");
}

void implement_int8_products_cpu(torch::Library& library) {
  library.impl("int8_linear", &linear<Cpu>);
  library.impl("int8_conv2d", &conv2d<Cpu>);
  library.impl("int8_linear_by_id", &ById<&linear<Cpu>>::call);
  library.impl("int8_conv2d_by_id", &ById<&conv2d<Cpu>>::call);
}
void implement_int8_products_cuda(torch::Library& library) {
#ifdef HALFSTEP_CUDA
  library.impl("int8_linear", &cuda_linear);
  library.impl("int8_conv2d", &cuda_conv2d);
  library.impl("int8_linear_by_id", &ById<&cuda_linear>::call);
  library.impl("int8_conv2d_by_id", &ById<&cuda_conv2d>::call);
#else
  library.impl("int8_linear", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  library.impl("int8_conv2d", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  library.impl("int8_linear_by_id", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  library.impl("int8_conv2d_by_id", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
#endif
}

}  // namespace torch_ops

at::Tensor int8_linear(const at::Tensor& input, const c10::intrusive_ptr<PackedInt8>& weight, const Int8Call& call) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::int8_linear", "")
                             .typed<decltype(torch_ops::linear<torch_ops::Cpu>)>();
  return op.call(input, weight, call.input_scale, call.input_zero_point, call.residual, call.activation, call.out_dtype,
                 call.out_scale, call.out_zero_point, call.input_row_scales);
}
at::Tensor int8_conv2d(const at::Tensor& input, const c10::intrusive_ptr<PackedInt8>& weight, const Int8Call& call) {
  TORCH_CHECK_VALUE(!call.input_row_scales, "int8_conv2d: got input_row_scales, expected none for a convolution");
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::int8_conv2d", "")
                             .typed<decltype(torch_ops::conv2d<torch_ops::Cpu>)>();
  return op.call(input, weight, call.input_scale, call.input_zero_point, call.residual, call.activation, call.out_dtype,
                 call.out_scale, call.out_zero_point);
}

}  // namespace halfstep
