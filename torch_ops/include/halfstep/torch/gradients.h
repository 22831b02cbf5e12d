// The gradient ops as C++ functions. They are torch.ops.halfstep.check_gradients_ and .unscale_, called through the
// dispatcher, so profilers, streams and device guards see them as they see ATen's.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include "halfstep/export.h"
#include "halfstep/gradients.h"

namespace halfstep {

// One read of all gradients of one device (contract: halfstep/gradients.h). No gradient is written.
//   grads  float32, float64, float16, bfloat16, mixed; strided; any number, any size, empty ones too
//   scale  float32, one element: the loss scale
//   found  float32, one element: set to 1 if a gradient is infinite or NaN, else left alone
//   norm   float32, one element: overwritten by the L2 norm of the unscaled gradients
//   stats  float32 [grads, 6], contiguous: see halfstep::GradientStat
// All on the gradients' device; runs on its current stream and never waits for it. Throws c10::Error (ValueError or
// TypeError in Python) before anything is written.
HALFSTEP_API void check_gradients_(at::TensorList grads, const at::Tensor& scale, const at::Tensor& found,
                                   const at::Tensor& norm, const std::optional<at::Tensor>& stats = std::nullopt);

// The same, and every gradient is replaced by gradient / scale, also when something was found (torch.amp's contract).
// With scale_is_inverse, `scale` already holds 1 / scale.
HALFSTEP_API void unscale_(at::TensorList grads, const at::Tensor& scale, const at::Tensor& found,
                           const std::optional<at::Tensor>& norm = std::nullopt,
                           const std::optional<at::Tensor>& stats = std::nullopt, bool scale_is_inverse = false);

}  // namespace halfstep
