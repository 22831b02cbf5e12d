// Policies and plans, and their JSON. Contract: halfstep/policy.h.
#include "halfstep/policy.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <unordered_map>
#include <utility>

#include <cxxabi.h>
#include <fnmatch.h>

#include "halfstep/status.h"
#include "json_reader.h"

namespace halfstep {
namespace {

constexpr std::array<std::pair<Precision, std::string_view>, 5> kNames{{{Precision::kFloat32, "float32"},
                                                                        {Precision::kTFloat32, "tfloat32"},
                                                                        {Precision::kFloat16, "float16"},
                                                                        {Precision::kBFloat16, "bfloat16"},
                                                                        {Precision::kInt8, "int8"}}};

bool matches(const std::string& glob, std::string_view text) {
  return glob == "*" || ::fnmatch(glob.c_str(), std::string(text).c_str(), 0) == 0;
}

Precision read_precision(const JsonReader& value) {
  const auto precision = precision_named(value.string());
  if (!precision) value.fail("expected one of float32, tfloat32, float16, bfloat16, int8");
  return *precision;
}

// Levenshtein's distance: how many characters to insert, delete or replace.
std::size_t distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i + 1);
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = std::exchange(row[j + 1], std::min({replaced, row[j] + 1, row[j + 1] + 1}));
    }
  }
  return row.back();
}

// The names nearest to `name`, at most three, quoted.
std::string nearest(std::string_view name, std::span<const PlannedLayer> layers) {
  std::vector<std::pair<std::size_t, std::size_t>> order;  // distance, place
  for (std::size_t i = 0; i < layers.size(); ++i) order.emplace_back(distance(name, layers[i].name), i);
  const std::size_t shown = std::min<std::size_t>(order.size(), 3);
  std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(shown), order.end());
  std::string text;
  for (std::size_t i = 0; i < shown; ++i)
    text += detail::concatenate(i == 0 ? "'" : ", '", layers[order[i].second].name, "'");
  return text;
}

// decide(layer) for every layer that is not the same as an earlier one.
template <class Decide>
std::vector<PlannedLayer> decide_each(std::span<const Layer> layers, const Decide& decide) {
  std::vector<PlannedLayer> planned;
  std::unordered_map<std::string_view, std::size_t> places;
  planned.reserve(layers.size());
  for (const Layer& layer : layers) {
    if (!layer.same_as.empty()) {
      const auto first = places.find(layer.same_as);
      HS_CHECK(first != places.end(), "PrecisionPlan: layer '", layer.name, "' is the same as '", layer.same_as,
               "', which does not come before it");
      planned.push_back(
          {layer.name, layer.type, planned[first->second].precision, "the same module as " + layer.same_as});
    } else {
      PolicyDecision decision = decide(layer);
      planned.push_back({layer.name, layer.type, decision.precision, std::move(decision.reason)});
    }
    places.emplace(layer.name, planned.size() - 1);
  }
  return planned;
}

std::vector<PlannedLayer> ask_each(std::span<const Layer> layers, const CustomPrecisionPolicy& policy, Precision half) {
  const std::string name = policy.name();
  HS_CHECK(half == Precision::kFloat16 || half == Precision::kBFloat16, name, ": half is ", name_of(half),
           ", expected float16 or bfloat16");
  return decide_each(layers, [&](const Layer& layer) {
    const bool yes = policy.should_use_fp16(layer.type, layer.name);
    return PolicyDecision{yes ? half : Precision::kFloat32, std::nullopt,
                          name + ".should_use_fp16 is " + (yes ? "True" : "False")};
  });
}

}  // namespace

std::string_view name_of(Precision precision) {
  for (const auto& [value, name] : kNames)
    if (value == precision) return name;
  HS_UNREACHABLE("precision ", static_cast<int>(precision));
}

std::optional<Precision> precision_named(std::string_view name) {
  for (const auto& [value, known] : kNames)
    if (known == name) return value;
  return std::nullopt;
}

// ---------------------------------------------------------------------------------------------------------- policies

