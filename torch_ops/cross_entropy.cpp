// cross_entropy, cross_entropy_forward and _backward, on which it stands, and torch's own cross_entropy under autocast:
// schemas, checks, autograd, and the way to the core. Contract: halfstep/torch/cross_entropy.h.
#include "halfstep/torch/cross_entropy.h"

#include <string_view>
#include <tuple>

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include "conversions.h"
#include "differentiable.h"
#include "halfstep/cross_entropy.h"
#include "registration.h"
#ifdef HALFSTEP_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace halfstep {
namespace torch_ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Tensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using torch::autograd::variable_list;

struct Settings {
  std::int64_t reduction;
  c10::SymInt ignore_index;
  double label_smoothing;
};

void check_settings(const Settings& settings, std::string_view op) {
  TORCH_CHECK_VALUE(settings.reduction >= 0 && settings.reduction <= 2, op, ": reduction is ", settings.reduction,
                    ", expected 0 (none), 1 (mean) or 2 (sum)");
  TORCH_CHECK_VALUE(settings.label_smoothing >= 0.0 && settings.label_smoothing <= 1.0, op, ": label_smoothing is ",
                    settings.label_smoothing, ", expected 0 to 1");
}

// -------------------------------------------------------------------- cross_entropy_forward and cross_entropy_backward

void check(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight, const Settings& settings,
           std::string_view op) {
  check_floating(input, op, "input", input.device());
  TORCH_CHECK_VALUE(input.dim() == 2, op, ": input has shape ", input.sym_sizes(), ", expected rows and classes");
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, op, ": target has dtype ", target.scalar_type(),
                   ", expected Long");
  TORCH_CHECK(target.device() == input.device(), op, ": target is on ", target.device(), ", expected ", input.device(),
              ", the device of input");
  TORCH_CHECK_VALUE(target.dim() == 1 && target.sym_size(0) == input.sym_size(0), op, ": target has shape ",
                    target.sym_sizes(), ", expected [", input.sym_size(0), "]");
  if (weight) {
    check_floating(*weight, op, "weight", input.device());
    TORCH_CHECK_TYPE(weight->scalar_type() == at::kFloat, op, ": weight has dtype ", weight->scalar_type(),
                     ", expected Float");
    TORCH_CHECK_VALUE(weight->dim() == 1 && weight->sym_size(0) == input.sym_size(1), op, ": weight has shape ",
                      weight->sym_sizes(), ", expected [", input.sym_size(1), "]");
  }
  check_settings(settings, op);
}

// The tensors of a call, contiguous, and the core's view of them.
struct Call {
  at::Tensor logits;
  at::Tensor targets;
  OptionalTensor weight;
  CrossEntropy core;

  Call(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weights, const Settings& settings)
      : logits(input.contiguous()),
        targets(target.contiguous()),
        weight(weights ? OptionalTensor(weights->contiguous()) : std::nullopt),
        core{input.size(0),
             input.size(1),
             view_of(logits),
             targets.const_data_ptr<std::int64_t>(),
             weight ? weight->const_data_ptr<float>() : nullptr,
             static_cast<LossReduction>(settings.reduction),
             settings.ignore_index.expect_int(),
             settings.label_smoothing} {}
};

// A target out of bounds is torch's IndexError.
template <class Run>
void with_index_errors(const Run& run) {
  try {
    run();
  } catch (const InvalidArgument& error) {
    TORCH_CHECK_INDEX(false, error.what());
  }
}

struct Cpu {
  static void run(const CrossEntropy& call, const CrossEntropyOutputs& out, const at::Tensor&) {
    with_index_errors([&] { cpu::cross_entropy(call, out, TorchExecutor()); });
  }
  static void run(const CrossEntropy& call, const CrossEntropyGradient& gradient, const at::Tensor&) {
    with_index_errors([&] { cpu::cross_entropy_backward(call, gradient, TorchExecutor()); });
  }
};

#ifdef HALFSTEP_CUDA
struct Cuda {
  static void run(const CrossEntropy& call, const CrossEntropyOutputs& out, const at::Tensor& input) {
    const c10::cuda::CUDAGuard guard(input.device());
    const at::Tensor workspace = at::empty({call.rows}, input.options().dtype(at::kFloat));
    cuda::cross_entropy(call, out, workspace.data_ptr<float>(), {c10::cuda::getCurrentCUDAStream().stream()});
  }
  static void run(const CrossEntropy& call, const CrossEntropyGradient& gradient, const at::Tensor& input) {
    const c10::cuda::CUDAGuard guard(input.device());
    cuda::cross_entropy_backward(call, gradient, {c10::cuda::getCurrentCUDAStream().stream()});
  }
};
#endif

