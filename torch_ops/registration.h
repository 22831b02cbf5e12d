// What each topic registers; register.cpp calls these, once, in this order.
#pragma once

#include <torch/library.h>

namespace halfstep::torch_ops {

// Schemas and classes.
void define_autocast_ops(torch::Library& library);
void define_calibration(torch::Library& library);
void define_cross_entropy(torch::Library& library);
void define_gradients(torch::Library& library);
void define_int8(torch::Library& library);
void define_int8_named_dtype(torch::Library& library);
void define_int8_norms(torch::Library& library);
void define_int8_pool(torch::Library& library);
void define_int8_prepare(torch::Library& library);
void define_int8_products(torch::Library& library);
void define_int8_script(torch::Library& library);
void define_norms(torch::Library& library);
void define_packed_int8(torch::Library& library);
void define_scaling(torch::Library& library);
void define_grad_scaler(torch::Library& library);
void define_optimizer(torch::Library& library);
void define_operation_counter(torch::Library& library);
void define_policy(torch::Library& library);
void define_scale_gradient(torch::Library& library);
void define_lower(torch::Library& library);
void define_stability(torch::Library& library);
void define_gradient_unscaler(torch::Library& library);

// Kernels by dispatch key.
void implement_cross_entropy_cpu(torch::Library& library);
void implement_gradients_cpu(torch::Library& library);
void implement_int8_cpu(torch::Library& library);
void implement_int8_norms_cpu(torch::Library& library);
void implement_int8_pool_cpu(torch::Library& library);
void implement_int8_products_cpu(torch::Library& library);
void implement_norms_cpu(torch::Library& library);
void implement_optimizer_cpu(torch::Library& library);
void implement_scaling_cpu(torch::Library& library);
void implement_cross_entropy_meta(torch::Library& library);
void implement_gradients_meta(torch::Library& library);
void implement_int8_meta(torch::Library& library);
void implement_int8_norms_meta(torch::Library& library);
void implement_int8_pool_meta(torch::Library& library);
void implement_norms_meta(torch::Library& library);
void implement_optimizer_meta(torch::Library& library);
void implement_scaling_meta(torch::Library& library);
void implement_cross_entropy_cuda(torch::Library& library);
void implement_gradients_cuda(torch::Library& library);
void implement_int8_cuda(torch::Library& library);
void implement_int8_norms_cuda(torch::Library& library);
void implement_int8_pool_cuda(torch::Library& library);
void implement_int8_products_cuda(torch::Library& library);
void implement_norms_cuda(torch::Library& library);
void implement_optimizer_cuda(torch::Library& library);
void implement_scaling_cuda(torch::Library& library);

// aten::cross_entropy_loss under CUDA autocast, unless torch has a kernel there.
void implement_cross_entropy_autocast(torch::Library& library);
bool cross_entropy_autocast_is_ours();

// The CUDA kernel of every op in a build without CUDA: an error that says how to get one.
void refuse_cuda(const c10::OperatorHandle& op, torch::jit::Stack* stack);

}  // namespace halfstep::torch_ops
