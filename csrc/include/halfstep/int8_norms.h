// Layer norm and RMS norm that write int8, for int8 products that read it: halfstep/norms.h's results, rounded to
// norm.out.dtype and then quantized as halfstep/int8.h says. So the bits are those of quantize() or quantize_rows() of
// what normalize() has written, without the pass over memory in between; and the rounded results themselves are written
// too where they are wanted.
//
// On the GPU the order in which normalize() adds depends on whether its tensors start at 16-byte boundaries; the bits
// are those of a call whose input, weight, bias and output do if all of those here do, `quantized` included.
//
// The functions of the namespaces cpu and cuda are the core's own; programs that link libhalfstep_torch call the ops in
// halfstep/torch/.
#pragma once

#include <cstdint>

#include "halfstep/int8.h"
#include "halfstep/norms.h"

namespace halfstep {

struct Int8Norm {
  NormForward norm;        // spatial and groups are 1. norm.out.data may be null: norm.out.dtype counts in any case
  std::int8_t* quantized;  // [rows, channels]
  Int8Parameters parameters{};
  float* row_scales = nullptr;  // [rows]: where each row is quantized by its own, row_scale(), and zero point 0
};

namespace cpu {
void normalize_int8(const Int8Norm& call, const Executor& executor);
}  // namespace cpu

// The same on device memory. Enqueues on `stream` only: no synchronisation, no host read, capturable in a CUDA graph.
namespace cuda {
void normalize_int8(const Int8Norm& call, CudaStream stream);
}  // namespace cuda

}  // namespace halfstep