struct Meta {};

template <class Backend>
Tensors cross_entropy_forward(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                              std::int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  const Settings settings{reduction, std::move(ignore_index), label_smoothing};
  check(input, target, weight, settings, "cross_entropy_forward");
  const auto floats = input.options().dtype(at::kFloat);
  const c10::SymInt rows = input.sym_size(0);
  at::Tensor loss = reduction == at::Reduction::None ? at::empty_symint({rows}, floats) : at::empty({}, floats);
  at::Tensor lse = at::empty_symint({rows}, floats);
  at::Tensor totals = at::empty({kLossTotals}, floats);
  if constexpr (!std::is_same_v<Backend, Meta>) {
    const Call call(input, target, weight, settings);
    Backend::run(call.core,
                 CrossEntropyOutputs{loss.data_ptr<float>(), lse.data_ptr<float>(), totals.data_ptr<float>()}, input);
  }
  return {loss, lse, totals};
}

template <class Backend>
at::Tensor cross_entropy_backward(const at::Tensor& grad_loss, const at::Tensor& input, const at::Tensor& target,
                                  const OptionalTensor& weight, const at::Tensor& lse, const at::Tensor& totals,
                                  std::int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  constexpr std::string_view op = "cross_entropy_backward";
  const Settings settings{reduction, std::move(ignore_index), label_smoothing};
  check(input, target, weight, settings, op);
  const c10::SymInt rows = input.sym_size(0);
  const c10::SymInt losses = reduction == at::Reduction::None ? rows : c10::SymInt(1);
  for (const auto& [tensor, argument, expected] :
       {std::tuple(grad_loss, "grad_loss", losses), std::tuple(lse, "lse", rows),
        std::tuple(totals, "totals", c10::SymInt(kLossTotals))}) {
    check_floating(tensor, op, argument, input.device());
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, op, ": ", argument, " has dtype ", tensor.scalar_type(),
                     ", expected Float");
    TORCH_CHECK_VALUE(tensor.sym_numel() == expected, op, ": ", argument, " has ", tensor.sym_numel(),
                      " elements, expected ", expected);
  }
  at::Tensor grad_input = at::empty_symint(input.sym_sizes(), input.options());
  if constexpr (!std::is_same_v<Backend, Meta>) {
    const Call call(input, target, weight, settings);
    const at::Tensor grad = grad_loss.contiguous();
    const at::Tensor dense_lse = lse.contiguous();
    const at::Tensor dense_totals = totals.contiguous();
    Backend::run(call.core,
                 CrossEntropyGradient{grad.const_data_ptr<float>(), dense_lse.const_data_ptr<float>(),
                                      dense_totals.const_data_ptr<float>(), grad_input.data_ptr()},
                 input);
  }
  return grad_input;
}

template <class Backend>
void implement(torch::Library& library) {
  library.impl("cross_entropy_forward", &cross_entropy_forward<Backend>);
  library.impl("cross_entropy_backward", &cross_entropy_backward<Backend>);
}

// -------------------------------------------------------------------------------------------------------- autograd

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            const OptionalTensor& weight, const Settings& settings) {
    static const auto forward_op = c10::Dispatcher::singleton()
                                       .findSchemaOrThrow("halfstep::cross_entropy_forward", "")
                                       .typed<decltype(cross_entropy_forward<Cpu>)>();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, lse, totals] =
        forward_op.call(input, target, weight, settings.reduction, settings.ignore_index, settings.label_smoothing);
    ctx->save_for_backward({input, target, weight.value_or(at::Tensor()), lse, totals});
    ctx->saved_data["reduction"] = settings.reduction;
    ctx->saved_data["ignore_index"] = settings.ignore_index;
    ctx->saved_data["label_smoothing"] = settings.label_smoothing;
    return loss;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    static const auto backward_op = c10::Dispatcher::singleton()
                                        .findSchemaOrThrow("halfstep::cross_entropy_backward", "")
                                        .typed<decltype(cross_entropy_backward<Cpu>)>();
    const variable_list tensors = ctx->get_saved_variables();
    auto& saved = ctx->saved_data;
    variable_list result(4);  // one for each argument of forward
    {
      const torch::autograd::AutoGradMode no_grad(false);
      result[0] = backward_op.call(grads[0], tensors[0], tensors[1],
                                   tensors[2].defined() ? OptionalTensor(tensors[2]) : std::nullopt, tensors[3],
                                   tensors[4], saved["reduction"].toInt(), saved["ignore_index"].toSymInt(),
                                   saved["label_smoothing"].toDouble());
    }
    return differentiable_once("cross_entropy", std::move(result));
  }
};

