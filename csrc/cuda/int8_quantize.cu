// Between floats and int8 on the GPU, sums of weights, and the embedding. Contract: halfstep/int8.h.
//
// Limit of each: the bytes read and written over the memory bandwidth. Rows that are quantized by their own scale are
// read once and kept in registers by a warp or a block; longer ones are read again, mostly from the L2 cache.
#include <algorithm>
#include <cstdint>

#include "halfstep/int8.h"
#include "pack.cuh"
#include "reduce.cuh"
#include "rows.cuh"
#include "try.h"

namespace halfstep::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kPackWidth = 16;  // int8 of one store

unsigned strided_blocks(std::int64_t threads) {
  return static_cast<unsigned>(std::clamp<std::int64_t>((threads + kBlock - 1) / kBlock, 1, 1 << 20));
}

// visit(i) for 0 .. count - 1 over the whole grid.
template <class Visit>
__device__ void for_strided(std::int64_t count, const Visit& visit) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kBlock;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < count; i += stride) visit(i);
}

// Elements by packs of kWidth, and what is left of them one by one.
template <int kWidth, class Visit>
__device__ void for_packs(std::int64_t numel, const Visit& visit) {
  const std::int64_t packs = numel / kWidth;
  for_strided(packs, [&](std::int64_t i) { visit(i * kWidth, std::integral_constant<int, kWidth>{}); });
  for_strided(numel - packs * kWidth,
              [&](std::int64_t i) { visit(packs * kWidth + i, std::integral_constant<int, 1>{}); });
}

// The elements from .. from + kCount - 1 as float32, multiplied by their channels' factors if there are any.
template <class Storage, int kCount>
__device__ void widen_pack(const Pack<Storage, kCount>& pack, const ChannelFactors& factors, std::int64_t from,
                           float (&x)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) x[e] = widen_device(pack.elements[e]);
  if (!factors.values) return;
  std::int64_t channel = from % factors.channels;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    x[e] *= factors.values[channel];
    if (++channel == factors.channels) channel = 0;
  }
}

template <class Storage, int kCount>
__device__ void quantize_pack(const void* input, const ChannelFactors& factors, std::int64_t from, std::int8_t* out,
                              float inverse_scale, std::int32_t zero_point) {
  float x[kCount];
  widen_pack<Storage, kCount>(load_pack<Storage, kCount>(input, from), factors, from, x);
  std::int8_t q[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) q[e] = quantize_value(x[e], inverse_scale, zero_point);
  store_pack<std::int8_t, kCount>(out, from, q);
}

template <class Storage, int kWidth>
__global__ __launch_bounds__(kBlock) void quantize_kernel(const void* input, ChannelFactors factors, std::int64_t numel,
                                                          float inverse_scale, std::int32_t zero_point,
                                                          std::int8_t* out) {
  for_packs<kWidth>(numel, [&](std::int64_t at, auto count) {
    quantize_pack<Storage, decltype(count)::value>(input, factors, at, out, inverse_scale, zero_point);
  });
}

