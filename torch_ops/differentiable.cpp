// What the differentiable ops share. Contract: differentiable.h.
#include "differentiable.h"

#include <algorithm>
#include <string>

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

namespace halfstep::torch_ops {

bool must_decompose(std::initializer_list<std::optional<at::Tensor>> tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() && tensor->defined() &&
           (at::isTensorSubclassLike(*tensor) || tensor->_fw_grad(/*level=*/0).defined());
  });
}

at::Tensor widened(const at::Tensor& tensor) {
  return tensor.to(at::kFloat);
}

std::optional<at::Tensor> widened(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? std::optional(widened(*tensor)) : std::nullopt;
}

torch::autograd::variable_list differentiable_once(std::string_view op, torch::autograd::variable_list gradients) {
  if (!at::GradMode::is_enabled()) return gradients;
  // As torch's once_differentiable: they claim to be differentiable, and what differentiates them is the error.
  for (at::Tensor& gradient : gradients)
    if (gradient.defined()) gradient = gradient.detach().requires_grad_();
  const auto count = static_cast<std::int64_t>(gradients.size());
  return torch::autograd::DelayedError(
             "halfstep::" + std::string(op) +
                 " is differentiable once; for a second derivative use torch's own function on float32 tensors",
             count)
      .apply(std::move(gradients));
}

void check_floating(const at::Tensor& tensor, std::string_view op, std::string_view argument, at::Device device) {
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, op, ": ", argument, " has layout ", tensor.layout(),
                    ", expected a strided tensor");
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op, ": ", argument,
                   " has dtype ", dtype, ", expected Float, Half or BFloat16");
  TORCH_CHECK(tensor.device() == device, op, ": ", argument, " is on ", tensor.device(), ", expected ", device,
              ", the device of input");
}

}  // namespace halfstep::torch_ops
