// The int8 ops, PackedInt8 and Observer as C++ programs use them, against ATen in float64 and integers.
#include <sstream>
#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <torch/csrc/jit/frontend/sugared_value.h>
#include <torch/script.h>
#include <torch/torch.h>

#include "device_fixture.h"
#include "halfstep/torch/calibration.h"
#include "halfstep/torch/int8.h"
#include "halfstep/torch/norms.h"

namespace halfstep {
namespace {

using Packed = c10::intrusive_ptr<PackedInt8>;

struct Weights {
  at::Tensor weight, scales, bias;

  Packed packed(const PackedInt8::Geometry& geometry = {}) const {
    return c10::make_intrusive<PackedInt8>(weight, scales, bias, geometry);
  }
  at::Tensor dequantized() const {
    std::vector<std::int64_t> column(static_cast<std::size_t>(weight.dim()), 1);
    column[0] = -1;
    return weight.to(at::kDouble) * scales.to(at::kDouble).view(column);
  }
};

// Names halfstep's ops in the code of a module.
struct OpsOfHalfstep : torch::jit::Resolver {
  std::shared_ptr<torch::jit::SugaredValue> resolveValue(const std::string& name, torch::jit::GraphFunction&,
                                                         const torch::jit::SourceRange&) override {
    const auto symbol = c10::Symbol::fromQualString("halfstep::" + name);
    if (torch::jit::getAllOperatorsFor(symbol).empty()) return nullptr;
    return std::make_shared<torch::jit::BuiltinFunction>(symbol, std::nullopt);
  }
};

class Int8 : public test::DeviceTest {
 protected:
  Weights weights(std::vector<std::int64_t> sizes) const {
    const at::Tensor weight = at::randint(-127, 128, sizes, at::TensorOptions(GetParam()).dtype(at::kChar));
    const at::Tensor scales = at::rand({sizes[0]}, at::TensorOptions(GetParam())).add_(0.5).mul_(0.01);
    return {weight, scales, at::randn({sizes[0]}, at::TensorOptions(GetParam()))};
  }
  at::Tensor input(std::vector<std::int64_t> sizes) const { return at::randn(sizes, at::TensorOptions(GetParam())); }
  // What int8 makes of x, by the rule of halfstep/int8.h.
  static at::Tensor levels(const at::Tensor& x, double scale, std::int64_t zero_point) {
    const auto inverse = static_cast<double>(1.0F / static_cast<float>(scale));
    const at::Tensor scaled = x.mul(inverse).to(at::kFloat);
    return scaled.round().add(static_cast<double>(zero_point)).clamp(-128, 127);
  }
};

TEST_P(Int8, QuantizesByTheRule) {
  const at::Tensor x = input({7, 33});
  const at::Tensor q = quantize_int8(x, 0.02, 3);
  EXPECT_EQ(q.scalar_type(), at::kChar);
  EXPECT_TRUE(at::equal(q.to(at::kFloat), levels(x, 0.02, 3)));
  const at::Tensor transposed = x.t();
  EXPECT_TRUE(at::equal(quantize_int8(transposed, 0.02, 3), q.t()));
  EXPECT_THROW(quantize_int8(x, 0.0), c10::Error);
  EXPECT_THROW(quantize_int8(x, 0.02, 128), c10::Error);
  EXPECT_THROW(quantize_int8(x.to(at::kDouble), 0.02), c10::Error);
}

// The norm, its int8 by one scale and by rows, and a linear layer that reads either as if it had quantized itself.
TEST_P(Int8, LayerNormsWriteWhatLinearLayersRead) {
  const at::Tensor x = input({4, 5, 70});
  const at::Tensor weight = input({70});
  const at::Tensor norm = layer_norm(x, {70}, weight, std::nullopt, 1e-3, std::nullopt);
  const Packed packed = weights({19, 70}).packed();

  const Int8NormResult by_scale = layer_norm_int8(x, {70}, weight, std::nullopt, 1e-3, 0.02, -5, /*keep_float=*/true);
  EXPECT_TRUE(at::equal(by_scale.out, norm));
  EXPECT_TRUE(at::equal(by_scale.quantized, quantize_int8(norm, 0.02, -5)));
  EXPECT_EQ(by_scale.scales.numel(), 0);

  const Int8NormResult by_rows = layer_norm_int8(x, {70}, weight, std::nullopt, 1e-3);
  EXPECT_EQ(by_rows.out.numel(), 0);
  EXPECT_EQ(by_rows.scales.sizes(), at::IntArrayRef({4, 5}));
  Int8Call call;
  call.input_row_scales = by_rows.scales;
  EXPECT_TRUE(at::equal(int8_linear(by_rows.quantized, packed, call), int8_linear(norm, packed)));
  EXPECT_THROW(int8_linear(norm, packed, call), c10::Error);  // which is no int8
  EXPECT_THROW(layer_norm_int8(x, {5, 70}), c10::Error);
}

TEST_P(Int8, LinearSumsAndEpilogue) {
  for (const std::int64_t rows : {1, 5, 64}) {
    const Weights w = weights({19, 70});
    const Packed packed = w.packed();
    const at::Tensor x = input({rows, 70});
    const at::Tensor q = levels(x, 0.02, -5).to(at::kDouble);
    const at::Tensor sums = (q + 5).matmul(w.weight.to(at::kDouble).t());

    Int8Call call;
    call.input_scale = 0.02;
    call.input_zero_point = -5;
    call.out_dtype = at::kInt;
    EXPECT_TRUE(at::equal(int8_linear(x, packed, call).to(at::kDouble), sums));

    const at::Tensor residual = input({rows, 19});
    call.out_dtype.reset();
    call.residual = residual;
    call.activation = "relu";
    const double scale = static_cast<float>(0.02);
    const at::Tensor expected =
        (sums * (w.scales.to(at::kDouble) * scale) + w.bias + residual).clamp_min(0).to(at::kFloat);
    const at::Tensor out = int8_linear(x, packed, call);
    EXPECT_EQ(out.scalar_type(), at::kFloat);
    EXPECT_TRUE(at::allclose(out, expected, 1e-5, 1e-5));

    // An int8 output goes on as the next layer's input.
    call.out_scale = 0.1;
    call.out_zero_point = -128;
    const at::Tensor next = int8_linear(x, packed, call);
    EXPECT_EQ(next.scalar_type(), at::kChar);
    EXPECT_LE((next.to(at::kFloat) - levels(out, 0.1, -128)).abs().max().item<float>(), 0.0F);
    const Packed second = weights({4, 19}).packed();
    EXPECT_THROW(int8_linear(next, second), c10::Error);  // int8 without its scale
    Int8Call taken;
    taken.input_scale = 0.1;
    taken.input_zero_point = -128;
    EXPECT_EQ(int8_linear(next, second, taken).sizes(), at::IntArrayRef({rows, 4}));
  }
}

TEST_P(Int8, RowsAreQuantizedByTheirOwnLargest) {
  const Weights w = weights({8, 24});
  const at::Tensor x = input({2, 3, 24}) * at::logspace(-3, 3, 6).to(GetParam()).view({2, 3, 1});
  const at::Tensor expected = x.to(at::kDouble).matmul(w.dequantized().t()) + w.bias;
  const at::Tensor out = int8_linear(x, w.packed());
  EXPECT_EQ(out.sizes(), at::IntArrayRef({2, 3, 8}));
  // Each of 24 products is off by half a level of its row at most.
  const at::Tensor level = x.abs().amax(-1, true) / 127;
  const at::Tensor most = level * 0.501 * w.dequantized().abs().sum(1) + 1e-4;
  EXPECT_TRUE(((out - expected).abs() <= most).all().item<bool>());
}

TEST_P(Int8, Convolution) {
  for (const std::int64_t groups : {1, 2, 6}) {
    const Weights w = weights({12, 6 / groups, 3, 3});
    PackedInt8::Geometry geometry;
    geometry.stride = {2, 1};
    geometry.padding = {1, 0};
    geometry.dilation = {1, 2};
    geometry.groups = groups;
    Int8Call call;
    call.input_scale = 0.02;
    const at::Tensor x = input({3, 6, 9, 11});
    const at::Tensor q = levels(x, 0.02, 0).to(at::kDouble) * static_cast<double>(0.02F);
    const at::Tensor expected =
        at::conv2d(q.cpu(), w.dequantized().cpu(), w.bias.to(at::kDouble).cpu(), {2, 1}, {1, 0}, {1, 2}, groups);
    const at::Tensor out = int8_conv2d(x, w.packed(geometry), call);
    EXPECT_TRUE(out.is_contiguous(at::MemoryFormat::ChannelsLast));
    EXPECT_TRUE(at::allclose(out.cpu(), expected.to(at::kFloat), 1e-4, 1e-4));
    EXPECT_TRUE(at::equal(int8_conv2d(x.contiguous(at::MemoryFormat::ChannelsLast), w.packed(geometry), call), out));
  }
}

TEST_P(Int8, EmbeddingAndDequantizedWeight) {
  const Weights w = weights({50, 13});
  const at::Tensor table = w.dequantized().to(at::kFloat);
  EXPECT_TRUE(at::equal(dequantize_weight(w.packed(), at::kFloat), table));
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16})
    EXPECT_TRUE(at::equal(dequantize_weight(w.packed(), dtype), table.to(dtype)));
  for (const at::ScalarType dtype : {at::kLong, at::kInt}) {
    const at::Tensor indices = at::randint(50, {4, 6}, at::TensorOptions(GetParam()).dtype(dtype));
    EXPECT_TRUE(at::equal(int8_embedding(indices, w.packed()), table.index({indices.to(at::kLong)})));
  }
  EXPECT_THROW(dequantize_weight(w.packed(), at::kDouble), c10::Error);
  EXPECT_THROW(dequantize_weight(weights({4, 3, 2, 2}).packed(), at::kFloat), c10::Error);
}

