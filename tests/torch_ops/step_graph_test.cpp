// A replayed step is the step: bits, learning rates, skips, shapes, failures.
#include "halfstep/torch/step_graph.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "device_fixture.h"
#include "halfstep/torch.h"

namespace halfstep {
namespace {

constexpr int kForever = 1 << 30;  // a warm-up that never ends: the same step, never captured

class StepGraphs : public test::DeviceTest {};

// A network with dropout, its captured step and data.
template <class Optimizer, class Options>
struct Training {
  Training(at::DeviceType where, Options options, int warmup, std::optional<double> max_norm = {}, bool waits = false)
      : device(where), model(seeded()), optimizer(model->parameters(), options), weight(torch::ones({}, device)) {
    StepGraphOptions settings;
    settings.warmup = warmup;
    graph.emplace(
        scaler, std::vector<torch::optim::Optimizer*>{&optimizer},
        [this, max_norm, waits](const std::vector<at::Tensor>& in) {
          optimizer.zero_grad();
          at::Tensor loss;
          {
            const AutocastScope autocast(device.type(), device.is_cuda() ? at::kHalf : at::kBFloat16);
            loss = torch::nn::functional::cross_entropy(model->forward(in[0]).to(at::kFloat), in[1]) * weight;
          }
          scaler.scale(loss).backward();
          scaler.step(optimizer, max_norm);
          if (waits) loss.item<float>();
          scaler.update();
          return std::vector<at::Tensor>{loss.detach()};
        },
        settings);
    torch::manual_seed(3);
    for (int i = 0; i < 40; ++i) {
      x.push_back(torch::randn({16, 8}).to(device));
      y.push_back(torch::randint(4, {16}, torch::kLong).to(device));
    }
  }

  torch::nn::Sequential seeded() {
    torch::manual_seed(1);
    torch::nn::Sequential made(torch::nn::Linear(8, 32), torch::nn::ReLU(), torch::nn::Dropout(0.2),
                               torch::nn::Linear(32, 4));
    made->to(device);
    return made;
  }

  // Steps `begin` to `end`, with an overflow in step 12.
  std::vector<float> go(int begin, int end, std::int64_t rows = 16) {
    std::vector<float> losses;
    for (int i = begin; i < end; ++i) {
      weight.fill_(i == 12 ? INFINITY : 1.0);
      losses.push_back((*graph)({x[i].narrow(0, 0, rows), y[i].narrow(0, 0, rows)})[0].template item<float>());
    }
    return losses;
  }

  at::Device device;
  torch::nn::Sequential model;
  Optimizer optimizer;
  at::Tensor weight;
  GradScaler scaler{{.rule = {.init_scale = 1024.0}}};
  std::optional<StepGraph> graph;
  std::vector<at::Tensor> x, y;
};

template <class A>
void expect_same(A& first, A& second) {
  const auto mine = first.model->parameters(), other = second.model->parameters();
  for (std::size_t i = 0; i < mine.size(); ++i) EXPECT_TRUE(torch::equal(mine[i], other[i])) << i;
  EXPECT_EQ(first.scaler.get_scale(), second.scaler.get_scale());
  EXPECT_TRUE(torch::equal(first.scaler.state()->counters(), second.scaler.state()->counters()));
}

using torch::optim::Adam;
using torch::optim::AdamOptions;
using AdamRun = Training<Adam, AdamOptions>;

TEST_P(StepGraphs, ReplaysAreBitEqualToTheStep) {
  AdamRun captured(GetParam(), AdamOptions(1e-2), 3, 1.0), plain(GetParam(), AdamOptions(1e-2), kForever, 1.0);
  for (AdamRun* const run : {&captured, &plain}) {
    torch::manual_seed(5);
    run->go(0, 40);
  }
  expect_same(captured, plain);
  const bool cuda = GetParam() == at::kCUDA;
  EXPECT_EQ(captured.graph->captures(), cuda ? 1 : 0) << captured.graph->explain();
  EXPECT_EQ(captured.graph->replays(), cuda ? 37 : 0);
  EXPECT_EQ(plain.graph->captures(), 0);
  EXPECT_EQ(captured.graph->explain().find("a parameter is on cpu") == std::string::npos, cuda);
  captured.scaler.release(captured.optimizer);  // 40 steps, one of them skipped
  const auto& state = captured.optimizer.state().begin()->second;
  EXPECT_EQ(static_cast<torch::optim::AdamParamState&>(*state).step(), 39);
}

TEST_P(StepGraphs, FollowLearningRatesWithOneCapture) {
  using Sgd = torch::optim::SGD;
  using Options = torch::optim::SGDOptions;
  Training<Sgd, Options> captured(GetParam(), Options(0.1).momentum(0.9), 3),
      plain(GetParam(), Options(0.1).momentum(0.9), kForever);
  for (auto* const run : {&captured, &plain}) {
    torch::manual_seed(5);
    for (int i = 0; i < 40; ++i) {
      run->optimizer.param_groups()[0].options().set_lr(0.1 / (i + 1));
      run->go(i, i + 1);
    }
  }
  expect_same(captured, plain);
  EXPECT_EQ(captured.graph->captures(), GetParam() == at::kCUDA ? 1 : 0);
}

TEST_P(StepGraphs, MixWithOtherShapesEagerStepsAndReleases) {
  AdamRun captured(GetParam(), AdamOptions(1e-2), 2), plain(GetParam(), AdamOptions(1e-2), kForever);
  for (AdamRun* const run : {&captured, &plain}) {
    torch::manual_seed(5);
    for (int i = 0; i < 20; ++i) run->go(i, i + 1, i % 2 == 0 ? 16 : 8);
    run->scaler.release(run->optimizer);
    run->go(20, 40);
  }
  expect_same(captured, plain);
  EXPECT_EQ(captured.graph->captures(), GetParam() == at::kCUDA ? 3 : 0) << captured.graph->explain();
}

TEST_P(StepGraphs, AStepThatWaitsRunsAsItIs) {
  AdamRun captured(GetParam(), AdamOptions(1e-2), 3, {}, true),
      plain(GetParam(), AdamOptions(1e-2), kForever, {}, true);
  for (AdamRun* const run : {&captured, &plain}) {
    torch::manual_seed(5);
    run->go(0, 20);
  }
  expect_same(captured, plain);
  EXPECT_EQ(captured.graph->captures(), 0);
  EXPECT_NE(captured.graph->explain().find("runs as it is"), std::string::npos) << captured.graph->explain();
  AdamRun later(GetParam(), AdamOptions(1e-2), 3);  // dropout, memory and captures work after the failure
  later.go(0, 10);
  EXPECT_EQ(later.graph->captures(), GetParam() == at::kCUDA ? 1 : 0) << later.graph->explain();
}

TEST_P(StepGraphs, RefuseWhatCannotBe) {
  GradScaler scaler;
  const auto step = [](const std::vector<at::Tensor>& inputs) { return inputs; };
  EXPECT_NE(message_of([&] { StepGraph(scaler, {}, step); }).find("got no optimizer"), std::string::npos);
  Adam adam({parameter({1.0F})});
  StepGraphOptions none;
  none.warmup = 0;
  EXPECT_NE(message_of([&] { StepGraph(scaler, {&adam}, step, none); }).find("warmup is 0"), std::string::npos);
  StepGraphOptions null;
  null.modules.push_back(nullptr);
  EXPECT_NE(message_of([&] { StepGraph(scaler, {&adam}, step, null); }).find("a module is null"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Devices, StepGraphs, testing::Values(at::kCPU, at::kCUDA), test::device_name);

}  // namespace
}  // namespace halfstep
