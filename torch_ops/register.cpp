// The only registration of the namespace `halfstep`, when the library is loaded.
#include <optional>

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include "registration.h"

namespace halfstep::torch_ops {

void refuse_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, c10::toString(op.operator_name()),
                              ": got CUDA tensors, but this halfstep was built without CUDA. Build it on a machine "
                              "with a GPU (make setup), or with HALFSTEP_CUDA=ON pip install --no-build-isolation .");
}

namespace {

struct Registration {
  torch::Library definitions = MAKE_TORCH_LIBRARY(halfstep);
  torch::Library cpu = MAKE_TORCH_LIBRARY_IMPL(halfstep, CPU);
  torch::Library cuda = MAKE_TORCH_LIBRARY_IMPL(halfstep, CUDA);
  torch::Library meta = MAKE_TORCH_LIBRARY_IMPL(halfstep, Meta);
  // A sparse gradient in the list dispatches here: the same kernels, whose checks say what to pass instead.
  torch::Library sparse_cpu = MAKE_TORCH_LIBRARY_IMPL(halfstep, SparseCPU);
  torch::Library sparse_cuda = MAKE_TORCH_LIBRARY_IMPL(halfstep, SparseCUDA);
  torch::Library aten_autocast = MAKE_TORCH_LIBRARY_IMPL(aten, AutocastCUDA);

  Registration() {
    definitions.def("version() -> str", [] { return std::string(HALFSTEP_VERSION); });
    define_autocast_ops(definitions);
    define_calibration(definitions);
    define_cross_entropy(definitions);
    define_gradients(definitions);
    define_packed_int8(definitions);  // whose type the schemas name
    define_int8(definitions);
    define_int8_named_dtype(definitions);
    define_int8_norms(definitions);
    define_int8_pool(definitions);
    define_int8_prepare(definitions);
    define_int8_products(definitions);
    define_int8_script(definitions);
    define_norms(definitions);
    define_scaling(definitions);
    define_grad_scaler(definitions);
    define_optimizer(definitions);
    define_policy(definitions);
    define_lower(definitions);
    define_stability(definitions);
    define_gradient_unscaler(definitions);
    define_scale_gradient(definitions);
    define_operation_counter(definitions);
    implement_cross_entropy_cpu(cpu);
    implement_gradients_cpu(cpu);
    implement_int8_cpu(cpu);
    implement_int8_norms_cpu(cpu);
    implement_int8_pool_cpu(cpu);
    implement_int8_products_cpu(cpu);
    implement_norms_cpu(cpu);
    implement_optimizer_cpu(cpu);
    implement_scaling_cpu(cpu);
    implement_cross_entropy_cuda(cuda);
    implement_gradients_cuda(cuda);
    implement_int8_cuda(cuda);
    implement_int8_norms_cuda(cuda);
    implement_int8_pool_cuda(cuda);
    implement_int8_products_cuda(cuda);
    implement_norms_cuda(cuda);
    implement_optimizer_cuda(cuda);
    implement_scaling_cuda(cuda);
    implement_gradients_cpu(sparse_cpu);
    implement_gradients_cuda(sparse_cuda);
    implement_optimizer_cpu(sparse_cpu);
    implement_optimizer_cuda(sparse_cuda);
    implement_cross_entropy_meta(meta);
    implement_gradients_meta(meta);
    implement_int8_meta(meta);
    implement_int8_norms_meta(meta);
    implement_int8_pool_meta(meta);
    implement_norms_meta(meta);
    implement_optimizer_meta(meta);
    implement_scaling_meta(meta);
    implement_cross_entropy_autocast(aten_autocast);
  }
};

// A second copy of the library in one process must not register again: torch would end the process. It stays idle.
std::optional<Registration> register_once() {
  if (const auto first = c10::Dispatcher::singleton().findSchema({"halfstep::version", ""})) {
    torch::jit::Stack stack;
    first->callBoxed(&stack);
    TORCH_WARN("halfstep: this process has loaded a halfstep library already, version ", stack[0].toStringRef(),
               "; the second copy (version ", HALFSTEP_VERSION,
               ") registers nothing and the first one stays in use. Load only one.");
    return std::nullopt;
  }
  return std::make_optional<Registration>();
}

const std::optional<Registration> registration = register_once();

}  // namespace
}  // namespace halfstep::torch_ops
