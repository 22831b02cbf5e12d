// What the differentiable ops share: when they become plain ATen ops, and what their autograd functions need.
#pragma once

#include <initializer_list>
#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/variable.h>

namespace halfstep::torch_ops {

// Whether an op on `tensors` must be written as ATen ops: the tensors are being traced, transformed or wrapped
// (torch.compile, torch.export, torch.func, subclasses, dispatch modes, forward-mode AD), and only ATen ops can be
// looked through. Inductor then fuses casts and op into one kernel, which reads half and computes in float32 as ours.
bool must_decompose(std::initializer_list<std::optional<at::Tensor>> tensors);

// While it lives, autocast does not cast the thread's ops: their inputs have the dtypes they should have.
class NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard_{c10::autocast_dispatch_keyset};
};

// In float32, for the ATen formulas; none stays none.
at::Tensor widened(const at::Tensor& tensor);
std::optional<at::Tensor> widened(const std::optional<at::Tensor>& tensor);

// The results of a backward that has no derivative itself: differentiating them again is an error that names the op.
torch::autograd::variable_list differentiable_once(std::string_view op, torch::autograd::variable_list gradients);

// Throws unless `tensor` is strided, of dtype Float, Half or BFloat16 and on `device`.
void check_floating(const at::Tensor& tensor, std::string_view op, std::string_view argument, at::Device device);

}  // namespace halfstep::torch_ops
