// int8 quantization of TorchScript: calibration, the guard, and the report. Contract: halfstep/torch/int8_script.h; the
// steps on the graph: int8_script_graph.h.
#include "halfstep/torch/int8_script.h"

#include <fnmatch.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <ostream>
#include <set>
#include <tuple>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include "errors.h"
#include "halfstep/torch/calibration.h"
#include "int8_script_graph.h"
#include "int8_script_speed.h"
#include "registration.h"

namespace halfstep {
namespace {

using torch_ops::ScriptForm;
using torch_ops::ScriptLayer;
using torch_ops::ScriptSettings;
using Arguments = std::vector<c10::IValue>;
using Layers = std::vector<std::size_t>;

template <class Signature>
auto op_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

c10::intrusive_ptr<PackedInt8> pack(const ScriptLayer& layer, int bits) {
  static const auto quantize_weight = op_of<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, std::int64_t, bool)>(
      "halfstep::quantize_int8_weight");
  const auto [weight, scales] = quantize_weight.call(layer.weight, bits, false);
  return c10::make_intrusive<PackedInt8>(
      weight, scales, layer.bias ? std::optional(layer.bias->to(at::kFloat)) : std::nullopt, layer.geometry);
}

// ------------------------------------------------------------------------------------------------------- the choice

bool named_by(const std::string& glob, const std::string& name) {
  for (std::size_t end = name.find('.');; end = name.find('.', end + 1)) {
    if (::fnmatch(glob.c_str(), name.substr(0, end).c_str(), 0) == 0) return true;
    if (end == std::string::npos) return false;
  }
}

bool named_by_any(const std::vector<std::string>& globs, const std::string& name) {
  return std::ranges::any_of(globs, [&](const std::string& glob) { return named_by(glob, name); });
}

void check_globs(const std::vector<std::string>& globs, const char* argument, const ScriptForm& form) {
  for (const std::string& glob : globs) {
    const bool found =
        std::ranges::any_of(form.layers(), [&](const ScriptLayer& layer) { return named_by(glob, layer.name); }) ||
        std::ranges::any_of(form.left(), [&](const auto& left) { return named_by(glob, left.first); });
    TORCH_CHECK_VALUE(found, "quantize: ", argument, " has '", glob, "', which names no layer of the module");
  }
}

// -------------------------------------------------------------------------------------------------------- the guard

// The floating-point tensors in what a module returned.
std::vector<at::Tensor> floats_in(const c10::IValue& value) {
  std::vector<at::Tensor> found;
  value.visit([&](const c10::IValue& part) {
    if (part.isTensor() && part.toTensor().defined() && part.toTensor().is_floating_point() &&
        part.toTensor().numel() > 0)
      found.push_back(part.toTensor().detach().to(at::kFloat, /*non_blocking=*/false, /*copy=*/true));
    return false;
  });
  return found;
}

struct Verdict {
  double noise = 0, bound = 0;
  bool kept(double threshold) const { return bound <= threshold; }  // a NaN is not
};

class Guard {
 public:
  Guard(const torch::jit::Module& reference, std::vector<const Arguments*> batches) : batches_(std::move(batches)) {
    for (const Arguments* const batch : batches_) {
      references_.push_back(outputs(reference, *batch));
      TORCH_CHECK_VALUE(!references_.back().empty(),
                        "quantize: the module's output holds no floating-point tensor, "
                        "by which the int8 module could be judged");
      for (const at::Tensor& tensor : references_.back())
        TORCH_CHECK_VALUE(std::isfinite(tensor.sum(at::kDouble).item<double>()),
                          "quantize: the module's output holds NaN or infinity on a calibration batch");
    }
  }