PrecisionPolicy::PrecisionPolicy(std::string name, Precision otherwise, std::vector<PolicyRule> rules)
    : name_(std::move(name)), otherwise_(otherwise), rules_(std::move(rules)) {
  HS_CHECK(rules_.size() <= kMaxRules, "PrecisionPolicy: got ", rules_.size(), " rules, expected at most ", kMaxRules);
  for (std::size_t i = 0; i < rules_.size(); ++i)
    HS_CHECK(!rules_[i].type.empty(), "PrecisionPolicy: the type of rule ", i, " is empty, expected a glob");
}

PrecisionPolicy PrecisionPolicy::named(std::string_view name) {
  if (name == "mixed_float16") return {std::string(name), Precision::kFloat16};
  if (name == "mixed_bfloat16") return {std::string(name), Precision::kBFloat16};
  if (name == "float32") return {std::string(name), Precision::kFloat32};
  HS_CHECK(false, "PrecisionPolicy: name is '", name,
           "', expected one of 'mixed_float16', 'mixed_bfloat16', 'float32'");
}

PolicyDecision PrecisionPolicy::decide(std::string_view layer_name, std::string_view layer_type) const {
  for (std::size_t i = 0; i < rules_.size(); ++i) {
    const PolicyRule& rule = rules_[i];
    if (!matches(rule.name, layer_name) || !matches(rule.type, layer_type)) continue;
    const std::string which = detail::concatenate("rule ", i, rule.name == "*" ? "" : " name " + rule.name,
                                                  rule.type == "*" ? "" : " type " + rule.type);
    return {rule.precision, i, rule.reason.empty() ? which : rule.reason + " (" + which + ")"};
  }
  return {otherwise_, std::nullopt, "the default of " + name_};
}

PrecisionPolicy PrecisionPolicy::from_json(std::string_view text, std::string_view source) {
  const JsonDocument document(text, source, {kMaxBytes, kMaxDepth});
  const JsonReader root = document.root();
  root.only({"name", "default", "rules", "$schema"});
  std::vector<PolicyRule> rules;
  if (const auto list = root.find("rules")) {
    for (const JsonReader& entry : list->array(kMaxRules)) {
      entry.only({"name", "type", "precision", "reason"});
      PolicyRule rule;
      const auto name = entry.find("name"), type = entry.find("type"), reason = entry.find("reason");
      if (!name && !type) entry.fail("a rule needs a name, a type or both");
      if (name) rule.name = name->string();
      if (type) rule.type = type->string();
      if (type && rule.type.empty()) type->fail("expected a glob");
      if (reason) rule.reason = reason->string();
      rule.precision = read_precision(entry.at("precision"));
      rules.push_back(std::move(rule));
    }
  }
  return {root.at("name").string(), read_precision(root.at("default")), std::move(rules)};
}

std::string PrecisionPolicy::to_json() const {
  JsonWriter json;
  json.begin_object().field("name", name_).field("default", name_of(otherwise_)).begin_array("rules");
  for (const PolicyRule& rule : rules_) {
    json.begin_object();
    if (rule.name != "*" || rule.type == "*") json.field("name", rule.name);
    if (rule.type != "*") json.field("type", rule.type);
    json.field("precision", name_of(rule.precision));
    if (!rule.reason.empty()) json.field("reason", rule.reason);
    json.end();
  }
  return json.end().end().text();
}

// ------------------------------------------------------------------------------------------------------------- plans

PrecisionPlan::PrecisionPlan(std::string policy, std::vector<PlannedLayer> layers)
    : policy_(std::move(policy)), layers_(std::move(layers)) {
  places_.reserve(layers_.size());
  for (std::size_t i = 0; i < layers_.size(); ++i)
    HS_CHECK(places_.emplace(layers_[i].name, i).second, "PrecisionPlan: layer '", layers_[i].name, "' is there twice");
}

PrecisionPlan::PrecisionPlan(const PrecisionPolicy& policy, std::span<const Layer> layers)
    : PrecisionPlan(policy.name(),
                    decide_each(layers, [&](const Layer& layer) { return policy.decide(layer.name, layer.type); })) {}

PrecisionPlan::PrecisionPlan(const CustomPrecisionPolicy& policy, std::span<const Layer> layers, Precision half)
    : PrecisionPlan(policy.name(), ask_each(layers, policy, half)) {}

const PlannedLayer* PrecisionPlan::find(std::string_view name) const {
  const auto found = places_.find(name);
  return found == places_.end() ? nullptr : &layers_[found->second];
}

