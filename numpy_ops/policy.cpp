// Contract: halfstep/numpy.h.
#include "halfstep/policy.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "halfstep/numpy.h"
#include "halfstep/status.h"

#define HALFSTEP_C extern "C" __attribute__((visibility("default")))

namespace {

using halfstep::Layer;
using halfstep::Precision;
using halfstep::PrecisionPlan;
using halfstep::PrecisionPolicy;

constexpr std::int64_t kMaxLayers = std::int64_t{1} << 20;  // as many as PrecisionPlan::from_json() takes

bool write(halfstep_text* out, std::string_view text) noexcept {
  // Not new: what the caller frees must not depend on which C++ library it was linked with.
  auto* const data = static_cast<char*>(std::malloc(text.size() + 1));
  *out = {data, data == nullptr ? 0 : static_cast<std::int64_t>(text.size())};
  if (data == nullptr) return false;
  if (!text.empty()) std::memcpy(data, text.data(), text.size());
  data[text.size()] = '\0';
  return true;
}

// Writes the text that `body` returns; nothing may leave a C function but its result.
template <class Body>
std::int32_t guarded(halfstep_text* out, const Body& body) noexcept {
  if (out == nullptr) return 1;
  try {
    return write(out, body()) ? 0 : 2;
  } catch (const halfstep::InvalidArgument& error) {
    write(out, error.what());
    return 1;
  } catch (const std::exception& error) {
    write(out, error.what());
    return 2;
  } catch (...) {
    write(out, "unknown error");
    return 2;
  }
}

std::string_view view_of(const halfstep_text* text, const char* what) {
  HS_CHECK(text != nullptr, what, " is null");
  HS_CHECK(text->size >= 0, what, " has ", text->size, " bytes, expected >= 0");
  HS_CHECK(text->data != nullptr || text->size == 0, what, " has ", text->size, " bytes, but is null");
  return text->size == 0 ? std::string_view() : std::string_view(text->data, static_cast<std::size_t>(text->size));
}

// By the table of well-formed sequences in the Unicode standard: no overlong forms, surrogates or too large numbers.
bool is_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto byte = [&](std::size_t k) {
      return i + k < text.size() ? static_cast<unsigned char>(text[i + k]) : static_cast<unsigned char>(0);
    };
    const unsigned first = byte(0), second = byte(1);
    std::size_t length = 1;
    if (first >= 0x80) {
      length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
      const unsigned low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
      const unsigned high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
      if (first < 0xC2 || first > 0xF4 || second < low || second > high) return false;
      for (std::size_t k = 2; k < length; ++k)
        if (byte(k) < 0x80 || byte(k) > 0xBF) return false;
    }
    i += length;
  }
  return true;
}

// Two names must not become one in JSON, where what is no UTF-8 is replaced.
std::string name_of(const halfstep_text* text, const char* what) {
  const std::string_view view = view_of(text, what);
  HS_CHECK(is_utf8(view), what, " is no UTF-8");
  return std::string(view);
}

// A message ends at a NUL, so what it starts with must have none.
std::string_view source_of(const halfstep_text* source) {
  const std::string_view view = view_of(source, "source");
  HS_CHECK(view.find('\0') == std::string_view::npos, "source has a NUL character");
  return view;
}

void check_count(std::int64_t count, bool present, const char* what) {
  HS_CHECK(count >= 0 && count <= kMaxLayers, "count is ", count, ", expected 0 to ", kMaxLayers);
  HS_CHECK(present || count == 0, what, " are null");
}

std::vector<Layer> layers_of(const halfstep_layer* layers, std::int64_t count) {
  check_count(count, layers != nullptr, "layers");
  std::vector<Layer> result;
  result.reserve(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i)
    result.push_back({name_of(&layers[i].name, "the name of a layer"), name_of(&layers[i].type, "the type of a layer"),
                      name_of(&layers[i].same_as, "the earlier name of a layer")});
  return result;
}

PrecisionPolicy policy_of(const halfstep_text* json) {
  return PrecisionPolicy::from_json(view_of(json, "policy"));
}

