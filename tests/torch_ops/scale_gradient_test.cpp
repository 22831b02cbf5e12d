// scale_gradient and cast as C++ functions: what test_scale_gradient.py cannot see.
#include <cmath>
#include <vector>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "device_fixture.h"
#include "halfstep/torch.h"

namespace halfstep {
namespace {

class ScaleGradient : public test::DeviceTest {};

TEST_P(ScaleGradient, ReadsTheScaleInBackward) {
  const at::Tensor x = parameter({1, 2, 3});
  const at::Tensor scale = torch::full({1}, 2.0, x.options().requires_grad(false));
  const at::Tensor out = halfstep::scale_gradient(x, scale);
  EXPECT_TRUE(out.is_alias_of(x));
  scale.fill_(1024.0);
  out.sum().backward();
  EXPECT_EQ(values(x.grad()), std::vector<float>(3, 1024.0F));
}

TEST_P(ScaleGradient, CarriesAGradientBelowHalfAcrossACast) {
  const at::Tensor x = parameter({1, 2, 3});
  const double scale = 1 << 20;
  // 2^-30 is 0 in float16: scaled before the cast's backward it arrives, and is unscaled in float32.
  const at::Tensor half = halfstep::cast(halfstep::scale_gradient(x, 1 / scale), at::kHalf);
  EXPECT_EQ(half.scalar_type(), at::kHalf);
  const at::Tensor out = halfstep::scale_gradient(halfstep::cast(half, at::kFloat), scale);
  (out.sum() * std::ldexp(1.0, -30)).backward();
  EXPECT_EQ(x.grad().scalar_type(), at::kFloat);
  EXPECT_EQ(values(x.grad()), std::vector<float>(3, std::ldexp(1.0F, -30)));
}

TEST_P(ScaleGradient, NamesWhatIsWrong) {
  const at::Tensor x = parameter({1});
  EXPECT_THROW(halfstep::scale_gradient(x, at::ones({2}, x.options())), c10::ValueError);
  EXPECT_THROW(halfstep::cast(x, at::kLong), c10::TypeError);
  EXPECT_NE(message_of([&] { halfstep::cast(x, at::kLong); }).find("cast: dtype is Long"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Devices, ScaleGradient, testing::Values(at::kCPU, at::kCUDA), test::device_name);

}  // namespace
}  // namespace halfstep
