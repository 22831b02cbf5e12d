// The norms and cross entropy as C++ functions: what test_norms.py and test_cross_entropy.py cannot see.
#include <stdexcept>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "halfstep/torch/cross_entropy.h"
#include "halfstep/torch/norms.h"

namespace halfstep {
namespace {

TEST(Norms, ABlockWithAFloat32ResidualStream) {
  const auto weight = torch::ones({32}).requires_grad_();
  const auto residual = torch::randn({4, 32}).requires_grad_();
  const at::Tensor normed = halfstep::layer_norm(residual, {32}, weight, std::nullopt, 1e-5, at::kBFloat16);
  EXPECT_EQ(normed.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::allclose(normed, at::layer_norm(residual, {32}, weight).to(at::kBFloat16), 1e-2));
  halfstep::rms_norm(normed, {32}, weight).sum().backward();
  EXPECT_EQ(residual.grad().scalar_type(), at::kFloat);
  EXPECT_EQ(weight.grad().sizes(), at::IntArrayRef({32}));
  EXPECT_EQ(halfstep::group_norm(residual.to(at::kHalf), 4).scalar_type(), at::kHalf);
}

TEST(CrossEntropy, TrainsOnHalfLogits) {
  const auto logits = torch::randn({6, 11}).to(at::kHalf).requires_grad_();
  const auto target = torch::randint(11, {6}, at::kLong);
  const at::Tensor loss = halfstep::cross_entropy(logits, target);
  EXPECT_TRUE(at::allclose(loss, at::cross_entropy_loss(logits.to(at::kFloat), target)));
  loss.backward();
  EXPECT_EQ(logits.grad().scalar_type(), at::kHalf);
}

TEST(HalfReductionsScope, RestoresAlsoAfterAnException) {
  try {
    const HalfReductionsScope scope;
    {
      const HalfReductionsScope inner(false);
      EXPECT_FALSE(set_half_reductions(false));
    }
    EXPECT_TRUE(set_half_reductions(true));
    throw std::runtime_error("forward failed");
  } catch (const std::runtime_error&) {
  }
  EXPECT_FALSE(set_half_reductions(false));
}

}  // namespace
}  // namespace halfstep