template <class Storage, int kWidth>
__global__ __launch_bounds__(kBlock) void dequantize_kernel(const std::int8_t* input, std::int64_t numel,
                                                            Int8Parameters parameters, void* out) {
  for_packs<kWidth>(numel, [&](std::int64_t at, auto count) {
    constexpr int kCount = decltype(count)::value;
    const auto q = load_pack<std::int8_t, kCount>(input, at);
    float x[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      x[e] = static_cast<float>(q.elements[e] - parameters.zero_point) * parameters.scale;
    store_pack<Storage, kCount>(out, at, x);
  });
}

// A thread holds kHold packs of kWidth elements of its row; with none held it reads the row twice.
template <class Storage, int kWidth, int kThreads, int kHold>
__global__ __launch_bounds__(kRowBlock<kThreads>) void quantize_rows_kernel(const void* input, ChannelFactors factors,
                                                                            std::int64_t rows, std::int64_t cols,
                                                                            std::int8_t* out, float* scales) {
  constexpr bool kHeld = kHold > 0;
  constexpr int kGroup = kHeld ? kHold : 4;
  const std::int64_t packs = cols / kWidth;
  const std::int64_t lane = threadIdx.x % kThreads;
  const auto for_groups = [&](const auto& visit) {
    if constexpr (kHeld) {
      visit(lane);
    } else {
      for (std::int64_t base = lane; base < packs; base += kThreads * kGroup) visit(base);
    }
  };
  for_rows<kThreads>(rows, [&](std::int64_t row) {
    Pack<Storage, kWidth> x[kGroup];
    const auto load = [&](std::int64_t base) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k)
        if (base + k * kThreads < packs)
          x[k] = load_pack<Storage, kWidth>(input, row * cols + (base + k * kThreads) * kWidth);
    };
    std::uint32_t largest = 0;
    for_groups([&](std::int64_t base) {
      load(base);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (base + k * kThreads >= packs) break;
        float values[kWidth];
        widen_pack<Storage, kWidth>(x[k], factors, row * cols + (base + k * kThreads) * kWidth, values);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) largest = MaxBits{}(largest, __float_as_uint(values[e]) & 0x7fffffffU);
      }
    });
    const float scale = row_scale(reduce_row<kThreads>(largest, MaxBits{}, 0U));
    if (lane == 0) scales[row] = scale;
    const float inverse_scale = 1.0F / scale;
    for_groups([&](std::int64_t base) {
      if constexpr (!kHeld) load(base);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (base + k * kThreads >= packs) break;
        float values[kWidth];
        widen_pack<Storage, kWidth>(x[k], factors, row * cols + (base + k * kThreads) * kWidth, values);
        std::int8_t q[kWidth];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) q[e] = quantize_value(values[e], inverse_scale, 0);
        store_pack<std::int8_t, kWidth>(out, row * cols + (base + k * kThreads) * kWidth, q);
      }
    });
  });
}

template <int kWidth>
__global__ __launch_bounds__(kRowBlock<kWarp>) void weight_sums_kernel(const std::int8_t* weight, std::int64_t channels,
                                                                       std::int64_t terms, std::int32_t* weight_sums) {
  for_rows<kWarp>(channels, [&](std::int64_t channel) {
    std::int32_t sum = 0;
    for (std::int64_t at = threadIdx.x % kWarp * kWidth; at < terms; at += kWarp * kWidth) {
      const auto pack = load_pack<std::int8_t, kWidth>(weight, channel * terms + at);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sum += pack.elements[e];
    }
    sum = reduce_warp(sum, Add{});
    if (threadIdx.x % kWarp == 0) weight_sums[channel] = sum;
  });
}

template <class Storage, int kWidth>
__global__ __launch_bounds__(kBlock) void embedding_kernel(const __grid_constant__ Int8Embedding call) {
  const std::int64_t packs = call.width / kWidth;
  for_strided(call.count * packs, [&](std::int64_t i) {
    const std::int64_t row = i / packs;
    const std::int64_t col = i % packs * kWidth;
    const std::int64_t index = call.wide_indices ? static_cast<const std::int64_t*>(call.indices)[row]
                                                 : static_cast<const std::int32_t*>(call.indices)[row];
    if (index < 0 || index >= call.entries) __trap();
    const float scale = call.scales[index];
    const auto q = load_pack<std::int8_t, kWidth>(call.weight, index * call.width + col);
    float x[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) x[e] = static_cast<float>(q.elements[e]) * scale;
    store_pack<Storage, kWidth>(call.out.data, row * call.width + col, x);
  });
}

// run(Storage{}) on the host.
template <class Run>
void with_host_storage(const char* name, DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat16:
      return run(Half{});
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat64:
      break;
  }
  HS_CHECK(false, name, ": got ", name_of(dtype), ", expected float32, float16 or bfloat16");
}

void check_factors(const char* name, const TensorView& input, const ChannelFactors& factors) {
  HS_CHECK(!factors.values || (factors.channels > 0 && input.numel % factors.channels == 0), name, ": ", input.numel,
           " elements are no multiple of ", factors.channels, " channels");
}

cudaStream_t native(CudaStream stream) {
  return static_cast<cudaStream_t>(stream.handle);
}

}  // namespace

void quantize(const TensorView& input, const ChannelFactors& factors, const Int8Parameters& parameters,
              std::int8_t* out, CudaStream stream) {
  check_factors("quantize", input, factors);
  with_host_storage("quantize", input.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if (input.numel == 0) return;
    const float inverse_scale = 1.0F / parameters.scale;
    const auto launch = [&](auto* kernel, int width) {
      kernel<<<strided_blocks((input.numel + width - 1) / width), kBlock, 0, native(stream)>>>(
          input.data, factors, input.numel, inverse_scale, parameters.zero_point, out);
    };
    if (starts_on_16_bytes(input.data) && starts_on_16_bytes(out)) {
      launch(quantize_kernel<Storage, kPackWidth>, kPackWidth);
    } else {
      launch(quantize_kernel<Storage, 1>, 1);
    }
    HS_CUDA_TRY(cudaGetLastError());
  });
}

