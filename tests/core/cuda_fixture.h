// Device memory for the CUDA tests, and the rule for machines without a GPU: skip, unless HALFSTEP_REQUIRE_CUDA=1.
#pragma once

#include <cstdlib>
#include <cstring>
#include <vector>

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "try.h"

namespace halfstep::test {

class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) {
      HS_CUDA_TRY(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
      return;
    }
    if (required()) FAIL() << "HALFSTEP_REQUIRE_CUDA=1, but no GPU";
    GTEST_SKIP() << "no GPU on this machine";
  }
  static bool required() {
    const char* const value = std::getenv("HALFSTEP_REQUIRE_CUDA");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }
  void TearDown() override {
    if (stream_ != nullptr) HS_CUDA_TRY(cudaStreamDestroy(stream_));
  }

  cudaStream_t stream_ = nullptr;  // not the default stream: work on the wrong one shows
};

// `count` elements on the device, filled from or read back to the host on a stream.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t count) : count_(count) {
    if (count > 0) HS_CUDA_TRY(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)));
  }
  DeviceArray(const std::vector<T>& values, cudaStream_t stream) : DeviceArray(values.size()) {
    HS_CUDA_TRY(cudaMemcpyAsync(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice, stream));
    HS_CUDA_TRY(cudaStreamSynchronize(stream));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(DeviceArray&& other) noexcept : data_(other.data_), count_(other.count_) { other.data_ = nullptr; }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  DeviceArray& operator=(DeviceArray&&) = delete;

  T* get() const { return data_; }
  std::vector<T> read(cudaStream_t stream) const {
    std::vector<T> values(count_);
    HS_CUDA_TRY(cudaMemcpyAsync(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost, stream));
    HS_CUDA_TRY(cudaStreamSynchronize(stream));
    return values;
  }

 private:
  T* data_ = nullptr;
  std::size_t count_ = 0;
};

}  // namespace halfstep::test
