// Maximum pooling of int8 images on the GPU. Contract: halfstep/int8_pool.h.
//
// A thread takes 16, 4 or 1 neighbouring channels of an output pixel, and reads its taps, which neighbours read too,
// through the caches.
//
// Limit: the bytes of input and output over the memory bandwidth.
#include <cuda_runtime.h>

#include "halfstep/int8_pool.h"
#include "halfstep/status.h"
#include "pack.cuh"
#include "try.h"

namespace halfstep::cuda {
namespace {

constexpr int kBlock = 256;

template <class Word>
__device__ Word larger(Word x, Word y) {
  if constexpr (sizeof(Word) == 16) {
    return {__vmaxs4(x.x, y.x), __vmaxs4(x.y, y.y), __vmaxs4(x.z, y.z), __vmaxs4(x.w, y.w)};
  } else if constexpr (sizeof(Word) == 4) {
    return __vmaxs4(x, y);
  } else {
    return x > y ? x : y;
  }
}

// -128 in every byte.
template <class Word>
__device__ Word lowest() {
  if constexpr (sizeof(Word) == 16) {
    return {0x80808080U, 0x80808080U, 0x80808080U, 0x80808080U};
  } else if constexpr (sizeof(Word) == 4) {
    return 0x80808080U;
  } else {
    return -128;
  }
}

template <class Word>
__global__ __launch_bounds__(kBlock) void max_pool_kernel(const __grid_constant__ Int8PoolShape shape,
                                                          const Word* __restrict__ input, Word* __restrict__ out) {
  const std::int64_t words = shape.channels / static_cast<std::int64_t>(sizeof(Word));
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  if (at >= shape.out_pixels() * words) return;
  const std::int64_t pixel = at / words;
  const std::int64_t row = pixel / shape.out[1];
  const Int8PoolTaps ys(shape, 0, row % shape.out[0]);
  const Int8PoolTaps xs(shape, 1, pixel % shape.out[1]);
  const Word* const image = input + row / shape.out[0] * shape.in[0] * shape.in[1] * words + at % words;
  Word largest = lowest<Word>();
  for (std::int64_t y = ys.first; y < ys.end; y += shape.dilation[0])
    for (std::int64_t x = xs.first; x < xs.end; x += shape.dilation[1])
      largest = larger(largest, __ldg(image + (y * shape.in[1] + x) * words));
  out[at] = largest;
}

template <class Word>
void launch(const Int8PoolShape& shape, const std::int8_t* input, std::int8_t* out, cudaStream_t stream) {
  const std::int64_t threads = shape.out_pixels() * (shape.channels / static_cast<std::int64_t>(sizeof(Word)));
  const std::int64_t blocks = (threads + kBlock - 1) / kBlock;
  HS_CHECK(blocks < std::int64_t{1} << 31, "int8_max_pool2d: ", threads, " outputs are too many");
  max_pool_kernel<Word><<<static_cast<unsigned>(blocks), kBlock, 0, stream>>>(
      shape, reinterpret_cast<const Word*>(input), reinterpret_cast<Word*>(out));
  HS_CUDA_TRY(cudaGetLastError());
}

}  // namespace

void int8_max_pool2d(const Int8PoolShape& shape, const std::int8_t* input, std::int8_t* out, CudaStream stream) {
  shape.check();
  if (shape.out_pixels() == 0 || shape.channels == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream.handle);
  const std::uint64_t multiples = reinterpret_cast<std::uintptr_t>(input) | reinterpret_cast<std::uintptr_t>(out) |
                                  static_cast<std::uint64_t>(shape.channels);
  if (multiples % 16 == 0) return launch<uint4>(shape, input, out, cuda_stream);
  if (multiples % 4 == 0) return launch<unsigned>(shape, input, out, cuda_stream);
  launch<signed char>(shape, input, out, cuda_stream);
}

}  // namespace halfstep::cuda
