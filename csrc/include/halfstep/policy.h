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
#include <optional>
#include <span>
#include <string>
#include <string_view>
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

// The precision of every layer of one model.
class HALFSTEP_API PrecisionPlan {
 public:
  // Throws InvalidArgument where two layers have one name.
  PrecisionPlan(std::string policy, std::vector<PlannedLayer> layers);
  PrecisionPlan(const PrecisionPolicy& policy, std::span<const Layer> layers);

  static PrecisionPlan from_json(std::string_view text, std::string_view source = "plan");
  std::string to_json() const;

  const std::string& policy() const { return policy_; }
  std::span<const PlannedLayer> layers() const { return layers_; }
  const PlannedLayer* find(std::string_view name) const;  // null if there is none

  // A table for people: name, type, precision, reason; a line per layer.
  std::string explain() const;
  // What `other` decides otherwise, a line each; "" if it decides the same.
  std::string diff(const PrecisionPlan& other) const;
  bool operator==(const PrecisionPlan&) const = default;

 private:
  std::string policy_;
  std::vector<PlannedLayer> layers_;
};

}  // namespace halfstep