TEST_P(Int8, RefusesWhatDoesNotFit) {
  const Weights w = weights({8, 24});
  const auto packed = [&](const at::Tensor& weight, const at::Tensor& scales, const at::Tensor& bias) {
    return c10::make_intrusive<PackedInt8>(weight, scales, bias, PackedInt8::Geometry{});
  };
  EXPECT_THROW(packed(w.weight.to(at::kFloat), w.scales, w.bias), c10::Error);
  EXPECT_THROW(packed(w.weight, w.scales.slice(0, 1), w.bias), c10::Error);
  EXPECT_THROW(packed(w.weight, w.scales * 0, w.bias), c10::Error);
  EXPECT_THROW(packed(w.weight, w.scales, w.bias.slice(0, 1)), c10::Error);
  PackedInt8::Geometry geometry;
  geometry.groups = 3;
  EXPECT_THROW(weights({8, 2, 3, 3}).packed(geometry), c10::Error);
  EXPECT_THROW(int8_linear(input({2, 23}), w.packed()), c10::Error);
  EXPECT_THROW(int8_conv2d(input({2, 24, 3, 3}), w.packed()), c10::Error);
  Int8Call call;
  call.activation = "softmax";
  EXPECT_THROW(int8_linear(input({2, 24}), w.packed(), call), c10::Error);
}

