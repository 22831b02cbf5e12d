#include "halfstep/torch/scopes.h"

#include <stdexcept>

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

namespace halfstep {
namespace {

bool enabled() {
  return at::autocast::is_autocast_enabled(at::kCPU);
}
at::ScalarType product_type(const at::Tensor& a) {
  return at::mm(a, a).scalar_type();
}

TEST(AutocastScope, CastsInsideAndRestoresOutside) {
  const at::Tensor a = at::rand({4, 4});
  const at::ScalarType before = at::autocast::get_autocast_dtype(at::kCPU);
  EXPECT_EQ(product_type(a), at::kFloat);
  {
    const AutocastScope outer(at::kCPU, at::kBFloat16);
    EXPECT_EQ(product_type(a), at::kBFloat16);
    {
      const AutocastScope inner(at::kCPU, at::kHalf, /*enabled=*/false);
      EXPECT_EQ(product_type(a), at::kFloat);
    }
    EXPECT_EQ(product_type(a), at::kBFloat16);
  }
  EXPECT_EQ(product_type(a), at::kFloat);
  EXPECT_EQ(at::autocast::get_autocast_dtype(at::kCPU), before);
}

TEST(AutocastScope, RestoresAfterAnException) {
  try {
    const AutocastScope scope(at::kCPU, at::kBFloat16);
    throw std::runtime_error("forward failed");
  } catch (const std::runtime_error&) {
  }
  EXPECT_FALSE(enabled());
  EXPECT_EQ(at::autocast::increment_nesting(), 1) << "the nesting count leaked";
  at::autocast::decrement_nesting();
}

TEST(AutocastScope, AnotherDtypeIsRefusedAndChangesNothing) {
  EXPECT_THROW(AutocastScope(at::kCPU, at::kFloat), c10::Error);
  EXPECT_FALSE(enabled());
}

// LibTorch keeps casts of weights until the outermost region ends: an update in between would go unseen.
TEST(AutocastScope, AnInnerScopesEndDropsTheCastsOfWeights) {
  at::Tensor weight = at::ones({2, 2});
  weight.requires_grad_(true);
  const at::Tensor x = at::ones({2, 2});
  const AutocastScope outer(at::kCPU, at::kBFloat16);
  const auto product = [&] {
    const AutocastScope inner(at::kCPU, at::kBFloat16);
    return at::mm(x, weight).sum().item<float>();
  };
  EXPECT_EQ(product(), 8.0F);
  {
    const torch::NoGradGuard no_grad;
    weight.mul_(3.0);
  }
  EXPECT_EQ(product(), 24.0F);
}

}  // namespace
}  // namespace halfstep