const PlannedLayer& PrecisionPlan::at(std::string_view name) const {
  const PlannedLayer* const layer = find(name);
  HS_CHECK(layer != nullptr, "PrecisionPlan: there is no layer '", name, "' among ", layers_.size(),
           layers_.empty() ? "" : "; the nearest: ", nearest(name, layers_));
  return *layer;
}

PrecisionPlan PrecisionPlan::from_json(std::string_view text, std::string_view source) {
  // A line for each layer of a large model, and no deeper than a policy.
  const JsonDocument document(text, source, {16 * PrecisionPolicy::kMaxBytes, PrecisionPolicy::kMaxDepth});
  const JsonReader root = document.root();
  root.only({"policy", "layers", "$schema"});
  std::vector<PlannedLayer> layers;
  for (const JsonReader& entry : root.at("layers").array(std::size_t{1} << 20)) {
    entry.only({"name", "type", "precision", "reason"});
    layers.push_back({entry.at("name").string(), entry.at("type").string(), read_precision(entry.at("precision")),
                      entry.at("reason").string()});
  }
  return {root.at("policy").string(), std::move(layers)};
}

std::string PrecisionPlan::to_json() const {
  JsonWriter json;
  json.begin_object().field("policy", policy_).begin_array("layers");
  for (const PlannedLayer& layer : layers_)
    json.begin_object()
        .field("name", layer.name)
        .field("type", layer.type)
        .field("precision", name_of(layer.precision))
        .field("reason", layer.reason)
        .end();
  return json.end().end().text();
}

std::string PrecisionPlan::explain() const {
  std::size_t widths[3] = {5, 4, 9};
  for (const PlannedLayer& layer : layers_) {
    widths[0] = std::max(widths[0], layer.name.size());
    widths[1] = std::max(widths[1], layer.type.size());
  }
  std::string text;
  const auto line = [&](std::string_view name, std::string_view type, std::string_view precision,
                        std::string_view reason) {
    const auto cell = [&](std::string_view value, std::size_t width) {
      text.append(value).append(width - std::min(width, value.size()) + 2, ' ');
    };
    cell(name, widths[0]);
    cell(type, widths[1]);
    cell(precision, widths[2]);
    text.append(reason).push_back('\n');
  };
  line("layer", "type", "precision", "reason");
  for (const PlannedLayer& layer : layers_) line(layer.name, layer.type, name_of(layer.precision), layer.reason);
  return text;
}

std::string PrecisionPlan::diff(const PrecisionPlan& other) const {
  std::string text;
  for (const PlannedLayer& mine : layers_) {
    const PlannedLayer* const layer = other.find(mine.name);
    if (layer == nullptr) {
      text += detail::concatenate(mine.name, ": ", name_of(mine.precision), " -> not there\n");
    } else if (layer->precision != mine.precision) {
      text += detail::concatenate(mine.name, ": ", name_of(mine.precision), " -> ", name_of(layer->precision), " (",
                                  layer->reason, ")\n");
    }
  }
  for (const PlannedLayer& layer : other.layers_)
    if (find(layer.name) == nullptr)
      text += detail::concatenate(layer.name, ": not there -> ", name_of(layer.precision), " (", layer.reason, ")\n");
  return text;
}

// --------------------------------------------------------------------------------------------------- policies as code

CustomPrecisionPolicy::~CustomPrecisionPolicy() = default;

std::string CustomPrecisionPolicy::name() const {
  return class_name(typeid(*this));
}

bool CustomPrecisionPolicy::should_use_fp16(std::string_view, std::string_view) const {
  return true;
}

std::optional<double> CustomPrecisionPolicy::get_loss_scale_factor(double) const {
  return std::nullopt;
}

std::string class_name(const std::type_info& type) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> readable(abi::__cxa_demangle(type.name(), nullptr, nullptr, &status),
                                                        std::free);
  const std::string_view text = readable ? readable.get() : type.name();
  std::size_t start = 0;  // after the last :: that is not inside of (anonymous namespace), f(ns::T) or <ns::T>
  int depth = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '<' || text[i] == '(' || text[i] == '{') ++depth;
    if (text[i] == '>' || text[i] == ')' || text[i] == '}') --depth;
    if (depth == 0 && text[i] == ':') start = i + 1;
  }
  return std::string(text.substr(start, text.find('<', start) - start));
}

}  // namespace halfstep
