// Threads for doors whose framework has none to lend.
#pragma once

#include "halfstep/export.h"
#include "halfstep/stream.h"

namespace halfstep {

// Runs tasks on `threads` threads, the calling one among them, which are made for the call and have ended when it
// returns. So nothing stays behind that a fork() could break, and nothing is shared between callers. Starting one takes
// some ten microseconds: tasks should be worth that. Tasks start in order. If one throws, those that have not started
// are dropped and the exception of one of them is thrown to the caller.
class HALFSTEP_API ThreadedExecutor final : public Executor {
 public:
  explicit ThreadedExecutor(int threads) : threads_(threads) {}
  void for_each(std::int64_t count, const std::function<void(std::int64_t)>& task) const override;

 private:
  int threads_;
};

}  // namespace halfstep
