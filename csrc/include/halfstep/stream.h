// Where work runs. The core never asks a framework or a global for it: the caller passes it.
#pragma once

#include <cstdint>
#include <functional>

namespace halfstep {

// A CUDA stream, named without the CUDA headers: `handle` is a cudaStream_t. The caller has made the stream's device
// current. Functions that take a CudaStream only enqueue; they never wait for the device.
struct CudaStream {
  void* handle;
};

// Runs independent tasks on CPU threads that the framework owns, so that halfstep follows its thread settings.
class Executor {
 public:
  virtual ~Executor() = default;

  // Calls task(0) .. task(count - 1), each once, in any order and on any thread; returns when all have returned.
  virtual void for_each(std::int64_t count, const std::function<void(std::int64_t)>& task) const = 0;
};

// Runs the tasks in order on the calling thread.
class SerialExecutor final : public Executor {
 public:
  void for_each(std::int64_t count, const std::function<void(std::int64_t)>& task) const override {
    for (std::int64_t i = 0; i < count; ++i) task(i);
  }
};

}  // namespace halfstep
