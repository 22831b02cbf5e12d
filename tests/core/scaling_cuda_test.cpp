// The scale rule on the GPU: every golden trajectory, and state equal to the CPU's.
#include <cmath>

#include "cuda_fixture.h"
#include "scale_fixture.h"

namespace halfstep {
namespace {

using test::DeviceArray;

class ScalingCuda : public test::CudaTest {};

TEST_F(ScalingCuda, FollowsEveryGoldenTrajectoryWithTheCpusStateBitForBit) {
  for (const test::Golden& golden : test::kGolden) {
    const ScaleRule rule = test::rule_of(golden);
    test::ScaleMemory host(rule);
    const DeviceArray<float> scale({host.scale}, stream_);
    const DeviceArray<std::int32_t> tracker({host.growth_tracker}, stream_);
    const DeviceArray<std::int32_t> credit({host.hysteresis_left}, stream_);
    const DeviceArray<std::int64_t> counters(std::vector<std::int64_t>(kCounters), stream_);
    const DeviceArray<double> history(std::vector<double>(kHistoryRows * kHistoryColumns), stream_);
    const ScaleState state{scale.get(), tracker.get(), credit.get(), counters.get(), history.get()};
    for (std::size_t i = 0; i < golden.scales.size(); ++i) {
      const float flag = golden.found[i] == '1' ? 1.0F : 0.0F;
      const float norm = flag != 0.0F ? INFINITY : static_cast<float>(i);
      const DeviceArray<float> inputs({flag, norm}, stream_);
      const float* const found[] = {inputs.get()};
      const float* const norms[] = {inputs.get() + 1};
      cuda::update_scale(state, rule, {found, norms}, {stream_});
      const float* const host_found[] = {&flag};
      const float* const host_norms[] = {&norm};
      cpu::update_scale(host.state(), rule, {host_found, host_norms});
      ASSERT_EQ(scale.read(stream_)[0], golden.scales[i]) << golden.peer << " after step " << i;
    }
    EXPECT_EQ(tracker.read(stream_)[0], host.growth_tracker);
    EXPECT_EQ(credit.read(stream_)[0], host.hysteresis_left);
    EXPECT_EQ(counters.read(stream_), std::vector<std::int64_t>(host.counters.begin(), host.counters.end()));
    EXPECT_EQ(history.read(stream_), host.history);
  }
}

TEST_F(ScalingCuda, CombinesFlags) {
  const DeviceArray<float> flags({0.0F, 0.0F, 2.0F, NAN, -1.0F}, stream_);
  const std::vector<std::pair<std::vector<const float*>, float>> cases{{{flags.get(), flags.get() + 1}, 0.0F},
                                                                       {{flags.get(), flags.get() + 2}, 1.0F},
                                                                       {{flags.get() + 3}, 1.0F},
                                                                       {{flags.get() + 2, flags.get() + 2}, 1.0F}};
  for (const auto& [found, expected] : cases) {
    cuda::combine_found(found, flags.get() + 4, {stream_});
    EXPECT_EQ(flags.read(stream_)[4], expected);
  }
}

TEST_F(ScalingCuda, GrantsWhatTheCpuGrants) {
  const ScaleRule rule{.init_scale = 1024.0, .growth_interval = 2, .min_scale = 4.0, .max_scale = 8192.0};
  test::ScaleMemory host(rule);
  double host_record[kRequestColumns] = {rule.max_scale, NAN, NAN};
  const DeviceArray<float> scale({host.scale}, stream_);
  const DeviceArray<std::int32_t> tracker({host.growth_tracker}, stream_);
  const DeviceArray<std::int32_t> credit({host.hysteresis_left}, stream_);
  const DeviceArray<std::int64_t> counters(std::vector<std::int64_t>(kCounters), stream_);
  const DeviceArray<double> history(std::vector<double>(kHistoryRows * kHistoryColumns), stream_);
  const DeviceArray<double> record({rule.max_scale, NAN, NAN}, stream_);
  const ScaleState state{scale.get(), tracker.get(), credit.get(), counters.get(), history.get()};
  const std::vector<std::pair<float, double>> steps{{0.0F, 4096.0}, {1.0F, 4096.0}, {0.0F, 9e9},
                                                    {0.0F, NAN},    {0.0F, 2.0},    {1.0F, 1.0}};
  for (const auto& [found, requested] : steps) {
    const float norm = 3.0F;
    const DeviceArray<float> inputs({found, norm}, stream_);
    const float* const flags[] = {inputs.get()};
    const float* const norms[] = {inputs.get() + 1};
    cuda::update_scale(state, rule, {flags, norms}, {stream_});
    cuda::request_scale(state, rule, requested, record.get(), {stream_});
    const float* const host_flags[] = {&found};
    const float* const host_norms[] = {&norm};
    cpu::update_scale(host.state(), rule, {host_flags, host_norms});
    cpu::request_scale(host.state(), rule, requested, host_record);
    EXPECT_EQ(scale.read(stream_)[0], host.scale);
    EXPECT_EQ(record.read(stream_), std::vector<double>(host_record, host_record + kRequestColumns));
  }
}

}  // namespace
}  // namespace halfstep
