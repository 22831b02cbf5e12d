// Norms that write int8 on the GPU. Contract: halfstep/int8_norms.h.
//
// Limit: the bytes of input and outputs over the memory bandwidth. Rows are read as in norms.cu; where each has its own
// scale, their results are computed twice, from registers, which takes fewer of them than a float for each.
#include "halfstep/int8_norms.h"
#include "norm_rows.cuh"
#include "pack.cuh"
#include "reduce.cuh"
#include "rows.cuh"
#include "try.h"

namespace halfstep::cuda {
namespace {

template <class Storage, class Layout, class Parameters>
__global__ __launch_bounds__(Layout::kBlock) void normalize_int8_kernel(const __grid_constant__ Int8Norm call,
                                                                        float inverse_scale) {
  constexpr int kWidth = Layout::kWidth;
  constexpr int kThreads = Layout::kThreads;
  const TensorView& out = call.norm.out;
  for_rows<kThreads>(call.norm.shape.rows, [&](std::int64_t row) {
    NormRow<Storage, Layout, Parameters> of_row(call.norm, row);
    // visit(at, results as they are when they are read again)
    const auto for_rounded = [&](const auto& visit) {
      of_row.for_results([&](std::int64_t at, const float (&results)[kWidth]) {
        float rounded[kWidth];
        with_storage(out.dtype, [&](auto storage) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) rounded[e] = widen_device(narrow_device<decltype(storage)>(results[e]));
        });
        visit(at, rounded);
      });
    };
    float inverse = inverse_scale;
    std::int32_t zero_point = call.parameters.zero_point;
    if (call.row_scales) {
      std::uint32_t largest = 0;
      for_rounded([&](std::int64_t, const float (&x)[kWidth]) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) largest = MaxBits{}(largest, __float_as_uint(x[e]) & 0x7fffffffU);
      });
      const float scale = row_scale(reduce_row<kThreads>(largest, MaxBits{}, 0U));
      if (threadIdx.x % kThreads == 0) call.row_scales[row] = scale;
      inverse = 1.0F / scale;
      zero_point = 0;
    }
    for_rounded([&](std::int64_t at, const float (&x)[kWidth]) {
      if (out.data) with_storage(out.dtype, [&](auto storage) { store_pack<decltype(storage)>(out.data, at, x); });
      std::int8_t q[kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) q[e] = quantize_value(x[e], inverse, zero_point);
      store_pack<std::int8_t, kWidth>(call.quantized, at, q);
    });
  });
}

template <class Storage>
void launch(const Int8Norm& call, cudaStream_t stream) {
  const NormForward& norm = call.norm;
  const bool aligned = starts_on_16_bytes(norm.input.data) && starts_on_16_bytes(norm.out.data) &&
                       starts_on_16_bytes(norm.weight.data) && starts_on_16_bytes(norm.bias.data) &&
                       starts_on_16_bytes(call.quantized);
  with_layout<Storage, kHoldOfForward>(
      norm.shape, aligned, norm.weight, norm.bias, [&]<class Layout, class Parameters>(Layout, Parameters) {
        normalize_int8_kernel<Storage, Layout, Parameters>
            <<<blocks_for(norm.shape.rows, kRowsPerBlock<Layout::kThreads>), Layout::kBlock, 0, stream>>>(
                call, 1.0F / call.parameters.scale);
      });
  HS_CUDA_TRY(cudaGetLastError());
}

}  // namespace

void normalize_int8(const Int8Norm& call, CudaStream stream) {
  const NormShape& shape = call.norm.shape;
  HS_CHECK(shape.spatial == 1 && shape.groups == 1, "normalize_int8: got ", shape.spatial,
           " elements of a channel and ", shape.groups, " groups, expected 1 of each");
  if (shape.rows == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream.handle);
  switch (call.norm.input.dtype) {
    case DType::kFloat32:
      return launch<float>(call, cuda_stream);
    case DType::kFloat16:
      return launch<Half>(call, cuda_stream);
    case DType::kBFloat16:
      return launch<BFloat16>(call, cuda_stream);
    case DType::kFloat64:
      break;
  }
  HS_UNREACHABLE("dtype ", static_cast<int>(call.norm.input.dtype));
}

}  // namespace halfstep::cuda
