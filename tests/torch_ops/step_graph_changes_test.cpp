// What changes between the calls of a captured step is followed, or leads to a new capture that says why.
#include <sstream>

#include <ATen/cuda/CUDAContext.h>

#include "step_graph_fixture.h"

namespace halfstep {
namespace {

using test::Tensors;
using test::train;
using test::Trainee;
using test::TraineeOptions;
using test::Twins;

class StepGraphChanges : public test::DeviceTest {};

TEST_P(StepGraphChanges, AnOverflowSkipsTheReplayedStepWhole) {
  Twins twins(GetParam());
  twins.go_to(0, 8);
  const Tensors params = twins.captured.model->parameters();
  Tensors before;
  for (const at::Tensor& parameter : params) before.push_back(parameter.detach().clone());
  twins.go(8, 16, INFINITY);
  for (std::size_t i = 0; i < params.size(); ++i) EXPECT_TRUE(test::same_bits(params[i], before[i])) << i;
  EXPECT_EQ(twins.captured.scaler->get_scale(), 512.0);
  twins.go_to(9, 12);
  EXPECT_FALSE(test::same_bits(params[0], before[0]));
  twins.expect_captures(1, 9);
  twins.each([](Trainee& run) { run.scaler->release(run.adam()); });
  for (Trainee* const run : {&twins.captured, &twins.plain}) {
    const auto& state = run->adam().state().begin()->second;
    EXPECT_EQ(static_cast<torch::optim::AdamParamState&>(*state).step(), 11);
  }
}

TEST_P(StepGraphChanges, OptionsAreFollowedByOneCapture) {
  Twins twins(GetParam());
  for (int i = 0; i < 16; ++i) {
    twins.each([i](Trainee& run) {
      run.options().set_lr(1e-2 / (i + 1));
      run.options().weight_decay(i < 6 ? 0.0 : 0.1).eps(i < 8 ? 1e-8 : 1e-3).betas({i < 10 ? 0.9 : 0.5, 0.999});
    });
    twins.go(i);
  }
  twins.expect_captures(1, 13);
}

TEST_P(StepGraphChanges, AScaleThatIsSetIsFollowedByOneCapture) {
  Twins twins(GetParam());
  twins.go_to(0, 6);
  twins.each([](Trainee& run) { run.scaler->update(256.0); });
  twins.go_to(6, 10);
  EXPECT_EQ(twins.captured.scaler->get_scale(), 256.0);
  twins.expect_captures(1, 7);
}

TEST_P(StepGraphChanges, AnotherRuleOfTheScalerIsCapturedAnew) {
  Twins twins(GetParam());
  twins.go_to(0, 6);
  twins.each([](Trainee& run) {
    const GradScaler other({.rule = {.init_scale = 512.0, .growth_interval = 2}});
    torch::serialize::OutputArchive saved;
    other.save(saved);
    std::stringstream file;
    saved.save_to(file);
    torch::serialize::InputArchive archive;
    archive.load_from(file);
    run.scaler->load(archive);
  });
  twins.go_to(6, 12);
  EXPECT_EQ(twins.captured.scaler->get_scale(), 4096.0);  // doubled three times
  twins.expect_captures(2, 6);
  if (twins.cuda) twins.expect_explained("started anew: the scaler's state was loaded or replaced");
}

TEST_P(StepGraphChanges, AScalerThatFollowsAPolicyIsReplayed) {
  struct Inverse : CustomPrecisionPolicy {
    std::optional<double> get_loss_scale_factor(double gradient_norm) const override { return 1000.0 / gradient_norm; }
  };
  Twins twins(GetParam());
  twins.go_to(0, 6);
  const std::int64_t captures = twins.graph().captures(), replays = twins.graph().replays();
  twins.each([](Trainee& run) { run.scaler->follow(std::make_shared<Inverse>()); });
  twins.go_to(6, 14);
  EXPECT_NE(twins.plain.scaler->get_scale(), 1024.0);
  EXPECT_EQ(twins.graph().captures(), captures);
  if (twins.cuda) {
    EXPECT_EQ(twins.graph().replays(), replays + 8);
  }
}

TEST_P(StepGraphChanges, AReplacedParameterIsCapturedAnew) {
  Twins twins(GetParam());
  twins.go_to(0, 6);
  twins.each([](Trainee& run) {
    const at::Tensor other = run.parameter(0).detach().mul(0.5).requires_grad_(true);
    run.parameter(0) = other;
    run.model->ptr(0)->as<torch::nn::LinearImpl>()->weight = other;
  });
  twins.go_to(6, 12);
  twins.expect_captures(2, 6);
  twins.expect_explained("started anew: parameter 0 of the optimizers was replaced");
}

TEST_P(StepGraphChanges, AMovedParameterIsCapturedAnew) {
  Twins twins(GetParam());
  twins.go_to(0, 6);
  twins.each([](Trainee& run) { run.parameter(0).set_data(run.parameter(0).detach().mul(0.5)); });
  twins.go_to(6, 12);
  twins.expect_captures(2, 6);
  twins.expect_explained("started anew: 0.weight has moved");
}

TEST_P(StepGraphChanges, AModelMayMoveToItsDeviceLater) {
  Twins twins(GetParam());
  Trainee& late = twins.captured;
  late.model->to(at::kCPU);
  late.graph.emplace(*late.scaler, late.pointers(), [&late](const Tensors& in) { return train(late, in); });
  late.model->to(late.device);
  twins.go_to(0, 6);
  twins.expect_captures(1, 3);
  if (twins.cuda) twins.expect_explained("started anew: parameter 0 of the optimizers has moved");
}

TEST_P(StepGraphChanges, AnotherGroupIsCapturedAnew) {
  TraineeOptions options;
  options.watch_modules = false;
  Twins twins(GetParam(), train, options);
  twins.each([](Trainee& run) { run.adam().param_groups()[0].params().pop_back(); });
  twins.go_to(0, 6);
  twins.each([](Trainee& run) {
    run.adam().add_param_group(torch::optim::OptimizerParamGroup({run.model->parameters().back()}));
  });
  twins.go_to(6, 12);
  twins.expect_captures(2, 6);
  twins.expect_explained("started anew: an optimizer has fewer parameters");
  twins.expect_explained("started anew: an optimizer has more parameters");
}

TEST_P(StepGraphChanges, FreezingIsCapturedAnew) {
  Twins twins(GetParam());
  for (const bool trained : {false, true}) {
    twins.go_to(trained ? 6 : 0, trained ? 12 : 6);
    twins.each([trained](Trainee& run) { run.parameter(0).requires_grad_(trained); });
  }
  const at::Tensor frozen = twins.captured.parameter(0).detach().clone();
  twins.go_to(12, 18);
  EXPECT_FALSE(test::same_bits(frozen, twins.captured.parameter(0)));
  twins.expect_captures(3, 9);
  twins.expect_explained("started anew: 0.weight was frozen");
  twins.expect_explained("started anew: 0.weight was unfrozen");
}

TEST_P(StepGraphChanges, AnotherModeIsCapturedAnew) {
  Twins twins(GetParam());
  twins.go_to(0, 6);
  twins.each([](Trainee& run) { run.norm().eval(); });
  const at::Tensor mean = twins.captured.norm().running_mean.clone();
  twins.go_to(6, 12);
  EXPECT_TRUE(test::same_bits(mean, twins.captured.norm().running_mean));
  twins.each([](Trainee& run) { run.model->eval(); });  // no dropout any more
  twins.go_to(12, 18);
  twins.expect_captures(3, 9);
  twins.expect_explained("started anew: module 1 was set to eval()");
  twins.expect_explained("started anew: a module was set to eval()");
}

TEST_P(StepGraphChanges, AMovedBufferIsCapturedAnew) {
  Twins twins(GetParam());
  twins.go_to(0, 6);
  twins.each([](Trainee& run) { run.norm().running_mean.set_data(run.norm().running_mean.mul(2)); });
  twins.go_to(6, 12);
  twins.expect_captures(2, 6);
  twins.expect_explained("started anew: 1.running_mean has moved");
}

TEST_P(StepGraphChanges, AnAddedModuleIsCapturedAnew) {
  Twins twins(GetParam());
  twins.go_to(0, 6);
  twins.each([](Trainee& run) { run.model->push_back(torch::nn::Tanh()); });
  twins.go_to(6, 12);
  twins.expect_captures(2, 6);
  twins.expect_explained("started anew: a module was added or replaced");
}

TEST_P(StepGraphChanges, AMemberThatIsAssignedNeedsAReset) {
  Twins twins(GetParam());
  twins.each([](Trainee& run) { run.norm().eval(); });  // it reads the mean
  twins.go_to(0, 6);
  twins.each([](Trainee& run) { run.norm().running_mean = run.norm().running_mean.add(1); });
  twins.graph().reset();
  twins.go_to(6, 12);
  twins.expect_captures(2, 6);
  twins.expect_explained("started anew: reset() was called");
}

TEST_P(StepGraphChanges, ADroppedGradientIsCapturedAnew) {
  const auto keep = [](Trainee& run, const Tensors& in) {
    for (const auto& optimizer : run.optimizers) optimizer->zero_grad(/*set_to_none=*/false);
    const at::Tensor loss = run.loss(in);
    run.scaler->scale(loss).backward();
    run.scaler->step(run.adam());
    run.scaler->update();
    return Tensors{loss};
  };
  Twins twins(GetParam(), keep);
  twins.go_to(0, 6);
  twins.each([](Trainee& run) { run.adam().zero_grad(); });
  twins.go_to(6, 12);
  twins.expect_captures(2, 6);
  if (twins.cuda) twins.expect_explained("started anew: the gradient of 0.weight was set or dropped");
}

TEST_P(StepGraphChanges, MemoryIsCountedAndGivenBack) {
  Twins twins(GetParam());
  EXPECT_EQ(twins.graph().memory(), 0U);
  twins.go_to(0, 3);
  EXPECT_EQ(twins.graph().memory(), 0U);
  twins.go(3);
  twins.go(4, 8);
  EXPECT_EQ(twins.graph().memory() > 0, twins.cuda);
  if (twins.cuda) twins.expect_explained("captured, 1 replays, ");
  twins.graph().reset();
  EXPECT_EQ(twins.graph().memory(), 0U);
  twins.go(5);
  if (!twins.cuda) return;
  std::vector<std::int64_t> reserved;
  for (int round = 0; round < 6; ++round) {
    twins.go_to(6, 12);
    EXPECT_GT(twins.graph().memory(), 0U);
    twins.graph().reset();
    twins.each([](Trainee& run) { run.adam().zero_grad(); });  // they lie in the pool
    c10::cuda::CUDACachingAllocator::emptyCache();
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(0);
    reserved.push_back(
        stats.reserved_bytes[static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE)].current);
  }
  EXPECT_EQ(reserved[5], reserved[1]) << "a capture that was dropped keeps memory";
  EXPECT_EQ(twins.graph().captures(), 7) << twins.graph().explain();
}

TEST_P(StepGraphChanges, OnlyTheLastReasonsAreKept) {
  Twins twins(GetParam());
  for (int i = 0; i < 7; ++i) twins.graph().reset("reason " + std::to_string(i));
  EXPECT_EQ(twins.graph().explain().find("reason 1"), std::string::npos);
  twins.expect_explained("reason 2");
  twins.expect_explained("reason 6");
}

INSTANTIATE_TEST_SUITE_P(Devices, StepGraphChanges, testing::Values(at::kCPU, at::kCUDA), test::device_name);

}  // namespace
}  // namespace halfstep
