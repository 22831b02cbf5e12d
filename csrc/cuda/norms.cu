// The norms on the GPU. Contract: halfstep/norms.h.
//
// How rows are read and normalised: norm_rows.cuh. The gradients of weight and bias take a second kernel, which leaves
// one partial sum per strip of samples in the workspace, and a third that adds the strips in order.
//
// Limit: the bytes of input and output over the memory bandwidth; backward reads two tensors and writes one, and reads
// the two once more for the parameters' gradients.
#include <algorithm>

#include "halfstep/norms.h"
#include "norm_rows.cuh"
#include "pack.cuh"
#include "reduce.cuh"
#include "rows.cuh"
#include "try.h"

namespace halfstep::cuda {
namespace {

template <class Storage, class Layout, class Parameters>
__global__ __launch_bounds__(Layout::kBlock) void normalize_kernel(const __grid_constant__ NormForward call) {
  constexpr int kWidth = Layout::kWidth;
  for_rows<Layout::kThreads>(call.shape.rows, [&](std::int64_t row) {
    NormRow<Storage, Layout, Parameters> of_row(call, row);
    of_row.for_results([&](std::int64_t at, const float (&out)[kWidth]) {
      with_storage(call.out.dtype, [&](auto storage) { store_pack<decltype(storage)>(call.out.data, at, out); });
    });
  });
}

template <class Storage, class Layout, class Parameters>
__global__ __launch_bounds__(Layout::kBlock) void backward_kernel(const __grid_constant__ NormBackward call) {
  constexpr int kWidth = Layout::kWidth;
  constexpr int kGroup = Layout::kGroup;
  constexpr int kThreads = Layout::kThreads;
  const std::int64_t cols = call.shape.cols();
  const std::int64_t packs = cols / kWidth;

  for_rows<Layout::kThreads>(call.shape.rows, [&](std::int64_t row) {
    const float mean = call.center ? call.mean[row] : 0.0F;
    const float rstd = call.rstd[row];
    // As read, and grad_out * weight. What follows from x is computed twice, which takes fewer registers than a float
    // for each element.
    Pack<Storage, kWidth> x[kGroup];
    float g[kGroup][kWidth];
    const auto h = [&](Storage element) { return (widen_device(element) - mean) * rstd; };
    const auto load = [&](std::int64_t base) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k)
        if (base + k * kThreads < packs)
          x[k] = load_pack<Storage, kWidth>(call.input.data, row * cols + (base + k * kThreads) * kWidth);
      with_storage(call.grad_out.dtype, [&](auto storage) {
        Pack<decltype(storage), kWidth> grad[kGroup];
#pragma unroll
        for (int k = 0; k < kGroup; ++k)
          if (base + k * kThreads < packs)
            grad[k] =
                load_pack<decltype(storage), kWidth>(call.grad_out.data, row * cols + (base + k * kThreads) * kWidth);
#pragma unroll
        for (int k = 0; k < kGroup; ++k)
#pragma unroll
          for (int e = 0; e < kWidth; ++e) g[k][e] = widen_device(grad[k].elements[e]);
      });
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const std::int64_t col = (base + k * kThreads) * kWidth;
        if (col >= cols) break;
        float weight[kWidth];
        Parameters::load(call.weight, call.shape, row, col, 1.0F, weight);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) g[k][e] *= weight[e];
      }
    };

    float2 sums{0.0F, 0.0F};
    Layout::for_groups(packs, [&](std::int64_t base) {
      load(base);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (base + k * kThreads >= packs) break;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          sums.x += g[k][e];
          sums.y += g[k][e] * h(x[k].elements[e]);
        }
      }
    });
    sums = reduce_row<kThreads>(sums, Add{}, float2{0.0F, 0.0F});
    const float mean_g = call.center ? sums.x / static_cast<float>(cols) : 0.0F;
    const float mean_gh = sums.y / static_cast<float>(cols);
    Layout::for_groups(packs, [&](std::int64_t base) {
      if constexpr (!Layout::kHeld) load(base);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const std::int64_t col = (base + k * kThreads) * kWidth;
        if (col >= cols) break;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) g[k][e] = rstd * (g[k][e] - mean_g - h(x[k].elements[e]) * mean_gh);
        store_pack<Storage>(call.grad_input, row * cols + col, g[k]);
      }
    });
  });
}

// The gradients of weight and bias over one strip of rows, for rows whose every element has its own parameter (layer
// and RMS norm). A warp reads kWidth columns a thread, row by row; the block's warps share the strip.
constexpr int kColumnWarps = 8;

