// The scaler's state, and torch.classes.halfstep.GradScaler. Contract: halfstep/torch/scaling.h.
#include <algorithm>
#include <cmath>
#include <string_view>
#include <utility>

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include "conversions.h"
#include "halfstep/torch/gradients.h"
#include "halfstep/torch/scaling.h"
#include "registration.h"

namespace halfstep {
namespace {

ScaleRule validated(const ScaleRule& rule) {
  try {
    validate(rule);
  } catch (const InvalidArgument& error) {
    TORCH_CHECK_VALUE(false, "GradScaler: ", error.what());
  }
  return rule;
}

at::Tensor scalar(double value, at::ScalarType dtype, at::Device device) {
  return at::full({}, value, at::TensorOptions().dtype(dtype).device(device));
}

// A copy that is awaited only where the host reads the result next.
at::Tensor moved(const at::Tensor& tensor, at::Device device) {
  return tensor.to(device, /*non_blocking=*/!device.is_cpu());
}

// The rule as one CPU tensor, in this order. A snapshot of another length is refused.
constexpr int kRuleEntries = 9;
constexpr std::size_t kSnapshotEntries = 6;
at::Tensor pack(const ScaleRule& rule) {
  const at::Tensor packed = at::zeros({kRuleEntries}, at::kDouble);
  double* const p = packed.data_ptr<double>();
  p[0] = rule.init_scale;
  p[1] = rule.growth_factor;
  p[2] = rule.backoff_factor;
  p[3] = static_cast<double>(rule.growth_interval);
  p[4] = rule.min_scale;
  p[5] = rule.max_scale;
  p[6] = static_cast<double>(rule.hysteresis);
  p[7] = static_cast<double>(rule.refill);
  p[8] = static_cast<double>(rule.growth_delay);
  return packed;
}

ScaleRule unpack(const at::Tensor& packed) {
  const double* const p = packed.const_data_ptr<double>();
  TORCH_CHECK_VALUE(p[7] == 0 || p[7] == 1 || p[7] == 2, "GradScaler: state entry 'rule' has refill ", p[7],
                    ", expected 0, 1 or 2");
  return validated({.init_scale = p[0],
                    .growth_factor = p[1],
                    .backoff_factor = p[2],
                    .growth_interval = static_cast<std::int64_t>(p[3]),
                    .min_scale = p[4],
                    .max_scale = p[5],
                    .hysteresis = static_cast<std::int64_t>(p[6]),
                    .refill = static_cast<Refill>(static_cast<int>(p[7])),
                    .growth_delay = static_cast<std::int64_t>(p[8])});
}

at::Tensor entry(const GradScalerState::Snapshot& snapshot, const std::string& key, at::ScalarType dtype,
                 std::int64_t numel) {
  const auto found = snapshot.find(key);
  TORCH_CHECK_VALUE(found != snapshot.end(), "GradScaler: the state has no entry '", key, "'");
  const at::Tensor& tensor = found->second;
  TORCH_CHECK_VALUE(tensor.defined() && tensor.scalar_type() == dtype && tensor.numel() == numel,
                    "GradScaler: state entry '", key, "' is ",
                    tensor.defined() ? tensor.toString() : std::string("undefined"), " with ",
                    tensor.defined() ? tensor.numel() : 0, " elements, expected ", dtype, " with ", numel);
  return tensor.to(at::kCPU, dtype).contiguous().clone();
}

}  // namespace

GradScalerState::GradScalerState(const ScaleRule& rule) : rule_(validated(rule)) {}

void GradScalerState::ensure_state(at::Device device) {
  if (scale_.defined()) {
    if (!waiting_) return;
    for (at::Tensor* tensor : {&scale_, &growth_tracker_, &hysteresis_left_, &counters_, &history_, &request_})
      if (tensor->defined()) *tensor = tensor->to(device);
    waiting_ = false;
    return;
  }
  scale_ = scalar(rule_.init_scale, at::kFloat, device);
  growth_tracker_ = scalar(-static_cast<double>(rule_.growth_delay), at::kInt, device);
  hysteresis_left_ = scalar(static_cast<double>(rule_.hysteresis), at::kInt, device);
  counters_ = at::zeros({kCounters}, at::TensorOptions().dtype(at::kLong).device(device));
  history_ = at::zeros({kHistoryRows, kHistoryColumns}, at::TensorOptions().dtype(at::kDouble).device(device));
}

at::Tensor GradScalerState::scale(const at::Tensor& outputs) {
  ensure_state(outputs.device());
  return outputs.mul(moved(scale_, outputs.device()));
}

at::Tensor GradScalerState::scale_tensor(const char* caller) const {
  TORCH_CHECK(scale_.defined(), "GradScaler: ", caller, " was called before scale(); scale the loss first");
  return scale_;
}

at::Tensor GradScalerState::record(at::TensorList found, at::TensorList norm) {
  std::vector<at::Tensor> flags;
  for (const at::Tensor& flag : found) flags.push_back(moved(flag, scale_.device()));
  found_.insert(found_.end(), flags.begin(), flags.end());
  for (const at::Tensor& length : norm) norm_.push_back(moved(length, scale_.device()));
  return flags.size() == 1 ? flags.front() : combine_found(flags);
}

at::Tensor GradScalerState::check(at::TensorList grads, bool write) {
  scale_tensor(write ? "unscale_" : "check_");
  const at::NoGradGuard no_grad;
  std::vector<std::pair<at::Device, std::vector<at::Tensor>>> by_device;
  for (const at::Tensor& grad : grads) {
    auto same = std::find_if(by_device.begin(), by_device.end(),
                             [&](const auto& entry) { return entry.first == grad.device(); });
    if (same == by_device.end()) same = by_device.insert(by_device.end(), {grad.device(), {}});
    same->second.push_back(grad);
  }
  for (const auto& [device, list] : by_device)  // all of them, before the first is written
    torch_ops::check_gradient_list(list, "GradScaler", device, write);
  if (by_device.empty()) by_device.push_back({scale_.device(), {}});

  std::vector<at::Tensor> found;
  std::vector<at::Tensor> norm;
  for (const auto& [device, list] : by_device) {
    const at::Tensor scale = moved(scale_, device);
    const at::Tensor flag = scalar(0.0, at::kFloat, device);
    const at::Tensor length = scalar(0.0, at::kFloat, device);
    if (write) {
      unscale_(list, scale, flag, length);
    } else {
      check_gradients_(list, scale, flag, length);
    }
    found.push_back(flag);
    norm.push_back(length);
  }
  return record(found, norm);
}

void GradScalerState::update() {
  TORCH_CHECK(!found_.empty(), "GradScaler: update() without a check of gradients since the last update()");
  update_scale_(scale_, growth_tracker_, hysteresis_left_, counters_, history_, found_, norm_, rule_);
  found_.clear();
  norm_.clear();
}

void GradScalerState::set_scale(double scale) {
  TORCH_CHECK_VALUE(static_cast<float>(scale) > 0.0F && scale >= rule_.min_scale && scale <= rule_.max_scale,
                    "GradScaler: scale is ", scale, ", expected a float32 > 0 from min_scale (", rule_.min_scale,
                    ") to max_scale (", rule_.max_scale, ")");
  if (request_.defined()) request_.select(0, kRequestLimit).fill_(scale);
  if (scale_.defined()) {
    scale_.fill_(scale);
  } else {
    rule_.init_scale = scale;
  }
  found_.clear();
  norm_.clear();
}

at::Tensor GradScalerState::request_scale(double requested) {
  if (!request_.defined()) {
    request_ = at::zeros({kRequestColumns}, at::kDouble);
    request_.data_ptr<double>()[kRequestLimit] = rule_.max_scale;
    request_ = moved(request_, scale_tensor("request_scale").device());
  }
  request_scale_(scale_, counters_, history_, request_, requested, rule_);
  return request_;
}

double GradScalerState::get_scale() const {
  return scale_.defined() ? scale_.item<double>() : rule_.init_scale;
}

at::Tensor GradScalerState::found() const {
  TORCH_CHECK(!found_.empty(), "GradScaler: no gradients were checked since the last update()");
  return combine_found(found_);
}

at::Tensor GradScalerState::counters() {
  wait_for_device();
  return counters_;
}

at::Tensor GradScalerState::history() {
  wait_for_device();
  return history_;
}

void GradScalerState::wait_for_device() {
  if (scale_.defined()) return;
  ensure_state(at::kCPU);
  waiting_ = true;
}

GradScalerState::Snapshot GradScalerState::snapshot() const {
  Snapshot snapshot{{"rule", pack(rule_)}};
  if (scale_.defined()) {
    const auto cpu = [](const at::Tensor& tensor) {
      return tensor.to(at::kCPU, /*non_blocking=*/false, /*copy=*/true);
    };
    snapshot["scale"] = cpu(scale_);
    snapshot["growth_tracker"] = cpu(growth_tracker_);
    snapshot["hysteresis_left"] = cpu(hysteresis_left_);
    snapshot["counters"] = cpu(counters_);
    snapshot["history"] = cpu(history_);
    if (request_.defined()) snapshot["request"] = cpu(request_);
  }
  return snapshot;
}

c10::intrusive_ptr<GradScalerState> GradScalerState::restore(const Snapshot& snapshot) {
  auto state = c10::make_intrusive<GradScalerState>(unpack(entry(snapshot, "rule", at::kDouble, kRuleEntries)));
  if (snapshot.size() > 1) {  // a scaler that was never used has no more than its rule
    const std::size_t expected = kSnapshotEntries + snapshot.count("request");
    TORCH_CHECK_VALUE(snapshot.size() == expected, "GradScaler: the state has ", snapshot.size(), " entries, expected ",
                      expected);
    state->waiting_ = true;
    state->scale_ = entry(snapshot, "scale", at::kFloat, 1);
    const auto scale = state->scale_.item<float>();
    TORCH_CHECK_VALUE(scale >= 0.0F && std::isfinite(scale), "GradScaler: state entry 'scale' is ", scale,
                      ", expected a finite number >= 0");
    state->growth_tracker_ = entry(snapshot, "growth_tracker", at::kInt, 1);
    state->hysteresis_left_ = entry(snapshot, "hysteresis_left", at::kInt, 1);
    state->counters_ = entry(snapshot, "counters", at::kLong, kCounters);
    for (int i = 0; i < kCounters; ++i) {
      const auto count = state->counters_.const_data_ptr<std::int64_t>()[i];
      TORCH_CHECK_VALUE(count >= 0, "GradScaler: state entry 'counters' holds ", count, ", expected counts >= 0");
    }
    state->history_ = entry(snapshot, "history", at::kDouble, kHistoryRows * kHistoryColumns);
    if (snapshot.contains("request")) state->request_ = entry(snapshot, "request", at::kDouble, kRequestColumns);
  }
  return state;
}

namespace torch_ops {
namespace {

using Self = c10::intrusive_ptr<GradScalerState>;

Self construct(double init_scale, double growth_factor, double backoff_factor, std::int64_t growth_interval,
               double min_scale, double max_scale, std::int64_t hysteresis, const std::string& refill,
               std::int64_t growth_delay) {
  Refill refill_value{};
  try {
    refill_value = refill_from_name(refill);
  } catch (const InvalidArgument& error) {
    TORCH_CHECK_VALUE(false, "GradScaler: ", error.what());
  }
  return c10::make_intrusive<GradScalerState>(ScaleRule{init_scale, growth_factor, backoff_factor, growth_interval,
                                                        min_scale, max_scale, hysteresis, refill_value, growth_delay});
}

c10::Dict<std::string, at::Tensor> to_dict(const GradScalerState::Snapshot& snapshot) {
  c10::Dict<std::string, at::Tensor> dict;
  for (const auto& [key, tensor] : snapshot) dict.insert(key, tensor);
  return dict;
}

Self from_dict(const c10::Dict<std::string, at::Tensor>& dict) {
  GradScalerState::Snapshot snapshot;
  for (const auto& item : dict) snapshot.emplace(item.key(), item.value());
  return GradScalerState::restore(snapshot);
}

}  // namespace

void define_grad_scaler(torch::Library& library) {
  const ScaleRule rule;
  library.class_<GradScalerState>("GradScaler")
      .def(torch::init(&construct), "",
           {torch::arg("init_scale") = rule.init_scale, torch::arg("growth_factor") = rule.growth_factor,
            torch::arg("backoff_factor") = rule.backoff_factor, torch::arg("growth_interval") = rule.growth_interval,
            torch::arg("min_scale") = rule.min_scale, torch::arg("max_scale") = rule.max_scale,
            torch::arg("hysteresis") = rule.hysteresis, torch::arg("refill") = std::string(name_of(rule.refill)),
            torch::arg("growth_delay") = rule.growth_delay})
      .def("scale", [](const Self& self, const at::Tensor& outputs) { return self->scale(outputs); })
      .def("unscale_",
           [](const Self& self, const std::vector<at::Tensor>& grads) { return self->check(grads, /*write=*/true); })
      .def("check_",
           [](const Self& self, const std::vector<at::Tensor>& grads) { return self->check(grads, /*write=*/false); })
      .def("update", [](const Self& self) { self->update(); })
      .def("set_scale", [](const Self& self, double scale) { self->set_scale(scale); })
      .def("get_scale", [](const Self& self) { return self->get_scale(); })
      .def("found", [](const Self& self) { return self->found(); })
      .def("counters", [](const Self& self) { return self->counters(); })
      .def("history", [](const Self& self) { return self->history(); })
      .def("state_dict", [](const Self& self) { return to_dict(self->snapshot()); })
      .def_pickle([](const Self& self) { return to_dict(self->snapshot()); },
                  [](const c10::Dict<std::string, at::Tensor>& dict) { return from_dict(dict); });
}

}  // namespace torch_ops
}  // namespace halfstep
