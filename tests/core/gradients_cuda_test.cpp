// The CUDA check against the CPU's and the float64 reference, on a stream that is not the default one.
#include <limits>
#include <numeric>

#include "cuda_fixture.h"
#include "gradient_fixture.h"

namespace halfstep {
namespace {

using test::DeviceArray;
using test::GradientList;

struct Result {
  float found = 0.0F;
  float norm = -1.0F;
  std::vector<float> stats;
  friend bool operator==(const Result&, const Result&) = default;
};

class GradientsCuda : public test::CudaTest {
 protected:
  // Runs the kernels on a copy of the list; `list` receives the written gradients back.
  Result run(GradientList& list, float scale, bool write, bool with_stats) {
    std::vector<DeviceArray<char>> buffers;
    std::vector<TensorView> views = list.shapes();
    for (std::size_t i = 0; i < list.size(); ++i) {
      const char* const begin = list.buffer(i);
      buffers.emplace_back(std::vector<char>(begin, begin + list.bytes(i)), stream_);
      views[i].data = buffers[i].get() + list.offset(i);
    }
    const DeviceArray<float> scalars({scale, 0.0F, -1.0F}, stream_);
    const DeviceArray<float> stats(std::vector<float>(list.size() * kGradientStats + 1, -1.0F), stream_);
    const DeviceArray<char> workspace(cuda::gradients_workspace_bytes(views));
    (write ? cuda::unscale : cuda::check_gradients)(
        views, {scalars.get()}, {scalars.get() + 1, scalars.get() + 2, with_stats ? stats.get() : nullptr},
        workspace.get(), {stream_});
    const std::vector<float> read = scalars.read(stream_);
    Result result{read[1], read[2], stats.read(stream_)};
    EXPECT_EQ(result.stats.back(), -1.0F) << "wrote past the statistics";
    result.stats.pop_back();
    if (write) {
      for (std::size_t i = 0; i < list.size(); ++i) {
        const std::vector<char> bytes = buffers[i].read(stream_);
        std::copy(bytes.begin(), bytes.end(), list.buffer(i));
      }
    }
    return result;
  }