PrecisionPlan plan_of(const halfstep_text* json) {
  return PrecisionPlan::from_json(view_of(json, "plan"));
}

// What a policy in another language has answered for each layer.
class Answers : public halfstep::CustomPrecisionPolicy {
 public:
  Answers(std::string name, const std::vector<Layer>& layers, const std::int32_t* answers) : name_(std::move(name)) {
    for (std::size_t i = 0; i < layers.size(); ++i) answers_.emplace(layers[i].name, answers[i] != 0);
  }

  std::string name() const override { return name_; }
  bool should_use_fp16(std::string_view, std::string_view layer_name) const override {
    return answers_.at(std::string(layer_name));
  }

 private:
  std::string name_;
  std::unordered_map<std::string, bool> answers_;
};

}  // namespace

HALFSTEP_C void halfstep_text_free(halfstep_text* text) {
  if (text == nullptr) return;
  std::free(const_cast<char*>(text->data));  // NOLINT(cppcoreguidelines-pro-type-const-cast)
  *text = {nullptr, 0};
}

HALFSTEP_C std::int32_t halfstep_policy_read(const halfstep_text* json, const halfstep_text* source,
                                             halfstep_text* out) {
  return guarded(out, [&] { return PrecisionPolicy::from_json(view_of(json, "json"), source_of(source)).to_json(); });
}

HALFSTEP_C std::int32_t halfstep_policy_named(const halfstep_text* name, halfstep_text* out) {
  return guarded(out, [&] { return PrecisionPolicy::named(view_of(name, "name")).to_json(); });
}

HALFSTEP_C std::int32_t halfstep_policy_match(const halfstep_text* policy, const halfstep_layer* layers,
                                              std::int64_t count, std::int64_t* rules, halfstep_text* out) {
  return guarded(out, [&] {
    const PrecisionPolicy the_policy = policy_of(policy);
    const std::vector<Layer> the_layers = layers_of(layers, count);
    check_count(count, rules != nullptr, "rules");
    for (std::size_t i = 0; i < the_layers.size(); ++i) {
      const auto rule = the_policy.decide(the_layers[i].name, the_layers[i].type).rule;
      rules[i] = rule ? static_cast<std::int64_t>(*rule) : -1;
    }
    return std::string();
  });
}

HALFSTEP_C std::int32_t halfstep_policy_plan(const halfstep_text* policy, const halfstep_layer* layers,
                                             std::int64_t count, halfstep_text* out) {
  return guarded(out, [&] { return PrecisionPlan(policy_of(policy), layers_of(layers, count)).to_json(); });
}

HALFSTEP_C std::int32_t halfstep_plan_answers(const halfstep_text* name, const halfstep_text* half,
                                              const halfstep_layer* layers, const std::int32_t* answers,
                                              std::int64_t count, halfstep_text* out) {
  return guarded(out, [&] {
    const std::string_view the_half = view_of(half, "half");
    const auto precision = halfstep::precision_named(the_half);
    HS_CHECK(precision == Precision::kFloat16 || precision == Precision::kBFloat16, "half is '", the_half,
             "', expected 'float16' or 'bfloat16'");
    const std::vector<Layer> the_layers = layers_of(layers, count);
    check_count(count, answers != nullptr, "answers");
    return PrecisionPlan(Answers(name_of(name, "name"), the_layers, answers), the_layers, *precision).to_json();
  });
}

HALFSTEP_C std::int32_t halfstep_plan_read(const halfstep_text* json, const halfstep_text* source, halfstep_text* out) {
  return guarded(out, [&] { return PrecisionPlan::from_json(view_of(json, "json"), source_of(source)).to_json(); });
}

HALFSTEP_C std::int32_t halfstep_plan_explain(const halfstep_text* plan, halfstep_text* out) {
  return guarded(out, [&] { return plan_of(plan).explain(); });
}

HALFSTEP_C std::int32_t halfstep_plan_diff(const halfstep_text* plan, const halfstep_text* other, halfstep_text* out) {
  return guarded(out, [&] { return plan_of(plan).diff(plan_of(other)); });
}
