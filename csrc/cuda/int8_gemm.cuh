// The tiled int8 product: sums[row, channel] over terms of input[row, term] * weight[channel, term], and its epilogue.
// Rows are plain, or the pixels of a convolution (int8_conv2d.cu), as a Loader brings them.
//
// A block computes a tile of rows by channels. It walks over the terms by 64 at a time, with kStages such slices in
// shared memory: while one is multiplied the next ones are on their way.
//
// A slice holds 64 bytes of each row, four chunks of 16. Eight rows of the same chunk, which the tensor cores' loads
// read at once, must lie in different banks, so chunk c of a row lies at c ^ (two bits of the row). Of the weights
// those eight rows are no neighbours: the channels of a fragment are dealt out so that each thread ends up with 8
// neighbouring channels of a row of the result, and writes them as one.
//
// Limit: the tensor cores through mma.sync, about 60 % of what Hopper's wgmma reaches; or the bytes from the L2 cache,
// (1 / rows + 1 / channels of a tile) a multiplication.
#pragma once

#include <algorithm>
#include <cstdint>

#include "int8_epilogue.cuh"
#include "int8_mma.cuh"
#include "processors.h"
#include "reduce.cuh"
#include "try.h"

namespace halfstep::cuda {

constexpr int kSlice = 64;  // terms
constexpr int kChunk = 16;
constexpr int kChunks = kSlice / kChunk;
constexpr int kStages = 3;  // 48 KB of shared memory with the largest tile: what every launch may use

template <int rows, int channels, int warp_rows, int warp_channels>
struct GemmTile {
  static constexpr int kRows = rows;
  static constexpr int kChannels = channels;
  static constexpr int kWarpRows = warp_rows;
  static constexpr int kWarpChannels = warp_channels;
  static constexpr int kWarpsDown = rows / warp_rows;
  static constexpr int kThreads = kWarpsDown * (channels / warp_channels) * kWarp;
  static constexpr int kStageBytes = (rows + channels) * kSlice;
  static_assert(warp_rows % 16 == 0 && warp_channels % 32 == 0 && kStages * kStageBytes <= 48 * 1024);
};
using LargeTile = GemmTile<128, 128, 64, 64>;
using TallTile = GemmTile<128, 64, 64, 32>;
using SmallTile = GemmTile<64, 64, 32, 32>;

__host__ __device__ inline int swizzled_input(int row, int chunk) {
  return row * kSlice + (chunk ^ (row >> 1 & 3)) * kChunk;
}
__host__ __device__ inline int swizzled_weight(int row, int chunk) {
  return row * kSlice + (chunk ^ (row >> 3 & 3)) * kChunk;
}

// Brings one chunk to shared memory by kUnit bytes at a time (16, 4, 1): find(i) is where its byte i lies, for i that
// are multiples of kUnit, or null. What is missing becomes `fill`, one byte four times over.
template <int kUnit, bool kThroughL1, class Find>
__device__ void load_chunk(std::uint32_t to, std::uint32_t fill, const Find& find) {
  if constexpr (kUnit == 16) {
    if (const std::int8_t* const from = find(0)) {
      copy_async<16, kThroughL1>(to, from);
    } else {
      store_shared(to, uint4{fill, fill, fill, fill});
    }
  } else if constexpr (kUnit == 4) {
#pragma unroll
    for (int i = 0; i < kChunk; i += 4) {
      if (const std::int8_t* const from = find(i)) {
        copy_async<4, kThroughL1>(to + i, from);
      } else {
        store_shared(to + i, fill);
      }
    }
  } else {
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const std::int8_t* const from = find(i);
      const std::uint32_t byte = from ? static_cast<std::uint8_t>(*from) : fill & 0xffU;
      words[i / 4] = i % 4 == 0 ? byte : words[i / 4] | byte << (i % 4 * 8);
    }
    store_shared(to, uint4{words[0], words[1], words[2], words[3]});
  }
}

// kRows rows of a dense matrix [rows, terms], from first_row on. Rows and terms that do not exist are 0.
template <int kRows, int kThreads, int kUnit, bool kThroughL1>
class RowLoader {
 public:
  __device__ RowLoader(const std::int8_t* data, std::int64_t rows, std::int64_t terms, std::int64_t first_row)
      : data_(data + (first_row + own_row()) * terms),
        terms_(static_cast<int>(terms)),
        rows_(rows - first_row < kRows ? static_cast<int>(rows - first_row) : kRows) {}

