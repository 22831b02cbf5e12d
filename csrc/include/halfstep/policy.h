// Which precision each layer of a model runs in, and why: ordered rules, the first match wins.
//
// A policy decides once per layer, when a plan is made, never while a model runs. It is read from and written as JSON
// (schema: docs/policy.schema.json):
//
//   {"name": "careful", "default": "float16", "rules": [
//     {"name": "head.*", "precision": "float32", "reason": "logits"},
//     {"type": "*Norm*", "precision": "float32"}]}
//
// Globs are POSIX fnmatch's: * is any run of characters, dots included, ? is one, [ab] one of a set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <typeinfo>
#include <unordered_map>
#include <vector>

#include "halfstep/export.h"

namespace halfstep {

enum class Precision : std::uint8_t { kFloat32, kTFloat32, kFloat16, kBFloat16, kInt8 };

// "float32", "tfloat32", "float16", "bfloat16", "int8".
HALFSTEP_API std::string_view name_of(Precision precision);
HALFSTEP_API std::optional<Precision> precision_named(std::string_view name);

// Of the layers whose qualified name and type match both globs.
struct PolicyRule {
  std::string name = "*";  // such as "encoder.layers.*.attention"; the model itself is ""
  std::string type = "*";  // the class without its namespace, such as "Linear" (LinearImpl's too) or "LSTM*"
  Precision precision = Precision::kFloat32;
  std::string reason;  // for people; may be empty

  bool operator==(const PolicyRule&) const = default;
};

struct PolicyDecision {
  Precision precision;
  std::optional<std::size_t> rule;  // its number, none for the default
  std::string reason;               // never empty
};

class HALFSTEP_API PrecisionPolicy {
 public:
  // Bounds of what from_json() takes; what is larger is an error before it is parsed.
  static constexpr std::size_t kMaxBytes = std::size_t{1} << 20;
  static constexpr std::size_t kMaxDepth = 8;
  static constexpr std::size_t kMaxRules = 4096;

  // Throws InvalidArgument for more than kMaxRules rules or an empty glob.
  PrecisionPolicy(std::string name, Precision otherwise, std::vector<PolicyRule> rules = {});

  // "mixed_float16", "mixed_bfloat16" or "float32"; anything else throws InvalidArgument.
  static PrecisionPolicy named(std::string_view name);

  // Throws InvalidArgument that names `source`, the line and the key. Unknown and repeated keys are errors.
  static PrecisionPolicy from_json(std::string_view text, std::string_view source = "policy");
  std::string to_json() const;

  PolicyDecision decide(std::string_view layer_name, std::string_view layer_type) const;

  const std::string& name() const { return name_; }
  Precision otherwise() const { return otherwise_; }  // where no rule matches
  std::span<const PolicyRule> rules() const { return rules_; }
  bool operator==(const PrecisionPolicy&) const = default;

 private:
  std::string name_;
  Precision otherwise_;
  std::vector<PolicyRule> rules_;
};

// A layer of a model, as a door describes it.
struct Layer {
  std::string name;
  std::string type;
  std::string same_as;  // the name under which a shared module came before: that decision holds
};

struct PlannedLayer {
  std::string name;
  std::string type;
  Precision precision;
  std::string reason;

  bool operator==(const PlannedLayer&) const = default;
};

class CustomPrecisionPolicy;

// The precision of every layer of one model.
class HALFSTEP_API PrecisionPlan {
 public:
  // Throws InvalidArgument where two layers have one name.
  PrecisionPlan(std::string policy, std::vector<PlannedLayer> layers);
  PrecisionPlan(const PrecisionPolicy& policy, std::span<const Layer> layers);
  // Asks the policy once per layer that is not the same as an earlier one. `half` is the precision of its yes: kFloat16
  // or kBFloat16, or InvalidArgument is thrown.
  PrecisionPlan(const CustomPrecisionPolicy& policy, std::span<const Layer> layers, Precision half);

  static PrecisionPlan from_json(std::string_view text, std::string_view source = "plan");
  std::string to_json() const;

  const std::string& policy() const { return policy_; }
  std::span<const PlannedLayer> layers() const { return layers_; }
  const PlannedLayer* find(std::string_view name) const;  // null if there is none; takes the same time in any plan
  const PlannedLayer& at(std::string_view name) const;    // throws InvalidArgument, which lists the nearest names

  // Returns function(inputs...), computed in the precision of this layer. Only declared here, since it needs a
  // framework: halfstep/torch/policy.h has the definition, and the contract.
  template <class Function, class... Inputs>
  auto run(std::string_view layer, Function&& function, Inputs&&... inputs) const;

  // A table for people: name, type, precision, reason; a line per layer.
  std::string explain() const;
  // What `other` decides otherwise, a line each; "" if it decides the same.
  std::string diff(const PrecisionPlan& other) const;
  bool operator==(const PrecisionPlan&) const = default;

 private:
  struct NameHash {
    using is_transparent = void;  // looked up by string_view, without a string
    std::size_t operator()(std::string_view name) const { return std::hash<std::string_view>{}(name); }
  };

  std::string policy_;
  std::vector<PlannedLayer> layers_;
  std::unordered_map<std::string, std::size_t, NameHash, std::equal_to<>> places_;  // of the names in layers_
};

// A policy as code: subclass it and override what you decide.
//
//   struct Conservative : halfstep::CustomPrecisionPolicy {
//     bool should_use_fp16(std::string_view layer_type, std::string_view) const override {
//       return layer_type != "LayerNorm";
//     }
//   };
//
// It is asked once per layer when a plan is made, never while a model runs.
class HALFSTEP_API CustomPrecisionPolicy {
 public:
  CustomPrecisionPolicy() = default;
  virtual ~CustomPrecisionPolicy();

  virtual std::string name() const;  // of its plans; the class's name
  // Whether a layer, of this class and under this qualified name, runs in half precision.
  virtual bool should_use_fp16(std::string_view layer_type, std::string_view layer_name) const;
  // The loss scale that follows from the L2 norm of a step's unscaled gradients; none leaves it as it is.
  virtual std::optional<double> get_loss_scale_factor(double gradient_norm) const;

 protected:
  CustomPrecisionPolicy(const CustomPrecisionPolicy&) = default;
  CustomPrecisionPolicy& operator=(const CustomPrecisionPolicy&) = default;
};

// "Net" for ns::Net<int>: a class's name without its namespaces and template arguments, in which layer types are given.
HALFSTEP_API std::string class_name(const std::type_info& type);

}  // namespace halfstep
