// Rows times packed weights, in tasks. Linear layers and convolutions differ in where their rows come from.
#pragma once

#include <cstdint>
#include <functional>

#include "halfstep/int8.h"

namespace halfstep::cpu {

// Products of int8 that are worth a task, some ten microseconds' work.
inline constexpr std::int64_t kInt8TaskCost = 1 << 20;

struct Int8Rows {
  const std::int8_t* data;
  std::int64_t pitch;
};

struct Int8Product {
  std::int64_t rows;
  std::int64_t terms;
  std::int64_t channels;  // of all groups
  std::int64_t groups = 1;
  std::int64_t rows_per_scale = 1;  // as many share one of row_scales
  bool gathers = false;             // rows() needs a buffer
  // The terms of `count` rows from `row` on, of one group. `buffer` has room for them.
  std::function<Int8Rows(std::int64_t row, std::int64_t count, std::int64_t group, std::int8_t* buffer)> get_rows;
};

void multiply_packed(const Int8Product& product, const void* packed, const Int8Epilogue& epilogue, Int8Isa isa,
                     const Executor& executor);

// Throws InvalidArgument for what no kernel takes. `function` is named in the message.
void check_int8_epilogue(const char* function, const Int8Epilogue& epilogue, std::int64_t terms);

// A single task stays on the calling thread.
inline void run_int8_tasks(std::int64_t tasks, const Executor& executor,
                           const std::function<void(std::int64_t)>& task) {
  if (tasks <= 1) {
    SerialExecutor().for_each(tasks, task);
  } else {
    executor.for_each(tasks, task);
  }
}

}  // namespace halfstep::cpu
