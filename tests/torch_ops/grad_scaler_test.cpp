// The C++ GradScaler around torch::optim, on the CPU and, where there is one, the GPU.
#include <cmath>
#include <sstream>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "device_fixture.h"
#include "halfstep/torch.h"

namespace halfstep {
namespace {

class GradScalerTest : public test::DeviceTest {};

TEST_P(GradScalerTest, TrainsLikeTheUnscaledLoop) {
  at::Tensor plain = parameter({1.0F, -2.0F, 3.0F});
  at::Tensor scaled = parameter({1.0F, -2.0F, 3.0F});
  torch::optim::SGD plain_sgd({plain}, torch::optim::SGDOptions(0.1).momentum(0.9));
  torch::optim::SGD scaled_sgd({scaled}, torch::optim::SGDOptions(0.1).momentum(0.9));
  GradScaler scaler({.rule = {.init_scale = 1024.0}});
  for (int step = 0; step < 5; ++step) {
    plain_sgd.zero_grad();
    plain.square().sum().backward();
    plain_sgd.step();
    scaled_sgd.zero_grad();
    scaler.scale(scaled.square().sum()).backward();
    EXPECT_TRUE(scaler.step(scaled_sgd));
    scaler.update();
    EXPECT_TRUE(torch::allclose(scaled, plain, 1e-6, 1e-7));
  }
}

TEST_P(GradScalerTest, SkipsAnOverflowAndBacksOff) {
  at::Tensor p = parameter({1.0F});
  torch::optim::Adam adam({p}, torch::optim::AdamOptions(0.1));
  GradScaler scaler({.rule = {.init_scale = 1024.0, .growth_interval = 2}});
  scaler.scale((p * INFINITY).sum()).backward();
  EXPECT_FALSE(scaler.step(adam));
  scaler.update();
  EXPECT_EQ(values(p), std::vector<float>{1.0F});
  scaler.release(adam);
  EXPECT_EQ(static_cast<torch::optim::AdamParamState&>(*adam.state().at(p.unsafeGetTensorImpl())).step(), 0);
  EXPECT_EQ(scaler.get_scale(), 512.0);
  for (int i = 0; i < 2; ++i) {
    adam.zero_grad();
    scaler.scale(p.sum()).backward();
    EXPECT_TRUE(scaler.step(adam));
    scaler.update();
  }
  EXPECT_EQ(scaler.get_scale(), 1024.0);
  EXPECT_EQ(scaler.state()->counters().cpu()[kSkipped].item<int64_t>(), 1);
}

TEST_P(GradScalerTest, UnscaleGivesTrueGradientsForClipping) {
  at::Tensor p = parameter({3.0F, 4.0F});
  torch::optim::SGD sgd({p}, torch::optim::SGDOptions(1.0));
  GradScaler scaler;
  scaler.scale((p * p).sum() / 2).backward();
  scaler.unscale_(sgd);
  EXPECT_EQ(values(p.grad()), (std::vector<float>{3.0F, 4.0F}));
  torch::nn::utils::clip_grad_norm_({p}, 1.0);
  EXPECT_TRUE(scaler.step(sgd));
  EXPECT_NEAR(values(p)[0], 2.4F, 1e-5);
}

TEST_P(GradScalerTest, EachOptimizerIsSkippedByItsOwnGradients) {
  at::Tensor good = parameter({1.0F});
  at::Tensor bad = parameter({1.0F});
  torch::optim::SGD good_sgd({good}, torch::optim::SGDOptions(1.0));
  torch::optim::SGD bad_sgd({bad}, torch::optim::SGDOptions(1.0));
  GradScaler scaler({.rule = {.init_scale = 8.0}});
  scaler.scale((good + bad * INFINITY).sum()).backward();
  EXPECT_TRUE(scaler.step(good_sgd));
  EXPECT_FALSE(scaler.step(bad_sgd));
  scaler.update();
  EXPECT_EQ(values(good)[0], 0.0F);
  EXPECT_EQ(values(bad)[0], 1.0F);
  EXPECT_EQ(scaler.get_scale(), 4.0);
}

TEST_P(GradScalerTest, MisuseIsNamedAndChangesNothing) {
  at::Tensor p = parameter({1.0F});
  torch::optim::SGD sgd({p}, torch::optim::SGDOptions(1.0));
  GradScaler scaler({.rule = {.init_scale = 8.0}});
  EXPECT_NE(message_of([&] { scaler.update(); }).find("update() without a check"), std::string::npos);
  EXPECT_NE(message_of([&] { scaler.step(sgd); }).find("No inf checks were recorded"), std::string::npos);
  const at::Tensor loss = p.sum();
  scaler.scale(loss).backward();
  scaler.unscale_(sgd);
  EXPECT_NE(message_of([&] { scaler.unscale_(sgd); }).find("already been called"), std::string::npos);
  const at::Tensor grad = p.grad();
  p.mutable_grad() = at::Tensor();
  EXPECT_NE(message_of([&] { scaler.step(sgd); }).find("was freed, resized or added"), std::string::npos);
  EXPECT_EQ(values(p)[0], 1.0F);
  p.mutable_grad() = grad;
  EXPECT_TRUE(scaler.step(sgd));
  EXPECT_NE(message_of([&] { scaler.step(sgd); }).find("step() has already been called"), std::string::npos);
  EXPECT_NE(message_of([&] { scaler.unscale_(sgd); }).find("after step()"), std::string::npos);
  for (const double bad : {-1.0, 0.0, static_cast<double>(NAN)})
    EXPECT_NE(message_of([&] { scaler.update(bad); }).find("scale is"), std::string::npos);
  EXPECT_EQ(scaler.get_scale(), 8.0);
  EXPECT_THROW(GradScaler({.rule = {.init_scale = -1.0}}), c10::Error);
}

TEST_P(GradScalerTest, HalfGradientsAreRefusedUnlessAskedFor) {
  at::Tensor p = torch::ones({2}, torch::dtype(torch::kHalf).device(GetParam())).requires_grad_(true);
  torch::optim::SGD sgd({p}, torch::optim::SGDOptions(1.0));
  for (const bool allowed : {false, true}) {
    GradScaler scaler({.rule = {.init_scale = 8.0}, .allow_fp16_gradients = allowed});
    sgd.zero_grad();
    scaler.scale(p.sum()).backward();
    if (allowed) {
      EXPECT_TRUE(scaler.step(sgd));
    } else {
      EXPECT_EQ(message_of([&] { scaler.step(sgd); }), "Attempting to unscale FP16 gradients.");
    }
  }
}

TEST_P(GradScalerTest, SavedStateResumesTheRun) {
  at::Tensor p = parameter({1.0F});
  torch::optim::SGD sgd({p}, torch::optim::SGDOptions(0.1));
  const auto iterate = [&](GradScaler& scaler, float factor) {
    sgd.zero_grad();
    scaler.scale((p * factor).sum()).backward();
    scaler.step(sgd);
    scaler.update();
  };
  ScaleRule rule = scale_rule("megatron");
  rule.init_scale = 256.0;
  GradScaler scaler({.rule = rule});
  iterate(scaler, INFINITY);  // one of two tolerated overflows
  std::stringstream file;
  {
    torch::serialize::OutputArchive archive;
    scaler.save(archive);
    archive.save_to(file);
  }
  GradScaler resumed;
  torch::serialize::InputArchive archive;
  archive.load_from(file);
  resumed.load(archive);
  EXPECT_EQ(resumed.get_scale(), 256.0);
  iterate(resumed, INFINITY);
  EXPECT_EQ(resumed.get_scale(), 128.0);
  EXPECT_EQ(resumed.state()->counters().cpu()[kSteps].item<int64_t>(), 2);

  GradScaler untouched({.rule = {.init_scale = 4.0}});
  torch::serialize::InputArchive empty;
  std::stringstream nothing;
  torch::serialize::OutputArchive().save_to(nothing);
  empty.load_from(nothing);
  EXPECT_NE(message_of([&] { untouched.load(empty); }).find("no entry 'rule'"), std::string::npos);
  EXPECT_EQ(untouched.get_scale(), 4.0);
}

TEST_P(GradScalerTest, LookingAtTheStateBeforeTheFirstLossDoesNotSettleItsDevice) {
  GradScaler fresh, loaded;
  fresh.state()->counters();
  std::stringstream file;
  torch::serialize::OutputArchive out;
  fresh.save(out);
  out.save_to(file);
  torch::serialize::InputArchive in;
  in.load_from(file);
  loaded.load(in);
  loaded.state()->history();
  for (GradScaler* const scaler : {&fresh, &loaded}) {
    scaler->scale(torch::ones({}, torch::device(GetParam())));
    EXPECT_EQ(scaler->state()->counters().device().type(), GetParam());
  }
}

TEST_P(GradScalerTest, DisabledIsThePlainLoop) {
  at::Tensor p = parameter({1.0F});
  torch::optim::SGD sgd({p}, torch::optim::SGDOptions(1.0));
  GradScaler scaler({.enabled = false});
  const at::Tensor loss = p.sum();
  EXPECT_TRUE(scaler.scale(loss).is_same(loss));
  loss.backward();
  scaler.unscale_(sgd);
  EXPECT_TRUE(scaler.step(sgd));
  scaler.update();
  EXPECT_EQ(values(p)[0], 0.0F);
  EXPECT_EQ(scaler.get_scale(), 1.0);
}

INSTANTIATE_TEST_SUITE_P(Devices, GradScalerTest, testing::Values(at::kCPU, at::kCUDA), test::device_name);

}  // namespace
}  // namespace halfstep
