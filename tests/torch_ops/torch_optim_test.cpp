// The fused step of torch::optim's own optimizers against torch's.
#include <cmath>
#include <sstream>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "device_fixture.h"
#include "halfstep/torch.h"

namespace halfstep {
namespace {

class TorchOptim : public test::DeviceTest {
 protected:
  // Two parameters in two groups with settings of their own, stepped five times: by torch, or by the scaler with a skip
  // in between.
  template <class Optimizer, class Options>
  std::vector<at::Tensor> train(Options first, Options second, bool fused) {
    torch::manual_seed(1);
    std::vector<at::Tensor> params;
    for (const int64_t size : {1, 3000})
      params.push_back(torch::randn({size}).to(GetParam()).detach().requires_grad_(true));
    std::vector<torch::optim::OptimizerParamGroup> groups;
    groups.emplace_back(std::vector<at::Tensor>{params[0]}, std::make_unique<Options>(first));
    groups.emplace_back(std::vector<at::Tensor>{params[1]}, std::make_unique<Options>(second));
    Optimizer optimizer(groups, first);
    GradScaler scaler({.rule = {.init_scale = 1024.0}});
    for (int step = 0; step < 5; ++step) {
      optimizer.zero_grad();
      const at::Tensor loss = (params[0].square().sum() + params[1].pow(3).sum()) * (step + 1);
      if (!fused) {
        loss.backward();
        torch::nn::utils::clip_grad_norm_(params, 5.0);
        optimizer.step();
        continue;
      }
      if (step == 0 || step == 2) {
        scaler.scale(loss * INFINITY).backward();
        EXPECT_FALSE(scaler.step(optimizer));
        scaler.update();
        optimizer.zero_grad();
        scaler.scale((params[0].square().sum() + params[1].pow(3).sum()) * (step + 1)).backward();
      } else {
        scaler.scale(loss).backward();
      }
      EXPECT_TRUE(scaler.step(optimizer, 5.0));
      scaler.update();
    }
    EXPECT_EQ(scaler.host_syncs(), 0);
    return params;
  }

