#include "halfstep/threads.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

namespace halfstep {
namespace {

TEST(ThreadedExecutor, RunsEachTaskOnce) {
  for (const int threads : {-1, 1, 2, 7, 64}) {
    for (const std::int64_t count : {0, 1, 3, 1000}) {
      std::vector<std::atomic<int>> calls(static_cast<std::size_t>(count));
      ThreadedExecutor(threads).for_each(count, [&](std::int64_t i) { ++calls[static_cast<std::size_t>(i)]; });
      for (const std::atomic<int>& n : calls) EXPECT_EQ(n, 1) << threads << " threads, " << count << " tasks";
    }
  }
}

TEST(ThreadedExecutor, RunsOnSeveralThreads) {
  std::atomic<int> arrived{0};
  ThreadedExecutor(3).for_each(3, [&](std::int64_t) {
    ++arrived;
    while (arrived < 3) std::this_thread::yield();  // would hang on fewer
  });
  EXPECT_EQ(arrived, 3);
}

TEST(ThreadedExecutor, ThrowsWhatATaskThrows) {
  std::atomic<int> calls{0};
  const auto run = [&] {
    ThreadedExecutor(2).for_each(1 << 20, [&](std::int64_t) {
      ++calls;
      throw std::runtime_error("task");
    });
  };
  EXPECT_THROW(run(), std::runtime_error);
  EXPECT_LE(calls, 2) << "tasks started after one had thrown";
}

TEST(ThreadedExecutor, WorksInAForkedProcess) {
  std::atomic<int> sum{0};
  const auto add = [&](std::int64_t i) { sum += static_cast<int>(i); };
  ThreadedExecutor(4).for_each(100, add);
  const pid_t child = fork();
  if (child == 0) {
    sum = 0;
    ThreadedExecutor(4).for_each(100, add);
    _exit(sum == 4950 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace
}  // namespace halfstep
