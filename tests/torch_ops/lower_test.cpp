#include "halfstep/torch/lower.h"

#include <sstream>

#include <gtest/gtest.h>
#include <torch/script.h>
#include <torch/torch.h>

#include "device_fixture.h"
#include "halfstep/torch/scopes.h"

namespace halfstep {
namespace {

using test::DeviceTest;

// A module from TorchScript's text: two linear layers of one class, and a product and a softmax of its own.
class Lower : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (IsSkipped()) return;
    torch::manual_seed(0);
    const auto linear = [&] {
      torch::jit::Module module("Linear");
      module.register_parameter("weight", at::randn({8, 8}, options()), /*is_buffer=*/false);
      module.register_attribute("training", c10::BoolType::get(), false);
      module.define("def forward(self, x):\n  return torch.linear(x, self.weight)\n");
      return module;
    };
    module_.register_module("first", linear());
    module_.register_module("second", linear());
    module_.register_parameter("mix", at::randn({8, 8}, options()), /*is_buffer=*/false);
    module_.register_attribute("training", c10::BoolType::get(), false);
    module_.define(R"(
      def forward(self, x, steps: int):
        for i in range(steps):
          x = torch.tanh(self.first.forward(x))
        return self.second.forward(torch.softmax(torch.matmul(x, self.mix), -1))
    )");
  }

  at::TensorOptions options() const { return at::TensorOptions(at::kFloat).device(GetParam()); }
  at::Tensor parameter(const std::string& name) const {
    return module_.attr(name).toModule().attr("weight").toTensor();
  }
  at::Tensor call(const torch::jit::Module& module, const at::Tensor& x) const {
    torch::NoGradGuard no_grad;
    return module.get_method("forward")({x, 2}).toTensor();
  }

  torch::jit::Module module_ = torch::jit::Module("Model");
};

INSTANTIATE_TEST_SUITE_P(Devices, Lower, testing::Values(at::kCPU, at::kCUDA), test::device_name);

PrecisionPlan plan_of(const torch::jit::Module& module, Precision first, Precision second) {
  const PrecisionPolicy policy("test", Precision::kBFloat16,
                               {{"first", "*", first, "first"}, {"second", "*", second, "second"}});
  return plan(module, policy);
}

TEST_P(Lower, APolicyAsCodeIsAskedOfAScript) {
  struct First : CustomPrecisionPolicy {
    bool should_use_fp16(std::string_view, std::string_view layer_name) const override { return layer_name == "first"; }
  };
  const PrecisionPlan made = plan(module_, First(), Precision::kBFloat16);
  EXPECT_EQ(made.at("first").precision, Precision::kBFloat16);
  EXPECT_EQ(made.at("second").precision, Precision::kFloat32);
  EXPECT_EQ(made.at("second").type, "Linear");
}

TEST_P(Lower, LayersOfAModule) {
  const std::vector<Layer> layers = layers_of(module_);
  ASSERT_EQ(layers.size(), 3U);
  EXPECT_EQ(layers[0].name, "");
  EXPECT_EQ(layers[0].type, "Model");
  EXPECT_EQ(layers[2].name, "second");
  EXPECT_EQ(layers[2].type, "Linear");
}

TEST_P(Lower, TheBitsOfOpsUnderAutocast) {
  const at::Tensor x = at::randn({4, 8}, options());
  const torch::jit::Module lowered = lower(module_, plan_of(module_, Precision::kBFloat16, Precision::kFloat32));
  at::Tensor expected = x;
  {
    torch::NoGradGuard no_grad;
    const AutocastScope autocast(GetParam(), at::kBFloat16);
    for (int i = 0; i < 2; ++i) expected = at::tanh(at::linear(expected, parameter("first")));
    expected = at::softmax(at::matmul(expected, module_.attr("mix").toTensor()), -1);
    const AutocastScope off(GetParam(), at::kBFloat16, /*enabled=*/false);
    expected = at::linear(expected.to(at::kFloat), parameter("second"));
  }
  const at::Tensor got = call(lowered, x);
  EXPECT_EQ(got.scalar_type(), at::kFloat);
  EXPECT_TRUE(at::equal(got, expected));
  EXPECT_EQ(lowered.attr("first").toModule().attr("weight").toTensor().scalar_type(), at::kBFloat16);
  EXPECT_EQ(lowered.attr("second").toModule().attr("weight").toTensor().scalar_type(), at::kFloat);
  EXPECT_EQ(parameter("first").scalar_type(), at::kFloat) << "the original's";
}

