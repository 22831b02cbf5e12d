// The observation of tensors on the GPU: the CPU's integers, bit for bit, and sums of channels close to the CPU's.
#include "calibration_fixture.h"
#include "cuda_fixture.h"

namespace halfstep {
namespace {

using test::DeviceArray;
using test::GradientList;

class CalibrationCuda : public test::CudaTest {
 protected:
  // A copy of the tensor on the device, as far off a 16-byte boundary as it is here.
  DeviceArray<char> copy(GradientList& tensors) const {
    const char* const begin = tensors.buffer(0);
    return {std::vector<char>(begin, begin + tensors.bytes(0)), stream_};
  }
  static TensorView view_in(const DeviceArray<char>& buffer, GradientList& tensors) {
    TensorView view = tensors.views()[0];
    view.data = buffer.get() + tensors.offset(0);
    return view;
  }

  RangeHistogram observe(const TensorView& view) const {
    const DeviceArray<RangeKeys> keys(1);
    cuda::range_keys(view, keys.get(), {stream_});
    const RangeKeys found = keys.read(stream_)[0];
    RangeHistogram histogram;
    const int exponent = histogram.exponent_with(found);
    const DeviceArray<std::uint64_t> counts(std::vector<std::uint64_t>(kRangeBins), stream_);
    cuda::add_to_counts(view, exponent, counts.get(), {stream_});
    histogram.add_batch(found, view.numel);
    histogram.add_counts(counts.read(stream_), exponent);
    return histogram;
  }

  ChannelStatistics channels(const TensorView& view, const ChannelShape& shape) const {
    const auto size = static_cast<std::size_t>(shape.channels);
    const DeviceArray<float> max(std::vector<float>(size, -1.0F), stream_);
    const DeviceArray<double> sum(std::vector<double>(size, -1.0), stream_);
    const DeviceArray<std::uint64_t> count(std::vector<std::uint64_t>(size, 77), stream_);
    const DeviceArray<char> workspace(cuda::channel_workspace_bytes(shape));
    cuda::channel_statistics(view, shape, max.get(), sum.get(), count.get(), workspace.get(), {stream_});
    return {max.read(stream_), sum.read(stream_), count.read(stream_)};
  }
};

TEST_F(CalibrationCuda, CountsAsTheCpuDoes) {
  for (const test::ObservedCase& c : test::observed_cases()) {
    SCOPED_TRACE(testing::Message() << c);
    GradientList tensors;
    tensors.add(c.dtype, c.values, c.misaligned);
    RangeHistogram expected;
    cpu::observe(tensors.views()[0], expected, SerialExecutor());
    const DeviceArray<char> buffer = copy(tensors);
    const RangeHistogram found = observe(view_in(buffer, tensors));
    EXPECT_EQ(found.state_numbers(), expected.state_numbers());
    EXPECT_EQ(found.state_counts(), expected.state_counts());
  }
}

// More elements than one pass of the largest grid holds.
TEST_F(CalibrationCuda, CountsMoreThanTheGridHolds) {
  constexpr std::size_t kMany = (std::size_t{1} << 25) + 12345;
  const DeviceArray<float> values(kMany);
  HS_CUDA_TRY(cudaMemsetAsync(values.get(), 0x3c, kMany * 4, stream_));  // 0x3c3c3c3c: 0.01149...
  const float other = -3.0F;
  HS_CUDA_TRY(cudaMemcpyAsync(values.get() + kMany - 1, &other, 4, cudaMemcpyHostToDevice, stream_));
  const RangeHistogram found = observe({values.get(), static_cast<std::int64_t>(kMany), DType::kFloat32});
  EXPECT_EQ(found.count(), kMany);
  EXPECT_EQ(found.min(), -3.0F);
  EXPECT_EQ(found.exponent(), 2);
  EXPECT_EQ(found.counts()[2047 - 1536], 1U);
  EXPECT_EQ(found.counts()[2048 + 5], kMany - 1);  // 0.01149 / (4 / 2048)
}

TEST_F(CalibrationCuda, ChannelsAsTheCpuSeesThem) {
  for (const test::ChannelCase& c : test::channel_cases()) {
    SCOPED_TRACE(testing::Message() << c.shape.outer << " x " << c.shape.channels << " x " << c.shape.inner << ' '
                                    << name_of(c.dtype));
    GradientList tensors;
    tensors.add(c.dtype, test::channel_values(c.shape), 1);
    const ChannelStatistics expected = cpu::channel_statistics(tensors.views()[0], c.shape, SerialExecutor());
    const DeviceArray<char> buffer = copy(tensors);
    const ChannelStatistics found = channels(view_in(buffer, tensors), c.shape);
    EXPECT_EQ(found.max, expected.max);
    EXPECT_EQ(found.count, expected.count);
    ASSERT_EQ(found.sum.size(), expected.sum.size());
    for (std::size_t i = 0; i < found.sum.size(); ++i)
      EXPECT_NEAR(found.sum[i], expected.sum[i], 1e-12 * found.max[i] * static_cast<double>(found.count[i])) << i;
    EXPECT_EQ(channels(view_in(buffer, tensors), c.shape).sum, found.sum) << "the same bits in every run";
  }
}

TEST_F(CalibrationCuda, CanBeCapturedInAGraph) {
  const DeviceArray<float> values(std::vector<float>(100000, 2.0F), stream_);
  const TensorView view{values.get(), 100000, DType::kFloat32};
  const ChannelShape shape{1000, 100, 1};
  const DeviceArray<RangeKeys> keys(std::vector<RangeKeys>(1), stream_);
  const DeviceArray<std::uint64_t> counts(std::vector<std::uint64_t>(kRangeBins), stream_);
  const DeviceArray<float> max(100);
  const DeviceArray<double> sum(100);
  const DeviceArray<std::uint64_t> count(100);
  const DeviceArray<char> workspace(cuda::channel_workspace_bytes(shape));
  HS_CUDA_TRY(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  cuda::range_keys(view, keys.get(), {stream_});
  cuda::add_to_counts(view, 2, counts.get(), {stream_});
  cuda::channel_statistics(view, shape, max.get(), sum.get(), count.get(), workspace.get(), {stream_});
  cudaGraph_t graph = nullptr;
  HS_CUDA_TRY(cudaStreamEndCapture(stream_, &graph));
  cudaGraphExec_t executable = nullptr;
  HS_CUDA_TRY(cudaGraphInstantiate(&executable, graph, 0));
  EXPECT_EQ(counts.read(stream_), std::vector<std::uint64_t>(kRangeBins)) << "capturing must not run";
  for (int i = 0; i < 2; ++i) HS_CUDA_TRY(cudaGraphLaunch(executable, stream_));
  EXPECT_EQ(counts.read(stream_)[kRangeBinsPerSide + 1024], 200000U);
  EXPECT_EQ(keys.read(stream_)[0].zeros, 0U);
  EXPECT_EQ(keys.read(stream_)[0].lowest, 0x40000000);
  EXPECT_EQ(sum.read(stream_), std::vector<double>(100, 2000.0));
  HS_CUDA_TRY(cudaGraphExecDestroy(executable));
  HS_CUDA_TRY(cudaGraphDestroy(graph));
}

}  // namespace
}  // namespace halfstep
