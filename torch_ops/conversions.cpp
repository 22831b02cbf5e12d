#include "conversions.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

namespace halfstep::torch_ops {

std::optional<DType> to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return std::nullopt;
  }
}

void TorchExecutor::for_each(std::int64_t count, const std::function<void(std::int64_t)>& task) const {
  at::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) task(i);
  });
}

void check_argument(const at::Tensor& tensor, std::string_view op, std::string_view argument, at::ScalarType dtype,
                    at::Device device, std::int64_t numel) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", argument, " has dtype ", tensor.scalar_type(),
                   ", expected ", dtype);
  TORCH_CHECK(tensor.device() == device, op, ": ", argument, " is on ", tensor.device(), ", expected ", device);
  // Symbolic: torch.compile with dynamic shapes comes through here too.
  TORCH_CHECK_VALUE(tensor.sym_numel() == numel, op, ": ", argument, " has ", tensor.sym_numel(),
                    " elements, expected ", numel);
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided && tensor.is_contiguous(), op, ": ", argument,
                    " must be a contiguous strided tensor");
}

void check_gradient_list(at::TensorList grads, std::string_view op, at::Device device, bool written) {
  for (std::size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor& grad = grads[i];
    TORCH_CHECK_VALUE(grad.defined(), op, ": grads[", i, "] is undefined, expected a tensor");
    TORCH_CHECK_VALUE(grad.layout() == at::kStrided, op, ": grads[", i, "] has layout ", grad.layout(),
                      ", expected a strided tensor (of a sparse gradient pass its values)");
    TORCH_CHECK_TYPE(to_dtype(grad.scalar_type()).has_value(), op, ": grads[", i, "] has dtype ", grad.scalar_type(),
                     ", expected Float, Double, Half or BFloat16");
    TORCH_CHECK(grad.device() == device, op, ": grads[", i, "] is on ", grad.device(), ", expected ", device,
                ", the device of the other arguments");
    TORCH_CHECK_VALUE(!written || at::has_internal_overlap(grad) != at::MemOverlap::Yes, op, ": grads[", i,
                      "] is expanded, several of its elements share memory; clone() it before it is written");
  }
}

GradientViews::GradientViews(at::TensorList grads, bool written) {
  views_.reserve(grads.size());
  for (const at::Tensor& grad : grads) {
    const bool in_place = grad.is_non_overlapping_and_dense();
    if (!in_place) copies_.emplace_back(grad, grad.contiguous());
    const at::Tensor& dense = in_place ? grad : copies_.back().second;
    void* data = nullptr;
    if (dense.numel() > 0) {
      // Reading through the const pointer leaves a copy-on-write tensor shared.
      data = written ? dense.mutable_data_ptr() : const_cast<void*>(dense.const_data_ptr());
    }
    views_.push_back({data, dense.numel(), *to_dtype(grad.scalar_type())});
  }
}

void GradientViews::write_back() const {
  for (const auto& [original, copy] : copies_) original.copy_(copy);
}

TensorView view_of(const at::Tensor& tensor) {
  void* const data = tensor.numel() > 0 ? const_cast<void*>(tensor.const_data_ptr()) : nullptr;
  return {data, tensor.numel(), *to_dtype(tensor.scalar_type())};
}

void bump_version(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace halfstep::torch_ops
