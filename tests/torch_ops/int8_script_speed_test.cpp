// quantize(): the speed guard, with kernels that sleep in place of those of the machine.
#include <chrono>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/library.h>
#include <torch/script.h>

#include "halfstep/torch/int8.h"
#include "int8_script_fixture.h"

namespace halfstep {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
constexpr std::int64_t kSlowTerms = 24;
// Far from each other, and from what a busy machine adds to them.
constexpr int kFloatMilliseconds = 12;
constexpr int kSlowMilliseconds = 70;

void sleep_for_milliseconds(int count) {
  std::this_thread::sleep_for(std::chrono::milliseconds(count));
}

// As torch's, and slower in float32.
at::Tensor slow_linear(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias) {
  if (input.scalar_type() == at::kFloat) sleep_for_milliseconds(kFloatMilliseconds);
  const at::Tensor product = at::matmul(input, weight.t());
  return bias ? product + *bias : product;
}

// Slower than that for layers of kSlowTerms.
at::Tensor slow_int8_linear(const at::Tensor& input, const c10::intrusive_ptr<PackedInt8>& weight,
                            std::optional<double> input_scale, std::int64_t input_zero_point,
                            const OptionalTensor& residual, std::string_view activation,
                            std::optional<at::ScalarType> out_dtype, std::optional<double> out_scale,
                            std::int64_t out_zero_point, const OptionalTensor& row_scales) {
  if (weight->weight().size(1) == kSlowTerms) sleep_for_milliseconds(kSlowMilliseconds);
  EXPECT_TRUE(input_scale && !residual && !out_scale && !row_scales && out_zero_point == 0 && activation == "none");
  const at::Tensor q = at::clamp(at::round(input / *input_scale) + input_zero_point, -128, 127) - input_zero_point;
  const at::Tensor sums = at::matmul(q, weight->weight().to(at::kFloat).t());
  const at::Tensor out = sums * (weight->scales() * *input_scale);
  return (weight->bias() ? out + *weight->bias() : out).to(out_dtype.value_or(input.scalar_type()));
}

class Int8ScriptSpeed : public test::Int8ScriptTest {
 protected:
  void SetUp() override {
    Int8ScriptTest::SetUp();
    if (IsSkipped()) return;
    threads_ = at::get_num_threads();
    at::set_num_threads(
        1);  // a team of threads waits for its last one, which on a busy machine takes as long as a sleep
    const c10::DispatchKey key = GetParam() == at::kCPU ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
    aten_.emplace(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
    aten_->impl("linear", &slow_linear);
    halfstep_.emplace(torch::Library::IMPL, "halfstep", key, __FILE__, __LINE__);
    halfstep_->impl("int8_linear", &slow_int8_linear);
  }

  void TearDown() override {
    if (threads_ > 0) at::set_num_threads(threads_);
    Int8ScriptTest::TearDown();
  }

  // Layers "a", "b" and so on of these numbers of terms, with tanh between them.
  torch::jit::Module chain(const std::vector<std::int64_t>& terms) const {
    torch::jit::Module module("Chain");
    std::string calls;
    for (std::size_t i = 0; i < terms.size(); ++i) {
      const std::int64_t outputs = i + 1 < terms.size() ? terms[i + 1] : 8;
      const std::string name(1, static_cast<char>('a' + i));
      module.register_module(name,
                             test::layer("Linear", random({outputs, terms[i]}), random({outputs}),
                                         "def forward(self, x):\n  return torch.linear(x, self.weight, self.bias)\n"));
      calls += "  x = torch.tanh(self." + name + ".forward(x))\n";
    }
    module.define("def forward(self, x):\n" + calls + "  return x\n");
    return module;
  }

  std::vector<std::vector<c10::IValue>> rows(std::int64_t terms) const {
    std::vector<std::vector<c10::IValue>> batches;
    for (int i = 0; i < 6; ++i) batches.push_back({random({8, terms})});
    return batches;
  }

 private:
  int threads_ = 0;
  std::optional<torch::Library> aten_, halfstep_;
};

INSTANTIATE_TEST_SUITE_P(Devices, Int8ScriptSpeed, testing::Values(at::kCPU, at::kCUDA), test::device_name);

TEST_P(Int8ScriptSpeed, FasterLayersStayInt8) {
  const auto batches = rows(16);
  const Quantized result = quantize(chain({16, 32, 16}), batches);
  EXPECT_EQ(result.report.int8_layers(), 3);
  EXPECT_LT(result.report.int8_milliseconds, result.report.milliseconds);
  for (const char* const name : {"a", "b", "c"}) {
    EXPECT_GE(entry(result.report, name).milliseconds, kFloatMilliseconds);
    EXPECT_LT(entry(result.report, name).int8_milliseconds, entry(result.report, name).milliseconds);
  }
  std::ostringstream text;
  text << result.report;
  EXPECT_NE(text.str().find("a call takes"), std::string::npos) << text.str();
  EXPECT_NE(text.str().find(" ms in float"), std::string::npos) << text.str();
}

TEST_P(Int8ScriptSpeed, SlowerLayersStayFloat) {
  const torch::jit::Module model = chain({16, kSlowTerms, 32, 16});
  const auto batches = rows(16);
  const Quantized result = quantize(model, batches);
  EXPECT_FALSE(entry(result.report, "b").int8);
  EXPECT_TRUE(entry(result.report, "b").why.starts_with("slower: int8 takes ")) << entry(result.report, "b").why;
  EXPECT_NE(entry(result.report, "b").why.find(" of the time of Float"), std::string::npos);
  EXPECT_GT(entry(result.report, "b").int8_milliseconds, entry(result.report, "b").milliseconds);
  for (const char* const name : {"a", "c", "d"}) EXPECT_TRUE(entry(result.report, name).int8) << name;
  EXPECT_EQ(calls_of(result.module, "halfstep::int8_linear"), 3);
  EXPECT_EQ(calls_of(result.module, "aten::linear"), 1);
  EXPECT_LT(noise(call(model, batches[0]), call(result.module, batches[0])), 0.02);

  const Quantized whole = test::quantized(model, batches);
  EXPECT_EQ(whole.report.int8_layers(), 4);
  EXPECT_LT(whole.report.milliseconds, 0.0);
  EXPECT_LT(entry(whole.report, "b").milliseconds, 0.0);
}

TEST_P(Int8ScriptSpeed, AFloatCopyComesBackWhereAllIsSlower) {
  const torch::jit::Module model = chain({kSlowTerms, kSlowTerms});
  const auto batches = rows(kSlowTerms);
  const Quantized result = quantize(model, batches);
  EXPECT_EQ(result.report.int8_layers(), 0);
  EXPECT_EQ(calls_of(result.module, "halfstep::"), 0);
  EXPECT_GT(result.report.int8_milliseconds, result.report.milliseconds);
  EXPECT_NE(result.report.note.find("a float copy came back"), std::string::npos) << result.report.note;
  EXPECT_NE(result.report.note.find("in bfloat16 the module takes"), std::string::npos) << result.report.note;
  EXPECT_TRUE(result.report.kept);
  EXPECT_TRUE(at::equal(call(model, batches[0]), call(result.module, batches[0])));
  EXPECT_EQ(result.module.attr("a").toModule().attr("weight").toTensor().scalar_type(), at::kFloat);
}

TEST_P(Int8ScriptSpeed, ModulesThatWriteToTheirArgumentsAreTimedOnCopies) {
  torch::jit::Module writing("Writing");
  writing.register_module("inner", chain({16, 32}));
  writing.define("def forward(self, x):\n  x.mul_(2)\n  return self.inner.forward(x)\n");
  const auto batches = rows(16);
  const at::Tensor before = batches[0][0].toTensor().clone();
  const Quantized result = quantize(writing, batches);
  EXPECT_EQ(result.report.int8_layers(), 2);
  EXPECT_TRUE(at::equal(batches[0][0].toTensor(), before));
}

}  // namespace
}  // namespace halfstep