  Verdict judge(const torch::jit::Module& module) {
    static const auto output_noise = op_of<at::Tensor(const at::Tensor&, const at::Tensor&)>("halfstep::output_noise");
    ++evaluations;
    std::vector<double> shares;
    for (std::size_t i = 0; i < batches_.size(); ++i) {
      const std::vector<at::Tensor> found = outputs(module, *batches_[i]);
      TORCH_CHECK_VALUE(found.size() == references_[i].size(), "quantize: the int8 module gives ", found.size(),
                        " floating-point tensors, expected ", references_[i].size());
      for (std::size_t j = 0; j < found.size(); ++j) {
        const at::Tensor noise = output_noise.call(references_[i][j], found[j]);
        shares.insert(shares.end(), noise.const_data_ptr<double>(), noise.const_data_ptr<double>() + noise.numel());
      }
    }
    samples = static_cast<std::int64_t>(shares.size());
    const auto n = static_cast<double>(shares.size());
    const double mean = std::accumulate(shares.begin(), shares.end(), 0.0) / n;
    double squares = 0;
    for (const double share : shares) squares += (share - mean) * (share - mean);
    return {mean, n < 2 ? mean : mean + 2 * std::sqrt(squares / (n - 1) / n)};
  }

  std::int64_t evaluations = 0;
  std::int64_t samples = 0;

 private:
  static std::vector<at::Tensor> outputs(const torch::jit::Module& module, const Arguments& batch) {
    return floats_in(torch_ops::call_module(module, batch));
  }

  std::vector<const Arguments*> batches_;
  std::vector<std::vector<at::Tensor>> references_;
};

// -------------------------------------------------------------------------------------------------------- the steps

void check_options(const QuantizeOptions& options, const std::vector<Arguments>& calibration) {
  TORCH_CHECK_VALUE(options.bits >= 2 && options.bits <= 8, "quantize: bits is ", options.bits, ", expected 2 to 8");
  TORCH_CHECK_VALUE(options.accuracy_threshold >= 0 && options.accuracy_threshold <= 1,
                    "quantize: accuracy_threshold is ", options.accuracy_threshold,
                    ", expected 0 to 1, such as 0.02 for 2 %");
  TORCH_CHECK_VALUE(!calibration.empty(), "quantize: calibration is empty, expected at least one list of arguments");
}

class Quantizer {
 public:
  Quantizer(const torch::jit::Module& module, const std::vector<Arguments>& calibration, const QuantizeOptions& options)
      : options_(options), form_(module, options.fold_batch_norm) {
    for (std::size_t i = 0; i < calibration.size(); ++i) {
      const bool judges = calibration.size() < 3 || i % 3 == 2;
      if (judges) judging_.push_back(&calibration[i]);
      if (!judges || calibration.size() < 3) calibrating_.push_back(&calibration[i]);
    }
    check_globs(options.include, "include", form_);
    check_globs(options.exclude, "exclude", form_);
    for (const auto& [norm, convolution] : form_.folded()) report_.folded.push_back(norm + " into " + convolution);
    for (const ScriptLayer& layer : form_.layers()) {
      QuantizedLayer& entry = report_.layers.emplace_back();
      entry.name = layer.name;
      entry.kind = layer.kind;
      if (!options.include.empty() && !named_by_any(options.include, layer.name)) entry.why = "not in include";
      if (named_by_any(options.exclude, layer.name)) entry.why = "in exclude";
    }
  }

  Quantized run(const torch::jit::Module& reference) {
    calibrate();
    Guard guard(reference, judging_);
    Layers chosen = search(guard);
    if (options_.speed_guard && !chosen.empty()) chosen = faster(chosen, guard);
    auto [module, regions] = built(chosen);
    Verdict verdict = guard.judge(module);
    if (options_.bias_correction && !chosen.empty()) verdict = correct_biases(chosen, verdict, guard);
    report_.noise = verdict.noise;
    report_.bound = verdict.bound;
    report_.kept = verdict.kept(options_.accuracy_threshold);
    report_.samples = guard.samples;
    report_.evaluations = guard.evaluations;
    describe(chosen, regions);
    return {built(chosen).module, std::move(report_)};  // another one, whose buffers no call has changed
  }

