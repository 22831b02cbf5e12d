// The merge of statistics on the GPU: the CPU's rows, bit for bit.
#include "halfstep/stability.h"

#include <random>

#include "cuda_fixture.h"
#include "halfstep/gradients.h"

namespace halfstep {
namespace {

using test::DeviceArray;

class StabilityCuda : public test::CudaTest {};

TEST_F(StabilityCuda, MergesAsTheCpuDoes) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> value(0.0F, 1e5F);
  std::vector<double> row(kLayerStatistics, 0.0);
  const DeviceArray<double> device_row(row, stream_);
  for (int place = 1; place <= 20; ++place) {
    std::vector<float> stats(kGradientStats);
    for (float& entry : stats) entry = value(random);
    if (place % 3 != 0) stats[kNonFinite] = 0.0F;
    const DeviceArray<float> device_stats(stats, stream_);
    cuda::merge_statistics(device_stats.get(), device_row.get(), place, 65520.0, {stream_});
    cpu::merge_statistics(stats.data(), row.data(), place, 65520.0);
    ASSERT_EQ(device_row.read(stream_), row) << place;
  }
}

}  // namespace
}  // namespace halfstep
