// Tests that run on the CPU and, where there is one, the GPU.
#pragma once

#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <torch/torch.h>

namespace halfstep::test {

class DeviceTest : public testing::TestWithParam<at::DeviceType> {
 protected:
  void SetUp() override {
    if (GetParam() != at::kCUDA || torch::cuda::is_available()) return;
    const char* const required = std::getenv("HALFSTEP_REQUIRE_CUDA");
    if (required != nullptr && std::strcmp(required, "1") == 0) FAIL() << "HALFSTEP_REQUIRE_CUDA=1, but no GPU";
    GTEST_SKIP() << "no GPU on this machine";
  }

  at::Tensor parameter(std::vector<float> values) {
    return torch::tensor(values, torch::dtype(torch::kFloat).device(GetParam())).requires_grad_(true);
  }
  static std::vector<float> values(const at::Tensor& tensor) {
    const at::Tensor flat = tensor.detach().cpu().contiguous();
    return {flat.data_ptr<float>(), flat.data_ptr<float>() + flat.numel()};
  }
  static std::string message_of(const std::function<void()>& action) {
    try {
      action();
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    ADD_FAILURE() << "nothing was thrown";
    return {};
  }
};

inline std::string device_name(const testing::TestParamInfo<at::DeviceType>& param) {
  return param.param == at::kCPU ? "cpu" : "cuda";
}

}  // namespace halfstep::test
