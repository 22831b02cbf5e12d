// update_scale_, request_scale_, combine_found and scale_preset: schemas, checks, and the way to the core. Contract:
// halfstep/torch/scaling.h and halfstep/scaling.h.
#include "halfstep/torch/scaling.h"

#include <array>
#include <string_view>
#include <tuple>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>

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
  const at::Tensor& scale;
  const at::Tensor& growth_tracker;
  const OptionalTensor& hysteresis_left;
  const OptionalTensor& counters;
  const OptionalTensor& history;
  at::TensorList found;
  at::TensorList norm;
  ScaleRule rule;
};

std::vector<const float*> pointers(at::TensorList tensors) {
  std::vector<const float*> result;
  result.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) result.push_back(tensor.const_data_ptr<float>());
  return result;
}

void check_flags(at::TensorList tensors, std::string_view op, std::string_view argument, at::Device device) {
  for (const at::Tensor& tensor : tensors) check_argument(tensor, op, argument, at::kFloat, device);
}

Refill parse_refill(std::string_view refill, std::string_view op) {
  try {
    return refill_from_name(refill);
  } catch (const InvalidArgument& error) {
    TORCH_CHECK_VALUE(false, op, ": ", error.what());
  }
}

void check_rule(const ScaleRule& rule, std::string_view op, void (*check)(const ScaleRule&)) {
  try {
    check(rule);
  } catch (const InvalidArgument& error) {
    TORCH_CHECK_VALUE(false, op, ": ", error.what());
  }
}

void check(const Arguments& a) {
  constexpr std::string_view op = "update_scale_";
  const at::Device device = a.scale.device();
  check_argument(a.scale, op, "scale", at::kFloat, device);
  check_argument(a.growth_tracker, op, "growth_tracker", at::kInt, device);
  if (a.hysteresis_left) check_argument(*a.hysteresis_left, op, "hysteresis_left", at::kInt, device);
  if (a.counters) check_argument(*a.counters, op, "counters", at::kLong, device, kCounters);
  if (a.history) check_argument(*a.history, op, "history", at::kDouble, device, kHistoryRows * kHistoryColumns);
  TORCH_CHECK_VALUE(!a.found.empty(), op, ": found is an empty list, expected at least one flag");
  check_flags(a.found, op, "found", device);
  check_flags(a.norm, op, "norm", device);
  TORCH_CHECK_VALUE(a.rule.hysteresis == 1 || a.hysteresis_left, op, ": hysteresis is ", a.rule.hysteresis,
                    ", expected hysteresis_left with it");
  TORCH_CHECK_VALUE(!a.history || a.counters, op, ": got history without counters");
  check_rule(a.rule, op, validate_update);
}

// The core takes a bounded number of flags and norms; beyond it torch combines them into one.
std::vector<at::Tensor> folded_found(at::TensorList found) {
  if (found.size() <= kMaxScaleInputs) return found.vec();
  return {at::stack(found).ne(0).any().to(at::kFloat)};
}

std::vector<at::Tensor> folded_norm(at::TensorList norm) {
  if (norm.size() <= kMaxScaleInputs) return norm.vec();
  return {at::linalg_vector_norm(at::stack(norm))};
}

template <class Launch>
void update_scale(const Arguments& a, Launch launch) {
  const auto found_tensors = folded_found(a.found);
  const auto norm_tensors = folded_norm(a.norm);
  const auto found = pointers(found_tensors);
  const auto norm = pointers(norm_tensors);
  launch(ScaleState{a.scale.data_ptr<float>(), a.growth_tracker.data_ptr<std::int32_t>(),
                    data_or_null<std::int32_t>(a.hysteresis_left), data_or_null<std::int64_t>(a.counters),
                    data_or_null<double>(a.history)},
         ScaleInputs{found, norm});
  bump_version(a.scale);
  bump_version(a.growth_tracker);
  for (const OptionalTensor* tensor : {&a.hysteresis_left, &a.counters, &a.history}) {
    if (*tensor) bump_version(**tensor);
  }
}

void update_scale_cpu(const Arguments& a) {
  check(a);
  update_scale(a,
               [&](const ScaleState& state, const ScaleInputs& inputs) { cpu::update_scale(state, a.rule, inputs); });
}

void update_scale_meta(const Arguments& a) {
  check(a);
}

struct Request {
  const at::Tensor& scale;
  const at::Tensor& counters;
  const at::Tensor& history;
  const at::Tensor& record;
  double requested;
  ScaleRule rule;
};

