// check_gradients_ and unscale_: schemas, checks, and the way to the core. Contract: halfstep/torch/gradients.h.
#include "halfstep/torch/gradients.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include "conversions.h"
#include "registration.h"
#ifdef HALFSTEP_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace halfstep {
namespace torch_ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

struct Arguments {
  at::TensorList grads;
  const at::Tensor& scale;
  const at::Tensor& found;
  const OptionalTensor& norm;
  const OptionalTensor& stats;
  bool scale_is_inverse;
  bool write;
};

void check(const Arguments& a) {
  const char* const op = a.write ? "unscale_" : "check_gradients_";
  const at::Device device = a.scale.device();
  check_gradient_list(a.grads, op, device, a.write);
  check_argument(a.scale, op, "scale", at::kFloat, device);
  check_argument(a.found, op, "found", at::kFloat, device);
  if (a.norm) check_argument(*a.norm, op, "norm", at::kFloat, device);
  if (a.stats) {
    const auto rows = static_cast<std::int64_t>(a.grads.size());
    check_argument(*a.stats, op, "stats", at::kFloat, device, rows * kGradientStats);
  }
}

void run_meta(const Arguments& a) {
  check(a);
}

template <class Launch>
void run(const Arguments& a, Launch launch) {
  const GradientViews gradients(a.grads, a.write);
  const CheckOutputs out{a.found.data_ptr<float>(), data_or_null<float>(a.norm), data_or_null<float>(a.stats)};
  launch(gradients.views(), UnscaleFactor{a.scale.const_data_ptr<float>(), a.scale_is_inverse}, out);
  if (a.write) {
    gradients.write_back();
    for (const at::Tensor& grad : a.grads) bump_version(grad);
  }
  bump_version(a.found);
  if (a.norm) bump_version(*a.norm);
  if (a.stats) bump_version(*a.stats);
}

void run_cpu(const Arguments& a) {
  check(a);
  run(a, [&](TensorList grads, UnscaleFactor factor, const CheckOutputs& out) {
    (a.write ? cpu::unscale : cpu::check_gradients)(grads, factor, out, TorchExecutor());
  });
}

#ifdef HALFSTEP_CUDA
void run_cuda(const Arguments& a) {
  check(a);  // before the guard, whose own error for a scale on the CPU names no argument
  const c10::cuda::CUDAGuard guard(a.scale.device());
  run(a, [&](TensorList grads, UnscaleFactor factor, const CheckOutputs& out) {
    const auto bytes = static_cast<std::int64_t>(cuda::gradients_workspace_bytes(grads));
    const at::Tensor workspace = at::empty({bytes}, a.scale.options().dtype(at::kByte));
    const CudaStream stream{c10::cuda::getCurrentCUDAStream().stream()};
    (a.write ? cuda::unscale : cuda::check_gradients)(grads, factor, out, workspace.data_ptr(), stream);
  });
}
#endif

// The two ops, for one backend.
template <void (*backend)(const Arguments&)>
void check_gradients_op(at::TensorList grads, const at::Tensor& scale, const at::Tensor& found, const at::Tensor& norm,
                        const OptionalTensor& stats) {
  backend({grads, scale, found, norm, stats, /*scale_is_inverse=*/false, /*write=*/false});
}

template <void (*backend)(const Arguments&)>
void unscale_op(at::TensorList grads, const at::Tensor& scale, const at::Tensor& found, const OptionalTensor& norm,
                const OptionalTensor& stats, bool scale_is_inverse) {
  backend({grads, scale, found, norm, stats, scale_is_inverse, /*write=*/true});
}

template <void (*backend)(const Arguments&)>
void implement(torch::Library& library) {
  library.impl("check_gradients_", &check_gradients_op<backend>);
  library.impl("unscale_", &unscale_op<backend>);
}

}  // namespace

void define_gradients(torch::Library& library) {
  library.def(
      "check_gradients_(Tensor[] grads, Tensor scale, Tensor(a!) found, Tensor(b!) norm, Tensor(c!)? stats=None) "
      "-> ()");
  library.def(
      "unscale_(Tensor(a!)[] grads, Tensor scale, Tensor(b!) found, Tensor(c!)? norm=None, Tensor(d!)? stats=None, *, "
      "bool scale_is_inverse=False) -> ()");
}

void implement_gradients_cpu(torch::Library& library) {
  implement<run_cpu>(library);
}

void implement_gradients_meta(torch::Library& library) {
  implement<run_meta>(library);
}

void implement_gradients_cuda(torch::Library& library) {
#ifdef HALFSTEP_CUDA
  implement<run_cuda>(library);
#else
  library.impl("check_gradients_", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  library.impl("unscale_", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
#endif
}

}  // namespace torch_ops

void check_gradients_(at::TensorList grads, const at::Tensor& scale, const at::Tensor& found, const at::Tensor& norm,
                      const std::optional<at::Tensor>& stats) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::check_gradients_", "")
                             .typed<decltype(torch_ops::check_gradients_op<torch_ops::run_cpu>)>();
  op.call(grads, scale, found, norm, stats);
}

void unscale_(at::TensorList grads, const at::Tensor& scale, const at::Tensor& found,
              const std::optional<at::Tensor>& norm, const std::optional<at::Tensor>& stats, bool scale_is_inverse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::unscale_", "")
                             .typed<decltype(torch_ops::unscale_op<torch_ops::run_cpu>)>();
  op.call(grads, scale, found, norm, stats, scale_is_inverse);
}

}  // namespace halfstep
