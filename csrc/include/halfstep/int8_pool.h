// Maximum pooling of int8 images. It commutes with quantization, which is monotonic: pooling the int8 of an image gives
// the int8 of the pooled image, so that int8 can pass from one convolution through a pooling to the next.
//
//   out[image, y, x, channel] = max over the window's taps inside of the image; -128 where no tap is, as the int8 of
//   the -infinity that a float pooling pads with
//
// The functions of the namespaces cpu and cuda are the core's own; programs that link libhalfstep_torch call the op in
// halfstep/torch/int8.h.
#pragma once

#include <cstdint>

#include "halfstep/dtype.h"
#include "halfstep/stream.h"
#include "halfstep/tensor_list.h"

namespace halfstep {

// Images lie [batch, height, width, channels], densely. Sizes of a dimension stand as {height, width}; output sizes are
// the caller's. Each size, and what the windows reach, is at most 2^28.
struct Int8PoolShape {
  std::int64_t batch, channels;
  std::int64_t in[2], out[2];
  std::int64_t kernel[2];
  std::int64_t stride[2] = {1, 1};
  std::int64_t pad[2] = {0, 0};  // above and at the left
  std::int64_t dilation[2] = {1, 1};

  HALFSTEP_HOST_DEVICE std::int64_t out_pixels() const { return batch * out[0] * out[1]; }

  // Throws InvalidArgument for what the functions below do not take.
  void check() const;
};

// The taps of a window in one dimension that lie inside: `first`, `first + dilation`, ... below `end`.
struct Int8PoolTaps {
  std::int64_t first, end;

  HALFSTEP_HOST_DEVICE Int8PoolTaps(const Int8PoolShape& s, int dim, std::int64_t at) {
    const std::int64_t start = at * s.stride[dim] - s.pad[dim];
    const std::int64_t outside = start < 0 ? (-start + s.dilation[dim] - 1) / s.dilation[dim] : 0;
    const std::int64_t reach = start + (s.kernel[dim] - 1) * s.dilation[dim] + 1;
    first = start + outside * s.dilation[dim];
    end = reach < s.in[dim] ? reach : s.in[dim];
  }
};

namespace cpu {
HALFSTEP_API void int8_max_pool2d(const Int8PoolShape& shape, const std::int8_t* input, std::int8_t* out,
                                  const Executor& executor);
}  // namespace cpu

// The same on device memory. Enqueues on `stream` only: no synchronisation, no host read, capturable in a CUDA graph.
namespace cuda {
void int8_max_pool2d(const Int8PoolShape& shape, const std::int8_t* input, std::int8_t* out, CudaStream stream);
}  // namespace cuda

}  // namespace halfstep