 private:
  // Ranges of the inputs, and packed weights.
  void calibrate() {
    const auto watch = c10::make_intrusive<ScriptForm::Watch>();
    std::vector<Observer> observers(form_.layers().size());
    std::vector<bool> called(observers.size());
    watch->see = [&](std::size_t i, const at::Tensor& input) {
      called[i] = true;
      const ScriptLayer& layer = form_.layers()[i];
      if (const std::string why = torch_ops::refused_input(layer, input); !why.empty()) report_.layers[i].why = why;
      if (layer.kind != "embedding" && report_.layers[i].why.empty()) observers[i].observe(input);
    };
    for (std::size_t i = 0; i < std::min<std::size_t>(2, calibrating_.size()); ++i) form_.probe(*calibrating_[i]);
    const torch::jit::Module watched = form_.watched(watch);
    for (const Arguments* const batch : calibrating_) torch_ops::call_module(watched, *batch);
    for (std::size_t i = 0; i < observers.size(); ++i) {
      QuantizedLayer& entry = report_.layers[i];
      if (!entry.why.empty()) continue;
      const bool has_range = entry.kind != "embedding" && !options_.dynamic;
      try {
        if (!called[i]) {
          entry.why = "it is not called on the calibration batches";
          continue;
        }
        if (entry.kind != "embedding" && observers[i].histogram().count() == 0) {
          entry.why = "it got no finite values during calibration";
          continue;
        }
        ScriptSettings settings{pack(form_.layers()[i], options_.bits), std::nullopt, 0};
        if (has_range) {
          const Int8Parameters range = observers[i].parameters(options_.calibrator, {.bits = options_.bits});
          settings.input_scale = range.scale;
          settings.input_zero_point = range.zero_point;
        }
        settings_.emplace(i, std::move(settings));
      } catch (const c10::ValueError& error) {  // weights that are not finite
        entry.why = error.what_without_backtrace();
      }
    }
  }

  ScriptForm::Built built(const Layers& layers) const {
    std::map<std::size_t, ScriptSettings> settings;
    for (const std::size_t layer : layers) settings.emplace(layer, settings_.at(layer));
    return form_.build(settings);
  }

  // The layers with which the threshold is kept: all, or as many as are left when the most harmful are given back.
  Layers search(Guard& guard) {
    Layers order;
    for (const auto& [layer, settings] : settings_) order.push_back(layer);
    if (order.empty()) {
      note("no layer can be int8; a float copy came back");
      return {};
    }
    const double threshold = options_.accuracy_threshold;
    const Verdict everywhere = guard.judge(built(order).module);
    report_.noise_everywhere = everywhere.noise;
    report_.bound_everywhere = everywhere.bound;
    if (everywhere.kept(threshold)) return order;
    for (const std::size_t layer : order) report_.layers[layer].noise = guard.judge(built({layer}).module).noise;
    const auto harm = [&](std::size_t layer) {
      const double noise = report_.layers[layer].noise;
      return std::isnan(noise) ? std::numeric_limits<double>::infinity() : noise;
    };
    std::ranges::stable_sort(order, std::greater<>(), harm);
    const auto without = [&](std::size_t count) {
      Layers left(order.begin() + static_cast<std::ptrdiff_t>(count), order.end());
      std::ranges::sort(left);
      return left;
    };
    std::size_t fails = 0, holds = 1;
    while (holds < order.size() && !guard.judge(built(without(holds)).module).kept(threshold)) {
      fails = holds;
      holds = std::min(2 * holds, order.size());
    }
    while (holds - fails > 1) {
      const std::size_t middle = (fails + holds) / 2;
      (guard.judge(built(without(middle)).module).kept(threshold) ? holds : fails) = middle;
    }
    for (std::size_t i = 0; i < holds; ++i)
      report_.layers[order[i]].why =
          "given back for accuracy, number " + std::to_string(i + 1) + " of the most harmful";
    if (holds == order.size()) note("no layer alone keeps the noise at the threshold or below; a float copy came back");
    return without(holds);
  }

