// Cross entropy on half-precision logits, differentiable. It is torch.ops.halfstep.cross_entropy, called through the
// dispatcher, and by a switch what torch's own cross_entropy runs under autocast on a GPU.
#pragma once

#include <optional>

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include "halfstep/export.h"

namespace halfstep {

// torch.nn.functional.cross_entropy with a float32 loss, computed in float32 from the logits as they are: no float32
// copy of them in either direction (contract: halfstep/cross_entropy.h).
//   input   [N, C] or [C]; float32, float16 or bfloat16, taken as it is under autocast; any strides
//   target  [N] or []; int64 classes
//   weight  [C], of a floating-point dtype; no gradient flows to it
// Input of more dimensions, class probabilities as targets and targets of other integer types go to ATen's function on
// a float32 copy. A target that is neither a class nor ignore_index: IndexError on the CPU, a device assertion on the
// GPU. Runs on the input's current stream and never waits for it. Differentiable once. Under torch.compile,
// torch.export, torch.func, forward-mode AD and dispatch modes it is ATen's function on a cast input.
HALFSTEP_API at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target,
                                      const std::optional<at::Tensor>& weight = std::nullopt,
                                      std::int64_t reduction = at::Reduction::Mean, c10::SymInt ignore_index = -100,
                                      double label_smoothing = 0.0);

// Whether torch's cross_entropy under CUDA autocast runs as the op above where that takes its arguments (half logits of
// one or two dimensions, int64 targets), for this thread. Off at first; returns what was. Everything else stays as it
// is, and so do calls under hooks for saved tensors (activation checkpointing without reentrance, save_on_cpu) and a
// torch version that has an autocast kernel of its own there.
HALFSTEP_API bool set_half_reductions(bool enabled);

// The same for a block: at its end, also by an exception, the switch is as before.
class HALFSTEP_API HalfReductionsScope {
 public:
  explicit HalfReductionsScope(bool enabled = true) : previous_(set_half_reductions(enabled)) {}
  ~HalfReductionsScope() { set_half_reductions(previous_); }
  HalfReductionsScope(const HalfReductionsScope&) = delete;
  HalfReductionsScope& operator=(const HalfReductionsScope&) = delete;

 private:
  bool previous_;
};

}  // namespace halfstep
