// GradScaler::follow: the loss scale that a policy as code asks for.
#include <cmath>
#include <sstream>

#include "device_fixture.h"
#include "halfstep/torch.h"

namespace halfstep {
namespace {

// 1000 / norm, and what it was asked.
struct Inverse : CustomPrecisionPolicy {
  std::optional<double> get_loss_scale_factor(double gradient_norm) const override {
    asked.push_back(gradient_norm);
    return 1000.0 / gradient_norm;
  }
  mutable std::vector<double> asked;
};

struct Constant : CustomPrecisionPolicy {
  explicit Constant(std::optional<double> the_answer) : answer(the_answer) {}
  std::optional<double> get_loss_scale_factor(double) const override { return answer; }
  std::optional<double> answer;
};

// A parameter whose gradient is what the test says: norm 5 k for step(k), an overflow for step(INFINITY).
struct Loop {
  explicit Loop(at::DeviceType device, const ScaleRule& rule = {.init_scale = 64.0, .growth_interval = 1000})
      : parameter(torch::zeros({2}, torch::dtype(torch::kFloat).device(device)).requires_grad_(true)),
        optimizer({parameter}, torch::optim::SGDOptions(0.1)),
        scaler({.rule = rule}) {}

  double step(double factor) {
    backward(factor);
    scaler.update();
    return scaler.get_scale();
  }
  void backward(double factor) {
    optimizer.zero_grad();
    const at::Tensor direction = torch::tensor({3.0F, 4.0F}).to(parameter.device());
    scaler.scale((parameter * (direction * factor)).sum()).backward();
    scaler.step(optimizer);
  }

  at::Tensor parameter;
  torch::optim::SGD optimizer;
  GradScaler scaler;
};

class FollowTest : public test::DeviceTest {};

TEST_P(FollowTest, TheScaleFollowsTheNormOfTheStepBefore) {
  Loop loop(GetParam());
  const auto policy = std::make_shared<Inverse>();
  loop.scaler.follow(policy);
  EXPECT_EQ(loop.step(1.0), 64.0) << "no step before";
  EXPECT_FLOAT_EQ(loop.step(2.0), 200.0);
  EXPECT_FLOAT_EQ(loop.step(8.0), 100.0);
  EXPECT_FLOAT_EQ(loop.step(INFINITY), 50.0) << "the rule's backoff, not 25";
  EXPECT_FLOAT_EQ(loop.step(NAN), 25.0);
  EXPECT_FLOAT_EQ(loop.step(1.0), 25.0) << "1000 / 40, of the last step that was applied";
  EXPECT_FLOAT_EQ(loop.step(16.0), 25.0) << "not 200: what overflowed is not granted again";
  EXPECT_FLOAT_EQ(loop.step(1.0), 12.5);
  const std::vector<double> expected{5.0, 10.0, 40.0, 40.0, 40.0, 5.0, 80.0};
  ASSERT_EQ(policy->asked.size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_FLOAT_EQ(policy->asked[i], expected[i]) << i;
}

TEST_P(FollowTest, NoAnswerLeavesTheRuleAlone) {
  const ScaleRule rule{.init_scale = 64.0, .growth_interval = 2};
  Loop plain(GetParam(), rule), following(GetParam(), rule), ended(GetParam(), rule);
  following.scaler.follow(std::make_shared<Constant>(std::nullopt));
  ended.scaler.follow(std::make_shared<Constant>(3.0));
  ended.scaler.follow(nullptr);
  for (const double factor : {1.0, 1.0, 1.0, static_cast<double>(INFINITY), 1.0, 1.0, 1.0}) {
    const double expected = plain.step(factor);
    EXPECT_EQ(following.step(factor), expected);
    EXPECT_EQ(ended.step(factor), expected);
  }
}

TEST_P(FollowTest, AnswersAreClampedToTheRulesBounds) {
  Loop loop(GetParam(), {.init_scale = 64.0, .min_scale = 32.0, .max_scale = 128.0});
  const auto policy = std::make_shared<Constant>(1e300);
  loop.scaler.follow(policy);
  loop.step(1.0);
  EXPECT_EQ(loop.step(1.0), 128.0);
  policy->answer = 1e-300;
  EXPECT_EQ(loop.step(1.0), 32.0);
}

TEST_P(FollowTest, AWrongAnswerChangesNothing) {
  Loop loop(GetParam());
  const auto policy = std::make_shared<Constant>(std::nullopt);
  loop.scaler.follow(policy);
  loop.step(1.0);
  for (const double wrong : {std::nan(""), static_cast<double>(INFINITY), 0.0, -1.0, 1e-60}) {
    loop.backward(1.0);
    policy->answer = wrong;
    const std::string expected =
        c10::str("GradScaler: Constant.get_loss_scale_factor(5) returned ", wrong, ", expected a finite float32 > 0");
    EXPECT_EQ(message_of([&] { loop.scaler.update(); }).substr(0, expected.size()), expected);
    EXPECT_EQ(loop.scaler.get_scale(), 64.0);
    const auto before = loop.scaler.state()->counters()[kSteps].item<std::int64_t>();
    policy->answer = 16.0;
    loop.scaler.update();
    EXPECT_EQ(loop.scaler.get_scale(), 16.0) << "the update that failed can be made again";
    EXPECT_EQ(loop.scaler.state()->counters()[kSteps].item<std::int64_t>(), before + 1);
    loop.scaler.update(64.0);
  }
}

TEST_P(FollowTest, GrowthRaisesTheLimit) {
  Loop loop(GetParam(), {.init_scale = 64.0, .growth_interval = 3});
  loop.scaler.follow(std::make_shared<Constant>(256.0));
  loop.step(1.0);
  EXPECT_EQ(loop.step(1.0), 256.0);
  EXPECT_EQ(loop.step(INFINITY), 128.0);
  EXPECT_EQ(loop.step(1.0), 128.0);
  EXPECT_EQ(loop.step(1.0), 128.0);
  EXPECT_EQ(loop.step(1.0), 256.0);
}

// A resumed run goes on with the same scales, whether the last step before was applied or not.
TEST_P(FollowTest, ResumesFromACheckpoint) {
  const std::vector<double> factors{1.0, 2.0, INFINITY, 4.0, INFINITY, INFINITY, 8.0, 1.0, 1.0};
  std::vector<double> expected;
  Loop whole(GetParam());
  whole.scaler.follow(std::make_shared<Inverse>());
  for (const double factor : factors) expected.push_back(whole.step(factor));
  for (std::size_t stop = 1; stop < factors.size(); ++stop) {
    std::stringstream file;
    {
      Loop first(GetParam());
      first.scaler.follow(std::make_shared<Inverse>());
      for (std::size_t i = 0; i < stop; ++i) first.step(factors[i]);
      torch::serialize::OutputArchive archive;
      first.scaler.save(archive);
      archive.save_to(file);
    }
    Loop second(GetParam());
    if (stop % 2 == 0) second.scaler.follow(std::make_shared<Inverse>());
    torch::serialize::InputArchive archive;
    archive.load_from(file);
    second.scaler.load(archive);
    if (stop % 2 == 1) second.scaler.follow(std::make_shared<Inverse>());
    for (std::size_t i = stop; i < factors.size(); ++i)
      EXPECT_EQ(second.step(factors[i]), expected[i]) << "stopped at " << stop << ", step " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, FollowTest, testing::Values(at::kCPU, at::kCUDA), test::device_name);

}  // namespace
}  // namespace halfstep