template <class Storage, int kWidth>
__global__ __launch_bounds__(kColumnWarps* kWarp) void column_kernel(const __grid_constant__ NormBackward call,
                                                                     std::int64_t strips, float* weights,
                                                                     float* biases) {
  __shared__ float2 shared[kColumnWarps][kWidth][kWarp];
  const std::int64_t rows = call.shape.rows;
  const std::int64_t cols = call.shape.channels;
  const std::int64_t strip = blockIdx.y;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t col = (static_cast<std::int64_t>(blockIdx.x) * kWarp + lane) * kWidth;
  float2 sums[kWidth] = {};  // of weight, of bias
  if (col < cols) {
    with_storage(call.grad_out.dtype, [&](auto storage) {
#pragma unroll 4
      for (std::int64_t row = rows * strip / strips + warp; row < rows * (strip + 1) / strips; row += kColumnWarps) {
        const auto x = load_pack<Storage, kWidth>(call.input.data, row * cols + col);
        const auto grad = load_pack<decltype(storage), kWidth>(call.grad_out.data, row * cols + col);
        const float mean = call.center ? call.mean[row] : 0.0F;
        const float rstd = call.rstd[row];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const float g = widen_device(grad.elements[e]);
          sums[e].x += g * ((widen_device(x.elements[e]) - mean) * rstd);
          sums[e].y += g;
        }
      }
    });
  }
#pragma unroll
  for (int e = 0; e < kWidth; ++e) shared[warp][e][lane] = sums[e];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kWidth * kWarp; i += kColumnWarps * kWarp) {
    const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kWarp * kWidth + i;
    if (at >= cols) break;
    float2 total{0.0F, 0.0F};
    for (int other = 0; other < kColumnWarps; ++other) total = Add{}(total, shared[other][i % kWidth][i / kWidth]);
    if (call.grad_weight) weights[strip * cols + at] = total.x;
    if (call.grad_bias) biases[strip * cols + at] = total.y;
  }
}

// The same for group norm: one warp or block sums one channel of one sample.
template <class Storage, class Layout>
__global__ __launch_bounds__(Layout::kBlock) void channel_kernel(const __grid_constant__ NormBackward call,
                                                                 float* weights, float* biases) {
  constexpr int kWidth = Layout::kWidth;
  const std::int64_t packs = call.shape.spatial / kWidth;
  for_rows<Layout::kThreads>(call.shape.rows * call.shape.channels, [&](std::int64_t channel) {
    const std::int64_t row = channel / call.shape.channels;
    const float mean = call.center ? call.mean[row] : 0.0F;
    const float rstd = call.rstd[row];
    float2 sums{0.0F, 0.0F};
    with_storage(call.grad_out.dtype, [&](auto storage) {
#pragma unroll 4
      for (std::int64_t i = threadIdx.x % Layout::kThreads; i < packs; i += Layout::kThreads) {
        const std::int64_t first = channel * call.shape.spatial + i * kWidth;
        const auto x = load_pack<Storage, kWidth>(call.input.data, first);
        const auto grad = load_pack<decltype(storage), kWidth>(call.grad_out.data, first);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const float g = widen_device(grad.elements[e]);
          sums.x += g * ((widen_device(x.elements[e]) - mean) * rstd);
          sums.y += g;
        }
      }
    });
    sums = reduce_row<Layout::kThreads>(sums, Add{}, float2{0.0F, 0.0F});
    if (threadIdx.x % Layout::kThreads == 0) {
      if (call.grad_weight) weights[channel] = sums.x;
      if (call.grad_bias) biases[channel] = sums.y;
    }
  });
}

// Of weights (y = 0) and biases (y = 1): result[i] = sum over strips of partials[strip][i], 32 neighbouring i a block.
constexpr int kStripWarps = 16;

