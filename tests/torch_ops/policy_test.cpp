// Plans for torch::nn models, and layers that run in what a plan says.
#include "halfstep/torch/policy.h"

#include <fstream>
#include <memory>
#include <sstream>
#include <stdexcept>

#include <ATen/autocast_mode.h>

#include "device_fixture.h"
#include "halfstep/status.h"
#include "halfstep/torch/scaling.h"
#include "halfstep/torch/scopes.h"
#include "policy_fixture.h"

namespace halfstep {
namespace {

constexpr int kWidth = 16;

std::string data_file(const std::string& name) {
  const std::ifstream file(std::string(HALFSTEP_TEST_DATA) + "/" + name);
  EXPECT_TRUE(file.good()) << name;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

struct Conservative : CustomPrecisionPolicy {
  bool should_use_fp16(std::string_view layer_type, std::string_view layer_name) const override {
    return layer_type.find("Norm") == std::string_view::npos && !layer_name.starts_with("head");
  }
};

// tests/python/test_policy.py compares the plans of the same model in Python with the same files.
TEST(PlanOfAModel, IsTheSameInTwoLanguages) {
  const test::Encoder model;
  const auto policy = PrecisionPolicy::from_json(data_file("encoder_policy.json"));
  EXPECT_EQ(plan(*model, policy), PrecisionPlan::from_json(data_file("encoder_plan.json")));
  EXPECT_EQ(plan(*model, Conservative(), Precision::kBFloat16),
            PrecisionPlan::from_json(data_file("encoder_answers.json")));
}

TEST(PlanOfAModel, AttentionsOutProjInheritsFromIt) {
  struct Net : torch::nn::Module {
    Net() { register_module("again", register_module("attention", torch::nn::MultiheadAttention(8, 2))); }
  };
  const Net model;
  const PrecisionPolicy policy("n", Precision::kFloat16, {{"attention", "*", Precision::kFloat32, ""}});
  const PrecisionPlan made = plan(model, policy);
  EXPECT_EQ(made.at("attention.out_proj").precision, Precision::kFloat32);
  EXPECT_EQ(made.at("attention.out_proj").reason, "never called: inherits from attention");
  EXPECT_EQ(made.at("attention.out_proj").type, "NonDynamicallyQuantizableLinear") << "as in Python";
  EXPECT_EQ(made.at("again.out_proj").precision, Precision::kFloat32);
  EXPECT_EQ(made.at("again.out_proj").reason, "the same module as attention.out_proj");
}

TEST(PlanOfAModel, TypesAreClassesWhateverAModuleCallsItself) {
  struct Impl : torch::nn::Module {};
  struct Named : torch::nn::Module {
    Named() : Module("my net") { register_module("0", std::make_shared<Impl>()); }
  };
  const Named model;  // not in a shared_ptr
  const std::vector<Layer> layers = layers_of(model);
  ASSERT_EQ(layers.size(), 1U) << "a container without parameters is no layer";
  EXPECT_EQ(layers[0].name, "0");
  EXPECT_EQ(layers[0].type, "Impl");
  const Impl leaf;
  EXPECT_EQ(layers_of(leaf).at(0).name, "");
}

// What this thread's autocast is set to.
struct Switches {
  bool enabled;
  at::ScalarType dtype;
  bool cache;
  bool operator==(const Switches&) const = default;
};

Switches switches(at::DeviceType device) {
  return {at::autocast::is_autocast_enabled(device), at::autocast::get_autocast_dtype(device),
          at::autocast::is_autocast_cache_enabled()};
}

PrecisionPlan planned(std::initializer_list<std::pair<const char*, Precision>> layers) {
  std::vector<PlannedLayer> entries;
  for (const auto& [name, precision] : layers) entries.push_back({name, "Linear", precision, "test"});
  return {"test", std::move(entries)};
}

const PrecisionPlan kPlan = planned({{"full", Precision::kFloat32},
                                     {"fp16", Precision::kFloat16},
                                     {"bf16", Precision::kBFloat16},
                                     {"int8", Precision::kInt8},
                                     {"tf32", Precision::kTFloat32}});

class RunTest : public test::DeviceTest {
 protected:
  at::Tensor rand(at::IntArrayRef shape = {3, kWidth}) const { return torch::rand(shape, GetParam()); }
  torch::nn::Linear linear() const {
    torch::nn::Linear layer(kWidth, kWidth);
    layer->to(GetParam());
    return layer;
  }
};

TEST_P(RunTest, LayersComputeInTheirPrecision) {
  torch::nn::Linear layer = linear();
  const at::Tensor x = rand();
  const AutocastScope autocast(GetParam(), at::kBFloat16);
  const Switches outside = switches(GetParam());
  EXPECT_EQ(kPlan.run("bf16", layer, x).scalar_type(), at::kBFloat16);
  EXPECT_EQ(kPlan.run("fp16", layer, x).scalar_type(), at::kHalf) << "not the cast that autocast has kept";
  EXPECT_EQ(kPlan.run("full", layer, x).scalar_type(), at::kFloat);
  EXPECT_EQ(layer(x).scalar_type(), at::kBFloat16);
  const auto inside = [&](const char* name) { return kPlan.run(name, [&] { return switches(GetParam()); }); };
  EXPECT_EQ(inside("bf16"), outside) << "what autocast computes in anyway needs no scope";
  EXPECT_EQ(inside("fp16"), (Switches{true, at::kHalf, false}));
  EXPECT_FALSE(inside("full").enabled);
  EXPECT_EQ(switches(GetParam()), outside);
}

TEST_P(RunTest, AFloat32LayerTakesHalfInputs) {
  torch::nn::Linear layer = linear();
  const at::Tensor x = rand();
  const AutocastScope autocast(GetParam(), at::kBFloat16);
  const at::Tensor hidden = at::mm(x, rand({kWidth, kWidth}));
  ASSERT_EQ(hidden.scalar_type(), at::kBFloat16);
  const at::Tensor expected =
      torch::nn::functional::linear(hidden.to(at::kDouble).cpu(), layer->weight.detach().to(at::kDouble).cpu(),
                                    layer->bias.detach().to(at::kDouble).cpu());
  const auto close = [&](const at::Tensor& y) {
    return y.scalar_type() == at::kFloat && at::allclose(y.to(at::kDouble).cpu(), expected, 1e-5, 1e-5);
  };
  EXPECT_TRUE(close(kPlan.run("full", layer, hidden)));
  EXPECT_TRUE(close(kPlan.run("full", [&](const at::Tensor& h) { return layer(h); }, hidden)));
  EXPECT_TRUE(close(kPlan.run("full", layer.ptr(), hidden))) << "a shared_ptr";
  EXPECT_TRUE(close(kPlan.run("full", &*layer, hidden))) << "a pointer";
  EXPECT_TRUE(close(kPlan.run("full", [&] { return layer(hidden.to(at::kFloat)); })));
  EXPECT_THROW(kPlan.run("full", [&] { return layer(hidden); }), c10::Error) << "what a lambda captures is not cast";
}

TEST_P(RunTest, AHalfLayerTakesInputsOfAnotherHalf) {
  torch::nn::Linear layer = linear();
  const AutocastScope autocast(GetParam(), at::kBFloat16);
  const at::Tensor hidden = layer(rand());
  const auto type_inside = [](const at::Tensor& x) { return x.scalar_type(); };
  EXPECT_EQ(kPlan.run("fp16", type_inside, hidden), at::kHalf);
  EXPECT_EQ(kPlan.run("bf16", type_inside, hidden.to(at::kFloat)), at::kFloat) << "autocast's own layer";
}

TEST_P(RunTest, InputsAreCastInsideOfContainersAndNothingElseIs) {
  const AutocastScope autocast(GetParam(), at::kBFloat16);
  const at::Tensor half = rand().to(at::kBFloat16), counts = at::ones({2}, at::kLong), exact = rand().to(at::kDouble);
  kPlan.run(
      "full",
      [](const at::Tensor& a, const at::Tensor& b, const at::Tensor& c, const at::Tensor& undefined) {
        EXPECT_EQ(a.scalar_type(), at::kFloat);
        EXPECT_EQ(b.scalar_type(), at::kLong);
        EXPECT_EQ(c.scalar_type(), at::kDouble);
        EXPECT_FALSE(undefined.defined());
      },
      half, counts, exact, at::Tensor());
  using State = std::optional<std::tuple<at::Tensor, at::Tensor>>;
  kPlan.run(
      "full",
      [](const std::vector<at::Tensor>& list, const State& state, const State& none, std::pair<at::Tensor, int> pair) {
        EXPECT_EQ(list.at(1).scalar_type(), at::kFloat);
        EXPECT_EQ(std::get<1>(*state).scalar_type(), at::kFloat);
        EXPECT_FALSE(none.has_value());
        EXPECT_EQ(pair.first.scalar_type(), at::kFloat);
        EXPECT_EQ(pair.second, 7);
      },
      std::vector<at::Tensor>{counts, half}, State({half, half}), State(), std::pair<at::Tensor, int>(half, 7));
  int written = 0;
  auto owned = kPlan.run(
      "full",
      [](int& out, std::unique_ptr<int> taken) {
        out = *taken;
        return taken;
      },
      written, std::make_unique<int>(3));
  EXPECT_EQ(written, 3) << "passed by reference";
  EXPECT_EQ(*owned, 3);
}

TEST_P(RunTest, RecurrentLayersTakeTheirStateToo) {
  torch::nn::LSTM lstm(kWidth, kWidth);
  lstm->to(GetParam());
  const at::Tensor x = rand({4, 3, kWidth});
  std::tuple<at::Tensor, std::tuple<at::Tensor, at::Tensor>> expected, got;
  const auto state = std::make_tuple(rand({1, 3, kWidth}).to(at::kBFloat16), rand({1, 3, kWidth}).to(at::kBFloat16));
  expected = lstm(x.to(at::kBFloat16).to(at::kFloat),
                  std::make_tuple(std::get<0>(state).to(at::kFloat), std::get<1>(state).to(at::kFloat)));
  const AutocastScope autocast(GetParam(), at::kBFloat16);
  got = kPlan.run("full", lstm, x.to(at::kBFloat16), std::optional(state));
  EXPECT_TRUE(at::equal(std::get<0>(got), std::get<0>(expected)));
}

TEST_P(RunTest, WhereAutocastIsOffNothingHappens) {
  torch::nn::Linear layer = linear();
  const at::Tensor x = rand();
  const at::Tensor expected = layer(x);
  const auto check = [&] {
    const Switches outside = switches(GetParam());
    for (const char* const name : {"full", "fp16", "bf16"}) {
      EXPECT_TRUE(at::equal(kPlan.run(name, layer, x), expected)) << name;
      EXPECT_EQ(kPlan.run(name, [&] { return switches(GetParam()); }), outside) << name;
      EXPECT_EQ(kPlan.run(name, [](const at::Tensor& h) { return h.scalar_type(); }, x.to(at::kHalf)), at::kHalf);
    }
  };
  check();
  const AutocastScope autocast(GetParam(), at::kBFloat16);
  const AutocastScope off(GetParam(), at::kHalf, /*enabled=*/false);
  check();
}

// One device's scope is no other's: autocast may be on for both, in different types.
TEST_P(RunTest, ActsWhereAutocastIsOn) {
  const at::DeviceType other = GetParam() == at::kCPU ? at::kCUDA : at::kCPU;
  const AutocastScope autocast(GetParam(), at::kBFloat16);
  const Switches off = switches(other);
  EXPECT_EQ(kPlan.run("fp16", [&] { return switches(other).dtype; }), off.dtype);
  const AutocastScope both(other, at::kHalf);
  kPlan.run("fp16", [&] {
    EXPECT_EQ(switches(GetParam()).dtype, at::kHalf);
    EXPECT_EQ(switches(other).dtype, at::kHalf);
  });
  kPlan.run("full", [&] {
    EXPECT_FALSE(switches(GetParam()).enabled);
    EXPECT_FALSE(switches(other).enabled);
  });
  EXPECT_EQ(switches(GetParam()).dtype, at::kBFloat16);
  EXPECT_EQ(switches(other).dtype, at::kHalf);
}

TEST_P(RunTest, ScopesNest) {
  torch::nn::Linear layer = linear();
  const at::Tensor x = rand();
  const AutocastScope autocast(GetParam(), at::kBFloat16);
  const Switches outside = switches(GetParam());
  kPlan.run("fp16", [&] {
    const Switches island = switches(GetParam());
    EXPECT_EQ(kPlan.run("full", layer, x).scalar_type(), at::kFloat);
    EXPECT_EQ(kPlan.run("bf16", layer, x).scalar_type(), at::kBFloat16);
    EXPECT_EQ(switches(GetParam()), island);
    EXPECT_EQ(layer(x).scalar_type(), at::kHalf);
  });
  kPlan.run("full", [&] {
    const at::Tensor inner = kPlan
                                 .run(
                                     "fp16",
                                     [&](const at::Tensor& given) {
                                       const at::Tensor product = layer(given);
                                       EXPECT_EQ(product.scalar_type(), at::kHalf)
                                           << "the plan has turned autocast off, not the program";
                                       return std::pair(product, given.scalar_type());
                                     },
                                     x)
                                 .first;
    EXPECT_EQ(inner.scalar_type(), at::kFloat) << "what stands around computes without autocast";
    EXPECT_FALSE(switches(GetParam()).enabled);
    EXPECT_EQ(kPlan.run("full", layer, x.to(at::kHalf)).scalar_type(), at::kFloat);
    const AutocastScope own(GetParam(), at::kBFloat16);
    EXPECT_EQ(kPlan.run("fp16", layer, x).scalar_type(), at::kHalf);
  });
  EXPECT_EQ(switches(GetParam()), outside);
}

TEST_P(RunTest, ExceptionsRestoreEverything) {
  const AutocastScope autocast(GetParam(), at::kBFloat16);
  const Switches outside = switches(GetParam());
  for (const char* const name : {"full", "fp16"}) {
    EXPECT_THROW(kPlan.run(name, [] { throw std::runtime_error("forward failed"); }), std::runtime_error);
    EXPECT_EQ(switches(GetParam()), outside) << name;
  }
}

std::string run_error(const PrecisionPlan& plan, const char* name) {
  bool called = false;
  std::string message = "no error";
  try {
    plan.run(name, [&] { called = true; });
  } catch (const InvalidArgument& error) {
    message = error.what();
  }
  EXPECT_FALSE(called);
  return message;
}

TEST_P(RunTest, WhatAPlanCannotRunIsNamed) {
  for (const bool on : {true, false}) {
    const AutocastScope autocast(GetParam(), at::kBFloat16, on);
    const Switches outside = switches(GetParam());
    EXPECT_EQ(run_error(kPlan, "int8"),
              "PrecisionPlan::run: layer 'int8' is planned as int8, expected float32, float16 or bfloat16");
    EXPECT_EQ(run_error(kPlan, "tf32"),
              "PrecisionPlan::run: layer 'tf32' is planned as tfloat32, expected float32, float16 or bfloat16");
    EXPECT_EQ(run_error(kPlan, "fpl6"),
              "PrecisionPlan: there is no layer 'fpl6' among 5; the nearest: 'fp16', 'full', 'bf16'");
    EXPECT_EQ(switches(GetParam()), outside);
  }
}

TEST_P(RunTest, ASharedModuleRunsAlikeUnderBothNames) {
  struct Tied : torch::nn::Module {
    explicit Tied(const torch::nn::Linear& layer) {
      register_module("first", layer);
      register_module("second", layer);
    }
  };
  torch::nn::Linear layer = linear();
  const Tied model(layer);
  const PrecisionPolicy policy("test", Precision::kBFloat16,
                               {{"first", "*", Precision::kFloat16, ""}, {"second", "*", Precision::kFloat32, ""}});
  const PrecisionPlan tied = plan(model, policy);
  EXPECT_EQ(tied.at("second").reason, "the same module as first");
  const AutocastScope autocast(GetParam(), at::kBFloat16);
  EXPECT_EQ(tied.run("first", layer, rand()).scalar_type(), at::kHalf);
  EXPECT_EQ(tied.run("second", layer, rand()).scalar_type(), at::kHalf);
}

TEST_P(RunTest, BackwardInsideOfTheScope) {
  torch::nn::Linear layer = linear();
  const at::Tensor hidden = rand().to(at::kBFloat16).requires_grad_(true);
  layer(hidden.to(at::kFloat)).pow(2).sum().backward();
  const at::Tensor expected = layer->weight.grad().clone(), expected_input = hidden.grad().clone();
  layer->zero_grad();
  hidden.mutable_grad().reset();
  const AutocastScope autocast(GetParam(), at::kBFloat16);
  kPlan.run("full", [&](const at::Tensor& x) { layer(x).pow(2).sum().backward(); }, hidden);
  EXPECT_TRUE(at::equal(layer->weight.grad(), expected)) << "float32 forward and backward";
  EXPECT_EQ(hidden.grad().scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::equal(hidden.grad(), expected_input));
}

struct NetImpl : torch::nn::Module {
  NetImpl()
      : body(register_module("body", torch::nn::Linear(kWidth, kWidth))),
        island(register_module("island", torch::nn::Linear(kWidth, kWidth))),
        head(register_module("head", torch::nn::Linear(kWidth, 4))) {}

  at::Tensor forward(const PrecisionPlan& the_plan, const at::Tensor& x) {
    const at::Tensor h = the_plan.run("body", body, x).tanh();
    return the_plan.run("head", head, the_plan.run("island", island, h).tanh());
  }
  // The same, by hand.
  at::Tensor forward(at::DeviceType device, const at::Tensor& x) {
    at::Tensor h = body(x).tanh();
    {
      const AutocastScope half(device, at::kHalf, /*enabled=*/true, /*cache_enabled=*/false);
      h = island(h).tanh();
    }
    const AutocastScope off(device, at::kBFloat16, /*enabled=*/false);
    return head(h.to(at::kFloat));
  }

  torch::nn::Linear body, island, head;
};
TORCH_MODULE(Net);

// The losses of five steps. ambient: inside of one autocast scope, that of each step comes within.
template <class Forward>
std::vector<float> train(at::DeviceType device, const Forward& forward, bool ambient = false) {
  torch::manual_seed(3);
  Net model;
  model->to(device);
  const at::Tensor x = torch::randn({64, kWidth}).to(device), y = torch::randint(4, {64}).to(device);
  torch::optim::Adam optimizer(model->parameters(), torch::optim::AdamOptions(3e-2));
  GradScaler scaler({.rule = {.init_scale = 1024.0}});
  std::optional<AutocastScope> outer;
  if (ambient) outer.emplace(device, at::kBFloat16);
  std::vector<float> losses;
  for (int step = 0; step < 5; ++step) {
    optimizer.zero_grad();
    at::Tensor loss;
    {
      const AutocastScope autocast(device, at::kBFloat16);
      const at::Tensor logits = forward(model, x);
      EXPECT_EQ(logits.scalar_type(), at::kFloat);
      loss = torch::nn::functional::cross_entropy(logits, y);
    }
    scaler.scale(loss).backward();
    scaler.step(optimizer);
    scaler.update();
    losses.push_back(loss.item<float>());
  }
  return losses;
}

TEST_P(RunTest, TrainsAsScopesByHandDo) {
  const PrecisionPolicy policy(
      "test", Precision::kBFloat16,
      {{"island", "*", Precision::kFloat16, ""}, {"head", "*", Precision::kFloat32, "logits"}});
  const PrecisionPlan net_plan = plan(*Net(), policy);
  const auto planned_forward = [&](Net& model, const at::Tensor& x) { return model->forward(net_plan, x); };
  const auto by_hand = [&](Net& model, const at::Tensor& x) { return model->forward(GetParam(), x); };
  const std::vector<float> losses = train(GetParam(), planned_forward);
  for (std::size_t step = 1; step < losses.size(); ++step) EXPECT_LT(losses[step], losses[step - 1]) << step;
  EXPECT_LT(losses.back(), 0.9F * losses.front());
  EXPECT_EQ(losses, train(GetParam(), by_hand));
  // There the backward pass runs under autocast too, and rounds otherwise; the updates must be seen all the same.
  const std::vector<float> ambient = train(GetParam(), planned_forward, /*ambient=*/true);
  EXPECT_EQ(ambient, train(GetParam(), by_hand, /*ambient=*/true));
  for (std::size_t step = 0; step < losses.size(); ++step) EXPECT_NEAR(ambient[step], losses[step], 2e-3) << step;
}

INSTANTIATE_TEST_SUITE_P(Devices, RunTest, testing::Values(at::kCPU, at::kCUDA), test::device_name);

}  // namespace
}  // namespace halfstep
