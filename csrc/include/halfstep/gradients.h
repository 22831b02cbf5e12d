// The check of the gradients: one read decides finite or not and takes the norm and the per-tensor statistics.
//
// With inv = float32(1 / float64(*scale)), as torch.amp computes it, g the stored gradient and u = g * inv the
// unscaled one (computed in float32; float64 gradients in float64):
//
//   found   set to 1 if any u is infinite or NaN; otherwise left alone, so that several calls can share one flag.
//           u and not g is looked at: a scale below 1 can push a finite g over the edge, which torch.amp misses.
//   norm    the L2 norm of all u of the list, 0 for an empty one. Squares are summed in float32 (float64 for float64
//           gradients) over short runs and in float64 across them, in a fixed order: the same input gives the same
//           bits in every run, on the CPU whatever the number of threads and the instruction set. It is NaN or
//           infinite when some u is, and infinite too when the square of a finite float32 u overflows (|u| > 1.8e19).
//   stats   one row of kGradientStats float32 per tensor, may be null.
//
// float32, float64, float16 and bfloat16 may be mixed in one list. No limit on elements (64-bit sizes) or tensors.
// check_gradients never writes a gradient; unscale replaces every g by u (rounded to its dtype, and a u that becomes
// infinite there is found), also when something was found: torch's contract.
//
// The functions of the namespaces cpu and cuda are the core's own; programs that link libhalfstep_torch call the ops in
// halfstep/torch/.
#pragma once

#include <cstddef>

#include "halfstep/stream.h"
#include "halfstep/tensor_list.h"

namespace halfstep {

enum GradientStat : int {
  kNonFinite,     // elements that are infinite or NaN after unscaling
  kMaxMagnitude,  // largest |u| among the finite ones
  kSumOfSquares,  // of u, non-finite ones included
  kZeros,         // elements equal to 0
  kBelowHalf,     // elements with 0 < |u| < 2^-14, below float16's normal range
  kElements,      // all elements
  kGradientStats,
};

struct CheckOutputs {
  float* found;  // required
  float* norm;   // may be null
  float* stats;  // [tensors, kGradientStats], may be null
};

// What the gradients are multiplied by: 1 / *scale, or *scale itself if `inverse` says that it is 1/scale already.
struct UnscaleFactor {
  const float* scale;
  bool inverse = false;
};

namespace cpu {
void check_gradients(TensorList grads, UnscaleFactor factor, const CheckOutputs& out, const Executor& executor);
void unscale(TensorList grads, UnscaleFactor factor, const CheckOutputs& out, const Executor& executor);
// The same, but every u goes to `unscaled`, a list of the same sizes and dtypes (InvalidArgument otherwise), and the
// gradients stay. A tensor of it may be the gradient itself; otherwise the two share no memory.
void unscale_into(TensorList grads, TensorList unscaled, UnscaleFactor factor, const CheckOutputs& out,
                  const Executor& executor);
}  // namespace cpu

// The same on device memory. Enqueues on `stream` only: no synchronisation, no host read, capturable in a CUDA graph.
// `workspace` is device memory of gradients_workspace_bytes(grads) bytes, aligned to 16, free again when the stream
// has passed the call. Tensors go into kernel parameters, up to 1024 a launch: nothing is uploaded.
namespace cuda {
std::size_t gradients_workspace_bytes(TensorList grads);
void check_gradients(TensorList grads, UnscaleFactor factor, const CheckOutputs& out, void* workspace,
                     CudaStream stream);
void unscale(TensorList grads, UnscaleFactor factor, const CheckOutputs& out, void* workspace, CudaStream stream);
}  // namespace cuda

}  // namespace halfstep