__global__ __launch_bounds__(kStripWarps* kWarp) void strips_kernel(const float* weights, const float* biases,
                                                                    std::int64_t strips, std::int64_t size,
                                                                    float* grad_weight, float* grad_bias) {
  float* const result = blockIdx.y == 0 ? grad_weight : grad_bias;
  if (!result) return;
  const float* const partials = blockIdx.y == 0 ? weights : biases;
  __shared__ double shared[kStripWarps][kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kWarp + lane;
  double sum = 0.0;
  if (i < size) {
#pragma unroll 4
    for (std::int64_t strip = warp; strip < strips; strip += kStripWarps) sum += partials[strip * size + i];
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= size) return;
  for (int other = 1; other < kStripWarps; ++other) sum += shared[other][lane];
  result[i] = static_cast<float>(sum);
}

// How many partial sums each parameter gets: enough strips to fill the GPU, each of enough rows to pay for itself.
std::int64_t strips_of(const NormShape& shape) {
  if (!by_column(shape)) return shape.samples();
  constexpr std::int64_t kBlocks = 1024;
  constexpr std::int64_t kRowsPerStrip = 32;
  const std::int64_t tiles = (shape.channels + 255) / 256;
  return std::min((shape.rows + kRowsPerStrip - 1) / kRowsPerStrip,
                  std::max<std::int64_t>(1, kBlocks / std::max<std::int64_t>(1, tiles)));
}

template <class Storage>
void launch_forward(const NormForward& call, cudaStream_t stream) {
  const bool aligned = starts_on_16_bytes(call.input.data) && starts_on_16_bytes(call.out.data) &&
                       starts_on_16_bytes(call.weight.data) && starts_on_16_bytes(call.bias.data);
  with_layout<Storage, kHoldOfForward>(
      call.shape, aligned, call.weight, call.bias, [&]<class Layout, class Parameters>(Layout, Parameters) {
        normalize_kernel<Storage, Layout, Parameters>
            <<<blocks_for(call.shape.rows, kRowsPerBlock<Layout::kThreads>), Layout::kBlock, 0, stream>>>(call);
      });
  HS_CUDA_TRY(cudaGetLastError());
}

template <class Storage>
void launch_parameters(const NormBackward& call, bool aligned, float* weights, float* biases, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(Storage);
  const NormShape& shape = call.shape;
  const std::int64_t strips = strips_of(shape);
  if (by_column(shape)) {
    const auto launch = [&](auto* kernel, int width) {
      const auto tiles = static_cast<unsigned>((shape.channels + kWarp * width - 1) / (kWarp * width));
      kernel<<<dim3(tiles, static_cast<unsigned>(strips)), kColumnWarps * kWarp, 0, stream>>>(call, strips, weights,
                                                                                              biases);
    };
    if (aligned && shape.channels % kWidth == 0) {
      launch(column_kernel<Storage, kWidth>, kWidth);
    } else {
      launch(column_kernel<Storage, 1>, 1);
    }
  } else {
    const auto launch = [&](auto layout) {
      using Layout = decltype(layout);
      channel_kernel<Storage, Layout>
          <<<blocks_for(shape.rows * shape.channels, kRowsPerBlock<Layout::kThreads>), Layout::kBlock, 0, stream>>>(
              call, weights, biases);
    };
    if (!aligned || shape.spatial % kWidth != 0) {
      launch(Layout<1, kWarp, 0>{});
    } else if (shape.spatial <= 8192) {
      launch(Layout<kWidth, kWarp, 0>{});
    } else {
      launch(Layout<kWidth, 256, 0>{});
    }
  }
  HS_CUDA_TRY(cudaGetLastError());
}

template <class Storage>
void launch_backward(const NormBackward& call, float* workspace, cudaStream_t stream) {
  const NormShape& shape = call.shape;
  const bool aligned = starts_on_16_bytes(call.input.data) && starts_on_16_bytes(call.grad_out.data) &&
                       starts_on_16_bytes(call.weight.data) && starts_on_16_bytes(call.grad_input);
  const bool elements = shape.rows > 0 && shape.cols() > 0;
  if (call.grad_input && elements) {
    with_layout<Storage, /*kHoldOfWarp=*/sizeof(Storage) == 2 ? 4 : 8>(  // 1024 elements of a row
        shape, aligned, call.weight, {}, [&]<class Layout, class Parameters>(Layout, Parameters) {
          backward_kernel<Storage, Layout, Parameters>
              <<<blocks_for(shape.rows, kRowsPerBlock<Layout::kThreads>), Layout::kBlock, 0, stream>>>(call);
        });
    HS_CUDA_TRY(cudaGetLastError());
  }
  const std::int64_t size = shape.parameters();
  if (size == 0 || (!call.grad_weight && !call.grad_bias)) return;
  const std::int64_t strips = elements ? strips_of(shape) : 0;
  float* const weights = workspace;
  float* const biases = workspace + strips * size;
  if (elements) launch_parameters<Storage>(call, aligned, weights, biases, stream);
  strips_kernel<<<dim3(blocks_for(size, kWarp), 2), kStripWarps * kWarp, 0, stream>>>(weights, biases, strips, size,
                                                                                      call.grad_weight, call.grad_bias);
  HS_CUDA_TRY(cudaGetLastError());
}

}  // namespace

std::size_t norms_workspace_bytes(const NormShape& shape) {
  return static_cast<std::size_t>(2 * strips_of(shape) * shape.parameters()) * sizeof(float);
}

void normalize(const NormForward& call, CudaStream stream) {
  if (call.shape.rows == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream.handle);
  switch (call.input.dtype) {
    case DType::kFloat32:
      return launch_forward<float>(call, cuda_stream);
    case DType::kFloat16:
      return launch_forward<Half>(call, cuda_stream);
    case DType::kBFloat16:
      return launch_forward<BFloat16>(call, cuda_stream);
    case DType::kFloat64:
      break;
  }
  HS_UNREACHABLE("dtype ", static_cast<int>(call.input.dtype));
}

void normalize_backward(const NormBackward& call, void* workspace, CudaStream stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream.handle);
  auto* const partials = static_cast<float*>(workspace);
  switch (call.input.dtype) {
    case DType::kFloat32:
      return launch_backward<float>(call, partials, cuda_stream);
    case DType::kFloat16:
      return launch_backward<Half>(call, partials, cuda_stream);
    case DType::kBFloat16:
      return launch_backward<BFloat16>(call, partials, cuda_stream);
    case DType::kFloat64:
      break;
  }
  HS_UNREACHABLE("dtype ", static_cast<int>(call.input.dtype));
}

}  // namespace halfstep::cuda