void check_request(const Request& a) {
  constexpr std::string_view op = "request_scale_";
  const at::Device device = a.scale.device();
  check_argument(a.scale, op, "scale", at::kFloat, device);
  check_argument(a.counters, op, "counters", at::kLong, device, kCounters);
  check_argument(a.history, op, "history", at::kDouble, device, kHistoryRows * kHistoryColumns);
  check_argument(a.record, op, "record", at::kDouble, device, kRequestColumns);
  check_rule(a.rule, op, validate_update);
}

template <class Launch>
void request_scale(const Request& a, Launch launch) {
  ScaleState state{};
  state.scale = a.scale.data_ptr<float>();
  state.counters = a.counters.data_ptr<std::int64_t>();
  state.history = a.history.data_ptr<double>();
  launch(state, a.record.data_ptr<double>());
  bump_version(a.scale);
  bump_version(a.record);
}

void request_scale_cpu(const Request& a) {
  check_request(a);
  request_scale(
      a, [&](const ScaleState& state, double* record) { cpu::request_scale(state, a.rule, a.requested, record); });
}

at::Tensor new_flag(at::TensorList found) {
  TORCH_CHECK_VALUE(!found.empty(), "combine_found: found is an empty list, expected at least one flag");
  check_flags(found, "combine_found", "found", found[0].device());
  return at::empty({}, found[0].options());
}

at::Tensor combine_found_cpu(at::TensorList found) {
  const at::Tensor result = new_flag(found);
  const auto folded = folded_found(found);
  cpu::combine_found(pointers(folded), result.data_ptr<float>());
  return result;
}

at::Tensor combine_found_meta(at::TensorList found) {
  return new_flag(found);
}

#ifdef HALFSTEP_CUDA
void update_scale_cuda(const Arguments& a) {
  check(a);
  const c10::cuda::CUDAGuard guard(a.scale.device());
  const CudaStream stream{c10::cuda::getCurrentCUDAStream().stream()};
  update_scale(a, [&](const ScaleState& state, const ScaleInputs& inputs) {
    cuda::update_scale(state, a.rule, inputs, stream);
  });
}

void request_scale_cuda(const Request& a) {
  check_request(a);
  const c10::cuda::CUDAGuard guard(a.scale.device());
  const CudaStream stream{c10::cuda::getCurrentCUDAStream().stream()};
  request_scale(a, [&](const ScaleState& state, double* record) {
    cuda::request_scale(state, a.rule, a.requested, record, stream);
  });
}

at::Tensor combine_found_cuda(at::TensorList found) {
  const at::Tensor result = new_flag(found);
  const c10::cuda::CUDAGuard guard(result.device());
  const auto folded = folded_found(found);
  cuda::combine_found(pointers(folded), result.data_ptr<float>(), {c10::cuda::getCurrentCUDAStream().stream()});
  return result;
}
#endif

template <void (*backend)(const Arguments&)>
void update_scale_op(const at::Tensor& scale, const at::Tensor& growth_tracker, const OptionalTensor& hysteresis_left,
                     const OptionalTensor& counters, const OptionalTensor& history, at::TensorList found,
                     at::TensorList norm, double growth_factor, double backoff_factor, std::int64_t growth_interval,
                     double min_scale, double max_scale, std::int64_t hysteresis, std::string_view refill,
                     std::int64_t growth_delay) {
  const Refill refill_value = parse_refill(refill, "update_scale_");
  const ScaleRule rule{
      ScaleRule{}.init_scale, growth_factor, backoff_factor, growth_interval, min_scale, max_scale, hysteresis,
      refill_value,           growth_delay};
  backend({scale, growth_tracker, hysteresis_left, counters, history, found, norm, rule});
}

template <void (*backend)(const Request&)>
void request_scale_op(const at::Tensor& scale, const at::Tensor& counters, const at::Tensor& history,
                      const at::Tensor& record, double requested, double growth_factor, double min_scale,
                      double max_scale) {
  ScaleRule rule;
  rule.growth_factor = growth_factor;
  rule.min_scale = min_scale;
  rule.max_scale = max_scale;
  backend({scale, counters, history, record, requested, rule});
}

using Preset =
    std::tuple<double, double, double, std::int64_t, double, double, std::int64_t, std::string, std::int64_t>;

