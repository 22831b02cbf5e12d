// From torch's tensors to the core's views, with the checks that all ops share.
#pragma once

#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "halfstep/stream.h"
#include "halfstep/tensor_list.h"

namespace halfstep::torch_ops {

// Runs the core's CPU tasks on torch's intra-op threads: torch.set_num_threads holds for them.
class TorchExecutor final : public Executor {
 public:
  void for_each(std::int64_t count, const std::function<void(std::int64_t)>& task) const override;
};

// The core's name for a dtype, nullopt for one that it does not compute in.
std::optional<DType> to_dtype(at::ScalarType type);

// Throws unless `tensor` is a strided `dtype` tensor on `device` with `numel` contiguous elements. `op` and `argument`
// go into the message.
void check_argument(const at::Tensor& tensor, std::string_view op, std::string_view argument, at::ScalarType dtype,
                    at::Device device, std::int64_t numel = 1);

// Throws unless every gradient is a strided floating-point tensor of a known dtype on `device`, and, if it will be
// written, is not expanded (elements along a stride of 0 share memory).
void check_gradient_list(at::TensorList grads, std::string_view op, at::Device device, bool written);

// Dense views of gradients, to read or (`written`) to write. What is dense in any order of dimensions is viewed in
// place; what has gaps or overlaps is copied, and write_back() carries a written copy home.
class GradientViews {
 public:
  GradientViews(at::TensorList grads, bool written);
  TensorList views() const { return views_; }
  void write_back() const;

 private:
  std::vector<TensorView> views_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;  // original, dense copy
};

// check_gradients_ of views that have been checked, on `device` (gradients.cpp).
void check_gradient_views(TensorList grads, at::Device device, const at::Tensor& scale, const at::Tensor& found,
                          const at::Tensor& norm, const std::optional<at::Tensor>& stats);

// A contiguous tensor of a dtype the core knows. Nothing may be written through the view unless the tensor is the
// caller's own: copy-on-write tensors stay shared.
TensorView view_of(const at::Tensor& tensor);

// Raw writes are invisible to autograd: tell it that the tensor has a new version.
void bump_version(const at::Tensor& tensor);

template <class T>
T* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

}  // namespace halfstep::torch_ops
