// Scaling of gradients alone, and casts: torch.ops.halfstep.scale_gradient and .cast as C++ functions.
#pragma once

#include <ATen/core/Tensor.h>

#include "halfstep/export.h"

namespace halfstep {

// `x` itself, as a view; the gradient that comes back to it is multiplied by `scale`. Any number of derivatives.
//   x      of dtype Half, BFloat16, Float or Double; its gradient keeps dtype and shape
//   scale  one element, Float, on the device of x or the CPU; no gradient flows to it
// `scale` is held, not copied, and read on its device when the backward pass runs: what is written to it in the
// meantime takes effect, as often as backward runs, and nothing waits for the device. The product is computed in
// float32 (Double: float64), so that neither a scale beyond float16's range nor the bits of one in bfloat16 are lost.
// The result shares memory with x, and torch raises an error where either is written in place afterwards. So it does
// under the transforms of torch.func, which know no C++ autograd functions. Under torch.compile a scale that is written
// between forward and backward is an error too, since compiled graphs check the versions of their inputs; what was
// written before the forward is read.
HALFSTEP_API at::Tensor scale_gradient(const at::Tensor& x, const at::Tensor& scale);

// The same by a finite number.
HALFSTEP_API at::Tensor scale_gradient(const at::Tensor& x, double scale);

// `x` in `dtype`, both Half, BFloat16, Float or Double; the gradient comes back in the dtype of x. Where x has that
// dtype already, it is x itself. It is x.to(dtype) for floating-point types, and an error for others.
HALFSTEP_API at::Tensor cast(const at::Tensor& x, at::ScalarType dtype);

}  // namespace halfstep
