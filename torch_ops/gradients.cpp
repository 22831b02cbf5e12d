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

void check_outputs(const char* op, at::Device device, std::size_t rows, const at::Tensor& scale,
                   const at::Tensor& found, const OptionalTensor& norm, const OptionalTensor& stats) {
  check_argument(scale, op, "scale", at::kFloat, device);
  check_argument(found, op, "found", at::kFloat, device);
  if (norm) check_argument(*norm, op, "norm", at::kFloat, device);
  if (stats) check_argument(*stats, op, "stats", at::kFloat, device, static_cast<std::int64_t>(rows) * kGradientStats);
}

void check(const Arguments& a) {
  const char* const op = a.write ? "unscale_" : "check_gradients_";
  const at::Device device = a.scale.device();
  check_gradient_list(a.grads, op, device, a.write);
  check_outputs(op, device, a.grads.size(), a.scale, a.found, a.norm, a.stats);
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
template <class Launch>
void with_workspace(TensorList grads, const at::Tensor& scale, Launch launch) {
  const auto bytes = static_cast<std::int64_t>(cuda::gradients_workspace_bytes(grads));
  const at::Tensor workspace = at::empty({bytes}, scale.options().dtype(at::kByte));
  launch(workspace.data_ptr(), CudaStream{c10::cuda::getCurrentCUDAStream().stream()});
}

void run_cuda(const Arguments& a) {
  check(a);  // before the guard, whose own error for a scale on the CPU names no argument
  const c10::cuda::CUDAGuard guard(a.scale.device());
  run(a, [&](TensorList grads, UnscaleFactor factor, const CheckOutputs& out) {
    with_workspace(grads, a.scale, [&](void* workspace, CudaStream stream) {
      (a.write ? cuda::unscale : cuda::check_gradients)(grads, factor, out, workspace, stream);
    });
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

void check_gradient_views(TensorList grads, at::Device device, const at::Tensor& scale, const at::Tensor& found,
                          const at::Tensor& norm, const OptionalTensor& stats) {
  check_outputs("check_gradients_", device, grads.size(), scale, found, norm, stats);
  const CheckOutputs out{found.data_ptr<float>(), norm.data_ptr<float>(), data_or_null<float>(stats)};
  const UnscaleFactor factor{scale.const_data_ptr<float>()};
  if (device.is_cpu()) {
    cpu::check_gradients(grads, factor, out, TorchExecutor());
    return;
  }
#ifdef HALFSTEP_CUDA
  const c10::cuda::CUDAGuard guard(device);
  with_workspace(grads, scale, [&](void* workspace, CudaStream stream) {
    cuda::check_gradients(grads, factor, out, workspace, stream);
  });
#endif
}

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
