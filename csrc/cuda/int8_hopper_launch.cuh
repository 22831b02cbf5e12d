// Launches of the Hopper kernel: maps of the matrices, and its instances. Each activation is a source of its own, so
// that two cores compile them side by side.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>

#include "int8_hopper.cuh"
#include "int8_tiles.h"
#include "processors.h"
#include "try.h"

namespace halfstep::cuda {

// The maps of a call, in the boxes of a tile.
CUtensorMap hopper_input_map(const Int8LinearShape& shape, const std::int8_t* input, int rows);
CUtensorMap hopper_weight_map(const Int8LinearShape& shape, const std::int8_t* weight, int channels);

inline ClampActivation clamp_activation(Activation activation) {
  return {0.0F, activation == Activation::kRelu6 ? 6.0F : std::numeric_limits<float>::infinity(),
          activation == Activation::kNone};
}

template <class Tile>
HopperCall hopper_call(const Int8LinearShape& shape, const Int8Finish& finish) {
  const auto tiles_of = [](std::int64_t size, int tile) { return (size + tile - 1) / tile; };
  const std::int64_t row_tiles = tiles_of(shape.rows, Tile::kRows * Tile::kCluster);
  const std::int64_t channel_tiles = tiles_of(shape.channels, Tile::kChannels);
  HS_CHECK(shape.rows < (std::int64_t{1} << 31) - 256 && shape.channels < (std::int64_t{1} << 31) - 256 &&
               row_tiles * channel_tiles < std::int64_t{1} << 30,
           "int8 product of ", shape.rows, " rows and ", shape.channels, " channels is too large");
  return {shape.rows,
          shape.channels,
          static_cast<int>(tiles_of(shape.terms, kHopperSlice)),
          static_cast<int>(row_tiles),
          static_cast<int>(channel_tiles),
          finish};
}

// As many clusters as there is room for, or tiles.
template <class Tile, auto kernel, class... Arguments>
void launch_clusters(const HopperCall& call, cudaStream_t stream, const Arguments&... arguments) {
  int device = 0;
  HS_CUDA_TRY(cudaGetDevice(&device));
  static std::atomic<std::uint64_t> prepared{0};  // a bit for each device whose kernel may have this much shared memory
  const std::uint64_t bit = std::uint64_t{1} << device % 64;
  if ((prepared.load(std::memory_order_relaxed) & bit) == 0 || device >= 64) {
    HS_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes));
    prepared.fetch_or(bit, std::memory_order_relaxed);
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Tile::kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(
      std::min(call.row_tiles * call.channel_tiles, processors_of(device) / Tile::kCluster) * Tile::kCluster);
  config.blockDim = Tile::kThreads;
  config.dynamicSmemBytes = Tile::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  HS_CUDA_TRY(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <class Tile, class Activate>
void launch_hopper_tile(const Int8LinearShape& shape, const std::int8_t* input, const std::int8_t* weight,
                        const Int8Finish& finish, const Activate& activate_values, cudaStream_t stream) {
  const HopperCall call = hopper_call<Tile>(shape, finish);
  launch_clusters<Tile, int8_hopper_kernel<Tile, Activate>>(
      call, stream, hopper_input_map(shape, input, Tile::kRows),
      hopper_weight_map(shape, weight, Tile::kChannels / Tile::kCluster), call, activate_values);
}

template <class Activate>
void launch_hopper(Int8Tile tile, const Int8LinearShape& shape, const std::int8_t* input, const std::int8_t* weight,
                   const Int8Finish& finish, const Activate& activate_values, cudaStream_t stream) {
  const auto run = [&](auto chosen) {
    launch_hopper_tile<decltype(chosen)>(shape, input, weight, finish, activate_values, stream);
  };
  switch (tile) {
    case Int8Tile::kPair256x256:
      return run(HopperTile<128, 256, 2>{});
    case Int8Tile::k128x256:
      return run(HopperTile<128, 256, 1>{});
    case Int8Tile::kPair256x128:
      return run(HopperTile<128, 128, 2>{});
    case Int8Tile::k128x128:
      return run(HopperTile<128, 128, 1>{});
    case Int8Tile::k64x64:
      return run(HopperTile<64, 64, 1>{});
    case Int8Tile::kNone:
      return;
  }
}

// In int8_hopper_{clamp,gelu,other}.cu.
void launch_hopper_clamp(Int8Tile tile, const Int8LinearShape& shape, const std::int8_t* input,
                         const std::int8_t* weight, const Int8Finish& finish, cudaStream_t stream);
void launch_hopper_gelu(Int8Tile tile, const Int8LinearShape& shape, const std::int8_t* input,
                        const std::int8_t* weight, const Int8Finish& finish, cudaStream_t stream);
void launch_hopper_other(Int8Tile tile, const Int8LinearShape& shape, const std::int8_t* input,
                         const std::int8_t* weight, const Int8Finish& finish, cudaStream_t stream);

}  // namespace halfstep::cuda