TEST_P(Int8, IsSharedByThreads) {
  const Packed packed = weights({96, 200}).packed();  // no thread has made its packed form yet
  const Packed convolution = weights({16, 8, 3, 3}).packed();
  const at::Tensor x = input({33, 200});
  const at::Tensor images = input({2, 8, 7, 7});
  constexpr int kThreads = 8;
  std::vector<at::Tensor> products(kThreads), convolved(kThreads);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kThreads; ++i)
    threads.emplace_back([&, i] {
      for (int repeat = 0; repeat < 5; ++repeat) {
        products[i] = int8_linear(x, packed);
        convolved[i] = int8_conv2d(images, convolution);
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (std::size_t i = 0; i < kThreads; ++i) {
    EXPECT_TRUE(at::equal(products[i], int8_linear(x, packed)));
    EXPECT_TRUE(at::equal(convolved[i], int8_conv2d(images, convolution)));
  }
}

TEST_P(Int8, MovesAndCorrects) {
  const Weights w = weights({8, 24});
  const Packed packed = w.packed();
  const at::Tensor x = input({5, 24});
  EXPECT_TRUE(at::equal(int8_linear(x.cpu(), packed->to(at::kCPU)).to(GetParam()), int8_linear(x, packed)));
  const at::Tensor shift = input({8});
  const at::Tensor moved = int8_linear(x, packed->corrected({shift, 3 * shift}));
  EXPECT_TRUE(at::allclose(moved, int8_linear(x, packed) + 2 * shift, 1e-5, 1e-5));
  EXPECT_TRUE(at::equal(packed->bias()->to(at::kFloat), w.bias));
}

TEST_P(Int8, OfAnObserversParameters) {
  const Observer observer(-1);
  const at::Tensor first = input({40, 24}), second = input({10, 24}) - 0.5;
  std::thread other([&] { observer.observe(second); });
  observer.observe(first);
  other.join();
  const at::Tensor all = at::cat({first, second});
  EXPECT_EQ(observer.histogram().count(), static_cast<std::uint64_t>(all.numel()));
  const Int8Parameters parameters = observer.parameters(RangeMethod::kMinMax);
  const double low = all.min().item<double>(), high = all.max().item<double>();
  EXPECT_NEAR(parameters.scale, (high - low) / 255, 1e-6 * high);
  // The range is covered: what comes back is off by half a level, but at the ends by one.
  const at::Tensor q = quantize_int8(all, parameters.scale, parameters.zero_point).to(at::kDouble);
  const at::Tensor back = (q - parameters.zero_point) * static_cast<double>(parameters.scale);
  EXPECT_LE((back - all).abs().max().item<double>(), 1.001 * parameters.scale);

  const Observer restored = Observer::restored(observer.state());
  EXPECT_EQ(restored.parameters(RangeMethod::kMse).scale, observer.parameters(RangeMethod::kMse).scale);
  EXPECT_EQ(restored.channels_dim(), std::optional<std::int64_t>(-1));
  EXPECT_THROW(Observer().parameters(RangeMethod::kMinMax), std::exception);
}

TEST_P(Int8, InAModuleThatIsSavedAndLoaded) {
  const Weights w = weights({8, 24});
  torch::jit::Module module("Model");
  const auto type = c10::getCustomClassType<Packed>();
  module.register_attribute("linear", type, torch::IValue(w.packed()));
  module.register_attribute("table", type, torch::IValue(weights({50, 24}).packed()));
  module.define(R"(
    def forward(self, ids):
      return int8_linear(int8_embedding(ids, self.table), self.linear)
  )",
                std::make_shared<OpsOfHalfstep>());
  const at::Tensor ids = at::randint(50, {6, 5}, at::TensorOptions(GetParam()).dtype(at::kLong));
  const at::Tensor out = module.forward({ids}).toTensor();
  EXPECT_EQ(out.sizes(), at::IntArrayRef({6, 5, 8}));
  const Packed table = module.attr("table").toCustomClass<PackedInt8>();
  EXPECT_TRUE(at::equal(out, int8_linear(int8_embedding(ids, table), w.packed())));

  std::stringstream file;
  module.save(file);
  const std::string bytes = file.str();
  torch::jit::Module loaded = torch::jit::load(file);
  EXPECT_TRUE(at::equal(loaded.forward({ids}).toTensor(), out));
  const Packed again = loaded.attr("linear").toCustomClass<PackedInt8>();
  EXPECT_TRUE(at::equal(again->weight(), w.weight));
  EXPECT_TRUE(at::equal(*again->bias(), w.bias));
  const torch::jit::Module copy = loaded.deepcopy();
  EXPECT_TRUE(at::equal(copy.get_method("forward")({ids}).toTensor(), out));

  std::stringstream damaged(bytes.substr(0, bytes.size() / 2));
  EXPECT_THROW(torch::jit::load(damaged), std::exception);
}

INSTANTIATE_TEST_SUITE_P(Devices, Int8, testing::Values(at::kCPU, at::kCUDA), test::device_name);

}  // namespace
}  // namespace halfstep
