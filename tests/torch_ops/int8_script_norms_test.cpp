// quantize(): layer norms that write int8 for the layers that read them.
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>
#include <torch/script.h>

#include "halfstep/torch/int8.h"
#include "int8_script_fixture.h"

namespace halfstep {
namespace {

class Int8ScriptNorms : public test::Int8ScriptTest {
 protected:
  // A norm that two linear layers read, and what else `forward` does.
  torch::jit::Module normed(const char* forward) const {
    torch::jit::Module module("Normed");
    module.register_module("norm", test::layer("LayerNorm", random({16}) + 1, random({16}), R"(
    def forward(self, x):
      return torch.layer_norm(x, [16], self.weight, self.bias, 1e-5, True)
  )"));
    for (const char* const name : {"a", "b"})
      module.register_module(name,
                             test::layer("Linear", random({16, 16}), random({16}),
                                         "def forward(self, x):\n  return torch.linear(x, self.weight, self.bias)\n"));
    module.define(forward);
    return module;
  }

  std::vector<std::vector<c10::IValue>> rows() const {
    std::vector<std::vector<c10::IValue>> batches;
    for (int i = 0; i < 6; ++i) batches.push_back({random({8, 16})});
    return batches;
  }
};

INSTANTIATE_TEST_SUITE_P(Devices, Int8ScriptNorms, testing::Values(at::kCPU, at::kCUDA), test::device_name);

TEST_P(Int8ScriptNorms, LayerNormsWriteInt8) {
  const torch::jit::Module model = normed(R"(
    def forward(self, x):
      y = self.norm.forward(x)
      return torch.relu(self.a.forward(y)) + self.b.forward(y) * torch.size(y, 0)
  )");
  const auto batches = rows();
  const torch::NoGradGuard no_grad;
  const auto parameter = [&](const char* name) { return model.attr("norm").toModule().attr(name).toTensor(); };
  for (const bool dynamic : {false, true}) {
    QuantizeOptions how;
    how.dynamic = dynamic;
    const Quantized result = test::quantized(model, batches, how);
    EXPECT_EQ(entry(result.report, "a").fused, "a + norm norm + relu");
    EXPECT_EQ(entry(result.report, "b").fused, "b + norm norm");
    EXPECT_EQ(calls_of(result.module, "aten::layer_norm"), 0);
    EXPECT_EQ(calls_of(result.module, "halfstep::layer_norm_int8"), 1);
    for (const auto& batch : batches) EXPECT_LT(noise(call(model, batch), call(result.module, batch)), 0.01);
    if (!dynamic) continue;
    const auto [quantized, scales, none] =
        layer_norm_int8(batches[0][0].toTensor(), {16}, parameter("weight"), parameter("bias"), 1e-5);
    const auto linear = [&](const char* name, const at::Tensor& input, const at::Tensor& rows, const char* activation) {
      Int8Call arguments;
      arguments.activation = activation;
      arguments.input_row_scales = rows;
      const auto packed = result.module.attr(name).toModule().attr("packed").toCustomClass<PackedInt8>();
      return int8_linear(input, packed, arguments);
    };
    const at::Tensor expected = linear("a", quantized, scales, "relu") + linear("b", quantized, scales, "none") * 8;
    EXPECT_TRUE(at::equal(call(result.module, batches[0]), expected));
  }
}

TEST_P(Int8ScriptNorms, LayerNormsThatAreWrittenToOrReadByFloatLayers) {
  const auto batches = rows();
  const auto fused = [&](const char* forward, const QuantizeOptions& how = {}) {
    const torch::jit::Module model = normed(forward);
    const Quantized result = test::quantized(model, batches, how);
    for (const auto& batch : batches)
      EXPECT_LT(noise(call(model, {batch[0].toTensor().clone()}), call(result.module, {batch[0].toTensor().clone()})),
                0.01);
    return std::pair(entry(result.report, "a").fused, calls_of(result.module, "halfstep::layer_norm_int8"));
  };
  const auto yes = std::pair(std::string("a + norm norm"), std::int64_t{1});
  const auto no = std::pair(std::string(), std::int64_t{0});
  const char* const read_too = R"(
    def forward(self, x):
      y = self.norm.forward(x)
      return self.a.forward(y) * y + self.b.forward(y)
  )";
  EXPECT_EQ(fused(read_too), yes);
  QuantizeOptions half;
  half.exclude = {"b"};
  EXPECT_EQ(fused(read_too, half), yes);
  EXPECT_EQ(fused(R"(
    def forward(self, x):
      y = self.norm.forward(x)
      z = self.a.forward(y)
      y.add_(1)
      return z * self.b.forward(x) + y
  )"),
            yes);
  EXPECT_EQ(fused(R"(
    def forward(self, x):
      y = self.norm.forward(x)
      y.add_(1)
      return self.a.forward(y) * self.b.forward(x)
  )"),
            no);
  EXPECT_EQ(fused(R"(
    def forward(self, x):
      y = self.norm.forward(x)
      for i in range(2):
        x = x + self.a.forward(y) * 0.5
        y.mul_(2)
      return x * self.b.forward(x)
  )"),
            no);
}

TEST_P(Int8ScriptNorms, RmsNormsWriteInt8) {
  const torch::jit::Module model = normed(R"(
    def forward(self, x):
      y = torch.rms_norm(x, [16], self.norm.weight, 1e-5)
      return torch.relu(self.a.forward(y)) + self.b.forward(torch.rms_norm(y * x, [16])) * y
  )");
  const auto batches = rows();
  const torch::NoGradGuard no_grad;
  const Quantized result = test::quantized(model, batches);
  EXPECT_EQ(entry(result.report, "a").fused, "a + norm norm + relu");
  EXPECT_EQ(entry(result.report, "b").fused, "b + norm rms_norm");
  EXPECT_EQ(calls_of(result.module, "aten::rms_norm"), 0);
  EXPECT_EQ(calls_of(result.module, "halfstep::rms_norm_int8"), 2);
  for (const auto& batch : batches) EXPECT_LT(noise(call(model, batch), call(result.module, batch)), 0.01);
}

TEST_P(Int8ScriptNorms, ALayerNormOfAHalfModuleStaysHalf) {
  torch::jit::Module model = normed(R"(
    def forward(self, x):
      y = self.norm.forward(x)
      return self.a.forward(y) + self.b.forward(y) * y
  )");
  model.to(at::kBFloat16);
  std::vector<std::vector<c10::IValue>> batches = rows();
  for (auto& batch : batches) batch[0] = batch[0].toTensor().to(at::kBFloat16);
  const Quantized result = test::quantized(model, batches);
  EXPECT_EQ(calls_of(result.module, "halfstep::layer_norm_int8"), 1);
  const at::Tensor got = call(result.module, batches[0]);
  EXPECT_EQ(got.scalar_type(), at::kBFloat16);
  EXPECT_LT(noise(call(model, batches[0]).to(at::kFloat), got.to(at::kFloat)), 0.01);
}

}  // namespace
}  // namespace halfstep
