// Statistics of running layers and their hooks, in a program without Python.
#include <cmath>
#include <thread>

#include <halfstep/torch.h>

#include "device_fixture.h"
#include "halfstep/status.h"

namespace halfstep {
namespace {

class LayerStatisticsTest : public test::DeviceTest {
 protected:
  static double at(const at::Tensor& rows, std::int64_t layer, Observed kind, LayerStatistic column) {
    return rows[layer][kind][column].item<double>();
  }
};
INSTANTIATE_TEST_SUITE_P(Devices, LayerStatisticsTest, testing::Values(at::kCPU, at::kCUDA), test::device_name);

TEST_P(LayerStatisticsTest, SeesOutputsAndBothGradients) {
  LayerStatistics statistics(2, Precision::kFloat16);
  const at::Tensor weight = parameter({2.0F, -3.0F, 0.0F});
  const at::Tensor x = parameter({1.0F, 1e-5F, 4.0F}) * 1.0F;
  statistics.begin_step();
  const at::Tensor y = statistics.watch_input(0, x) * weight;
  statistics.watch_output(0, y);
  const at::Tensor z = statistics.watch_input(1, y) * 3e4F;
  statistics.watch_output(1, z);
  z.sum().backward();

  const at::Tensor rows = statistics.rows();
  EXPECT_EQ(at(rows, 0, kOutput, kSeenElements), 3);
  EXPECT_EQ(at(rows, 0, kOutput, kSeenZeros), 1);
  EXPECT_EQ(at(rows, 0, kOutput, kSeenBelowHalf), 1);
  EXPECT_EQ(at(rows, 0, kOutput, kSeenMaximum), 2);
  EXPECT_FLOAT_EQ(at(rows, 0, kOutputGradient, kSeenMaximum), 3e4);
  EXPECT_FLOAT_EQ(at(rows, 0, kInputGradient, kSeenMaximum), 9e4);
  EXPECT_EQ(at(rows, 0, kInputGradient, kEarliest), 0) << "nothing is infinite in float32";
  EXPECT_EQ(at(rows, 1, kOutput, kSeenMaximum), 6e4);
  EXPECT_EQ(at(rows, 1, kOutputGradient, kSeenSquares), 3);
  EXPECT_FLOAT_EQ(at(rows, 1, kInputGradient, kSeenMaximum), 3e4);
  statistics.reset();
  EXPECT_EQ(statistics.rows().abs().max().item<double>(), 0.0);
}

TEST_P(LayerStatisticsTest, TheOrderTellsWhereItBegan) {
  LayerStatistics statistics(3, Precision::kFloat16);
  StabilityMonitor monitor({"p",
                            {{"a", "L", Precision::kFloat16, ""},
                             {"b", "L", Precision::kFloat16, ""},
                             {"c", "L", Precision::kFloat16, ""}}});
  at::Tensor x = parameter({300.0F}).to(at::kHalf);
  statistics.begin_step();
  for (std::int64_t layer = 0; layer < 3; ++layer) {
    x = statistics.watch_input(layer, x);
    x = layer == 1 ? x * x : x * 1.0;  // 90000
    statistics.watch_output(layer, x);
  }
  EXPECT_EQ(at(statistics.rows(), 1, kOutput, kEarliest), 0.5);
  EXPECT_EQ(at(statistics.rows(), 2, kOutput, kEarliest), 1.0 / 3);
  const auto decisions = monitor.observe(0, statistics.summary(), StepKind::kUnstable);
  ASSERT_EQ(decisions.size(), 1U);
  EXPECT_EQ(decisions[0].layer, "b");
  EXPECT_EQ(monitor.plan().at("b").precision, Precision::kFloat32);
}

TEST_P(LayerStatisticsTest, WatchingChangesNoValueAndNoGradient) {
  const auto run = [&](bool watched) {
    LayerStatistics statistics(1, Precision::kFloat16);
    const at::Tensor leaf = parameter({1.0F, -2.0F, 3.0F});
    const at::Tensor x = leaf * 2.0F;
    at::Tensor y = (watched ? statistics.watch_input(0, x) : x).sin();
    if (watched) statistics.watch_output(0, y);
    y = y + x;  // x goes two ways
    y.relu_();
    y.sum().backward();
    return std::make_pair(values(y), values(leaf.grad()));
  };
  EXPECT_EQ(run(true), run(false));
}

TEST_P(LayerStatisticsTest, PassesOverWhatItCannotRead) {
  LayerStatistics statistics(1, Precision::kFloat16);
  const auto options = torch::TensorOptions().device(GetParam());
  for (const at::Tensor& tensor :
       {torch::ones({3}, options.dtype(at::kLong)), torch::ones({0}, options), torch::ones({3}, at::kMeta),
        at::Tensor(), torch::ones({3}, options.dtype(at::kComplexFloat)), torch::eye(3, options).to_sparse()}) {
    statistics.watch_output(0, tensor);
    EXPECT_TRUE(statistics.watch_input(0, tensor).is_same(tensor));
  }
  EXPECT_EQ(at(statistics.rows(), 0, kOutput, kSeen), 0);
  statistics.watch_output(0, torch::ones({4, 4}, options).t().narrow(0, 1, 2));  // with gaps
  EXPECT_EQ(at(statistics.rows(), 0, kOutput, kSeenElements), 8);
  EXPECT_THROW(statistics.watch_output(1, torch::ones({1})), InvalidArgument);
  EXPECT_THROW(statistics.watch_input(-1, torch::ones({1})), InvalidArgument);
  EXPECT_THROW(LayerStatistics(0, Precision::kFloat16), InvalidArgument);
  EXPECT_THROW(LayerStatistics(1, Precision::kFloat32), InvalidArgument);
}

TEST_P(LayerStatisticsTest, HooksOutliveTheirMakerAndLeaveNothingBehind) {
  const at::Tensor leaf = parameter({1.0F, 2.0F});
  at::Tensor y;
  {
    LayerStatistics statistics(1, Precision::kFloat16);
    y = statistics.watch_input(0, leaf) * 2.0F;
    statistics.watch_output(0, y);
  }
  y.sum().backward();
  EXPECT_EQ(values(leaf.grad()), (std::vector<float>{2.0F, 2.0F}));
  EXPECT_TRUE(torch::autograd::impl::hooks(leaf).empty());
}

TEST_P(LayerStatisticsTest, SeveralThreadsMayWatch) {
  LayerStatistics statistics(4, Precision::kFloat16);
  std::vector<std::thread> threads;
  for (std::int64_t layer = 0; layer < 4; ++layer)
    threads.emplace_back([&, layer] {
      for (int i = 0; i < 50; ++i)
        statistics.watch_output(layer, torch::ones({10}, torch::TensorOptions().device(GetParam())));
    });
  for (std::thread& thread : threads) thread.join();
  for (std::int64_t layer = 0; layer < 4; ++layer) EXPECT_EQ(at(statistics.rows(), layer, kOutput, kSeenElements), 500);
}

// A network whose second layer leaves float16's range, trained by a program that asks the monitor for its plan.
struct Planted : torch::nn::Module {
  Planted() {
    const torch::NoGradGuard no_grad;
    planted->weight.mul_(1e6);
  }
  at::Tensor forward(at::Tensor x, const PrecisionPlan& plan, LayerStatistics& statistics) {
    statistics.begin_step();
    const auto layer = [&](std::int64_t number, const char* name, auto& module, const at::Tensor& input) {
      const at::Tensor output = plan.run(name, module, statistics.watch_input(number, input));
      statistics.watch_output(number, output);
      return output;
    };
    x = layer(0, "first", first, x).relu();
    x = layer(1, "planted", planted, x);
    x = layer(2, "norm", norm, x).relu();
    return layer(3, "last", last, x);
  }
  torch::nn::Linear first = register_module("first", torch::nn::Linear(4, 16));
  torch::nn::Linear planted = register_module("planted", torch::nn::Linear(16, 16));
  torch::nn::LayerNorm norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({16})));
  torch::nn::Linear last = register_module("last", torch::nn::Linear(16, 1));
};

