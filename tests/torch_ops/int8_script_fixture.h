// Modules of TorchScript's text, and what tests of quantize() ask of its results.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/script.h>
#include <torch/torch.h>

#include "device_fixture.h"
#include "halfstep/torch/int8_script.h"

namespace halfstep::test {

inline torch::jit::Module layer(const char* type, const at::Tensor& weight, const at::Tensor& bias,
                                const char* forward) {
  torch::jit::Module module(type);
  module.register_parameter("weight", weight, /*is_buffer=*/false);
  module.register_parameter("bias", bias, /*is_buffer=*/false);
  module.register_attribute("training", c10::BoolType::get(), true);
  if (forward != nullptr) module.define(forward);
  return module;
}

// quantize() whatever is faster on this machine.
inline Quantized quantized(const torch::jit::Module& module, const std::vector<std::vector<c10::IValue>>& calibration,
                           QuantizeOptions options = {}) {
  options.speed_guard = false;
  return quantize(module, calibration, options);
}

class Int8ScriptTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    torch::manual_seed(0);
  }

  at::TensorOptions options() const { return at::TensorOptions(at::kFloat).device(GetParam()); }
  at::Tensor random(at::IntArrayRef sizes) const { return at::randn(sizes, options()).mul_(0.5); }
  static at::Tensor call(const torch::jit::Module& module, const std::vector<c10::IValue>& batch) {
    const torch::NoGradGuard no_grad;
    return module.get_method("forward")(batch).toTensor();
  }
  static double noise(const at::Tensor& expected, const at::Tensor& got) {
    return ((got - expected).square().sum() / expected.square().sum()).item<double>();
  }
  static const QuantizedLayer& entry(const QuantizeReport& report, const std::string& name) {
    const auto found = std::ranges::find(report.layers, name, &QuantizedLayer::name);
    if (found == report.layers.end()) throw std::runtime_error("no layer " + name);
    return *found;
  }
  static std::int64_t calls_of(const torch::jit::Module& module, const std::string& op) {
    const std::string text = module.get_method("forward").graph()->toString();
    std::int64_t count = 0;
    for (std::size_t at = text.find(op); at != std::string::npos; at = text.find(op, at + 1)) ++count;
    return count;
  }
};

}  // namespace halfstep::test
