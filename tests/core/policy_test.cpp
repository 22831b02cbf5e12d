// Policies and plans: rules, JSON both ways, and every way a file can be wrong.
#include "halfstep/policy.h"

#include <memory>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "halfstep/status.h"

namespace halfstep {
namespace {

const PrecisionPolicy kCareful("careful", Precision::kFloat16,
                               {{"head.*", "*", Precision::kFloat32, "logits"},
                                {"*", "*Norm*", Precision::kFloat32, ""},
                                {"encoder.layers.?.fc[12]", "Linear", Precision::kBFloat16, ""},
                                {"encoder.*", "*", Precision::kTFloat32, ""}});

std::string error_of(const std::string& text) {
  try {
    PrecisionPolicy::from_json(text, "p.json");
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "no error";
}

TEST(Policy, TheFirstRuleThatMatchesWins) {
  const auto precision = [](const char* name, const char* type) { return kCareful.decide(name, type).precision; };
  EXPECT_EQ(precision("head.out", "LayerNorm"), Precision::kFloat32);
  EXPECT_EQ(precision("encoder.norm", "LayerNorm"), Precision::kFloat32);
  EXPECT_EQ(precision("encoder.layers.3.fc1", "Linear"), Precision::kBFloat16);
  EXPECT_EQ(precision("encoder.layers.10.fc1", "Linear"), Precision::kTFloat32) << "? is one character";
  EXPECT_EQ(precision("encoder.layers.3.fc3", "Linear"), Precision::kTFloat32);
  EXPECT_EQ(precision("encoder.layers.3.fc1", "Conv2d"), Precision::kTFloat32) << "both globs must match";
  EXPECT_EQ(precision("head", "Linear"), Precision::kFloat16) << "head.* is below head";
  EXPECT_EQ(precision("", "Net"), Precision::kFloat16);
}

TEST(Policy, EveryDecisionHasAReason) {
  const PolicyDecision named = kCareful.decide("head.out", "Linear");
  EXPECT_EQ(named.rule, 0U);
  EXPECT_EQ(named.reason, "logits (rule 0 name head.*)");
  EXPECT_EQ(kCareful.decide("encoder.layers.3.fc1", "Linear").reason,
            "rule 2 name encoder.layers.?.fc[12] type Linear");
  const PolicyDecision otherwise = kCareful.decide("x", "Linear");
  EXPECT_FALSE(otherwise.rule.has_value());
  EXPECT_EQ(otherwise.reason, "the default of careful");
}

TEST(Policy, NamedPolicies) {
  EXPECT_EQ(PrecisionPolicy::named("mixed_float16").otherwise(), Precision::kFloat16);
  EXPECT_EQ(PrecisionPolicy::named("mixed_bfloat16").otherwise(), Precision::kBFloat16);
  EXPECT_EQ(PrecisionPolicy::named("float32").otherwise(), Precision::kFloat32);
  EXPECT_THROW(PrecisionPolicy::named("float64"), InvalidArgument);
  for (const auto precision :
       {Precision::kFloat32, Precision::kTFloat32, Precision::kFloat16, Precision::kBFloat16, Precision::kInt8})
    EXPECT_EQ(precision_named(name_of(precision)), precision);
  EXPECT_FALSE(precision_named("half").has_value());
}

TEST(Policy, GoesThroughJsonUnchanged) {
  const std::string text = kCareful.to_json();
  EXPECT_EQ(PrecisionPolicy::from_json(text), kCareful);
  EXPECT_EQ(PrecisionPolicy::from_json(text).to_json(), text);
  const PrecisionPolicy strange("with \"quotes\"\n", Precision::kInt8, {{"", "*", Precision::kFloat32, "\xc3\xa4\t"}});
  EXPECT_EQ(PrecisionPolicy::from_json(strange.to_json()), strange);
  EXPECT_EQ(PrecisionPolicy::from_json(R"({"name": "n", "default": "float32", "$schema": "x"})"),
            PrecisionPolicy("n", Precision::kFloat32));
}

TEST(Policy, WrongFilesAreNamedByLineAndKey) {
  const auto rule = [](const std::string& entry) {
    return "{\"name\": \"n\",\n \"default\": \"float16\",\n \"rules\": [\n  {\"type\": \"Linear\", \"precision\": "
           "\"float32\"},\n  " +
           entry + "]}";
  };
  EXPECT_EQ(error_of(rule(R"({"typ": "Linear", "precision": "float32"})")),
            "p.json, line 5, rules[1]: unknown key 'typ', expected name, type, precision, reason");
  EXPECT_EQ(error_of(rule(R"({"type": "Linear", "precision": "half"})")),
            "p.json, line 5, rules[1].precision: got 'half', expected one of float32, tfloat32, float16, bfloat16, "
            "int8");
  EXPECT_EQ(error_of(rule(R"({"type": "Linear"})")), "p.json, line 5, rules[1]: the key 'precision' is missing");
  EXPECT_EQ(error_of(rule(R"({"precision": "int8"})")),
            "p.json, line 5, rules[1]: a rule needs a name, a type or both");
  EXPECT_EQ(error_of(rule(R"({"type": 3, "precision": "int8"})")),
            "p.json, line 5, rules[1].type: got 3, expected a string");
  EXPECT_EQ(error_of(rule(R"({"type": "", "precision": "int8"})")),
            "p.json, line 5, rules[1].type: got '', expected a glob");
  EXPECT_EQ(error_of(rule("7")), "p.json, line 5, rules[1]: got 7, expected an object");
  EXPECT_EQ(error_of("{\"name\": \"n\"}"), "p.json, line 1: the key 'default' is missing");
  EXPECT_EQ(error_of("[]"), "p.json, line 1: expected an object");
  EXPECT_EQ(error_of(R"({"name": "n", "default": "float32", "rules": {}})"),
            "p.json, line 1, rules: expected an array");
  EXPECT_EQ(error_of(R"({"name": "n", "name": "m", "default": "float32"})"),
            "p.json, line 1: an object has the key 'name' twice");
  EXPECT_EQ(error_of("{\n\"name\": \"n\",\n\"name\": \"m\"}"), "p.json, line 3: an object has the key 'name' twice");
  EXPECT_EQ(error_of("{\n\n\"default\": 1e999}").rfind("p.json, line 3: number overflow", 0), 0U)
      << error_of("{\n\n\"default\": 1e999}");
  using namespace std::string_literals;
  EXPECT_EQ(error_of("{\"name\": \"n\",\n\"default\": \"float32\"}\n\0 {"s), "p.json, line 3: has a NUL character");
  EXPECT_EQ(error_of("{\n\"rules\":\n[[[[[[[[[[["), "p.json, line 3: is nested deeper than 8 levels");
  EXPECT_EQ(error_of("{\n\"name\": \"n\",\n\"default\" \"float32\"}").rfind("p.json, line 3: is not JSON: ", 0), 0U)
      << error_of("{\n\"name\": \"n\",\n\"default\" \"float32\"}");
  EXPECT_NE(error_of(""), "no error");
  EXPECT_NE(error_of("{\"name\": \"\xff\", \"default\": \"float32\"}"), "no error") << "not UTF-8";
}

TEST(Policy, SizesAreBounded) {
  EXPECT_EQ(error_of(std::string(PrecisionPolicy::kMaxBytes + 1, ' ')).rfind("p.json: has 1048577 bytes", 0), 0U);
  EXPECT_NE(error_of(std::string(100000, '[')).find("is nested deeper than 8 levels"), std::string::npos);
  std::string values = "[0";
  for (int i = 0; i < 100000; ++i) values += ",0";
  EXPECT_EQ(error_of(values + "]"), "p.json, line 1: has too many values for a policy or a plan");
  std::string many = R"({"name": "n", "default": "float32", "rules": [)";
  for (std::size_t i = 0; i <= PrecisionPolicy::kMaxRules; ++i) {
    many += i == 0 ? "" : ",";
    many += R"({"type": "L", "precision": "int8"})";
  }
  EXPECT_NE(error_of(many + "]}").find("has 4097 entries, expected at most 4096"), std::string::npos);
  EXPECT_THROW(PrecisionPolicy("n", Precision::kFloat32, std::vector<PolicyRule>(PrecisionPolicy::kMaxRules + 1)),
               InvalidArgument);
}

// Whatever is done to a file, it is read or refused, never more. Run under the sanitizers too.
TEST(Policy, DamagedFilesAreReadOrRefused) {
  const std::string text = kCareful.to_json();
  std::mt19937 random(1);
  int refused = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string damaged = text;
    for (unsigned edits = 1 + random() % 4; edits > 0; --edits) {
      const std::size_t at = random() % damaged.size();
      switch (random() % 4) {
        case 0:
          damaged[at] = static_cast<char>(random() % 256);
          break;
        case 1:
          damaged.erase(at, 1 + random() % 9);
          break;
        case 2:
          damaged.insert(at, damaged.substr(random() % damaged.size(), 12));
          break;
        default:
          damaged.resize(at + 1);
      }
      if (damaged.empty()) damaged.push_back(' ');
    }
    try {
      PrecisionPolicy::from_json(damaged);
    } catch (const InvalidArgument&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 1000);
}

TEST(Plan, DecidesOncePerLayerAndFollowsSharedModules) {
  const std::vector<Layer> layers{{"encoder.fc", "Linear", ""}, {"head.tied", "Linear", "encoder.fc"}};
  const PrecisionPlan plan(kCareful, layers);
  ASSERT_NE(plan.find("head.tied"), nullptr);
  EXPECT_EQ(plan.find("head.tied")->precision, Precision::kTFloat32) << "the first name decides";
  EXPECT_EQ(plan.find("head.tied")->reason, "the same module as encoder.fc");
  EXPECT_EQ(plan.find("nothing"), nullptr);
  const std::vector<Layer> wrong{{"a", "Linear", "b"}};
  EXPECT_THROW(PrecisionPlan(kCareful, wrong), InvalidArgument);
  EXPECT_THROW(PrecisionPlan("p", {{"a", "L", Precision::kInt8, "r"}, {"a", "L", Precision::kInt8, "r"}}),
               InvalidArgument);
}

TEST(Plan, ExplainsComparesAndGoesThroughJson) {
  const std::vector<Layer> layers{{"body", "Linear", ""}, {"head.out", "Linear", ""}};
  const PrecisionPlan plan(kCareful, layers);
  EXPECT_EQ(plan.explain(),
            "layer     type    precision  reason\n"
            "body      Linear  float16    the default of careful\n"
            "head.out  Linear  float32    logits (rule 0 name head.*)\n");
  EXPECT_EQ(PrecisionPlan::from_json(plan.to_json()), plan);
  EXPECT_EQ(plan.diff(plan), "");
  const PrecisionPlan other("other", {{"body", "Linear", Precision::kFloat32, "slow in half"},
                                      {"extra", "LSTM", Precision::kFloat32, "new"}});
  EXPECT_EQ(plan.diff(other),
            "body: float16 -> float32 (slow in half)\n"
            "head.out: float32 -> not there\n"
            "extra: not there -> float32 (new)\n");
  EXPECT_THROW(PrecisionPlan::from_json(R"({"policy": "p", "layers": [{"name": "a"}]})"), InvalidArgument);
}

// Of a plan that is copied, moved or assigned the names lie elsewhere; short ones inside of the string objects.
TEST(Plan, FindsLayersAfterCopiesAndMoves) {
  std::vector<PlannedLayer> layers;
  for (int i = 0; i < 300; ++i)
    layers.push_back({(i % 2 == 0 ? "l" : "encoder.layers.of.a.long.name.") + std::to_string(i), "Linear",
                      static_cast<Precision>(i % 5), "r"});
  const auto finds_all = [&](const PrecisionPlan& plan) {
    for (const PlannedLayer& layer : layers)
      if (plan.find(layer.name) == nullptr || *plan.find(layer.name) != layer) return false;
    return plan.find("l1") == nullptr && plan.find("") == nullptr;
  };
  auto original = std::make_unique<PrecisionPlan>("p", layers);
  EXPECT_TRUE(finds_all(*original));
  PrecisionPlan copy = *original;
  PrecisionPlan assigned("q", {});
  EXPECT_NE(assigned, copy);
  assigned = *original;
  original.reset();
  EXPECT_TRUE(finds_all(copy));
  EXPECT_TRUE(finds_all(assigned));
  EXPECT_EQ(assigned, copy);
  const PrecisionPlan moved = std::move(copy);
  EXPECT_TRUE(finds_all(moved));
  EXPECT_EQ(moved, assigned);
  EXPECT_EQ(PrecisionPlan::from_json(moved.to_json()), moved);
}

TEST(Plan, AnUnknownNameIsAnErrorThatListsTheNearest) {
  const auto error_at = [](const PrecisionPlan& plan, std::string_view name) -> std::string {
    try {
      plan.at(name);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "no error";
  };
  std::vector<PlannedLayer> layers;
  for (const char* const name : {"decoder.out", "encoder.fc1", "encoder.fc2", "encoder.norm", "head"})
    layers.push_back({name, "Linear", Precision::kFloat16, "r"});
  const PrecisionPlan plan("p", layers);
  EXPECT_EQ(plan.at("head"), layers[4]);
  EXPECT_EQ(error_at(plan, "encodr.fc2"),
            "PrecisionPlan: there is no layer 'encodr.fc2' among 5; the nearest: 'encoder.fc2', 'encoder.fc1', "
            "'encoder.norm'");
  EXPECT_EQ(error_at(plan, "haed").substr(0, 66), "PrecisionPlan: there is no layer 'haed' among 5; the nearest: 'hea");
  EXPECT_EQ(error_at(PrecisionPlan("p", {}), "a"), "PrecisionPlan: there is no layer 'a' among 0");
}

struct Conservative : CustomPrecisionPolicy {
  bool should_use_fp16(std::string_view layer_type, std::string_view layer_name) const override {
    asked.emplace_back(std::string(layer_type), std::string(layer_name));
    return layer_type != "LayerNorm" && !layer_name.starts_with("head");
  }
  std::optional<double> get_loss_scale_factor(double gradient_norm) const override { return 1024.0 / gradient_norm; }
  mutable std::vector<std::pair<std::string, std::string>> asked;
};

TEST(CustomPolicy, IsAskedOncePerLayer) {
  const std::vector<Layer> layers{
      {"body", "Linear", ""}, {"norm", "LayerNorm", ""}, {"head", "Linear", ""}, {"head.tied", "Linear", "body"}};
  const Conservative policy;
  const PrecisionPlan plan(policy, layers, Precision::kBFloat16);
  EXPECT_EQ(plan, PrecisionPlan("Conservative",
                                {{"body", "Linear", Precision::kBFloat16, "Conservative.should_use_fp16 is True"},
                                 {"norm", "LayerNorm", Precision::kFloat32, "Conservative.should_use_fp16 is False"},
                                 {"head", "Linear", Precision::kFloat32, "Conservative.should_use_fp16 is False"},
                                 {"head.tied", "Linear", Precision::kBFloat16, "the same module as body"}}));
  const std::vector<std::pair<std::string, std::string>> once{
      {"Linear", "body"}, {"LayerNorm", "norm"}, {"Linear", "head"}};
  EXPECT_EQ(policy.asked, once);
  const CustomPrecisionPolicy& base = policy;
  EXPECT_EQ(base.get_loss_scale_factor(2.0), 512.0);
}

TEST(CustomPolicy, LeavesEverythingInHalfUnlessOverridden) {
  const std::vector<Layer> layers{{"head", "Linear", ""}};
  const CustomPrecisionPolicy policy;
  EXPECT_EQ(PrecisionPlan(policy, layers, Precision::kFloat16).at("head").precision, Precision::kFloat16);
  EXPECT_FALSE(policy.get_loss_scale_factor(1.0).has_value());
}

TEST(CustomPolicy, HalfIsAHalfPrecision) {
  for (const Precision half : {Precision::kFloat32, Precision::kTFloat32, Precision::kInt8}) {
    try {
      PrecisionPlan(Conservative(), {}, half);
      ADD_FAILURE() << name_of(half) << " was taken";
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(error.what(), "Conservative: half is " + std::string(name_of(half)) + ", expected float16 or bfloat16");
    }
  }
}

template <class T>
struct Block {
  struct Inner {};
};

TEST(ClassName, HasNeitherNamespaceNorArguments) {
  struct Local {};
  const auto lambda = [](std::vector<int>) {
    struct InLambda {};
    return class_name(typeid(InLambda));
  };
  EXPECT_EQ(class_name(typeid(Conservative)), "Conservative") << "in an anonymous namespace";
  EXPECT_EQ(class_name(typeid(PrecisionPlan)), "PrecisionPlan");
  EXPECT_EQ(class_name(typeid(Local)), "Local");
  EXPECT_EQ(lambda({}), "InLambda");
  EXPECT_EQ(class_name(typeid(Block<std::vector<PrecisionPlan>>)), "Block");
  EXPECT_EQ(class_name(typeid(Block<Conservative>::Inner)), "Inner");
  EXPECT_EQ(class_name(typeid(int)), "int");
}

}  // namespace
}  // namespace halfstep