  template <class Optimizer, class Options>
  void compare(const Options& first, const Options& second) {
    const auto ours = train<Optimizer>(first, second, true);
    const auto torchs = train<Optimizer>(first, second, false);
    for (std::size_t i = 0; i < ours.size(); ++i) EXPECT_TRUE(torch::allclose(ours[i], torchs[i], 1e-5, 1e-6)) << i;
  }
};

TEST_P(TorchOptim, AdamIsTorchs) {
  using Options = torch::optim::AdamOptions;
  compare<torch::optim::Adam>(Options(0.1).weight_decay(0.1), Options(0.01).amsgrad(true).betas({0.5, 0.9}));
}

TEST_P(TorchOptim, AdamWIsTorchs) {
  using Options = torch::optim::AdamWOptions;
  compare<torch::optim::AdamW>(Options(0.1).weight_decay(0.1), Options(0.01).eps(1e-3));
}

TEST_P(TorchOptim, SgdIsTorchs) {
  using Options = torch::optim::SGDOptions;
  compare<torch::optim::SGD>(Options(0.1).momentum(0.9).dampening(0.5), Options(0.01).weight_decay(0.1));
  compare<torch::optim::SGD>(Options(0.1).momentum(0.9).nesterov(true), Options(0.01).momentum(0.5));
}

TEST_P(TorchOptim, AParameterThatMovesToAnotherGroupTakesItsOptions) {
  const at::Tensor p = parameter({1.0F}), q = parameter({1.0F});
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(std::vector<at::Tensor>{p, q}, std::make_unique<torch::optim::SGDOptions>(0.5));
  groups.emplace_back(std::vector<at::Tensor>{}, std::make_unique<torch::optim::SGDOptions>(0.0));
  torch::optim::SGD sgd(groups, torch::optim::SGDOptions(0.5));
  GradScaler scaler;
  const auto step = [&] {
    sgd.zero_grad();
    scaler.scale((p + q).sum()).backward();
    scaler.step(sgd);
    scaler.update();
  };
  step();
  sgd.param_groups()[0].params().pop_back();
  sgd.param_groups()[1].params().push_back(q);
  step();
  EXPECT_EQ(values(p)[0], 0.0F);
  EXPECT_EQ(values(q)[0], 0.5F);
}

TEST_P(TorchOptim, ReleaseCountsAppliedStepsAndCheckpointsGoOn) {
  const auto make = [&](const at::Tensor& p) { return torch::optim::Adam({p}, torch::optim::AdamOptions(0.1)); };
  const auto iterate = [](torch::optim::Adam& adam, GradScaler& scaler, const at::Tensor& p, float factor) {
    adam.zero_grad();
    scaler.scale((p * factor).sum()).backward();
    scaler.step(adam);
    scaler.update();
  };
  at::Tensor p = parameter({1.0F, 2.0F});
  torch::optim::Adam adam = make(p);
  GradScaler scaler;
  iterate(adam, scaler, p, 1.0F);
  iterate(adam, scaler, p, INFINITY);
  iterate(adam, scaler, p, 3.0F);
  scaler.release(adam);
  const auto step = [](torch::optim::Adam& optimizer, const at::Tensor& param) {
    return static_cast<torch::optim::AdamParamState&>(*optimizer.state().at(param.unsafeGetTensorImpl())).step();
  };
  EXPECT_EQ(step(adam, p), 2);

  std::stringstream file;
  torch::save(adam, file);
  at::Tensor q = p.detach().clone().requires_grad_(true);
  torch::optim::Adam resumed = make(q);
  torch::load(resumed, file);
  for (int i = 0; i < 2; ++i) {  // the one with its own scaler, the other with one that never saw the optimizer
    GradScaler fresh;
    iterate(adam, scaler, p, 2.0F);
    iterate(resumed, fresh, q, 2.0F);
    fresh.release(resumed);
    EXPECT_EQ(values(p), values(q));
  }
  EXPECT_EQ(step(resumed, q), 4);

  // A checkpoint loaded into an optimizer that is being stepped replaces its state and its count.
  iterate(resumed, scaler, q, 1.0F);
  file.clear();
  file.seekg(0);
  torch::load(resumed, file);
  iterate(resumed, scaler, q, 1.0F);
  scaler.release(resumed);
  EXPECT_EQ(step(resumed, q), 3);
}

TEST_P(TorchOptim, ASkippedFirstStepLeavesNoMomentum) {
  at::Tensor p = parameter({1.0F});
  torch::optim::SGD sgd({p}, torch::optim::SGDOptions(0.1).momentum(0.9));
  GradScaler scaler;
  scaler.scale((p * INFINITY).sum()).backward();
  EXPECT_FALSE(scaler.step(sgd));
  scaler.release(sgd);
  EXPECT_TRUE(sgd.state().empty());
}

TEST_P(TorchOptim, FrozenAndLaterParameters) {
  at::Tensor a = parameter({1.0F}), b = parameter({1.0F}), c = parameter({1.0F});
  torch::optim::Adam adam({a, b}, torch::optim::AdamOptions(0.1));
  GradScaler scaler;
  const auto iterate = [&](const at::Tensor& loss) {
    adam.zero_grad();
    scaler.scale(loss.sum()).backward();
    scaler.step(adam);
    scaler.update();
  };
  iterate(a);
  EXPECT_EQ(values(b)[0], 1.0F);
  EXPECT_EQ(adam.state().size(), 1);
  iterate(a + b);
  adam.add_param_group(torch::optim::OptimizerParamGroup({c}));
  iterate(c);
  for (const at::Tensor& param : {b, c}) EXPECT_NEAR(values(param)[0], 0.9F, 1e-5F);
  EXPECT_EQ(scaler.host_syncs(), 0);
}

TEST_P(TorchOptim, OtherOptimizersAreStepped) {
  at::Tensor p = parameter({1.0F});
  torch::optim::RMSprop rmsprop({p}, torch::optim::RMSpropOptions(0.1));
  GradScaler scaler;
  scaler.scale(p.sum()).backward();
  EXPECT_TRUE(scaler.step(rmsprop, 0.5));
  EXPECT_EQ(scaler.host_syncs(), 1);
  EXPECT_NE(values(p)[0], 1.0F);
  EXPECT_NE(message_of([&] { scaler.step(rmsprop, -1.0); }).find("max_norm is -1, expected a number > 0"),
            std::string::npos);
}

TEST_P(TorchOptim, AMovedScalerGoesOn) {
  at::Tensor p = parameter({1.0F});
  torch::optim::SGD sgd({p}, torch::optim::SGDOptions(0.5));
  GradScaler first;
  first.scale(p.sum()).backward();
  first.step(sgd);
  GradScaler second = std::move(first);
  second.update();
  second.scale(p.sum()).backward();
  EXPECT_TRUE(second.step(sgd));
}

INSTANTIATE_TEST_SUITE_P(Devices, TorchOptim, testing::Values(at::kCPU, at::kCUDA), test::device_name);

}  // namespace
}  // namespace halfstep