// --------------------------------------------------------------------------------------------------- the public op

// Classes of one or two dimensions; the rest is ATen's.
bool is_ours(const at::Tensor& input, const at::Tensor& target) {
  return (input.dim() == 1 || input.dim() == 2) && target.dim() == input.dim() - 1 &&
         target.scalar_type() == at::kLong && input.layout() == at::kStrided;
}

at::Tensor cross_entropy_op(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                            std::int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  constexpr std::string_view op = "cross_entropy";
  check_floating(input, op, "input", input.device());
  const Settings settings{reduction, ignore_index, label_smoothing};
  check_settings(settings, op);
  const NoAutocast no_autocast;
  const OptionalTensor weights = widened(weight);
  if (is_ours(input, target)) {
    const at::Tensor rows = input.dim() == 1 ? input.unsqueeze(0) : input;
    const at::Tensor targets = input.dim() == 1 ? target.unsqueeze(0) : target;
    check(rows, targets, weights, settings, op);
    if (!must_decompose({input, target, weight})) {
      const OptionalTensor constant = weights ? OptionalTensor(weights->detach()) : std::nullopt;
      const at::Tensor loss = CrossEntropyFunction::apply(rows, targets, constant, settings);
      return input.dim() == 1 && reduction == at::Reduction::None ? loss.squeeze(0) : loss;
    }
  }
  const at::Tensor targets = target.is_floating_point() ? widened(target) : target;
  return at::cross_entropy_loss_symint(widened(input), targets, weights, reduction, std::move(ignore_index),
                                       label_smoothing);
}

// ------------------------------------------------------------------------------- torch's cross_entropy under autocast

thread_local bool half_reductions = false;
bool autocast_is_ours = false;  // set once, at registration

// Autocast has no kernel of its own here: torch's function is made of others, which it runs in float32.
// Where saved tensors are packed by hooks it stays torch's: checkpointing, which works so, computes the loss again in
// backward(), on a thread whose switch is off, and must find the same tensors saved.
at::Tensor autocast_cross_entropy(c10::DispatchKeySet keys, const at::Tensor& input, const at::Tensor& target,
                                  const OptionalTensor& weight, std::int64_t reduction, c10::SymInt ignore_index,
                                  double label_smoothing) {
  const bool is_half = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  const bool packed = at::SavedTensorDefaultHooks::get_hooks().has_value();
  if (half_reductions && is_half && !packed && is_ours(input, target))
    return halfstep::cross_entropy(input, target, weight, reduction, std::move(ignore_index), label_smoothing);
  const c10::DispatchKeySet below(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::AutocastCUDA);
  return at::_ops::cross_entropy_loss::redispatch(keys & below, input, target, weight, reduction,
                                                  std::move(ignore_index), label_smoothing);
}

}  // namespace

void define_cross_entropy(torch::Library& library) {
  library.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, SymInt ignore_index=-100, "
      "float label_smoothing=0.0) -> Tensor",
      &cross_entropy_op);
  library.def(
      "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int reduction, SymInt ignore_index, "
      "float label_smoothing) -> (Tensor loss, Tensor lse, Tensor totals)");
  library.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor lse, "
      "Tensor totals, int reduction, SymInt ignore_index, float label_smoothing) -> Tensor");
  library.def("set_half_reductions(bool enabled) -> bool", &halfstep::set_half_reductions);
}

void implement_cross_entropy_cpu(torch::Library& library) {
  implement<Cpu>(library);
}

void implement_cross_entropy_meta(torch::Library& library) {
  implement<Meta>(library);
}

void implement_cross_entropy_cuda(torch::Library& library) {
#ifdef HALFSTEP_CUDA
  implement<Cuda>(library);
#else
  library.impl("cross_entropy_forward", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  library.impl("cross_entropy_backward", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
#endif
}

void implement_cross_entropy_autocast(torch::Library& library) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::cross_entropy_loss", "");
  autocast_is_ours = !op.hasKernelForDispatchKey(c10::DispatchKey::AutocastCUDA);
  if (autocast_is_ours) library.impl("cross_entropy_loss", &autocast_cross_entropy);
}

bool cross_entropy_autocast_is_ours() {
  return autocast_is_ours;
}

}  // namespace torch_ops

at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
                         std::int64_t reduction, c10::SymInt ignore_index, double label_smoothing) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::cross_entropy", "")
                             .typed<decltype(torch_ops::cross_entropy_op)>();
  return op.call(input, target, weight, reduction, std::move(ignore_index), label_smoothing);
}

bool set_half_reductions(bool enabled) {
  return std::exchange(torch_ops::half_reductions, enabled);
}

}  // namespace halfstep
