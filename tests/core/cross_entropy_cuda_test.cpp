// The CUDA cross entropy against the float64 reference, on a stream that is not the default one.
#include "cross_entropy_fixture.h"
#include "cuda_fixture.h"

namespace halfstep {
namespace {

using test::DeviceArray;
using test::LossCase;
using test::LossData;

class CrossEntropyCuda : public test::CudaTest {
 protected:
  // Runs both directions on a copy of the tensors, which receive the outputs back. The gradient starts `shifted`
  // elements further from a 16-byte boundary than the logits.
  void run(LossData& data, std::size_t shifted = 0) {
    const std::size_t size = size_of(data.test_case.dtype);
    std::vector<DeviceArray<char>> buffers;
    std::vector<TensorView> views = data.tensors.shapes();
    for (std::size_t i = 0; i < views.size(); ++i) {
      std::vector<char> bytes(data.tensors.bytes(i) + shifted * size);
      std::copy_n(data.tensors.buffer(i), data.tensors.bytes(i), bytes.data());
      buffers.emplace_back(bytes, stream_);
      views[i].data = buffers[i].get() + data.tensors.offset(i) + (i == LossData::kGradLogits ? shifted * size : 0);
    }
    const DeviceArray<std::int64_t> targets(data.targets, stream_);
    const DeviceArray<float> weight(data.weight, stream_);
    const DeviceArray<float> grad_loss(data.grad_loss, stream_);
    const DeviceArray<float> loss(data.loss, stream_);
    const DeviceArray<float> lse(data.lse, stream_);
    const DeviceArray<float> totals(data.totals, stream_);
    const DeviceArray<float> workspace(data.targets.size());
    const CrossEntropy call = data.call(views[LossData::kLogits], targets.get(), weight.get());
    cuda::cross_entropy(call, {loss.get(), lse.get(), totals.get()}, workspace.get(), {stream_});
    cuda::cross_entropy_backward(call, {grad_loss.get(), lse.get(), totals.get(), views[LossData::kGradLogits].data},
                                 {stream_});
    data.loss = loss.read(stream_);
    data.lse = lse.read(stream_);
    data.totals = totals.read(stream_);
    const std::vector<char> bytes = buffers[LossData::kGradLogits].read(stream_);
    std::copy(bytes.begin() + static_cast<std::ptrdiff_t>(shifted * size), bytes.end(),
              data.tensors.buffer(LossData::kGradLogits));
  }
};

TEST_F(CrossEntropyCuda, AgreesWithTheReferenceForAllSizesAndSettings) {
  for (const LossCase& c : test::loss_cases()) {
    for (const std::size_t shifted : {std::size_t{0}, std::size_t{1}}) {
      SCOPED_TRACE(testing::Message() << c << ", shifted " << shifted);
      LossData data(c);
      run(data, shifted);
      test::expect_loss_matches(data);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST_F(CrossEntropyCuda, TheSameBitsInEveryRun) {
  const LossCase c{.rows = 700, .classes = 5003, .weighted = true, .smoothing = 0.1};
  LossData first(c);
  LossData second(c);
  run(first);
  run(second);
  EXPECT_EQ(first.loss, second.loss);
  EXPECT_EQ(first.lse, second.lse);
  const auto bytes = static_cast<std::size_t>(c.rows * c.classes) * 2;
  EXPECT_EQ(std::memcmp(first.tensors.views()[LossData::kGradLogits].data,
                        second.tensors.views()[LossData::kGradLogits].data, bytes),
            0);
}

TEST_F(CrossEntropyCuda, LargeOffsetsAndMaskedBeginningsCostNothing) {
  for (const double offset : {-1e4, 0.0, 1e4}) {
    LossData data({.rows = 1, .classes = 9000, .dtype = DType::kFloat32});
    for (std::size_t i = 0; i < 9000; ++i)
      data.tensors.set(LossData::kLogits, i, i < 8990 ? -std::numeric_limits<double>::infinity() : offset);
    data.targets[0] = 8999;
    run(data);
    EXPECT_FLOAT_EQ(data.loss[0], std::log(10.0F));
    EXPECT_EQ(data.tensors.get(LossData::kGradLogits, 0), 0.0);
  }
}

TEST_F(CrossEntropyCuda, NonFiniteLogitsShowInTheirRowAlone) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const std::int64_t classes : {20, 5000}) {
    for (const double bad : {kInfinity, std::numeric_limits<double>::quiet_NaN()}) {
      LossData data({.rows = 2, .classes = classes, .reduction = LossReduction::kNone});
      data.tensors.set(LossData::kLogits, static_cast<std::size_t>(classes - 1), bad);
      run(data);
      EXPECT_TRUE(std::isnan(data.loss[0]));
      EXPECT_TRUE(std::isfinite(data.loss[1]));
    }
    LossData masked({.rows = 1, .classes = classes});
    for (std::size_t i = 0; i < static_cast<std::size_t>(classes); ++i)
      masked.tensors.set(LossData::kLogits, i, -kInfinity);
    run(masked);
    EXPECT_TRUE(std::isnan(masked.loss[0])) << "no class is left";
  }
}

TEST_F(CrossEntropyCuda, AllRowsIgnoredIsNaNForTheMeanAndNoGradient) {
  LossData data({.rows = 2, .classes = 20});
  data.targets = {LossData::kIgnored, LossData::kIgnored};
  run(data);
  EXPECT_TRUE(std::isnan(data.loss[0]));
  for (std::size_t i = 0; i < 40; ++i) EXPECT_EQ(data.tensors.get(LossData::kGradLogits, i), 0.0);
}

// More than 2^31 elements: every index is 64 bits wide. Needs 8.6 GB.
TEST_F(CrossEntropyCuda, MoreThanTwoToTheThirtyOneElements) {
  constexpr std::int64_t kRows = 42800;
  constexpr std::int64_t kClasses = 50257;
  constexpr std::size_t kElements = kRows * kClasses;
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  HS_CUDA_TRY(cudaMemGetInfo(&free_bytes, &total_bytes));
  if (free_bytes < (std::size_t{10} << 30)) {
    if (required()) FAIL() << "HALFSTEP_REQUIRE_CUDA=1, but less than 10 GiB of GPU memory are free";
    GTEST_SKIP() << "needs 10 GiB of free GPU memory";
  }
  const DeviceArray<std::uint16_t> logits(kElements);
  const DeviceArray<std::uint16_t> grad(kElements);
  HS_CUDA_TRY(cudaMemsetAsync(logits.get(), 0, kElements * 2, stream_));
  const DeviceArray<std::int64_t> targets(std::vector<std::int64_t>(kRows, kClasses - 1), stream_);
  const DeviceArray<float> scalars({1.0F, -7.0F, -7.0F, -7.0F}, stream_);  // grad_loss, loss, totals
  const DeviceArray<float> lse(kRows);
  const DeviceArray<float> workspace(kRows);
  const CrossEntropy call{kRows,         kClasses, {logits.get(), kRows * kClasses, DType::kFloat16},
                          targets.get(), nullptr,  LossReduction::kSum,
                          -100,          0.0};
  cuda::cross_entropy(call, {scalars.get() + 1, lse.get(), scalars.get() + 2}, workspace.get(), {stream_});
  cuda::cross_entropy_backward(call, {scalars.get(), lse.get(), scalars.get() + 2, grad.get()}, {stream_});
  std::uint16_t last[2] = {};
  HS_CUDA_TRY(cudaMemcpyAsync(last, grad.get() + kElements - 2, sizeof last, cudaMemcpyDeviceToHost, stream_));
  HS_CUDA_TRY(cudaStreamSynchronize(stream_));
  EXPECT_NEAR(scalars.read(stream_)[1], kRows * std::log(static_cast<double>(kClasses)), 1.0);
  EXPECT_NEAR(widen(Half{last[0]}), 1.0 / kClasses, 1e-7);
  EXPECT_EQ(widen(Half{last[1]}), -1.0F);
}

}  // namespace
}  // namespace halfstep
