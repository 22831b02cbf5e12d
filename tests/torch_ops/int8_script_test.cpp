// quantize() of modules that are made here, of TorchScript's text.
#include "halfstep/torch/int8_script.h"

#include <sstream>
#include <thread>

#include <gtest/gtest.h>
#include <torch/script.h>
#include <torch/torch.h>

#include "halfstep/torch/int8.h"
#include "int8_script_fixture.h"

namespace halfstep {
namespace {

using test::layer;

// An embedding's rows through two linear layers of one class, the first in a loop, a branch that data decides, and a
// convolution over pictures.
class Int8Script : public test::Int8ScriptTest {
 protected:
  void SetUp() override {
    Int8ScriptTest::SetUp();
    if (IsSkipped()) return;
    const char* const linear = "def forward(self, x):\n  return torch.linear(x, self.weight, self.bias)\n";
    mlp_.register_module("first", layer("Linear", random({16, 16}), random({16}), linear));
    mlp_.register_module("second", layer("Linear", random({16, 16}), random({16}), linear));
    mlp_.register_module("rare", layer("Linear", random({16, 16}), random({16}), linear));
    mlp_.register_parameter("mix", random({16, 4}), /*is_buffer=*/false);
    mlp_.register_attribute("training", c10::BoolType::get(), true);
    mlp_.define(R"(
      def forward(self, x, steps: int):
        for i in range(steps):
          x = torch.relu(self.first.forward(x))
        x = self.second.forward(torch.relu(self.first.forward(x)))
        if bool(torch.gt(torch.sum(x), 1e9)):
          x = self.rare.forward(x)
        return torch.silu(torch.matmul(torch.gelu(x, approximate="tanh"), self.mix))
    )");
    cnn_.register_module("conv", layer("Conv2d", random({8, 3, 3, 3}), random({8}), R"(
      def forward(self, x):
        return torch.conv2d(x, self.weight, self.bias, [1, 1], [1, 1], [1, 1], 1)
    )"));
    cnn_.register_module("next", layer("Conv2d", random({8, 8, 1, 1}), random({8}), R"(
      def forward(self, x):
        return torch.conv2d(x, self.weight, self.bias, [1, 1], [0, 0], [1, 1], 1)
    )"));
    cnn_.register_module("last", layer("Conv2d", random({8, 8, 1, 1}), random({8}), R"(
      def forward(self, x):
        return torch.conv2d(x, self.weight, self.bias, [1, 1], [0, 0], [1, 1], 1)
    )"));
    torch::jit::Module norm = layer("BatchNorm2d", random({8}) + 1, random({8}), nullptr);
    norm.register_buffer("mean", random({8}));
    norm.register_buffer("var", random({8}).abs() + 0.5);
    norm.define(R"(
      def forward(self, x):
        return torch.batch_norm(x, self.weight, self.bias, self.mean, self.var, self.training, 0.1, 1e-5, True)
    )");
    cnn_.register_module("norm", norm);
    cnn_.register_attribute("training", c10::BoolType::get(), true);
    cnn_.define(R"(
      def forward(self, x):
        y = torch.relu(self.norm.forward(self.conv.forward(x)))
        y = torch.relu(self.next.forward(y))
        return torch.mean(self.last.forward(y) + y, [2, 3])
    )");
  }

  std::vector<std::vector<c10::IValue>> rows() const {
    std::vector<std::vector<c10::IValue>> batches;
    for (int i = 0; i < 6; ++i) batches.push_back({random({8, 16}), 2});
    return batches;
  }
  std::vector<std::vector<c10::IValue>> pictures() const {
    std::vector<std::vector<c10::IValue>> batches;
    for (int i = 0; i < 6; ++i) batches.push_back({random({4, 3, 7, 7})});
    return batches;
  }
  torch::jit::Module mlp_ = torch::jit::Module("Mlp");
  torch::jit::Module cnn_ = torch::jit::Module("Cnn");
};

INSTANTIATE_TEST_SUITE_P(Devices, Int8Script, testing::Values(at::kCPU, at::kCUDA), test::device_name);

TEST_P(Int8Script, LayersInLoopsAndBranches) {
  const auto batches = rows();
  const Quantized result = test::quantized(mlp_, batches);
  EXPECT_TRUE(result.report.kept);
  EXPECT_EQ(result.report.samples, 16);
  EXPECT_LE(result.report.bound, 0.02);
  for (const char* const name : {"first", "second", "mix"}) EXPECT_TRUE(entry(result.report, name).int8) << name;
  EXPECT_FALSE(entry(result.report, "rare").int8);
  EXPECT_NE(entry(result.report, "rare").why.find("not called"), std::string::npos);
  EXPECT_EQ(calls_of(result.module, "halfstep::int8_linear"), 4);  // one of them in the loop
  EXPECT_EQ(entry(result.report, "first").fused, "first + relu + int8 out");
  EXPECT_EQ(entry(result.report, "second").fused, "") << "the branch reads what gelu reads";
  EXPECT_EQ(entry(result.report, "mix").fused, "mix + silu");

  mlp_.eval();
  for (const auto& batch : batches) {
    const double share = noise(call(mlp_, batch), call(result.module, batch));
    EXPECT_GT(share, 0.0);
    EXPECT_LT(share, 0.02);
  }
  const std::vector<c10::IValue> less{random({3, 16}), 1};  // another size, and other turns
  EXPECT_LT(noise(call(mlp_, less), call(result.module, less)), 0.05);
}

TEST_P(Int8Script, BatchNormsAreFoldedAndInt8PassesOn) {
  const auto batches = pictures();
  const Quantized result = test::quantized(cnn_, batches);
  EXPECT_EQ(result.report.folded, std::vector<std::string>{"norm into conv"});
  EXPECT_EQ(entry(result.report, "conv").fused, "conv + relu + int8 out");
  EXPECT_EQ(entry(result.report, "next").fused, "next + relu") << "the addition reads it too";
  EXPECT_EQ(entry(result.report, "last").fused, "last + residual");
  EXPECT_EQ(calls_of(result.module, "aten::batch_norm"), 0);
  EXPECT_EQ(calls_of(result.module, "aten::add"), 0);
  EXPECT_FALSE(result.module.attr("conv").toModule().hasattr("weight"));
  EXPECT_FALSE(result.module.hasattr("norm"));
  cnn_.eval();
  for (const auto& batch : batches) EXPECT_LT(noise(call(cnn_, batch), call(result.module, batch)), 0.01);
  QuantizeOptions apart;
  apart.fold_batch_norm = false;
  const Quantized plain = test::quantized(cnn_, batches, apart);
  EXPECT_TRUE(plain.report.folded.empty());
  EXPECT_EQ(calls_of(plain.module, "aten::batch_norm"), 1);
}

TEST_P(Int8Script, TheBitsOfTheOps) {
  const auto batches = rows();
  QuantizeOptions dynamic;
  dynamic.dynamic = true;
  dynamic.include = {"second"};
  const Quantized result = test::quantized(mlp_, batches, dynamic);
  EXPECT_EQ(result.report.int8_layers(), 1);
  EXPECT_EQ(entry(result.report, "first").why, "not in include");
  const auto packed = result.module.attr("second").toModule().attr("packed").toCustomClass<PackedInt8>();
  const auto linear = [&](const char* name, const at::Tensor& x) {
    const torch::jit::Module module = mlp_.attr(name).toModule();
    return at::linear(x, module.attr("weight").toTensor(), module.attr("bias").toTensor());
  };
  at::Tensor x = batches[0][0].toTensor();
  const torch::NoGradGuard no_grad;
  for (int i = 0; i < 3; ++i) x = linear("first", x).relu();
  const at::Tensor mixed = at::gelu(int8_linear(x, packed), "tanh").matmul(mlp_.attr("mix").toTensor());
  const at::Tensor expected = at::silu(mixed);
  const at::Tensor got = call(result.module, batches[0]);
  EXPECT_LT(noise(expected, got), 1e-12);  // the last product is a linear layer's, which may sum in another order
  const auto w = mlp_.attr("second").toModule().attr("weight").toTensor();
  const at::Tensor error = (packed->weight().to(at::kFloat) * packed->scales().unsqueeze(1) - w).abs();
  EXPECT_TRUE(error.le(packed->scales().unsqueeze(1) * 0.5001).all().item<bool>());
}

TEST_P(Int8Script, SavedLoadedAndCalledFromSeveralThreads) {
  const auto batches = rows();
  const Quantized result = test::quantized(mlp_, batches);
  std::stringstream file;
  result.module.save(file);
  const torch::jit::Module loaded = torch::jit::load(file);
  const at::Tensor expected = call(result.module, batches[0]);
  std::vector<int> differences(4, -1);
  std::vector<std::thread> threads;
  for (int& different : differences)
    threads.emplace_back([&] {
      int count = 0;
      for (int i = 0; i < 20; ++i) count += !at::equal(call(loaded, batches[0]), expected);
      different = count;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(differences, std::vector<int>(4, 0));
}

TEST_P(Int8Script, AHalfModuleStaysHalf) {
  mlp_.to(at::kBFloat16);
  std::vector<std::vector<c10::IValue>> batches = rows();
  for (auto& batch : batches) batch[0] = batch[0].toTensor().to(at::kBFloat16);
  const Quantized result = test::quantized(mlp_, batches);
  EXPECT_EQ(entry(result.report, "first").fused, "first + relu + int8 out");
  mlp_.eval();
  const at::Tensor got = call(result.module, batches[0]);
  EXPECT_EQ(got.scalar_type(), at::kBFloat16);
  EXPECT_LT(noise(call(mlp_, batches[0]).to(at::kFloat), got.to(at::kFloat)), 0.01);
}

TEST_P(Int8Script, TheModuleStaysAsItIs) {
  const auto batches = rows();
  const at::Tensor before = call(mlp_, batches[0]);
  const at::Tensor weight = mlp_.attr("rare").toModule().attr("weight").toTensor();
  const at::Tensor copy = weight.clone();
  const Quantized result = test::quantized(mlp_, batches);
  EXPECT_TRUE(mlp_.is_training());
  EXPECT_FALSE(result.module.is_training());
  result.module.attr("rare").toModule().attr("weight").toTensor().zero_();
  EXPECT_TRUE(at::equal(weight, copy)) << "the copy shares memory with it";
  EXPECT_TRUE(at::equal(call(mlp_, batches[0]), before));
}

TEST_P(Int8Script, TheGuardGivesBackTheMostHarmful) {
  const auto batches = rows();
  QuantizeOptions options;
  options.bias_correction = false;
  const Quantized all = test::quantized(mlp_, batches, options);
  options.accuracy_threshold = 0.5 * all.report.noise;
  const Quantized some = test::quantized(mlp_, batches, options);
  EXPECT_TRUE(some.report.kept);
  EXPECT_LE(some.report.bound, options.accuracy_threshold);
  EXPECT_EQ(some.report.noise_everywhere, all.report.noise);
  EXPECT_GT(some.report.int8_layers(), 0);
  EXPECT_LT(some.report.int8_layers(), all.report.int8_layers());
  double worst_kept = 0, best_given_back = 1;
  for (const QuantizedLayer& layer : some.report.layers) {
    if (layer.int8) worst_kept = std::max(worst_kept, layer.noise);
    if (layer.why.starts_with("given back")) best_given_back = std::min(best_given_back, layer.noise);
  }
  EXPECT_GE(best_given_back, worst_kept);

  options.accuracy_threshold = 0;
  const Quantized none = test::quantized(mlp_, batches, options);
  EXPECT_EQ(none.report.int8_layers(), 0);
  EXPECT_NE(none.report.note.find("a float copy came back"), std::string::npos);
  EXPECT_EQ(calls_of(none.module, "halfstep::"), 0);
  mlp_.eval();
  EXPECT_LT(noise(call(mlp_, batches[0]), call(none.module, batches[0])), 1e-12);
  std::ostringstream text;
  text << none.report;
  EXPECT_NE(text.str().find("first: float, given back for accuracy"), std::string::npos) << text.str();
}

// Weights of 3 bits and inputs whose mean is not 0 shift what a layer gives.
TEST_P(Int8Script, BiasesMakeUpForTheMeanError) {
  torch::jit::Module model("Model");
  model.register_module("first", mlp_.attr("first").toModule());
  model.define("def forward(self, x):\n  return self.first.forward(x)\n");
  std::vector<std::vector<c10::IValue>> batches;
  for (int i = 0; i < 6; ++i) batches.push_back({random({64, 16}).abs()});
  const auto worst_shift = [&](const Quantized& result) {
    at::Tensor sum = at::zeros({}, options().dtype(at::kDouble));
    for (const int i : {0, 1, 3, 4})  // those that calibrate
      sum = sum + (call(model, batches[i]).to(at::kDouble) - call(result.module, batches[i]).to(at::kDouble)).mean(0);
    return (sum / 4).abs().max().item<double>();
  };
  QuantizeOptions plain;
  plain.bits = 3;
  plain.accuracy_threshold = 1.0;
  plain.bias_correction = false;
  QuantizeOptions shifted = plain;
  shifted.bias_correction = true;
  const Quantized without = test::quantized(model, batches, plain);
  const Quantized with = test::quantized(model, batches, shifted);
  EXPECT_EQ(without.report.corrected, 0);
  EXPECT_EQ(with.report.corrected, 1);
  EXPECT_LT(with.report.bound, without.report.bound);
  EXPECT_GT(worst_shift(without), 0.01);
  EXPECT_LT(worst_shift(with), 1e-5);
  std::ostringstream text;
  text << with.report;
  EXPECT_NE(text.str().find("biases corrected in 1 layers"), std::string::npos) << text.str();
}

TEST_P(Int8Script, ABatchWithoutRowsForALayerDoesNotStopTheCorrectionOfBiases) {
  torch::jit::Module model("Routed");
  model.register_module("first", mlp_.attr("first").toModule());
  model.define("def forward(self, x):\n  return torch.sum(self.first.forward(x[x[:, 0] > 0.]), 0) + torch.sum(x)\n");
  std::vector<std::vector<c10::IValue>> batches;
  for (int i = 0; i < 6; ++i) batches.push_back({random({64, 16}).abs()});
  batches[1] = {-batches[1][0].toTensor()};  // which calibrates
  QuantizeOptions how;
  how.bits = 3;
  how.accuracy_threshold = 1.0;
  EXPECT_EQ(test::quantized(model, batches, how).report.corrected, 1);
}

TEST_P(Int8Script, BuffersThatForwardWritesAreNotTheCalibrations) {
  torch::jit::Module counter("Counter");
  counter.register_module("linear", mlp_.attr("first").toModule());
  counter.register_buffer("count", at::zeros({1}, options()));
  counter.define(R"(
    def forward(self, x):
      self.count.add_(1)
      return self.linear.forward(x) + 0.0 * self.count
  )");
  const Quantized result = test::quantized(counter, {{random({4, 16})}, {random({4, 16})}});
  EXPECT_EQ(result.module.attr("count").toTensor().item<float>(), 0);
  EXPECT_EQ(counter.attr("count").toTensor().item<float>(), 0);
  call(result.module, {random({4, 16})});
  EXPECT_EQ(result.module.attr("count").toTensor().item<float>(), 1);
}

TEST_P(Int8Script, Refusals) {
  const auto batches = rows();
  const auto message = [&](const QuantizeOptions& options) {
    return message_of([&] { test::quantized(mlp_, batches, options); });
  };
  const auto expect = [](const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  expect(message({.bits = 9}), "bits is 9, expected 2 to 8");
  expect(message({.accuracy_threshold = 2}), "accuracy_threshold is 2, expected 0 to 1");
  expect(message({.exclude = {"third"}}), "exclude has 'third', which names no layer");
  expect(message_of([&] { test::quantized(mlp_, {}); }), "calibration is empty");
  torch::jit::Module without("Without");
  expect(message_of([&] { test::quantized(without, batches); }), "module is a Without without a method forward");
  without.define("def forward(self, x: Tensor, steps: int) -> int:\n  return steps\n");
  expect(message_of([&] { test::quantized(without, batches); }), "output holds no floating-point tensor");
  torch::jit::Module nan("Nan");
  nan.define("def forward(self, x: Tensor, steps: int):\n  return torch.log(x - 1e9)\n");
  expect(message_of([&] { test::quantized(nan, batches); }), "NaN or infinity on a calibration batch");
}

}  // namespace
}  // namespace halfstep
