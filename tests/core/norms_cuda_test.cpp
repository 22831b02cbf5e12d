// The CUDA norms against the float64 reference, on a stream that is not the default one.
#include "cuda_fixture.h"
#include "norm_fixture.h"

namespace halfstep {
namespace {

using test::DeviceArray;
using test::NormCase;
using test::NormData;
using test::NormResult;

class NormsCuda : public test::CudaTest {
 protected:
  // Runs forward and backward on a copy of the tensors, which receive the outputs back.
  NormResult run(NormData& data) {
    const NormCase& c = data.test_case;
    std::vector<DeviceArray<char>> buffers;
    std::vector<TensorView> views = data.tensors.shapes();
    for (std::size_t i = 0; i < views.size(); ++i) {
      const char* const begin = data.tensors.buffer(i);
      buffers.emplace_back(std::vector<char>(begin, begin + data.tensors.bytes(i)), stream_);
      views[i].data = buffers[i].get() + data.tensors.offset(i);
    }
    NormResult result(c.shape);
    const DeviceArray<float> mean(result.mean, stream_);
    const DeviceArray<float> rstd(result.rstd, stream_);
    const DeviceArray<float> grad_weight(result.grad_weight, stream_);
    const DeviceArray<float> grad_bias(result.grad_bias, stream_);
    const DeviceArray<char> workspace(cuda::norms_workspace_bytes(c.shape));
    float* const mean_data = c.center ? mean.get() : nullptr;
    cuda::normalize({c.shape, c.center, test::kNormEps, views[NormData::kInput], views[NormData::kWeight],
                     views[NormData::kBias], views[NormData::kOut], mean_data, rstd.get()},
                    {stream_});
    cuda::normalize_backward(
        {c.shape, c.center, views[NormData::kGradOut], views[NormData::kInput], views[NormData::kWeight], mean_data,
         rstd.get(), views[NormData::kGradInput].data, grad_weight.get(), grad_bias.get()},
        workspace.get(), {stream_});
    result.mean = mean.read(stream_);
    result.rstd = rstd.read(stream_);
    result.grad_weight = grad_weight.read(stream_);
    result.grad_bias = grad_bias.read(stream_);
    for (const std::size_t i : {NormData::kOut, NormData::kGradInput}) {
      const std::vector<char> bytes = buffers[i].read(stream_);
      std::copy(bytes.begin(), bytes.end(), data.tensors.buffer(i));
    }
    return result;
  }
};

TEST_F(NormsCuda, AgreeWithTheReferenceForAllShapesAndDtypes) {
  for (const NormCase& c : test::norm_cases()) {
    SCOPED_TRACE(testing::Message() << c);
    NormData data(c);
    const NormResult result = run(data);
    test::expect_norm_matches(data, result);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST_F(NormsCuda, TheSameBitsInEveryRun) {
  for (const NormShape& shape : {NormShape{3000, 768}, NormShape{33, 20000}, NormShape{64, 4, 500, 8}}) {
    NormData first({.shape = shape});
    NormData second({.shape = shape});
    EXPECT_EQ(run(first), run(second));
    for (const std::size_t tensor : {NormData::kOut, NormData::kGradInput}) {
      const auto bytes = static_cast<std::size_t>(shape.rows * shape.cols()) * 2;
      EXPECT_EQ(std::memcmp(first.tensors.views()[tensor].data, second.tensors.views()[tensor].data, bytes), 0);
    }
  }
}

// More than 2^31 elements: every index is 64 bits wide. Needs 17.2 GB.
TEST_F(NormsCuda, MoreThanTwoToTheThirtyOneElements) {
  const NormShape shape{(std::int64_t{1} << 20) + 1, 2048};
  const auto numel = static_cast<std::size_t>(shape.rows * shape.cols());
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  HS_CUDA_TRY(cudaMemGetInfo(&free_bytes, &total_bytes));
  if (free_bytes < (std::size_t{18} << 30)) {
    if (required()) FAIL() << "HALFSTEP_REQUIRE_CUDA=1, but less than 18 GiB of GPU memory are free";
    GTEST_SKIP() << "needs 18 GiB of free GPU memory";
  }
  const DeviceArray<std::uint16_t> input(numel);
  const DeviceArray<std::uint16_t> grad(numel);
  const DeviceArray<std::uint16_t> out(numel);
  const DeviceArray<std::uint16_t> grad_input(numel);
  HS_CUDA_TRY(cudaMemsetAsync(input.get(), 0, numel * 2, stream_));
  HS_CUDA_TRY(cudaMemsetAsync(grad.get(), 0, numel * 2, stream_));
  const std::uint16_t one = 0x3c00;  // in float16
  HS_CUDA_TRY(cudaMemcpyAsync(input.get() + numel - 1, &one, 2, cudaMemcpyHostToDevice, stream_));
  HS_CUDA_TRY(cudaMemcpyAsync(grad.get() + numel - 1, &one, 2, cudaMemcpyHostToDevice, stream_));
  const DeviceArray<float> mean(static_cast<std::size_t>(shape.rows));
  const DeviceArray<float> rstd(static_cast<std::size_t>(shape.rows));
  const DeviceArray<float> parameters(2 * 2048);
  const DeviceArray<char> workspace(cuda::norms_workspace_bytes(shape));
  const auto view = [&](const DeviceArray<std::uint16_t>& array) {
    return TensorView{array.get(), static_cast<std::int64_t>(numel), DType::kFloat16};
  };
  cuda::normalize({shape, true, 0.0, view(input), {}, {}, view(out), mean.get(), rstd.get()}, {stream_});
  cuda::normalize_backward({shape,
                            true,
                            view(grad),
                            view(input),
                            {},
                            mean.get(),
                            rstd.get(),
                            grad_input.get(),
                            parameters.get(),
                            parameters.get() + 2048},
                           workspace.get(), {stream_});
  std::uint16_t last = 0;
  HS_CUDA_TRY(cudaMemcpyAsync(&last, out.get() + numel - 1, 2, cudaMemcpyDeviceToHost, stream_));
  HS_CUDA_TRY(cudaStreamSynchronize(stream_));
  EXPECT_NEAR(widen(Half{last}), std::sqrt(2047.0), 0.02);
  // The other rows have no spread: 0 * infinity.
  EXPECT_EQ(parameters.read(stream_).back(), 1.0F);
  EXPECT_FLOAT_EQ(mean.read(stream_).back(), 1.0F / 2048.0F);
}

TEST_F(NormsCuda, CanBeCapturedInAGraph) {
  const DeviceArray<float> input(std::vector<float>(64 * 768, 2.0F), stream_);
  const DeviceArray<float> out(std::vector<float>(64 * 768, -1.0F), stream_);
  const DeviceArray<float> rstd(64);
  const auto view = [](const DeviceArray<float>& array) { return TensorView{array.get(), 64 * 768, DType::kFloat32}; };
  HS_CUDA_TRY(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  cuda::normalize({{64, 768}, false, 0.0, view(input), {}, {}, view(out), nullptr, rstd.get()}, {stream_});
  cudaGraph_t graph = nullptr;
  HS_CUDA_TRY(cudaStreamEndCapture(stream_, &graph));
  cudaGraphExec_t executable = nullptr;
  HS_CUDA_TRY(cudaGraphInstantiate(&executable, graph, 0));
  EXPECT_EQ(out.read(stream_)[0], -1.0F) << "capturing must not run";
  HS_CUDA_TRY(cudaGraphLaunch(executable, stream_));
  EXPECT_FLOAT_EQ(out.read(stream_).back(), 1.0F);
  HS_CUDA_TRY(cudaGraphExecDestroy(executable));
  HS_CUDA_TRY(cudaGraphDestroy(graph));
}

}  // namespace
}  // namespace halfstep
