// layer_norm_int8 and rms_norm_int8: schemas, checks and the way to the core. Contract: halfstep/torch/int8.h,
// halfstep/int8_norms.h.
#include "halfstep/int8_norms.h"

#include <limits>
#include <tuple>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include "conversions.h"
#include "differentiable.h"
#include "halfstep/torch/int8.h"
#include "int8_checks.h"
#include "norm_checks.h"
#include "registration.h"
#ifdef HALFSTEP_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace halfstep {
namespace torch_ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

struct Cpu {
  static void run(const Int8Norm& call, const at::Tensor&) { cpu::normalize_int8(call, TorchExecutor()); }
};

#ifdef HALFSTEP_CUDA
struct Cuda {
  static void run(const Int8Norm& call, const at::Tensor& input) {
    const c10::cuda::CUDAGuard guard(input.device());
    cuda::normalize_int8(call, {c10::cuda::getCurrentCUDAStream().stream()});
  }
};
#endif

struct Meta {};

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <class Backend>
Result norm_int8(std::string_view op, const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                 const OptionalTensor& weight, const OptionalTensor& bias, bool center, double eps,
                 std::optional<double> scale, std::int64_t zero_point, bool keep_float) {
  check_floating(input, op, "input", input.device());
  const SymShape shape = last_dimensions(input, normalized_shape, op);
  check_affine(weight, op, "weight", input, normalized_shape);
  check_affine(bias, op, "bias", input, normalized_shape);
  const Int8Parameters parameters = checked_parameters(scale.value_or(1.0), zero_point, op, "scale");
  TORCH_CHECK_VALUE(scale || zero_point == 0, op, ": zero_point is ", zero_point, ", expected 0 where scale is absent");
  TORCH_CHECK_VALUE(scale || normalized_shape.size() == 1, op, ": normalized_shape is ", normalized_shape,
                    ", expected one dimension where scale is absent");
  const c10::SymIntArrayRef sizes = input.sym_sizes();
  const c10::SymInt none[] = {0};
  at::Tensor quantized = at::empty_symint(sizes, input.options().dtype(at::kChar));
  at::Tensor scales = at::empty_symint(scale ? c10::SymIntArrayRef(none) : sizes.slice(0, sizes.size() - 1),
                                       input.options().dtype(at::kFloat));
  at::Tensor out = at::empty_symint(keep_float ? sizes : c10::SymIntArrayRef(none), input.options());
  if constexpr (!std::is_same_v<Backend, Meta>) {
    const at::Tensor x = input.contiguous();
    const OptionalTensor w = dense(weight);
    const OptionalTensor b = dense(bias);
    TensorView rounded = view_of(x);  // its size and dtype
    rounded.data = keep_float ? out.data_ptr() : nullptr;
    const NormForward norm{shape.known(),   center,  eps,     view_of(x), view_or_none(w),
                           view_or_none(b), rounded, nullptr, nullptr};
    Backend::run(
        Int8Norm{norm, quantized.data_ptr<std::int8_t>(), parameters, scale ? nullptr : scales.data_ptr<float>()},
        input);
  }
  return {quantized, scales, out};
}

template <class Backend>
Result layer_norm_int8_op(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                          const OptionalTensor& bias, double eps, std::optional<double> scale, std::int64_t zero_point,
                          bool keep_float) {
  return norm_int8<Backend>("layer_norm_int8", input, normalized_shape, weight, bias, /*center=*/true, eps, scale,
                            zero_point, keep_float);
}

template <class Backend>
Result rms_norm_int8_op(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                        std::optional<double> eps, std::optional<double> scale, std::int64_t zero_point,
                        bool keep_float) {
  return norm_int8<Backend>("rms_norm_int8", input, normalized_shape, weight, OptionalTensor(), /*center=*/false,
                            eps.value_or(std::numeric_limits<float>::epsilon()), scale, zero_point, keep_float);
}

}  // namespace

void define_int8_norms(torch::Library& library) {
  library.def(
      "layer_norm_int8(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
      "float eps=1e-05, float? scale=None, int zero_point=0, bool keep_float=False) -> "
      "(Tensor quantized, Tensor scales, Tensor out)");
  library.def(
      "rms_norm_int8(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, "
      "float? scale=None, int zero_point=0, bool keep_float=False) -> (Tensor quantized, Tensor scales, Tensor out)");
}

void implement_int8_norms_cpu(torch::Library& library) {
  library.impl("layer_norm_int8", &layer_norm_int8_op<Cpu>);
  library.impl("rms_norm_int8", &rms_norm_int8_op<Cpu>);
}
void implement_int8_norms_meta(torch::Library& library) {
  library.impl("layer_norm_int8", &layer_norm_int8_op<Meta>);
  library.impl("rms_norm_int8", &rms_norm_int8_op<Meta>);
}
void implement_int8_norms_cuda(torch::Library& library) {
#ifdef HALFSTEP_CUDA
  library.impl("layer_norm_int8", &layer_norm_int8_op<Cuda>);
  library.impl("rms_norm_int8", &rms_norm_int8_op<Cuda>);
#else
  library.impl("layer_norm_int8", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  library.impl("rms_norm_int8", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
#endif
}

}  // namespace torch_ops

Int8NormResult layer_norm_int8(const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                               const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                               double eps, std::optional<double> scale, std::int64_t zero_point, bool keep_float) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::layer_norm_int8", "")
                             .typed<decltype(torch_ops::layer_norm_int8_op<torch_ops::Cpu>)>();
  auto [quantized, scales, out] = op.call(input, normalized_shape, weight, bias, eps, scale, zero_point, keep_float);
  return {quantized, scales, out};
}

Int8NormResult rms_norm_int8(const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                             const std::optional<at::Tensor>& weight, std::optional<double> eps,
                             std::optional<double> scale, std::int64_t zero_point, bool keep_float) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::rms_norm_int8", "")
                             .typed<decltype(torch_ops::rms_norm_int8_op<torch_ops::Cpu>)>();
  auto [quantized, scales, out] = op.call(input, normalized_shape, weight, eps, scale, zero_point, keep_float);
  return {quantized, scales, out};
}

}  // namespace halfstep