TEST_P(LayerStatisticsTest, AProgramAdaptsByTheMonitorsPlan) {
  torch::manual_seed(0);
  const auto model = std::make_shared<Planted>();
  model->to(GetParam());
  StabilityMonitor monitor(plan(*model, PrecisionPolicy::named("mixed_float16")));
  ASSERT_EQ(monitor.base().layers().size(), 4U);
  LayerStatistics statistics(4, monitor.half());
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(1e-3));
  GradScaler scaler({.rule = {.init_scale = 1024.0}});
  const at::Tensor x = torch::randn({32, 4}, torch::TensorOptions().device(GetParam()));
  std::vector<StabilityDecision> decisions;
  std::vector<float> losses;
  for (std::int64_t batch = 0; batch < 10; ++batch) {
    const PrecisionPlan now = monitor.plan();
    optimizer.zero_grad();
    at::Tensor loss;
    {
      const AutocastScope autocast(GetParam(), at::kHalf);
      loss = torch::mse_loss(model->forward(x, now, statistics).to(at::kFloat), x.narrow(1, 0, 1));
    }
    losses.push_back(loss.item<float>());
    const bool finite = std::isfinite(losses.back());
    if (finite) {
      scaler.scale(loss).backward();
      scaler.step(optimizer);
      scaler.update();
    }
    for (const auto& decision :
         monitor.observe(batch, statistics.summary(), finite ? StepKind::kUsual : StepKind::kUnstable))
      decisions.push_back(decision);
    statistics.reset();
  }
  ASSERT_EQ(decisions.size(), 1U);
  EXPECT_EQ(decisions[0].layer, "planted");
  EXPECT_EQ(decisions[0].batch, 0);
  EXPECT_FALSE(std::isfinite(losses[0]));
  for (std::size_t i = 1; i < losses.size(); ++i) EXPECT_TRUE(std::isfinite(losses[i]));
  EXPECT_LT(losses.back(), losses[1]);
  EXPECT_EQ(monitor.half_share(), 0.75);
}

}  // namespace
}  // namespace halfstep