void quantize_rows(const TensorView& input, const ChannelFactors& factors, std::int64_t rows, std::int8_t* out,
                   float* scales, CudaStream stream) {
  check_factors("quantize_rows", input, factors);
  with_host_storage("quantize_rows", input.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if (rows == 0) return;
    HS_CHECK(rows > 0 && input.numel % rows == 0, "quantize_rows: ", rows, " rows do not divide ", input.numel,
             " elements");
    const std::int64_t cols = input.numel / rows;
    const auto launch = [&](auto* kernel, int rows_per_block, int block) {
      kernel<<<blocks_for(rows, rows_per_block), block, 0, native(stream)>>>(input.data, factors, rows, cols, out,
                                                                             scales);
    };
    constexpr int kWidth = kPackWidth;
    if (cols % kWidth != 0 || !starts_on_16_bytes(input.data) || !starts_on_16_bytes(out)) {
      if (cols <= 1024)
        return launch(quantize_rows_kernel<Storage, 1, kWarp, 0>, kRowsPerBlock<kWarp>, kRowBlock<kWarp>);
      return launch(quantize_rows_kernel<Storage, 1, 512, 0>, 1, 512);
    }
    if (cols <= kWarp * 4 * kWidth)
      return launch(quantize_rows_kernel<Storage, kWidth, kWarp, 4>, kRowsPerBlock<kWarp>, kRowBlock<kWarp>);
    if (cols <= 256 * 4 * kWidth) return launch(quantize_rows_kernel<Storage, kWidth, 256, 4>, 1, 256);
    launch(quantize_rows_kernel<Storage, kWidth, 512, 0>, 1, 512);
  });
  HS_CUDA_TRY(cudaGetLastError());
}

void dequantize(const std::int8_t* input, const Int8Parameters& parameters, const TensorView& out, CudaStream stream) {
  with_host_storage("dequantize", out.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if (out.numel == 0) return;
    const auto launch = [&](auto* kernel, int width) {
      kernel<<<strided_blocks((out.numel + width - 1) / width), kBlock, 0, native(stream)>>>(input, out.numel,
                                                                                             parameters, out.data);
    };
    if (starts_on_16_bytes(input) && starts_on_16_bytes(out.data)) {
      launch(dequantize_kernel<Storage, kPackWidth>, kPackWidth);
    } else {
      launch(dequantize_kernel<Storage, 1>, 1);
    }
    HS_CUDA_TRY(cudaGetLastError());
  });
}

void int8_weight_sums(const Int8WeightShape& shape, const std::int8_t* weight, std::int32_t* weight_sums,
                      CudaStream stream) {
  HS_CHECK(shape.terms <= kInt8MaxTerms, "int8_weight_sums: ", shape.terms, " terms, expected at most ", kInt8MaxTerms);
  if (shape.channels == 0) return;
  const auto launch = [&](auto* kernel) {
    kernel<<<blocks_for(shape.channels, kRowsPerBlock<kWarp>), kRowBlock<kWarp>, 0, native(stream)>>>(
        weight, shape.channels, shape.terms, weight_sums);
  };
  if (starts_on_16_bytes(weight) && shape.terms % 16 == 0) {
    launch(weight_sums_kernel<16>);
  } else {
    launch(weight_sums_kernel<1>);
  }
  HS_CUDA_TRY(cudaGetLastError());
}

void int8_embedding(const Int8Embedding& call, CudaStream stream) {
  with_host_storage("int8_embedding", call.out.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if (call.count == 0 || call.width == 0) return;
    const auto launch = [&](auto* kernel, int width) {
      kernel<<<strided_blocks(call.count * (call.width / width)), kBlock, 0, native(stream)>>>(call);
    };
    if (call.width % kPackWidth == 0 && starts_on_16_bytes(call.weight) && starts_on_16_bytes(call.out.data)) {
      launch(embedding_kernel<Storage, kPackWidth>, kPackWidth);
    } else {
      launch(embedding_kernel<Storage, 1>, 1);
    }
    HS_CUDA_TRY(cudaGetLastError());
  });
}

}  // namespace halfstep::cuda
