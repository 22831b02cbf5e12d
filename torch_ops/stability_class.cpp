// torch.classes.halfstep.StabilityMonitor: the core's state machine with the statistics that it decides by.
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/ops/empty.h>
#include <torch/custom_class.h>

#include "errors.h"
#include "halfstep/torch/stability.h"
#include "plan_class.h"
#include "registration.h"

namespace halfstep::torch_ops {
namespace {

// batch, layer, state before, state after, score, hold, reason.
using Decision = std::tuple<std::int64_t, std::string, std::string, std::string, double, std::int64_t, std::string>;
// name, state, hold, left, demotions, promotions, score, reason.
using Entry =
    std::tuple<std::string, std::string, std::int64_t, std::int64_t, std::int64_t, std::int64_t, double, std::string>;

std::vector<Decision> listed(const std::vector<StabilityDecision>& decisions) {
  std::vector<Decision> list;
  for (const StabilityDecision& d : decisions)
    list.emplace_back(d.batch, d.layer, name_of(d.from), name_of(d.to), d.score, d.hold, d.reason);
  return list;
}

StepKind kind_named(const std::string& kind) {
  if (kind == "usual") return StepKind::kUsual;
  if (kind == "unstable") return StepKind::kUnstable;
  TORCH_CHECK_VALUE(kind == "float32", "StabilityMonitor.observe: kind is '", kind,
                    "', expected 'usual', 'unstable' or 'float32'");
  return StepKind::kFloat32;
}

struct MonitorClass : torch::CustomClassHolder {
  MonitorClass(const PrecisionPlan& plan, const StabilityOptions& options)
      : monitor(plan, options), statistics(static_cast<std::int64_t>(plan.layers().size()), monitor.half()) {}

  static std::span<const double> values(const at::Tensor& summary) {
    TORCH_CHECK_VALUE(summary.is_cpu() && summary.scalar_type() == at::kDouble && summary.is_contiguous(),
                      "StabilityMonitor: the summary is ", summary.toString(), ", expected a contiguous CPU float64");
    return {summary.const_data_ptr<double>(), static_cast<std::size_t>(summary.numel())};
  }

  StabilityMonitor monitor;
  LayerStatistics statistics;
};

using Self = c10::intrusive_ptr<MonitorClass>;

Self make(const c10::intrusive_ptr<PlanClass>& plan, double threshold, std::int64_t hold, std::int64_t max_hold,
          double lowest_scale) {
  return as_value_error([&] {
    return c10::make_intrusive<MonitorClass>(
        plan->plan,
        StabilityOptions{.threshold = threshold, .hold = hold, .max_hold = max_hold, .lowest_scale = lowest_scale});
  });
}

at::Tensor summary_of(const Self& self) {
  const std::vector<double> summary = self->statistics.summary();
  const at::Tensor tensor =
      at::empty({static_cast<std::int64_t>(summary.size()) / kSummaryColumns, kSummaryColumns}, at::kDouble);
  std::copy(summary.begin(), summary.end(), tensor.data_ptr<double>());
  return tensor;
}

using Pickled = std::tuple<std::string, std::vector<double>, std::string>;

Pickled pickled(const Self& self) {
  const StabilityOptions& options = self->monitor.options();
  return {self->monitor.base().to_json(),
          {options.threshold, static_cast<double>(options.hold), static_cast<double>(options.max_hold),
           options.lowest_scale},
          self->monitor.to_json()};
}

Self unpickled(const Pickled& state) {
  const auto& [plan, options, layers] = state;
  TORCH_CHECK_VALUE(options.size() == 4, "StabilityMonitor: the pickle has ", options.size(), " options, expected 4");
  return as_value_error([&] {
    auto self = c10::make_intrusive<MonitorClass>(PrecisionPlan::from_json(plan, "StabilityMonitor's plan"),
                                                  StabilityOptions{.threshold = options[0],
                                                                   .hold = static_cast<std::int64_t>(options[1]),
                                                                   .max_hold = static_cast<std::int64_t>(options[2]),
                                                                   .lowest_scale = options[3]});
    self->monitor.restore(layers);
    return self;
  });
}

}  // namespace

void define_stability(torch::Library& library) {
  const StabilityOptions defaults;
  library.class_<MonitorClass>("StabilityMonitor")
      .def(torch::init(&make), "",
           {torch::arg("plan"), torch::arg("threshold") = defaults.threshold, torch::arg("hold") = defaults.hold,
            torch::arg("max_hold") = defaults.max_hold, torch::arg("lowest_scale") = defaults.lowest_scale})
      .def("begin_step", [](const Self& self) { self->statistics.begin_step(); })
      .def("watch_output",
           [](const Self& self, std::int64_t layer, const at::Tensor& output, bool gradient) {
             as_value_error([&] { self->statistics.watch_output(layer, output, gradient); });
           },
           "", {torch::arg("layer"), torch::arg("output"), torch::arg("gradient") = true})
      .def("watch_input",
           [](const Self& self, std::int64_t layer, const at::Tensor& input) {
             return as_value_error([&] { return self->statistics.watch_input(layer, input); });
           },
           "", {torch::arg("layer"), torch::arg("input")})
      .def("rows", [](const Self& self) { return self->statistics.rows(); })
      .def("summary", &summary_of)
      .def("reset", [](const Self& self) { self->statistics.reset(); })
      .def("observe",
           [](const Self& self, std::int64_t batch, const at::Tensor& summary, const std::string& kind) {
             return as_value_error(
                 [&] { return listed(self->monitor.observe(batch, MonitorClass::values(summary), kind_named(kind))); });
           },
           "", {torch::arg("batch"), torch::arg("summary"), torch::arg("kind") = "usual"})
      .def("decide",
           [](const Self& self, std::int64_t batch, double loss_scale) {
             return listed(self->monitor.decide(batch, loss_scale));
           },
           "", {torch::arg("batch"), torch::arg("loss_scale")})
      .def("plan", [](const Self& self) { return c10::make_intrusive<PlanClass>(self->monitor.plan()); })
      .def("base", [](const Self& self) { return c10::make_intrusive<PlanClass>(self->monitor.base()); })
      .def("layers",
           [](const Self& self) {
             std::vector<Entry> entries;
             for (std::size_t i = 0; i < self->monitor.layers().size(); ++i) {
               const StabilityMonitor::LayerEntry& entry = self->monitor.layers()[i];
               entries.emplace_back(self->monitor.base().layers()[i].name, name_of(entry.state), entry.hold, entry.left,
                                    entry.demotions, entry.promotions, entry.score, entry.reason);
             }
             return entries;
           })
      .def("half_share", [](const Self& self) { return self->monitor.half_share(); })
      .def("to_json", [](const Self& self) { return self->monitor.to_json(); })
      .def("restore",
           [](const Self& self, const std::string& json) { as_value_error([&] { self->monitor.restore(json); }); })
      .def_pickle([](const Self& self) { return pickled(self); },
                  [](const Pickled& state) { return unpickled(state); });
}

}  // namespace halfstep::torch_ops
