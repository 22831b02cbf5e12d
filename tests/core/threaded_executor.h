// An executor that shows what depends on the order of tasks.
#pragma once

#include <thread>
#include <vector>

#include "halfstep/stream.h"

namespace halfstep::test {

// Runs the tasks on several threads, last one first.
class ThreadedExecutor final : public Executor {
 public:
  void for_each(std::int64_t count, const std::function<void(std::int64_t)>& task) const override {
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&, t] {
        for (std::int64_t i = count - 1 - t; i >= 0; i -= 3) task(i);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

}  // namespace halfstep::test