  // Those of the chosen layers that are not slower in int8; none if all of the module is.
  Layers faster(const Layers& chosen, Guard& guard) {
    const Arguments& batch = *calibrating_.front();
    const std::string own = c10::toString(form_.layers()[chosen.front()].weight.scalar_type());
    Layers kept = chosen;
    std::map<std::size_t, std::string> slower;
    for (const torch_ops::ScriptRegion& region : built(chosen).regions) {
      const auto times = torch_ops::time_region(form_, region, settings_, batch);
      if (!times) continue;
      const double share = torch_ops::share_of(times->in_int8, times->in_float);
      for (const std::size_t layer : region.layers) {
        report_.layers[layer].milliseconds = 1e3 * torch_ops::median(times->in_float);
        report_.layers[layer].int8_milliseconds = 1e3 * torch_ops::median(times->in_int8);
        if (share <= 1) continue;
        std::erase(kept, layer);
        slower[layer] = "slower: int8 takes " + std::to_string(share) + " of the time of " + own;
      }
    }
    // In the whole, what is at the borders of int8 counts too.
    std::vector<Layers> ways{{}, kept};
    if (kept != chosen) ways.push_back(chosen);
    std::vector<std::function<void()>> calls;
    for (const Layers& layers : ways)
      calls.emplace_back([module = built(layers).module, &batch] { torch_ops::call_module(module, batch); });
    const auto half = call_in_bfloat16(batch, own);
    if (half) calls.push_back(*half);
    const auto times = torch_ops::time_in_turns(calls, form_.device());
    const bool all = kept.empty() || (ways.size() > 2 && torch_ops::share_of(times[2], times[1]) < 1);
    const std::size_t best = all ? ways.size() - 1 : std::size_t{1};
    const auto keeps_threshold = [&](const Layers& layers) {
      return layers == chosen || guard.judge(built(layers).module).kept(options_.accuracy_threshold);
    };
    std::size_t way = best;
    if (torch_ops::share_of(times[best], times[0]) <= 1 && !keeps_threshold(ways[best])) {
      note("without the layers that are slower in int8 the threshold is not kept");
      way = ways.size() - 1;  // with all of them
    }
    report_.milliseconds = 1e3 * torch_ops::median(times[0]);
    report_.int8_milliseconds = 1e3 * torch_ops::median(times[way]);
    const double share = torch_ops::share_of(times[way], times[0]);
    const std::string whole =
        "all of the module takes " + std::to_string(share) + " of the time of " + own + " in int8";
    if (share > 1) {
      note(whole + "; a float copy came back");
      way = 0;
    }
    if (half && torch_ops::share_of(times.back(), times[way]) < 1)
      note("in bfloat16 the module takes " + std::to_string(1e3 * torch_ops::median(times.back())) +
           " ms, less than what came back: cast it, and quantize that");
    for (const std::size_t layer : chosen)
      if (std::ranges::count(ways[way], layer) == 0)
        report_.layers[layer].why = slower.contains(layer) ? slower[layer] : whole;
    return ways[way];
  }

  // Moves biases by the mean error of their layer, unless the guard likes the module better as it is.
  Verdict correct_biases(const Layers& chosen, const Verdict& verdict, Guard& guard) {
    static const auto mean_difference =
        op_of<at::Tensor(const at::Tensor&, const at::Tensor&, std::int64_t)>("halfstep::mean_difference");
    constexpr std::size_t kBatches = 8;
    std::map<std::size_t, std::vector<at::Tensor>> shifts;
    const auto watch = c10::make_intrusive<ScriptForm::Watch>();
    watch->see = [&](std::size_t i, const at::Tensor& input) {
      const ScriptLayer& layer = form_.layers()[i];
      if (layer.kind == "embedding" || std::ranges::count(chosen, i) == 0) return;
      const at::Tensor expected = torch_ops::float_product(layer, input);
      const at::Tensor got = torch_ops::int8_product(layer, settings_.at(i), input);
      const at::Tensor shift = mean_difference.call(expected, got, expected.dim() + layer.channel_dim());
      if (shift.isfinite().all().item<bool>()) shifts[i].push_back(shift);  // of nothing it is NaN
    };
    const torch::jit::Module watched = form_.watched(watch);
    for (std::size_t i = 0; i < std::min(kBatches, calibrating_.size()); ++i)
      torch_ops::call_module(watched, *calibrating_[i]);
    if (shifts.empty()) return verdict;
    const auto before = settings_;
    for (const auto& [layer, found] : shifts) settings_.at(layer).packed = settings_.at(layer).packed->corrected(found);
    const Verdict corrected = guard.judge(built(chosen).module);
    if (corrected.bound <= verdict.bound) {
      report_.corrected = static_cast<std::int64_t>(shifts.size());
      return corrected;
    }
    settings_ = before;
    return verdict;
  }

