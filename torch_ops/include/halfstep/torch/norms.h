// Layer norm, RMS norm and group norm on half precision, differentiable. They are torch.ops.halfstep.layer_norm,
// .rms_norm and .group_norm, called through the dispatcher.
//
// Arithmetic is in float32 throughout (contract: halfstep/norms.h); nothing is cast before or after in memory. Each
// gives what torch's function gives on float32 copies of its arguments, rounded once to `out_dtype`:
//   input      float32, float16 or bfloat16, any strides; taken as it is under autocast
//   weight, bias  of the same three dtypes; their gradients are summed in float32 and rounded to their dtype
//   out_dtype  of the same three, that of input if absent: with a float32 residual stream, half for what follows
// Runs on the input's current stream and never waits for it. Throws c10::Error (ValueError or TypeError in Python).
// Differentiable once. Under torch.compile, torch.export, torch.func, forward-mode AD and dispatch modes the ops are
// the ATen formula (cast, op, cast), which Inductor makes one kernel of.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include "halfstep/export.h"

namespace halfstep {

HALFSTEP_API at::Tensor layer_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                                   const std::optional<at::Tensor>& weight = std::nullopt,
                                   const std::optional<at::Tensor>& bias = std::nullopt, double eps = 1e-5,
                                   std::optional<at::ScalarType> out_dtype = std::nullopt);

// Without `eps`: that of float32, 1.19e-7, in which it computes (torch takes its compute type's as well).
HALFSTEP_API at::Tensor rms_norm(const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                                 const std::optional<at::Tensor>& weight = std::nullopt,
                                 std::optional<double> eps = std::nullopt,
                                 std::optional<at::ScalarType> out_dtype = std::nullopt);

// input [N, C, ...], weight and bias [C]. The result is contiguous, whatever the memory format of input.
HALFSTEP_API at::Tensor group_norm(const at::Tensor& input, std::int64_t num_groups,
                                   const std::optional<at::Tensor>& weight = std::nullopt,
                                   const std::optional<at::Tensor>& bias = std::nullopt, double eps = 1e-5,
                                   std::optional<at::ScalarType> out_dtype = std::nullopt);

}  // namespace halfstep