Preset scale_preset(std::string_view name) {
  try {
    const ScaleRule rule = scale_rule(name);
    return {rule.init_scale,  rule.growth_factor, rule.backoff_factor, rule.growth_interval,
            rule.min_scale,   rule.max_scale,     rule.hysteresis,     std::string(name_of(rule.refill)),
            rule.growth_delay};
  } catch (const InvalidArgument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

void check_scale_rule(double init_scale, double growth_factor, double backoff_factor, std::int64_t growth_interval,
                      double min_scale, double max_scale, std::int64_t hysteresis, std::string_view refill,
                      std::int64_t growth_delay, bool update_only) {
  check_rule({init_scale, growth_factor, backoff_factor, growth_interval, min_scale, max_scale, hysteresis,
              parse_refill(refill, "GradScaler"), growth_delay},
             "GradScaler", update_only ? validate_update : validate);
}

}  // namespace

void define_scaling(torch::Library& library) {
  library.def(
      "update_scale_(Tensor(a!) scale, Tensor(b!) growth_tracker, Tensor(c!)? hysteresis_left, Tensor(d!)? counters, "
      "Tensor(e!)? history, Tensor[] found, Tensor[] norm, float growth_factor=2.0, float backoff_factor=0.5, "
      "int growth_interval=2000, float min_scale=0.0, float max_scale=3.4028234663852886e38, int hysteresis=1, "
      "str refill='on_clean_step', int growth_delay=0) -> ()");
  library.def(
      "request_scale_(Tensor(a!) scale, Tensor counters, Tensor history, Tensor(b!) record, float requested, "
      "float growth_factor=2.0, float min_scale=0.0, float max_scale=3.4028234663852886e38) -> ()");
  library.def("combine_found(Tensor[] found) -> Tensor");
  library.def(
      "scale_preset(str name) -> (float init_scale, float growth_factor, float backoff_factor, int growth_interval, "
      "float min_scale, float max_scale, int hysteresis, str refill, int growth_delay)",
      &scale_preset);
  library.def(
      "check_scale_rule(float init_scale, float growth_factor, float backoff_factor, int growth_interval, "
      "float min_scale, float max_scale, int hysteresis, str refill, int growth_delay, *, bool update_only=False) -> "
      "()",
      &check_scale_rule);
}

void implement_scaling_cpu(torch::Library& library) {
  library.impl("update_scale_", &update_scale_op<update_scale_cpu>);
  library.impl("request_scale_", &request_scale_op<request_scale_cpu>);
  library.impl("combine_found", &combine_found_cpu);
}

void implement_scaling_meta(torch::Library& library) {
  library.impl("update_scale_", &update_scale_op<update_scale_meta>);
  library.impl("request_scale_", &request_scale_op<check_request>);
  library.impl("combine_found", &combine_found_meta);
}

void implement_scaling_cuda(torch::Library& library) {
#ifdef HALFSTEP_CUDA
  library.impl("update_scale_", &update_scale_op<update_scale_cuda>);
  library.impl("request_scale_", &request_scale_op<request_scale_cuda>);
  library.impl("combine_found", &combine_found_cuda);
#else
  library.impl("update_scale_", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  library.impl("request_scale_", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  library.impl("combine_found", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
#endif
}

}  // namespace torch_ops

void update_scale_(const at::Tensor& scale, const at::Tensor& growth_tracker,
                   const std::optional<at::Tensor>& hysteresis_left, const std::optional<at::Tensor>& counters,
                   const std::optional<at::Tensor>& history, at::TensorList found, at::TensorList norm,
                   const ScaleRule& rule) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::update_scale_", "")
                             .typed<decltype(torch_ops::update_scale_op<torch_ops::update_scale_cpu>)>();
  op.call(scale, growth_tracker, hysteresis_left, counters, history, found, norm, rule.growth_factor,
          rule.backoff_factor, rule.growth_interval, rule.min_scale, rule.max_scale, rule.hysteresis,
          name_of(rule.refill), rule.growth_delay);
}

void request_scale_(const at::Tensor& scale, const at::Tensor& counters, const at::Tensor& history,
                    const at::Tensor& record, double requested, const ScaleRule& rule) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::request_scale_", "")
                             .typed<decltype(torch_ops::request_scale_op<torch_ops::request_scale_cpu>)>();
  op.call(scale, counters, history, record, requested, rule.growth_factor, rule.min_scale, rule.max_scale);
}

at::Tensor combine_found(at::TensorList found) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::combine_found", "")
                             .typed<decltype(torch_ops::combine_found_cpu)>();
  return op.call(found);
}

}  // namespace halfstep
