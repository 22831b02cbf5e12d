// Contract: int8_script_speed.h.
#include "int8_script_speed.h"

#include <algorithm>
#include <chrono>

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace halfstep::torch_ops {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// Of one call, of `repeats` in a row.
double seconds_of(const std::function<void()>& call, int repeats, at::Device device) {
  const auto settle = [&] {
    if (!device.is_cpu()) c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.index());
  };
  settle();
  const auto begin = Clock::now();
  for (int i = 0; i < repeats; ++i) call();
  settle();
  return seconds_since(begin) / repeats;
}

// What a layer does in int8, on float or on the int8 that a layer before it writes.
std::function<void()> int8_call(const ScriptLayer& layer, const ScriptSettings& settings, const at::Tensor& input,
                                bool takes_int8) {
  if (!takes_int8 || (!settings.input_scale && layer.kind != "linear"))
    return [=, &layer, &settings] { int8_product(layer, settings, input); };
  if (settings.input_scale) {
    const at::Tensor quantized = quantize_int8(input, *settings.input_scale, settings.input_zero_point);
    return [=, &layer, &settings] { int8_product(layer, settings, quantized, input.scalar_type()); };
  }
  static const auto quantize_rows = c10::Dispatcher::singleton()
                                        .findSchemaOrThrow("halfstep::quantize_int8_rows", "")
                                        .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&)>();
  const auto [quantized, scales] = quantize_rows.call(input);
  return [&layer, &settings, type = input.scalar_type(), quantized = quantized, scales = scales] {
    int8_product(layer, settings, quantized, type, scales);
  };
}

}  // namespace

std::vector<Seconds> time_in_turns(const std::vector<std::function<void()>>& calls, at::Device device) {
  constexpr int kRounds = 15;
  constexpr int kFewestRounds = 3;
  constexpr double kShortest = 1e-3;
  constexpr double kLongest = 20.0;
  std::vector<int> repeats;
  for (const auto& call : calls) {
    call();
    seconds_of(call, 1, device);
    const double once = std::max(seconds_of(call, 1, device), 1e-7);
    repeats.push_back(std::clamp(static_cast<int>(kShortest / once), 1, 200));
  }
  std::vector<Seconds> taken(calls.size());
  const auto begin = Clock::now();
  for (int round = 0; round < kRounds; ++round) {
    for (std::size_t i = 0; i < calls.size(); ++i) taken[i].push_back(seconds_of(calls[i], repeats[i], device));
    if (round + 1 >= kFewestRounds && seconds_since(begin) > kLongest) break;
  }
  return taken;
}

double median(Seconds values) {
  std::ranges::sort(values);
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

double share_of(const Seconds& mine, const Seconds& rival) {
  Seconds shares;
  for (std::size_t i = 0; i < mine.size(); ++i) shares.push_back(mine[i] / rival[i]);
  return median(std::move(shares));
}

std::optional<RegionTimes> time_region(const ScriptForm& form, const ScriptRegion& region,
                                       const std::map<std::size_t, ScriptSettings>& settings,
                                       const std::vector<c10::IValue>& arguments) {
  std::vector<std::pair<std::size_t, at::Tensor>> inputs;  // in the order of the calls
  const auto watch = c10::make_intrusive<ScriptForm::Watch>();
  watch->see = [&](std::size_t layer, const at::Tensor& input) {
    const bool multiplies = std::ranges::count(region.layers, layer) > 0 && form.layers()[layer].kind != "embedding";
    const bool known = std::ranges::any_of(inputs, [&](const auto& each) { return each.first == layer; });
    if (multiplies && !known) inputs.emplace_back(layer, input.detach().clone());
  };
  call_module(form.watched(watch), arguments);
  if (inputs.empty()) return std::nullopt;
  std::vector<std::function<void()>> products;
  for (const auto& [layer, input] : inputs)
    products.push_back(int8_call(form.layers()[layer], settings.at(layer), input, !products.empty()));
  auto times = time_in_turns({[&] {
                                for (const auto& [layer, input] : inputs) float_product(form.layers()[layer], input);
                              },
                              [&] {
                                for (const auto& product : products) product();
                              }},
                             form.device());
  return RegionTimes{std::move(times[0]), std::move(times[1])};
}

}  // namespace halfstep::torch_ops
