// Layer norm, RMS norm and group norm that read half precision, compute in float32 and write half precision.
//
// A row x of `cols` elements is normalised by its own statistics, taken in float32 from one read of x:
//
//   mean    of x; 0 for RMS norm (center = false)
//   rstd    1 / sqrt(mean of (x - mean)^2 + eps)
//   out     (x - mean) * rstd * weight + bias
//
// and, with g = grad_out * weight and h = (x - mean) * rstd:
//
//   grad_input    rstd * (g - mean of g - h * mean of (g * h)), without "mean of g" for RMS norm
//   grad_weight   sum of grad_out * h over all elements that share the weight
//   grad_bias     sum of grad_out over them
//
// Statistics never come from E[x^2] - E[x]^2: a run of elements is summed about its own mean, and runs are merged as
// Chan, Golub and LeVeque do (Algorithms for computing the sample variance, 1983). So an offset a thousand times the
// spread costs no digits but those that float32 needs to hold the mean.
//
// input, weight, bias and out are float32, float16 or bfloat16, each for itself; mean, rstd and the gradients of weight
// and bias are float32; grad_input has the input's dtype. No limit on elements (64-bit sizes); no rows and no columns
// are allowed, and then the sums are 0. Rows may start at any element; 16-byte boundaries make the GPU faster.
//
// The same input gives the same bits in every run: sums go in a fixed order and without atomics, on the CPU whatever
// the number of threads and the instruction set.
//
// The functions of the namespaces cpu and cuda are the core's own; programs that link libhalfstep_torch call the ops in
// halfstep/torch/.
#pragma once

#include <cstddef>
#include <cstdint>

#include "halfstep/export.h"
#include "halfstep/stream.h"
#include "halfstep/tensor_list.h"

namespace halfstep {

// A row has `channels` channels of `spatial` neighbouring elements; a channel has one weight and one bias. Row r uses
// the parameters from (r % groups) * channels on, so that groups * channels is the size of weight and bias.
//   layer and RMS norm    rows, channels = columns
//   group norm            rows = samples * groups, channels = those of one group, spatial = height * width
struct NormShape {
  std::int64_t rows;
  std::int64_t channels;
  std::int64_t spatial = 1;
  std::int64_t groups = 1;

  HALFSTEP_HOST_DEVICE std::int64_t cols() const { return channels * spatial; }
  HALFSTEP_HOST_DEVICE std::int64_t samples() const { return rows / groups; }
  HALFSTEP_HOST_DEVICE std::int64_t parameters() const { return groups * channels; }
};

// Views with a null `data` are absent: weight and bias then count as 1 and 0.
struct NormForward {
  NormShape shape;
  bool center;  // false: RMS norm, and mean stays unwritten
  double eps;
  TensorView input;
  TensorView weight;
  TensorView bias;
  TensorView out;
  float* mean;  // [rows], null if not center; what is null of the two is not written
  float* rstd;  // [rows]
};

// What is null of the last three is not computed.
struct NormBackward {
  NormShape shape;
  bool center;
  TensorView grad_out;
  TensorView input;
  TensorView weight;
  const float* mean;
  const float* rstd;
  void* grad_input;    // in the input's dtype
  float* grad_weight;  // [parameters()]
  float* grad_bias;    // [parameters()]
};

namespace cpu {
void normalize(const NormForward& call, const Executor& executor);
void normalize_backward(const NormBackward& call, const Executor& executor);
}  // namespace cpu

// The same on device memory. Enqueues on `stream` only: no synchronisation, no host read, capturable in a CUDA graph.
// `workspace` is device memory of norms_workspace_bytes(shape) bytes, aligned to 16, free again when the stream has
// passed the call.
namespace cuda {
std::size_t norms_workspace_bytes(const NormShape& shape);
void normalize(const NormForward& call, CudaStream stream);
void normalize_backward(const NormBackward& call, void* workspace, CudaStream stream);
}  // namespace cuda

}  // namespace halfstep