  // A call of the module in bfloat16; none if it is not of float32, or fails there.
  std::optional<std::function<void()>> call_in_bfloat16(const Arguments& batch, const std::string& own) const {
    if (own != c10::toString(at::kFloat)) return std::nullopt;
    try {
      torch::jit::Module module = built({}).module.deepcopy();  // whose tensors are its own
      const auto cast = [](at::Tensor tensor) {                 // Module::to() would cast integers too
        if (tensor.is_floating_point()) tensor.set_data(tensor.to(at::kBFloat16));
      };
      for (const at::Tensor& parameter : module.parameters()) cast(parameter);
      for (const at::Tensor& buffer : module.buffers()) cast(buffer);
      Arguments halves;
      for (const c10::IValue& argument : batch)
        halves.push_back(argument.isTensor() && argument.toTensor().is_floating_point()
                             ? c10::IValue(argument.toTensor().to(at::kBFloat16))
                             : argument);
      torch_ops::call_module(module, halves);
      return [module, halves] { torch_ops::call_module(module, halves); };
    } catch (const std::exception&) {  // its code may take float32 for granted in any way
      return std::nullopt;
    }
  }

  void note(const std::string& text) { report_.note += (report_.note.empty() ? "" : "; ") + text; }

  void describe(const Layers& chosen, const std::vector<torch_ops::ScriptRegion>& regions) {
    static const auto kernel_on = op_of<std::string(const at::Device&)>("halfstep::int8_kernel");
    for (const std::size_t layer : chosen) {
      report_.layers[layer].int8 = true;
      report_.layers[layer].kernel = kernel_on.call(form_.device());
    }
    for (const torch_ops::ScriptRegion& region : regions)
      for (const auto& [layer, line] : region.fused) report_.layers[layer].fused = line;
    for (const auto& [name, why] : form_.left()) {
      QuantizedLayer& entry = report_.layers.emplace_back();
      entry.name = name;
      entry.why = why;
    }
  }

  const QuantizeOptions& options_;
  ScriptForm form_;
  std::vector<const Arguments*> calibrating_, judging_;
  std::map<std::size_t, ScriptSettings> settings_;  // of the candidates
  QuantizeReport report_;
};

}  // namespace

std::int64_t QuantizeReport::int8_layers() const {
  return std::ranges::count_if(layers, [](const QuantizedLayer& layer) { return layer.int8; });
}

std::ostream& operator<<(std::ostream& out, const QuantizeReport& report) {
  out << report.int8_layers() << " of " << report.layers.size() << " layers are int8\n";
  out << "share of noise in the outputs: " << report.noise << ", at most " << report.bound << ": the threshold is "
      << (report.kept ? "kept" : "NOT kept") << '\n';
  if (report.bound_everywhere != report.bound)
    out << "with all candidates in int8: " << report.noise_everywhere << ", at most " << report.bound_everywhere
        << '\n';
  if (report.milliseconds >= 0)
    out << "a call takes " << report.milliseconds << " ms in float, " << report.int8_milliseconds << " in int8\n";
  if (report.corrected > 0) out << "biases corrected in " << report.corrected << " layers\n";
  for (const std::string& folded : report.folded) out << "batch norm " << folded << '\n';
  for (const QuantizedLayer& layer : report.layers) {
    out << "  " << layer.name << ": ";
    if (layer.int8) {
      out << "int8 (" << layer.kernel << ')';
      if (!layer.fused.empty()) out << ", " << layer.fused;
    } else {
      out << "float, " << layer.why;
    }
    if (layer.noise >= 0) out << "; alone it makes noise of " << layer.noise;
    if (layer.milliseconds >= 0)
      out << "; its region " << layer.milliseconds << " ms in float, " << layer.int8_milliseconds << " in int8";
    out << '\n';
  }
  if (!report.note.empty()) out << "note: " << report.note << '\n';
  return out;
}

Quantized quantize(const torch::jit::Module& module, const std::vector<Arguments>& calibration,
                   const QuantizeOptions& options) {
  return torch_ops::as_value_error([&] {
    check_options(options, calibration);
    const at::NoGradGuard no_grad;
    Quantizer quantizer(module, calibration, options);
    return quantizer.run(torch_ops::copied_for_inference(module));
  });
}

}  // namespace halfstep
