// Contract: halfstep/threads.h.
#include "halfstep/threads.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace halfstep {

void ThreadedExecutor::for_each(std::int64_t count, const std::function<void(std::int64_t)>& task) const {
  std::atomic<std::int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&] {
    for (std::int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      try {
        task(i);
      } catch (...) {
        next.store(count);
        const std::lock_guard lock(error_mutex);
        error = std::current_exception();
      }
    }
  };

  std::vector<std::thread> helpers;
  const std::int64_t wanted = std::min<std::int64_t>(threads_, count) - 1;
  try {
    for (std::int64_t i = 0; i < wanted; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // The machine lends no more threads: those that have started do it.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace halfstep