  void expect_matches_reference(const Result& got, const test::Reference& expected) {
    EXPECT_EQ(got.found, expected.found ? 1.0F : 0.0F);
    EXPECT_NEAR(got.norm, expected.norm, 1e-6 * expected.norm);
    for (std::size_t tensor = 0; tensor < expected.stats.size(); ++tensor) {
      const float* const row = got.stats.data() + tensor * kGradientStats;
      for (const GradientStat exact : {kNonFinite, kMaxMagnitude, kZeros, kBelowHalf, kElements})
        EXPECT_EQ(row[exact], static_cast<float>(expected.stats[tensor][exact])) << "tensor " << tensor;
      EXPECT_NEAR(row[kSumOfSquares], expected.stats[tensor][kSumOfSquares],
                  1e-5 * expected.stats[tensor][kSumOfSquares]);
    }
  }
};

TEST_F(GradientsCuda, AgreesWithTheReferenceForAllDtypesAndSizes) {
  for (const float scale : {1.0F, 65536.0F, 3.0F}) {
    GradientList list = test::mixed_list(1e-4 * scale);
    const test::Reference expected = test::reference_check(list, scale);
    const Result with_stats = run(list, scale, /*write=*/false, /*with_stats=*/true);
    expect_matches_reference(with_stats, expected);
    EXPECT_EQ(run(list, scale, /*write=*/false, /*with_stats=*/false).norm, with_stats.norm);
    EXPECT_EQ(run(list, scale, /*write=*/false, /*with_stats=*/true), with_stats) << "another run, other bits";
  }
}

TEST_F(GradientsCuda, UnscaleWritesTheSameBitsAsTheCpu) {
  for (const float scale : {65536.0F, 3.0F}) {
    GradientList list = test::mixed_list(100.0);
    GradientList host = list;
    const Result got = run(list, scale, /*write=*/true, /*with_stats=*/true);
    Result expected;
    expected.stats.resize(list.size() * kGradientStats);
    cpu::unscale(host.views(), {&scale}, {&expected.found, &expected.norm, expected.stats.data()}, SerialExecutor());
    EXPECT_EQ(got.found, expected.found);
    EXPECT_NEAR(got.norm, expected.norm, 1e-6 * expected.norm);
    for (std::size_t tensor = 0; tensor < list.size(); ++tensor) {
      const auto bytes = static_cast<std::size_t>(list.shapes()[tensor].numel) * size_of(list.shapes()[tensor].dtype);
      EXPECT_EQ(std::memcmp(list.views()[tensor].data, host.views()[tensor].data, bytes), 0) << "tensor " << tensor;
    }
  }
}

TEST_F(GradientsCuda, OneBadElementIsFoundWhereverItIs) {
  constexpr std::size_t kSize = 70000;
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
    for (const double bad : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
      for (const std::size_t position : {std::size_t{0}, std::size_t{32768}, kSize - 1}) {
        GradientList list;
        list.add(DType::kFloat32, test::normal_values(100, 1.0, 1));
        list.add(dtype, test::normal_values(kSize, 1.0, 2), 1);
        list.set(1, position, bad);
        for (const bool with_stats : {false, true}) {
          const Result result = run(list, 2.0F, /*write=*/false, with_stats);
          EXPECT_EQ(result.found, 1.0F);
          EXPECT_EQ(std::isnan(result.norm), std::isnan(bad));
          EXPECT_EQ(std::isinf(result.norm), std::isinf(bad));
          if (with_stats) {
            EXPECT_EQ(result.stats[kGradientStats + kNonFinite], 1.0F);
          }
        }
      }
    }
  }
}

TEST_F(GradientsCuda, ManyTensorsTakeSeveralLaunches) {
  for (const std::size_t tensors : {std::size_t{129}, std::size_t{1024}, std::size_t{2500}}) {
    GradientList list;
    for (std::size_t i = 0; i < tensors; ++i)
      list.add(DType::kFloat32, test::normal_values(i % 7, 1.0, static_cast<unsigned>(i)));
    expect_matches_reference(run(list, 1.0F, /*write=*/false, /*with_stats=*/true), test::reference_check(list, 1.0F));
  }
}

TEST_F(GradientsCuda, AnEmptyListAndAListOfEmptyTensorsHaveNormZero) {
  GradientList empty;
  EXPECT_EQ(run(empty, 1.0F, /*write=*/false, /*with_stats=*/true).norm, 0.0F);
  empty.add(DType::kFloat16, {});
  const Result result = run(empty, 1.0F, /*write=*/false, /*with_stats=*/true);
  EXPECT_EQ(result.norm, 0.0F);
  EXPECT_EQ(result.found, 0.0F);
  EXPECT_EQ(result.stats, std::vector<float>(kGradientStats, 0.0F));
}

// More than 2^31 elements: every index is 64 bits wide. Needs 4.3 GB.
TEST_F(GradientsCuda, MoreThanTwoToTheThirtyOneElements) {
  const std::int64_t numel = (std::int64_t{1} << 31) + 5;
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  HS_CUDA_TRY(cudaMemGetInfo(&free_bytes, &total_bytes));
  if (free_bytes < (std::size_t{6} << 30)) {
    if (required()) FAIL() << "HALFSTEP_REQUIRE_CUDA=1, but less than 6 GiB of GPU memory are free";
    GTEST_SKIP() << "needs 6 GiB of free GPU memory";
  }
  const DeviceArray<std::uint16_t> data(static_cast<std::size_t>(numel));
  HS_CUDA_TRY(cudaMemsetAsync(data.get(), 0, static_cast<std::size_t>(numel) * 2, stream_));
  const std::uint16_t tail[] = {0x4000, 0x3c00};  // 2, 1 in float16
  HS_CUDA_TRY(cudaMemcpyAsync(data.get() + numel - 2, tail, sizeof tail, cudaMemcpyHostToDevice, stream_));
  const std::vector<TensorView> views{{data.get(), numel, DType::kFloat16}};
  const DeviceArray<float> scalars({1.0F, 0.0F, -1.0F}, stream_);
  const DeviceArray<float> stats(kGradientStats);
  const DeviceArray<char> workspace(cuda::gradients_workspace_bytes(views));
  cuda::check_gradients(views, {scalars.get()}, {scalars.get() + 1, scalars.get() + 2, stats.get()}, workspace.get(),
                        {stream_});
  EXPECT_EQ(scalars.read(stream_)[1], 0.0F);
  EXPECT_FLOAT_EQ(scalars.read(stream_)[2], std::sqrt(5.0F));
  EXPECT_EQ(stats.read(stream_)[kZeros], static_cast<float>(numel - 2));
}

TEST_F(GradientsCuda, CanBeCapturedInAGraph) {
  GradientList list = test::mixed_list(1.0);
  std::vector<DeviceArray<char>> buffers;
  std::vector<TensorView> views = list.shapes();
  for (std::size_t i = 0; i < list.size(); ++i) {
    buffers.emplace_back(std::vector<char>(list.buffer(i), list.buffer(i) + list.bytes(i)), stream_);
    views[i].data = buffers[i].get() + list.offset(i);
  }
  const DeviceArray<float> scalars({4.0F, 0.0F, -1.0F}, stream_);
  const DeviceArray<char> workspace(cuda::gradients_workspace_bytes(views));
  HS_CUDA_TRY(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  cuda::check_gradients(views, {scalars.get()}, {scalars.get() + 1, scalars.get() + 2, nullptr}, workspace.get(),
                        {stream_});
  cudaGraph_t graph = nullptr;
  HS_CUDA_TRY(cudaStreamEndCapture(stream_, &graph));
  cudaGraphExec_t executable = nullptr;
  HS_CUDA_TRY(cudaGraphInstantiate(&executable, graph, 0));
  EXPECT_EQ(scalars.read(stream_)[2], -1.0F) << "capturing must not run";
  HS_CUDA_TRY(cudaGraphLaunch(executable, stream_));
  const test::Reference expected = test::reference_check(list, 4.0F);
  EXPECT_NEAR(scalars.read(stream_)[2], expected.norm, 1e-6 * expected.norm);
  HS_CUDA_TRY(cudaGraphExecDestroy(executable));
  HS_CUDA_TRY(cudaGraphDestroy(graph));
}

}  // namespace
}  // namespace halfstep
