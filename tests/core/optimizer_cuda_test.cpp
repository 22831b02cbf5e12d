#include <gtest/gtest.h>

#include "cuda_fixture.h"
#include "halfstep/optimizer.h"
#include "optimizer_fixture.h"

namespace halfstep::test {
namespace {

// Sizes around a vector, a block and a chunk of the kernel.
const std::vector<std::size_t> kSizes = {0, 1, 3, 4, 5, 1023, 1024, 16384, 16387, 40000};

// A ParameterSet's buffers on the device.
class DeviceSet {
 public:
  DeviceSet(ParameterSet& set, const OptimizerCase& which, cudaStream_t stream)
      : set_(set),
        which_(which),
        stream_(stream),
        steps_(set.steps(), stream),
        memory_(cuda::OptimizerTable::bytes(set.size(), 1)),
        table_(memory_.get(), set.size(), 1) {
    upload(set.values(), values_);
    upload(set.copies(), copies_);
    upload(set.gradients(), gradients_);
    for (int s = 0; s < 3; ++s) upload(set.state(s), states_[s]);
    auto rows = set.rows();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      rows[i].values = values_[i].get() + set.values().offset(i);
      if (rows[i].half_copy) rows[i].half_copy = copies_[i].get() + set.copies().offset(i);
      for (int s = 0; s < set.used_states(); ++s) rows[i].state[s] = states_[s][i].get() + set.state(s).offset(i);
      rows[i].step = steps_.get() + i;
    }
    table_.set_tensors(which.kind, rows, CudaStream{stream});
    table_.set_groups(std::span(&which.group, 1), CudaStream{stream});
  }

  void step(const StepControl& control) {
    std::vector<const void*> addresses;
    for (std::size_t i = 0; i < gradients_.size(); ++i)
      addresses.push_back(gradients_[i].get() + set_.gradients().offset(i));
    table_.set_gradients(addresses, CudaStream{stream_});
    step_again(control);
  }

  void step_again(const StepControl& control) {
    cuda::optimizer_step(which_.kind, table_, control, CudaStream{stream_});
  }

  void set_group(const OptimizerGroup& group) { table_.set_groups(std::span(&group, 1), CudaStream{stream_}); }

  // The device's bytes into the set's buffers.
  void download(ParameterSet& set) {
    read(values_, set.values());
    read(copies_, set.copies());
    read(gradients_, set.gradients());
    for (int s = 0; s < 3; ++s) read(states_[s], set.state(s));
    set.steps() = steps_.read(stream_);
  }

 private:
  using Arrays = std::vector<DeviceArray<char>>;
  void upload(GradientList& list, Arrays& arrays) {
    for (std::size_t i = 0; i < list.size(); ++i)
      arrays.emplace_back(std::vector<char>(list.buffer(i), list.buffer(i) + list.bytes(i)), stream_);
  }
  void read(const Arrays& arrays, GradientList& list) {
    for (std::size_t i = 0; i < list.size(); ++i) {
      const auto bytes = arrays[i].read(stream_);
      std::memcpy(list.buffer(i), bytes.data(), bytes.size());
    }
  }