TEST_P(Lower, SavedAndLoaded) {
  const at::Tensor x = at::randn({4, 8}, options());
  const torch::jit::Module lowered =
      lower(module_, plan_of(module_, Precision::kFloat16, Precision::kBFloat16), at::kHalf);
  std::stringstream file;
  lowered.save(file);
  EXPECT_TRUE(at::equal(call(torch::jit::load(file), x), call(lowered, x)));
}

TEST_P(Lower, TheOriginalAndTheCopyShareNoMemory) {
  const at::Tensor x = at::randn({4, 8}, options());
  const at::Tensor before = call(module_, x);
  const torch::jit::Module lowered = lower(module_, plan_of(module_, Precision::kBFloat16, Precision::kFloat32));
  torch::NoGradGuard no_grad;
  for (const at::Tensor& tensor : lowered.parameters()) tensor.zero_();
  EXPECT_TRUE(at::equal(call(module_, x), before));
}

TEST_P(Lower, ViewsOfOneMemoryShareItInTheCopy) {
  const at::Tensor whole = at::zeros({8, 8}, options());
  module_.register_buffer("whole", whole);
  module_.register_buffer("part", whole.narrow(0, 2, 4));
  const torch::jit::Module lowered = lower(module_, plan_of(module_, Precision::kBFloat16, Precision::kFloat32));
  lowered.attr("part").toTensor().fill_(1);
  EXPECT_EQ(lowered.attr("whole").toTensor().sum().item<float>(), 32);
  EXPECT_EQ(whole.sum().item<float>(), 0) << "the original's";
}

TEST_P(Lower, AModuleThatIsLoweredAlready) {
  const PrecisionPlan plan = plan_of(module_, Precision::kBFloat16, Precision::kFloat32);
  const torch::jit::Module lowered = lower(module_, plan);
  const std::string message = message_of([&] { lower(lowered, plan); });
  EXPECT_NE(message.find("layer 'second' is planned as Float, but forward only reads its tensors"), std::string::npos)
      << message;
  const PrecisionPlan same = plan_of(module_, Precision::kBFloat16, Precision::kBFloat16);
  const at::Tensor x = at::randn({4, 8}, options());
  EXPECT_TRUE(at::equal(call(lower(lower(module_, same), same), x), call(lower(module_, same), x)));
}

TEST_P(Lower, Refusals) {
  const auto message = [&](const PrecisionPlan& plan, std::optional<at::ScalarType> dtype = std::nullopt) {
    return message_of([&] { lower(module_, plan, dtype); });
  };
  EXPECT_NE(message(plan_of(module_, Precision::kInt8, Precision::kFloat32))
                .find("layer 'first' is planned as int8, expected float32, float16 or bfloat16"),
            std::string::npos);
  EXPECT_NE(message(plan_of(module_, Precision::kFloat16, Precision::kFloat32)).find("autocast_dtype must say"),
            std::string::npos);
  const PrecisionPlan other("x", {{"third", "Linear", Precision::kFloat32, "x"}});
  EXPECT_NE(message(other, at::kHalf).find("the plan has a Linear 'third', but in the module there is none"),
            std::string::npos);
  module_.train();
  EXPECT_NE(message(plan_of(module_, Precision::kFloat32, Precision::kFloat32)).find("training mode; call eval()"),
            std::string::npos);
}

}  // namespace
}  // namespace halfstep
