// int8 products of rows. Contract: halfstep/int8.h.
//
// More than 32 rows go through Hopper's tiles (int8_hopper.h) where those can run, else through those of int8_gemm.cuh.
// Fewer read the weights once and do little with them, so there a block takes 16 channels, its warps share the terms
// among them, and everything goes from global memory straight to the tensor cores' registers.
//
// Limit of few rows: the bytes of the weights over the memory bandwidth.
#include "int8_linear.cuh"

#include "int8_gemm.cuh"
#include "int8_hopper.h"

namespace halfstep::cuda {
namespace {

template <int unit>
struct PlainRows {
  static constexpr int kUnit = unit;
  static constexpr bool kThroughL1 = false;

  template <int kRows, int kThreads>
  struct Loader : RowLoader<kRows, kThreads, kUnit, kThroughL1> {
    __device__ Loader(const PlainRows& input, std::int64_t, std::int64_t first_row)
        : RowLoader<kRows, kThreads, kUnit, kThroughL1>(input.data, input.rows, input.terms, first_row) {}
  };

  const std::int8_t* data;
  std::int64_t rows;
  std::int64_t terms;
};

constexpr int kFewRows = 32;
constexpr int kFewWarps = 8;
constexpr int kFewChannels = 16;

// 16 bytes, of which the first `count` exist (or none); the others are 0.
template <int kUnit>
__device__ uint4 load_terms(const std::int8_t* from, int count) {
  uint4 words{};
  if constexpr (kUnit == 16) {
    if (count > 0) words = __ldg(reinterpret_cast<const uint4*>(from));
  } else if constexpr (kUnit == 4) {
    const auto* const word = reinterpret_cast<const std::uint32_t*>(from);
    if (count > 0) words.x = __ldg(word);
    if (count > 4) words.y = __ldg(word + 1);
    if (count > 8) words.z = __ldg(word + 2);
    if (count > 12) words.w = __ldg(word + 3);
  } else {
    std::uint32_t own[4] = {};
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < count) own[i / 4] |= static_cast<std::uint32_t>(static_cast<std::uint8_t>(from[i])) << (i % 4 * 8);
    words = {own[0], own[1], own[2], own[3]};
  }
  return words;
}

// The terms of a sum may come in any order, if it is the same for both factors: of 64 terms a thread takes the 16
// neighbouring ones that are a single load, and the tensor cores take them for terms 4t .. 4t + 3 of four places.
template <int kRowFragments, int kUnit>
__global__ __launch_bounds__(kFewWarps* kWarp, 2) void few_rows_kernel(const std::int8_t* input,
                                                                       const std::int8_t* weight,
                                                                       const __grid_constant__ Int8LinearShape shape,
                                                                       const __grid_constant__ Int8Finish finish) {
  constexpr int kRows = kRowFragments * 16;
  constexpr int kAhead = kUnit == 16 ? 4 / kRowFragments : 1;  // slices whose loads are under way together
  __shared__ std::int32_t shared[kFewWarps][kRows][kFewChannels];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = lane / 4;
  const int t = lane % 4;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kFewChannels;
  const int rows = static_cast<int>(shape.rows);
  const int terms = static_cast<int>(shape.terms);

  std::int32_t sums[kRowFragments][2][4] = {};
#pragma unroll 1
  for (int term = warp * kSlice; term < terms; term += kAhead * kFewWarps * kSlice) {
    // All loads first: they are what the kernel waits for.
    uint4 b[kAhead][2];
    uint4 a[kAhead][kRowFragments][2];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = term + k * kFewWarps * kSlice + t * kChunk;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const std::int64_t channel = first + j * 8 + g;
        b[k][j] = load_terms<kUnit>(weight + channel * shape.terms + at, channel < shape.channels ? terms - at : 0);
      }
#pragma unroll
      for (int i = 0; i < kRowFragments * 2; ++i) {
        const int row = i * 8 + g;
        a[k][i / 2][i % 2] = load_terms<kUnit>(input + row * shape.terms + at, row < rows ? terms - at : 0);
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
        const uint4 upper = a[k][i][0];
        const uint4 lower = a[k][i][1];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          multiply_add(sums[i][j], {upper.x, lower.x, upper.y, lower.y}, {b[k][j].x, b[k][j].y});
          multiply_add(sums[i][j], {upper.z, lower.z, upper.w, lower.w}, {b[k][j].z, b[k][j].w});
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) shared[warp][i * 16 + e / 2 * 8 + g][j * 8 + t * 2 + e % 2] = sums[i][j][e];
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * kFewChannels; i += kFewWarps * kWarp) {
    const std::int64_t channel = first + i % kFewChannels;
    if (channel >= shape.channels) break;
    std::int32_t sum[1] = {};
    for (int other = 0; other < kFewWarps; ++other) sum[0] += shared[other][i / kFewChannels][i % kFewChannels];
    finish_sums(finish, ChannelTerms<1>(finish, channel, shape.channels), i / kFewChannels, channel, shape.channels,
                sum);
  }
}

}  // namespace

void launch_int8_linear(const Int8LinearShape& shape, const std::int8_t* input, const std::int8_t* weight,
                        const Int8Finish& finish, cudaStream_t stream) {
  if (shape.rows > kFewRows) {
    const Int8Tile tile = hopper_tile(shape, input, weight, finish);
    if (tile != Int8Tile::kNone) return launch_int8_hopper(tile, shape, input, weight, finish, stream);
  }
  const std::uint64_t multiples = address_of(input) | address_of(weight) | static_cast<std::uint64_t>(shape.terms);
  with_unit(multiples, [&](auto unit) {
    constexpr int kUnit = decltype(unit)::value;
    if (shape.rows > kFewRows) {
      GemmCall call{weight, shape.rows, shape.terms, shape.channels, 0, 0, 0, finish};
      return launch_gemm(PlainRows<kUnit>{input, shape.rows, shape.terms}, call, /*groups=*/1, stream);
    }
    const std::int64_t blocks = (shape.channels + kFewChannels - 1) / kFewChannels;
    HS_CHECK(blocks < std::int64_t{1} << 31, "int8_linear: ", shape.channels, " channels are too many");
    const auto launch = [&](auto* kernel) {
      kernel<<<static_cast<unsigned>(blocks), kFewWarps * kWarp, 0, stream>>>(input, weight, shape, finish);
    };
    if (shape.rows <= 16) {
      launch(few_rows_kernel<1, kUnit>);
    } else {
      launch(few_rows_kernel<2, kUnit>);
    }
    HS_CUDA_TRY(cudaGetLastError());
  });
}

void int8_linear(const Int8LinearShape& shape, const std::int8_t* input, const std::int8_t* weight,
                 const std::int32_t* weight_sums, const Int8Epilogue& epilogue, CudaStream stream) {
  const Int8Finish finish =
      int8_finish("int8_linear", epilogue, weight_sums, shape.terms, shape.channels, /*rows_per_scale=*/1);
  if (shape.rows == 0 || shape.channels == 0) return;
  launch_int8_linear(shape, input, weight, finish, static_cast<cudaStream_t>(stream.handle));
}

}  // namespace halfstep::cuda
