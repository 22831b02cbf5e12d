// scale_gradient and cast: schemas, checks, autograd. Contract: halfstep/torch/scale_gradient.h.
#include "halfstep/torch/scale_gradient.h"

#include <cmath>
#include <string_view>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>

#include "registration.h"

namespace halfstep {
namespace torch_ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool is_floating(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble;
}

void check_input(const at::Tensor& x, std::string_view op) {
  TORCH_CHECK_TYPE(is_floating(x.scalar_type()), op, ": x has dtype ", x.scalar_type(),
                   ", expected Half, BFloat16, Float or Double");
}

// `scale` is a number, or a tensor that is read here and now. A product with a tensor without dimensions is computed in
// the other's dtype, which would round the scale first, hence float32 for half gradients.
at::Tensor product(const at::Tensor& gradient, const c10::IValue& scale) {
  if (scale.isDouble()) return at::mul(gradient, scale.toDouble());
  const at::Tensor factor = scale.toTensor().reshape({});
  const at::ScalarType dtype = gradient.scalar_type();
  if (dtype == at::kFloat || dtype == at::kDouble) return at::mul(gradient, factor);
  return at::mul(gradient.to(at::kFloat), factor).to(dtype);
}

// Both keep the scale among the data and not among the saved tensors, whose versions autograd checks.
struct ProductFunction : torch::autograd::Function<ProductFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gradient, const c10::IValue& scale) {
    ctx->saved_data["scale"] = scale;
    return product(gradient, scale);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {ProductFunction::apply(grads[0], ctx->saved_data["scale"]), at::Tensor()};
  }
};

struct ScaleGradientFunction : torch::autograd::Function<ScaleGradientFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const c10::IValue& scale) {
    ctx->saved_data["scale"] = scale;
    return x;  // autograd makes a view of it
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {ProductFunction::apply(grads[0], ctx->saved_data["scale"]), at::Tensor()};
  }
};

void check_scale(const at::Tensor& x, const at::Tensor& scale) {
  constexpr std::string_view op = "scale_gradient";
  check_input(x, op);
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat, op, ": scale has dtype ", scale.scalar_type(),
                   ", expected Float");
  TORCH_CHECK_VALUE(scale.sym_numel() == 1, op, ": scale has ", scale.sym_numel(), " elements, expected 1");
  TORCH_CHECK(scale.device() == x.device() || scale.device().is_cpu(), op, ": scale is on ", scale.device(),
              ", expected ", x.device(), ", the device of x, or cpu");
}

void check_scale(const at::Tensor& x, double scale) {
  constexpr std::string_view op = "scale_gradient";
  check_input(x, op);
  TORCH_CHECK_VALUE(std::isfinite(scale), op, ": scale is ", scale, ", expected a finite number");
}

at::Tensor scale_gradient_tensor(const at::Tensor& x, const at::Tensor& scale) {
  check_scale(x, scale);
  return ScaleGradientFunction::apply(x, c10::IValue(scale.detach()));
}

at::Tensor scale_gradient_scalar(const at::Tensor& x, double scale) {
  check_scale(x, scale);
  return ScaleGradientFunction::apply(x, c10::IValue(scale));
}

at::Tensor cast_op(const at::Tensor& x, at::ScalarType dtype) {
  constexpr std::string_view op = "cast";
  check_input(x, op);
  TORCH_CHECK_TYPE(is_floating(dtype), op, ": dtype is ", dtype, ", expected Half, BFloat16, Float or Double");
  return x.to(dtype);
}

}  // namespace

void define_scale_gradient(torch::Library& library) {
  library.def("scale_gradient(Tensor(a) x, Tensor scale) -> Tensor(a)", &scale_gradient_tensor);
  library.def("scale_gradient.Scalar(Tensor(a) x, float scale) -> Tensor(a)", &scale_gradient_scalar);
  library.def("cast(Tensor(a) x, ScalarType dtype) -> Tensor(a)", &cast_op);
  // torch.func.vmap looks through ATen's composite ops by itself, not through others'.
  library.impl("cast", torch::dispatch(c10::DispatchKey::FuncTorchBatched, &cast_op));
}

}  // namespace torch_ops

at::Tensor scale_gradient(const at::Tensor& x, const at::Tensor& scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::scale_gradient", "")
                             .typed<decltype(torch_ops::scale_gradient_tensor)>();
  return op.call(x, scale);
}

at::Tensor scale_gradient(const at::Tensor& x, double scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::scale_gradient", "Scalar")
                             .typed<decltype(torch_ops::scale_gradient_scalar)>();
  return op.call(x, scale);
}

at::Tensor cast(const at::Tensor& x, at::ScalarType dtype) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("halfstep::cast", "").typed<decltype(torch_ops::cast_op)>();
  return op.call(x, dtype);
}

}  // namespace halfstep
