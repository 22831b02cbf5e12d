// Steps of all kinds: what is captured has the bits of the step as it is, what cannot be captured says why.
#include <cuda_runtime_api.h>

#include "step_graph_fixture.h"

namespace halfstep {
namespace {

using test::same_bits;
using test::Tensors;
using test::train;
using test::Trainee;
using test::TraineeOptions;
using test::Twins;

class StepGraphSteps : public test::DeviceTest {};

// Forward and backward; the caller steps.
Tensors only_backward(Trainee& run, const Tensors& in) {
  const at::Tensor loss = run.loss(in);
  run.scaler->scale(loss).backward();
  return {loss};
}

TEST_P(StepGraphSteps, TwoBackwardPassesInOneStep) {
  Twins twins(GetParam(), [](Trainee& run, const Tensors& in) {
    run.adam().zero_grad();
    Tensors losses;
    for (const std::int64_t begin : {0, 8}) {
      losses.push_back(run.loss({in[0].narrow(0, begin, 8), in[1].narrow(0, begin, 8)}));
      run.scaler->scale(losses.back() / 2).backward();
    }
    run.scaler->step(run.adam(), 1.0);
    run.scaler->update();
    return losses;
  });
  twins.go_to(0, 6);
  twins.go(6, 16, INFINITY);
  twins.go_to(7, 12);
  twins.expect_captures(1, 9);
}

TEST_P(StepGraphSteps, GradientsThatAreKeptAccumulateOverCalls) {
  Twins twins(GetParam(), only_backward);
  for (int i = 0; i < 16; ++i) {
    twins.go(i, 16, i == 9 ? INFINITY : 1.0);
    if (i % 4 != 3) continue;
    twins.each([](Trainee& run) {
      run.scaler->step(run.adam(), 1.0);
      run.scaler->update();
      run.adam().zero_grad(/*set_to_none=*/false);
    });
    twins.expect_same(i);
  }
  EXPECT_EQ(twins.captured.scaler->get_scale(), 512.0);
  twins.expect_captures(1, 13);
}

TEST_P(StepGraphSteps, GradientsThatAreDroppedAccumulateToo) {
  Twins twins(GetParam(), only_backward);
  for (int i = 0; i < 12; ++i) {
    twins.go(i);
    if (i % 4 != 3) continue;
    twins.each([](Trainee& run) {
      run.scaler->step(run.adam());
      run.scaler->update();
      run.adam().zero_grad();
    });
  }
  if (twins.cuda) twins.expect_explained("started anew: the gradient of 0.weight was set or dropped between the calls");
}

TEST_P(StepGraphSteps, TwoOptimizersWithOneScaler) {
  TraineeOptions options;
  options.split = true;
  Twins twins(GetParam(), train, options);
  twins.go_to(0, 6);
  twins.go(6, 16, INFINITY);
  twins.go_to(7, 12);
  EXPECT_EQ(twins.captured.scaler->get_scale(), 512.0);
  twins.expect_captures(1, 9);
}

TEST_P(StepGraphSteps, TwoStepGraphsShareAScaler) {
  TraineeOptions ours, theirs;
  ours.scaler = test::new_scaler();
  theirs.scaler = test::new_scaler();
  auto captured = std::make_unique<Trainee>(GetParam(), train, ours, true),
       other = std::make_unique<Trainee>(GetParam(), train, ours, true);
  Trainee plain(GetParam(), train, theirs, false), plain_other(GetParam(), train, theirs, false);
  const auto go = [&](Trainee& first, Trainee& second, int i, std::int64_t rows, double weight) {
    EXPECT_TRUE(same_bits(first.go(i, rows, weight)[0], second.go(i, rows, weight)[0])) << i;
    const Tensors mine = first.state(), others = second.state();
    ASSERT_EQ(mine.size(), others.size());
    for (std::size_t k = 0; k < mine.size(); ++k) EXPECT_TRUE(same_bits(mine[k], others[k])) << i << " state " << k;
  };
  for (int i = 0; i < 12; ++i) {
    go(*captured, plain, i, 16, i == 6 ? INFINITY : 1.0);
    go(*other, plain_other, i, 8, i == 8 ? INFINITY : 1.0);
  }
  EXPECT_EQ(ours.scaler->get_scale(), 256.0);
  const int captures = GetParam() == at::kCUDA ? 1 : 0;
  EXPECT_EQ(captured->graph->captures(), captures) << captured->graph->explain();
  EXPECT_EQ(other->graph->captures(), captures) << other->graph->explain();
  other.reset();  // an optimizer that the scaler has known is gone
  captured->graph->reset();
  for (int i = 12; i < 18; ++i) go(*captured, plain, i, 16, 1.0);
  EXPECT_EQ(captured->graph->captures(), 2 * captures) << captured->graph->explain();
}

TEST_P(StepGraphSteps, MoreShapesThanMaxGraphsRunAsTheyAre) {
  TraineeOptions options;
  options.graph.max_graphs = 1;
  Twins twins(GetParam(), train, options);
  for (int i = 0; i < 14; ++i) twins.go(i, i % 2 == 0 ? 16 : 8);  // both warm up before one is captured
  twins.go(14, 4);                                                // and one comes when it is full
  twins.expect_captures(1, 4);
  twins.expect_explained_on_cuda("[8]: runs as it is: there are max_graphs = 1 captures already");
  twins.expect_explained_on_cuda("[4]: runs as it is: there are max_graphs = 1 captures already");
}

TEST_P(StepGraphSteps, InputsOnTheCpuRunAsTheyAre) {
  TraineeOptions options;
  options.cpu_inputs = true;
  Twins twins(GetParam(), train, options);
  twins.go_to(0, 6);
  twins.expect_captures(0, 0);
  twins.expect_explained_on_cuda("runs as it is: an input is on cpu");
}

TEST_P(StepGraphSteps, AnInputThatNeedsAGradientRunsAsItIs) {
  Twins twins(GetParam());
  twins.go_to(0, 6);  // the same shape without a gradient is captured
  twins.each([](Trainee& run) { run.x[6].requires_grad_(true); });
  twins.go(6);
  EXPECT_TRUE(twins.captured.x[6].grad().defined());
  EXPECT_TRUE(same_bits(twins.captured.x[6].grad(), twins.plain.x[6].grad()));
  twins.expect_captures(1, 3);
  twins.expect_explained_on_cuda("runs as it is: an input requires a gradient");
}

TEST_P(StepGraphSteps, InputsOfAnyKindRunAsTheyAre) {
  Twins twins(GetParam(), [](Trainee& run, const Tensors& in) { return train(run, {in[0].to_dense(), in[1]}); });
  for (int i = 0; i < 6; ++i) {
    Tensors losses;
    twins.each([&](Trainee& run) {
      torch::manual_seed(i);
      losses.push_back(run.call({run.x[0].to_sparse(), run.y[0], at::Tensor()})[0]);
    });
    EXPECT_TRUE(same_bits(losses[0], losses[1])) << i;
  }
  twins.expect_same(6);
  twins.expect_captures(0, 0);
  twins.expect_explained_on_cuda("runs as it is: an input is Sparse");
}

TEST_P(StepGraphSteps, OutputsAreCopiesUnlessAskedFor) {
  for (const bool copies : {true, false}) {
    TraineeOptions options;
    options.graph.copy_outputs = copies;
    Twins twins(GetParam(), train, options);
    twins.go_to(0, 4);
    const at::Tensor first = twins.captured.go(4)[0], value = first.clone();
    const at::Tensor second = twins.captured.go(5)[0];
    EXPECT_EQ(first.is_same(second), twins.cuda && !copies);
    EXPECT_EQ(same_bits(first, value), !twins.cuda || copies);
    EXPECT_TRUE(same_bits(value, twins.plain.go(4)[0]));
    EXPECT_TRUE(same_bits(second, twins.plain.go(5)[0]));
    EXPECT_FALSE(second.requires_grad());
  }
}

TEST_P(StepGraphSteps, OutputsOnTheCpuRunAsTheyAre) {
  Twins twins(GetParam(), [](Trainee& run, const Tensors& in) { return Tensors{train(run, in)[0], torch::ones({})}; });
  twins.go_to(0, 6);
  twins.expect_captures(0, 0);
  twins.expect_explained_on_cuda("runs as it is: the step returns a tensor on cpu");
}

TEST_P(StepGraphSteps, StepsThatWaitRunAsTheyAre) {
  const bool cuda = GetParam() == at::kCUDA;
  const std::vector<std::function<void(const at::Tensor&)>> waits = {
      [](const at::Tensor& loss) { loss.item<float>(); },
      [cuda](const at::Tensor&) {
        if (cuda) c10::cuda::getCurrentCUDAStream().synchronize();
      },
      [cuda](const at::Tensor&) {  // whose error nobody looks at
        if (cuda) static_cast<void>(cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream()));
      }};
  for (std::size_t k = 0; k < waits.size(); ++k) {
    SCOPED_TRACE(k);
    for (const bool early : {true, false}) {
      Twins twins(GetParam(), [&, early](Trainee& run, const Tensors& in) {
        if (early) waits[k](run.weight);
        const Tensors losses = train(run, in);
        if (!early) waits[k](losses[0]);
        return losses;
      });
      twins.go_to(0, 8);
      twins.expect_captures(0, 0);
      twins.expect_explained_on_cuda("runs as it is: capturing threw");
    }
    Twins later(GetParam());  // dropout, memory and captures work after the failures
    later.go_to(0, 6);
    later.expect_captures(1, 3);
  }
}

TEST_P(StepGraphSteps, StepsOfTorchRunAsTheyAre) {
  Twins direct(GetParam(), [](Trainee& run, const Tensors& in) {
    run.adam().zero_grad();
    const at::Tensor loss = run.loss(in);
    loss.backward();
    run.adam().step();
    return Tensors{loss};
  });
  direct.go_to(0, 8);
  direct.expect_captures(0, 0);
  direct.expect_explained_on_cuda("parameters of torch::optim::Adam are written, but not by the scaler's step()");

  TraineeOptions options;
  options.scaler = std::make_shared<GradScaler>(GradScalerOptions{.enabled = false});
  Twins disabled(GetParam(), train, options);
  disabled.go_to(0, 8);
  disabled.expect_captures(0, 0);
  disabled.expect_explained_on_cuda("runs as it is: the scaler is disabled");

  options.scaler = nullptr;
  Twins other(
      GetParam(),
      [](Trainee& run, const Tensors& in) {
        if (run.optimizers.size() == 1)
          run.optimizers.push_back(std::make_shared<torch::optim::RMSprop>(run.model->parameters(), 1e-3));
        return train(run, in);
      },
      options);
  other.go_to(0, 8);
  other.expect_captures(0, 0);
  other.expect_explained_on_cuda("runs as it is: an optimizer is stepped by torch, after a read on the host");
}

TEST_P(StepGraphSteps, TheTraceOfAStepTellsWhoSteps) {
  Trainee run(GetParam(), train, {}, false);
  run.go(0);
  const auto optimizers = run.pointers();
  const Tensors in = {run.x[0], run.y[0]};
  const auto reason = [&](const std::function<void()>& step) {
    const StepTrace trace(*run.scaler, optimizers, /*sums=*/true);
    step();
    return trace.unfit();
  };
  EXPECT_EQ(reason([&] { train(run, in); }), "");
  EXPECT_EQ(reason([&] { only_backward(run, in); }), "");
  EXPECT_EQ(reason([&] { run.adam().step(); }).find("parameters of torch::optim::Adam are written, but not by"), 0U);
  EXPECT_EQ(reason([&] { run.options().set_lr(0.5); }).find("the step changes learning rates"), 0U);
  EXPECT_EQ(reason([&] { run.scaler->step(run.adam()); }).find("the step leaves the scaler's update()"), 0U);
}

TEST_P(StepGraphSteps, ASchedulerInTheStepRunsAsItIs) {
  Twins twins(GetParam(), [](Trainee& run, const Tensors& in) {
    const Tensors losses = train(run, in);
    run.options().set_lr(run.options().get_lr() * 0.5);
    return losses;
  });
  twins.go_to(0, 8);
  EXPECT_EQ(twins.captured.options().get_lr(), 1e-2 / 256);
  twins.expect_captures(0, 0);
  twins.expect_explained_on_cuda("runs as it is: the step changes learning rates");
}

TEST_P(StepGraphSteps, AnUpdateThatIsLeftToOthersRunsAsItIs) {
  Twins twins(GetParam(), [](Trainee& run, const Tensors& in) {
    run.adam().zero_grad();
    const Tensors losses = only_backward(run, in);
    run.scaler->step(run.adam());
    return losses;
  });
  for (int i = 0; i < 8; ++i) {
    twins.go(i, 16, i == 5 ? INFINITY : 1.0);
    twins.each([](Trainee& run) { run.scaler->update(); });
    twins.expect_same(i);
  }
  EXPECT_EQ(twins.captured.scaler->get_scale(), 512.0);
  twins.expect_captures(0, 0);
  twins.expect_explained_on_cuda("runs as it is: the step leaves the scaler's update() to others");
}

TEST_P(StepGraphSteps, AnUpdateForOthersIsNotReplayed) {
  Twins twins(GetParam());
  twins.go_to(0, 6);
  for (int i = 6; i < 12; ++i) {  // another optimizer's step waits for the update in the captured step
    twins.each([i](Trainee& run) {
      const at::Tensor extra = torch::full({1}, i == 8 ? INFINITY : 1.0, run.device).requires_grad_(true);
      torch::optim::SGD sgd({extra}, 0.1);
      run.scaler->scale(extra.sum() * extra.detach().sum()).backward();
      run.scaler->step(sgd);
      run.go(i);
    });
    twins.expect_same(i);
  }
  EXPECT_EQ(twins.captured.scaler->get_scale(), 512.0);
  twins.expect_captures(1, 3);
  if (!twins.cuda) return;
  twins.expect_explained("started anew: checks of gradients outside the step wait for the scaler's update()");
  twins.expect_explained("runs as it is: checks of gradients outside the step wait for the scaler's update()");
}

TEST_P(StepGraphSteps, AnErrorInTheStepReachesTheCaller) {
  int calls = 0;
  TraineeOptions options;
  options.graph.warmup = 1 << 20;
  Trainee run(
      GetParam(),
      [&](Trainee& mine, const Tensors& in) {
        TORCH_CHECK(++calls != 2, "of the step");
        return train(mine, in);
      },
      options, true);
  run.go(0);
  EXPECT_NE(message_of([&] { run.go(1); }).find("of the step"), std::string::npos);
  run.go(2);
  EXPECT_EQ(calls, 3);
}

INSTANTIATE_TEST_SUITE_P(Devices, StepGraphSteps, testing::Values(at::kCPU, at::kCUDA), test::device_name);

}  // namespace
}  // namespace halfstep
