// Autocast for C++ programs: LibTorch has the switches, this is the guard.
#pragma once

#include <ATen/core/Tensor.h>

#include "halfstep/export.h"

namespace halfstep {

// Within the scope's lifetime the thread's autocast on `device` is `enabled` with `dtype`; at its end, also by an
// exception, everything is as before. Scopes nest. The casts of weights that autocast keeps are dropped at every
// scope's end: kept longer they would hide the optimizer's updates from an enclosing scope and hold their memory.
//
//   {
//     halfstep::AutocastScope autocast(torch::kCUDA, torch::kHalf);
//     loss = loss_function(model->forward(x), y);
//   }
//   scaler.scale(loss).backward();
//
// `dtype` is kHalf or kBFloat16, or c10::Error is thrown. Not copyable: a scope belongs to its block and thread.
class HALFSTEP_API AutocastScope {
 public:
  explicit AutocastScope(at::DeviceType device, at::ScalarType dtype = at::kHalf, bool enabled = true,
                         bool cache_enabled = true);
  ~AutocastScope();
  AutocastScope(const AutocastScope&) = delete;
  AutocastScope& operator=(const AutocastScope&) = delete;

 private:
  at::DeviceType device_;
  at::ScalarType previous_dtype_;
  bool previous_enabled_;
  bool previous_cache_enabled_;
};

}  // namespace halfstep
