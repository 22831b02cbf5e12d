// Scripted modules trained under AutocastScope in C++.
#include <vector>

#include <gtest/gtest.h>
#include <torch/csrc/jit/passes/autocast.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>
#include <torch/torch.h>

#include "device_fixture.h"
#include "halfstep/torch/scaling.h"
#include "halfstep/torch/scopes.h"

namespace halfstep {
namespace {

class TorchScript : public test::DeviceTest {
 protected:
  torch::jit::Module make() {
    torch::manual_seed(0);
    torch::jit::Module module("Model");
    const auto parameter = [&](const char* name, std::vector<std::int64_t> sizes) {
      module.register_parameter(name, at::randn(sizes, at::TensorOptions(GetParam())).mul_(0.3).requires_grad_(true),
                                false);
    };
    parameter("hidden", {16, 8});
    parameter("head", {4, 16});
    module.register_attribute("training", c10::BoolType::get(), true);
    module.define(R"(
      def forward(self, x):
        return torch.linear(torch.relu(torch.linear(x, self.hidden)), self.head)
    )");
    return module;
  }

  // The losses of five steps. `forward` is called with the module, under autocast.
  template <class Forward>
  std::vector<float> train(torch::jit::Module module, const Forward& forward) {
    const at::Tensor x = at::randn({32, 8}, at::TensorOptions(GetParam()));
    const at::Tensor y = at::randint(4, {32}, at::TensorOptions(GetParam()).dtype(at::kLong));
    std::vector<at::Tensor> parameters;
    for (const at::Tensor& parameter : module.parameters()) parameters.push_back(parameter);
    torch::optim::SGD optimizer(parameters, torch::optim::SGDOptions(0.2));
    std::vector<float> losses;
    for (int step = 0; step < 5; ++step) {
      optimizer.zero_grad();
      at::Tensor loss;
      {
        const AutocastScope autocast(GetParam(), at::kBFloat16);
        loss = at::cross_entropy_loss(forward(module, x).to(at::kFloat), y);
      }
      loss.backward();
      optimizer.step();
      losses.push_back(loss.item<float>());
    }
    return losses;
  }
};

INSTANTIATE_TEST_SUITE_P(Devices, TorchScript, testing::Values(at::kCPU, at::kCUDA), test::device_name);

at::Tensor scripted(torch::jit::Module& module, const at::Tensor& x) {
  return module.forward({x}).toTensor();
}

at::Tensor eager(torch::jit::Module& module, const at::Tensor& x) {
  return at::linear(at::relu(at::linear(x, module.attr("hidden").toTensor())), module.attr("head").toTensor());
}

void expect_near(const std::vector<float>& losses, const std::vector<float>& expected) {
  EXPECT_LT(losses.back(), 0.9F * losses.front());
  for (std::size_t i = 0; i < losses.size(); ++i) EXPECT_NEAR(losses[i], expected[i], 0.02F * expected[i]) << i;
}

TEST_P(TorchScript, FiveStepsWithTheJitsAutocastPass) {
  ASSERT_TRUE(torch::jit::autocastEnabled()) << "torch's default, which loading halfstep leaves";
  expect_near(train(make(), scripted), train(make(), eager));
}

TEST_P(TorchScript, FiveStepsWithoutOptimization) {
  const bool before = torch::jit::getGraphExecutorOptimize();
  torch::jit::setGraphExecutorOptimize(false);
  const std::vector<float> losses = train(make(), scripted);
  torch::jit::setGraphExecutorOptimize(before);
  expect_near(losses, train(make(), eager));
}

TEST_P(TorchScript, InferenceWithThePassOffHasTheBitsOfEager) {
  torch::jit::Module module = make();
  const at::Tensor x = at::randn({5, 8}, at::TensorOptions(GetParam()));
  torch::NoGradGuard no_grad;
  const AutocastScope autocast(GetParam(), at::kBFloat16);
  const bool before = torch::jit::setAutocastMode(false);
  const at::Tensor got = scripted(module, x);
  torch::jit::setAutocastMode(before);
  EXPECT_EQ(got.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::equal(got, eager(module, x)));
}

}  // namespace
}  // namespace halfstep