  ParameterSet& set_;
  OptimizerCase which_;
  cudaStream_t stream_;
  Arrays values_, copies_, gradients_, states_[3];
  DeviceArray<float> steps_;
  DeviceArray<char> memory_;
  cuda::OptimizerTable table_;
};

class OptimizerCuda : public CudaTest, public testing::WithParamInterface<OptimizerCase> {};

// What the two pows of float32, the GPU's within 4 units, may leave in Adam's bias corrections 1 - beta^step, relative
// to what a parameter moves by.
double pow_error(const OptimizerCase& which, int step) {
  if (which.kind != OptimizerKind::kAdam) return 0.0;
  const auto of = [&](double beta) { return std::pow(beta, step) / (1.0 - std::pow(beta, step)); };
  return 0x1p-22 * (of(which.group.beta1) + 0.5 * of(which.group.beta2));
}

// Within one unit in the last place of the element, or of what it was before the step: where the two nearly cancel, no
// more can be left. `error` comes from pow_error.
void expect_within_one_ulp(GradientList& gpu, GradientList& cpu, const std::string& what,
                           GradientList* before = nullptr, double error = 0.0) {
  for (std::size_t i = 0; i < gpu.size(); ++i) {
    const DType dtype = gpu.shapes()[i].dtype;
    for (std::size_t k = 0; k < static_cast<std::size_t>(gpu.shapes()[i].numel); ++k) {
      const double now = cpu.get(i, k), then = before ? before->get(i, k) : now;
      ASSERT_NEAR(gpu.get(i, k), now,
                  ulp(dtype, std::max(std::fabs(now), std::fabs(then))) * 1.001 + std::fabs(now - then) * error)
          << what << " of tensor " << i << " (" << name_of(dtype) << "), element " << k;
    }
  }
}

TEST_P(OptimizerCuda, EqualsTheCpu) {
  for (const std::size_t misaligned : {0, 1}) {
    ParameterSet host(GetParam(), kSizes, misaligned);
    const float found = 0.0F, scale = 1000.0F, norm = 8.0F;
    const DeviceArray<float> control(std::vector<float>{found, scale, norm}, stream_);
    for (int step = 1; step <= 3; ++step) {
      host.new_gradients(static_cast<unsigned>(100 * step), 300.0);
      ParameterSet result = host, before = host;
      DeviceSet device(result, GetParam(), stream_);
      device.step({control.get(), control.get() + 1, control.get() + 2, 2.0F});
      cpu::optimizer_step(GetParam().kind, host.rows(), host.gradient_addresses(), std::span(&GetParam().group, 1),
                          {&found, &scale, &norm, 2.0F}, SerialExecutor());
      device.download(result);
      EXPECT_EQ(result.steps(), host.steps());
      expect_within_one_ulp(result.values(), host.values(), "value", &before.values(), pow_error(GetParam(), step));
      expect_within_one_ulp(result.copies(), host.copies(), "copy", &before.values(), pow_error(GetParam(), step));
      for (int s = 0; s < 3; ++s) expect_within_one_ulp(result.state(s), host.state(s), "state");
      for (std::size_t i = 0; i < host.size(); ++i)
        EXPECT_EQ(std::memcmp(result.gradients().buffer(i), host.gradients().buffer(i), host.gradients().bytes(i)), 0);
    }
  }
}

TEST_P(OptimizerCuda, ASkippedStepChangesNoByte) {
  for (const float flag : {1.0F, 2.0F, NAN}) {
    const DeviceArray<float> found(std::vector<float>{flag}, stream_);
    ParameterSet set(GetParam(), kSizes);
    ParameterSet untouched = set;
    DeviceSet device(set, GetParam(), stream_);
    device.step({found.get(), nullptr, nullptr, 0.0F});
    device.download(set);
    EXPECT_EQ(set.steps(), untouched.steps());
    for (std::size_t i = 0; i < set.size(); ++i) {
      const auto same = [&](GradientList& a, GradientList& b) {
        return std::memcmp(a.buffer(i), b.buffer(i), a.bytes(i)) == 0;
      };
      EXPECT_TRUE(same(set.values(), untouched.values()));
      EXPECT_TRUE(same(set.copies(), untouched.copies()));
      for (int s = 0; s < 3; ++s) EXPECT_TRUE(same(set.state(s), untouched.state(s)));
    }
  }
}

TEST_P(OptimizerCuda, ReplaysWithNewHyperparameters) {
  ParameterSet set(GetParam(), {1, 5000});
  ParameterSet host = set;
  DeviceSet device(set, GetParam(), stream_);
  const DeviceArray<float> found(std::vector<float>{0.0F}, stream_);
  device.step({found.get(), nullptr, nullptr, 0.0F});  // addresses of the gradients are set before the capture

  OptimizerGroup slower = GetParam().group;
  slower.lr /= 3;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  HS_CUDA_TRY(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
  device.step_again({found.get(), nullptr, nullptr, 0.0F});
  HS_CUDA_TRY(cudaStreamEndCapture(stream_, &graph));
  HS_CUDA_TRY(cudaGraphInstantiate(&executable, graph, 0));
  device.set_group(slower);
  HS_CUDA_TRY(cudaGraphLaunch(executable, stream_));
  device.download(set);
  HS_CUDA_TRY(cudaGraphExecDestroy(executable));
  HS_CUDA_TRY(cudaGraphDestroy(graph));

  const float zero = 0.0F;
  for (const OptimizerGroup& group : {GetParam().group, slower})
    cpu::optimizer_step(GetParam().kind, host.rows(), host.gradient_addresses(), std::span(&group, 1),
                        {&zero, nullptr, nullptr, 0.0F}, SerialExecutor());
  EXPECT_EQ(set.steps(), host.steps());
  for (std::size_t i = 0; i < set.size(); ++i)
    for (std::size_t k = 0; k < static_cast<std::size_t>(set.values().shapes()[i].numel); ++k)
      ASSERT_NEAR(set.values().get(i, k), host.values().get(i, k),
                  3 * ulp(set.storage(i).values, std::max(std::fabs(host.values().get(i, k)), 1.0)));
}

INSTANTIATE_TEST_SUITE_P(All, OptimizerCuda, testing::ValuesIn(optimizer_cases()),
                         [](const auto& param) { return param.param.name; });

class OptimizerCudaLarge : public CudaTest {};

TEST_F(OptimizerCudaLarge, ThousandsOfTensors) {
  const OptimizerCase which = optimizer_cases()[0];
  ParameterSet host(which, std::vector<std::size_t>(500, 100));
  ParameterSet result = host, before = host;
  DeviceSet device(result, which, stream_);
  const DeviceArray<float> found(std::vector<float>{0.0F}, stream_);
  device.step({found.get(), nullptr, nullptr, 0.0F});
  device.download(result);
  const float zero = 0.0F;
  cpu::optimizer_step(which.kind, host.rows(), host.gradient_addresses(), std::span(&which.group, 1),
                      {&zero, nullptr, nullptr, 0.0F}, SerialExecutor());
  expect_within_one_ulp(result.values(), host.values(), "value", &before.values(), pow_error(which, 1));
}

TEST_F(OptimizerCudaLarge, MoreThanTwoToTheThirtyOneElements) {
  const std::int64_t numel = (std::int64_t{1} << 31) + 5;
  std::size_t free = 0, total = 0;
  HS_CUDA_TRY(cudaMemGetInfo(&free, &total));
  if (free < static_cast<std::size_t>(numel) * 5) {
    if (required()) FAIL() << "needs 11 GB of device memory";
    GTEST_SKIP() << "needs 11 GB of device memory";
  }
  const DeviceArray<BFloat16> values(static_cast<std::size_t>(numel));
  const DeviceArray<BFloat16> grads(static_cast<std::size_t>(numel));
  HS_CUDA_TRY(cudaMemsetAsync(values.get(), 0, static_cast<std::size_t>(numel) * 2, stream_));
  HS_CUDA_TRY(cudaMemsetAsync(grads.get(), 0x3f, static_cast<std::size_t>(numel) * 2, stream_));  // 0.746...
  const DeviceArray<float> control(std::vector<float>{0.0F, 0.0F}, stream_);
  const DeviceArray<char> memory(cuda::OptimizerTable::bytes(1, 1));
  cuda::OptimizerTable table(memory.get(), 1, 1);
  const OptimizerGroup group{.lr = 2.0};
  const OptimizerTensor row{
      values.get(), {}, nullptr, control.get() + 1, numel, 0, DType::kBFloat16, DType::kBFloat16, DType::kBFloat16};
  const void* const gradient = grads.get();
  table.set_tensors(OptimizerKind::kSgd, std::span(&row, 1), CudaStream{stream_});
  table.set_gradients(std::span(&gradient, 1), CudaStream{stream_});
  table.set_groups(std::span(&group, 1), CudaStream{stream_});
  cuda::optimizer_step(OptimizerKind::kSgd, table, {control.get(), nullptr, nullptr, 0.0F}, CudaStream{stream_});
  for (const std::int64_t at : {std::int64_t{0}, (std::int64_t{1} << 31) - 1, std::int64_t{1} << 31, numel - 1}) {
    BFloat16 value{};
    HS_CUDA_TRY(cudaMemcpyAsync(&value, values.get() + at, sizeof value, cudaMemcpyDeviceToHost, stream_));
    HS_CUDA_TRY(cudaStreamSynchronize(stream_));
    EXPECT_EQ(widen(value), -2.0F * widen(BFloat16{0x3f3f})) << at;
  }
}

}  // namespace
}  // namespace halfstep::test