  // The slice from `term` on; place(row, chunk) is where a chunk goes.
  template <class Place>
  __device__ void load(int term, const Place& place) const {
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    const int at = term + chunk * kChunk;
#pragma unroll
    for (int pass = 0; pass < kRows; pass += kPass) {
      const int row = pass + own_row();
      const std::int8_t* const from = data_ + static_cast<std::int64_t>(pass) * terms_ + at;
      load_chunk<kUnit, kThroughL1>(place(row, chunk), 0U, [&](int i) -> const std::int8_t* {
        return row < rows_ && at + i < terms_ ? from + i : nullptr;
      });
    }
  }

 private:
  static constexpr int kPass = kThreads / kChunks;  // rows that all threads bring at a time
  static_assert(kRows % kPass == 0);
  static __device__ int own_row() { return static_cast<int>(threadIdx.x) / kChunks; }

  const std::int8_t* data_;
  int terms_;
  int rows_;
};

struct GemmCall {
  const std::int8_t* weight;   // [groups * group_outputs, terms]
  std::int64_t rows;           // of the result
  std::int64_t terms;          // of one group
  std::int64_t group_outputs;  // channels of the result in one group
  unsigned row_tiles;
  unsigned group_tiles;    // that cover the channels of one group
  unsigned channel_tiles;  // of all groups
  Int8Finish finish;
};

// Which tile a block takes: bands of 16 tiles of rows, and in each channel tile after channel tile, so that blocks that
// run at the same time read the same rows and weights.
__host__ __device__ inline uint2 tile_of(unsigned block, unsigned row_tiles, unsigned channel_tiles) {
  constexpr unsigned kBand = 16;
  const unsigned per_band = kBand * channel_tiles;
  const unsigned first = block / per_band * kBand;
  const unsigned height = row_tiles - first < kBand ? row_tiles - first : kBand;
  const unsigned inside = block % per_band;
  return {first + inside % height, inside / height};
}

// Input::Loader<kRows, kThreads>(input, group, first_row) brings the rows, with load() as RowLoader's.
template <class Tile, class Input>
__global__ __launch_bounds__(Tile::kThreads) void int8_gemm_kernel(const __grid_constant__ Input input,
                                                                   const __grid_constant__ GemmCall call) {
  constexpr int kRowFragments = Tile::kWarpRows / 16;
  constexpr int kChannelFragments = Tile::kWarpChannels / 8;
  __shared__ alignas(128) std::uint8_t shared[kStages * Tile::kStageBytes];
  const std::uint32_t stages = shared_address(shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warp_row = warp % Tile::kWarpsDown * Tile::kWarpRows;
  const int warp_channel = warp / Tile::kWarpsDown * Tile::kWarpChannels;

  const uint2 tile = tile_of(blockIdx.x, call.row_tiles, call.channel_tiles);
  const std::int64_t first_row = static_cast<std::int64_t>(tile.x) * Tile::kRows;
  const std::int64_t group = tile.y / call.group_tiles;
  const std::int64_t first_output = static_cast<std::int64_t>(tile.y % call.group_tiles) * Tile::kChannels;
  typename Input::template Loader<Tile::kRows, Tile::kThreads> rows(input, group, first_row);
  const RowLoader<Tile::kChannels, Tile::kThreads, Input::kUnit, Input::kThroughL1> weights(
      call.weight + group * call.group_outputs * call.terms, call.group_outputs, call.terms, first_output);

  const int terms = static_cast<int>(call.terms);
  const int slices = (terms + kSlice - 1) / kSlice;
  const auto load = [&](int slice) {
    if (slice < slices) {
      const std::uint32_t stage = stages + slice % kStages * Tile::kStageBytes;
      rows.load(slice * kSlice, [&](int row, int chunk) { return stage + swizzled_input(row, chunk); });
      weights.load(slice * kSlice,
                   [&](int row, int chunk) { return stage + Tile::kRows * kSlice + swizzled_weight(row, chunk); });
    }
    commit_copies();  // of nothing at the end, so that the count of those under way stays right
  };

  // Where this lane's row of the four matrices of a load begins. Bit 5 of it is the half of the slice.
  const int input_at = swizzled_input(warp_row + lane % 16, lane / 16);
  const int eighth = lane % 8;
  const int weight_at =
      Tile::kRows * kSlice + swizzled_weight(warp_channel + eighth / 2 * 8 + lane / 16 * 2 + eighth % 2, lane / 8 % 2);

  std::int32_t sums[kRowFragments][kChannelFragments][4] = {};
#pragma unroll
  for (int slice = 0; slice < kStages - 1; ++slice) load(slice);
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // everybody's copies are there, and the stage before this one has been read
    load(slice + kStages - 1);
    const std::uint32_t stage = stages + slice % kStages * Tile::kStageBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::uint32_t a[kRowFragments][4];
      std::uint32_t b[kChannelFragments][2];
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i)
        load_matrices(stage + (input_at ^ half * 32) + i * 16 * kSlice, a[i][0], a[i][1], a[i][2], a[i][3]);
      // Fragment j of a group of four holds the channels 8k + 2j and 8k + 2j + 1, k = 0 .. 3, of its 32.
#pragma unroll
      for (int j = 0; j < kChannelFragments; j += 2)
        load_matrices(stage + (weight_at ^ half * 32) + (j / 4 * 32 + j % 4 * 2) * kSlice, b[j][0], b[j][1],
                      b[j + 1][0], b[j + 1][1]);
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
        for (int j = 0; j < kChannelFragments; ++j) multiply_add(sums[i][j], a[i], b[j]);
    }
  }

  const std::int64_t end = (group + 1) * call.group_outputs;
