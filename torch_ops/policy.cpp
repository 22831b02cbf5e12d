// torch.classes.halfstep.PrecisionPolicy and PrecisionPlan: the core's, which pickle as their JSON.
#include "halfstep/policy.h"

#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <c10/util/Exception.h>
#include <torch/custom_class.h>

#include "errors.h"
#include "plan_class.h"
#include "registration.h"

namespace halfstep::torch_ops {
namespace {

struct PolicyClass : torch::CustomClassHolder {
  explicit PolicyClass(PrecisionPolicy the_policy) : policy(std::move(the_policy)) {}
  PrecisionPolicy policy;
};

using Plan = c10::intrusive_ptr<PlanClass>;
using Policy = c10::intrusive_ptr<PolicyClass>;
using Strings = std::vector<std::string>;

Policy policy_from_json(const std::string& text, const std::string& source) {
  return as_value_error([&] { return c10::make_intrusive<PolicyClass>(PrecisionPolicy::from_json(text, source)); });
}

Plan plan_from_json(const std::string& text, const std::string& source) {
  return as_value_error([&] { return c10::make_intrusive<PlanClass>(PrecisionPlan::from_json(text, source)); });
}

std::vector<Layer> layers_from(const Strings& names, const Strings& types, const Strings& same_as) {
  TORCH_CHECK_VALUE(types.size() == names.size() && same_as.size() == names.size(), "PrecisionPolicy.plan: got ",
                    names.size(), " names, ", types.size(), " types and ", same_as.size(),
                    " earlier names, expected as many of each");
  std::vector<Layer> layers;
  for (std::size_t i = 0; i < names.size(); ++i) layers.push_back({names[i], types[i], same_as[i]});
  return layers;
}

Plan plan_layers(const Policy& self, const Strings& names, const Strings& types, const Strings& same_as) {
  const auto layers = layers_from(names, types, same_as);
  return as_value_error([&] { return c10::make_intrusive<PlanClass>(PrecisionPlan(self->policy, layers)); });
}

// What a policy in Python has answered for each layer.
class Answers : public CustomPrecisionPolicy {
 public:
  Answers(std::string name, const std::vector<Layer>& layers, const c10::List<bool>& answers) : name_(std::move(name)) {
    TORCH_CHECK_VALUE(answers.size() == layers.size(), "CustomPrecisionPolicy.plan: got ", answers.size(),
                      " answers for ", layers.size(), " layers");
    for (std::size_t i = 0; i < layers.size(); ++i) answers_.emplace(layers[i].name, answers.get(i));
  }

  std::string name() const override { return name_; }
  bool should_use_fp16(std::string_view, std::string_view layer_name) const override {
    return answers_.at(std::string(layer_name));
  }

 private:
  std::string name_;
  std::unordered_map<std::string, bool> answers_;
};

Plan plan_answers(const std::string& name, const std::string& half, const Strings& names, const Strings& types,
                  const Strings& same_as, const c10::List<bool>& answers) {
  const auto layers = layers_from(names, types, same_as);
  const Answers policy(name, layers, answers);
  const auto precision = precision_named(half);
  TORCH_CHECK_VALUE(precision, "half is '", half, "', expected 'float16' or 'bfloat16'");
  return as_value_error([&] { return c10::make_intrusive<PlanClass>(PrecisionPlan(policy, layers, *precision)); });
}

}  // namespace

void define_policy(torch::Library& library) {
  library.class_<PlanClass>("PrecisionPlan")
      .def(torch::init([](const std::string& text, const std::string& source) { return plan_from_json(text, source); }),
           "", {torch::arg("json"), torch::arg("source") = "plan"})
      .def_static("of_answers", &plan_answers)
      .def("to_json", [](const Plan& self) { return self->plan.to_json(); })
      .def("policy", [](const Plan& self) { return self->plan.policy(); })
      .def("layers",
           [](const Plan& self) {
             std::vector<std::tuple<std::string, std::string, std::string, std::string>> layers;
             for (const PlannedLayer& layer : self->plan.layers())
               layers.emplace_back(layer.name, layer.type, name_of(layer.precision), layer.reason);
             return layers;
           })
      .def("explain", [](const Plan& self) { return self->plan.explain(); })
      .def("diff", [](const Plan& self, const Plan& other) { return self->plan.diff(other->plan); })
      .def_pickle([](const Plan& self) { return self->plan.to_json(); },
                  [](const std::string& text) { return plan_from_json(text, "plan"); });
  library.class_<PolicyClass>("PrecisionPolicy")
      .def(torch::init(
               [](const std::string& text, const std::string& source) { return policy_from_json(text, source); }),
           "", {torch::arg("json"), torch::arg("source") = "policy"})
      .def_static(
          "named",
          [](const std::string& name) {
            return as_value_error([&] { return c10::make_intrusive<PolicyClass>(PrecisionPolicy::named(name)); });
          })
      .def("to_json", [](const Policy& self) { return self->policy.to_json(); })
      .def("name", [](const Policy& self) { return self->policy.name(); })
      .def("decide",
           [](const Policy& self, const std::string& name, const std::string& type) {
             const PolicyDecision decision = self->policy.decide(name, type);
             return std::tuple(std::string(name_of(decision.precision)), decision.reason);
           })
      .def("plan", &plan_layers)
      .def_pickle([](const Policy& self) { return self->policy.to_json(); },
                  [](const std::string& text) { return policy_from_json(text, "policy"); });
}

}  // namespace halfstep::torch_ops