#pragma unroll
  for (int quad = 0; quad < kChannelFragments / 4; ++quad) {
    const std::int64_t first = group * call.group_outputs + first_output + warp_channel + quad * 32 + lane % 4 * 8;
    if (first >= end) break;
    const ChannelTerms<8> channel_terms(call.finish, first, end);
    std::int64_t row = first_row + warp_row + lane / 4;
    // A loop that moves the next fragment to the front, not copies of the epilogue for each: that is much less code.
#pragma unroll 1
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
      for (int below = 0; below < 2; ++below, row += 8) {
        std::int32_t own[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) own[e] = sums[0][quad * 4 + e / 2][below * 2 + e % 2];
        if (row < call.rows) finish_sums(call.finish, channel_terms, row, first, end, own);
      }
#pragma unroll
      for (int next = 1; next < kRowFragments; ++next)
#pragma unroll
        for (int e = 0; e < 16; ++e) sums[next - 1][quad * 4 + e / 4][e % 4] = sums[next][quad * 4 + e / 4][e % 4];
    }
  }
}

template <class Tile, class Input>
void launch_gemm(const Input& input, GemmCall call, std::int64_t groups, cudaStream_t stream) {
  const std::int64_t row_tiles = (call.rows + Tile::kRows - 1) / Tile::kRows;
  const std::int64_t group_tiles = (call.group_outputs + Tile::kChannels - 1) / Tile::kChannels;
  constexpr std::int64_t kMostBlocks = (std::int64_t{1} << 31) - 1;
  HS_CHECK(groups * group_tiles <= kMostBlocks / 16 && row_tiles <= kMostBlocks / (groups * group_tiles),
           "int8 product of ", call.rows, " rows and ", groups * call.group_outputs, " channels is too large");
  call.row_tiles = static_cast<unsigned>(row_tiles);
  call.group_tiles = static_cast<unsigned>(group_tiles);
  call.channel_tiles = static_cast<unsigned>(groups * group_tiles);
  int8_gemm_kernel<Tile, Input><<<call.row_tiles * call.channel_tiles, Tile::kThreads, 0, stream>>>(input, call);
  HS_CUDA_TRY(cudaGetLastError());
}

// The largest tile of which there are about as many as the GPU has processors. Odd alignments have one tile.
template <class Input>
void launch_gemm(const Input& input, const GemmCall& call, std::int64_t groups, cudaStream_t stream) {
  if constexpr (Input::kUnit == 16) {
    const int processors = processors_here();
    const auto fills = [&](std::int64_t rows, std::int64_t channels) {
      const std::int64_t tiles = (call.rows + rows - 1) / rows * ((call.group_outputs + channels - 1) / channels);
      return tiles * groups * 4 >= processors * std::int64_t{3};
    };
    if (call.group_outputs > 64 && fills(128, 128)) return launch_gemm<LargeTile>(input, call, groups, stream);
    if (fills(128, 64)) return launch_gemm<TallTile>(input, call, groups, stream);
  }
  launch_gemm<SmallTile>(input, call, groups, stream);
}

// How many bytes can be moved at a time where addresses and sizes are multiples of all of these: run(16), run(4),
// run(1).
template <class Run>
void with_unit(std::uint64_t multiples, const Run& run) {
  if (multiples % 16 == 0) return run(std::integral_constant<int, 16>{});
  if (multiples % 4 == 0) return run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 1>{});
}

inline std::uint64_t address_of(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data);
}

}  // namespace halfstep::cuda
