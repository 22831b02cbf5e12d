// The tiles of the Hopper product one by one, for the tests and for bench/int8_tiles.cpp, which measures them.
#pragma once

#include <cstdint>

#include "halfstep/int8.h"

namespace halfstep::cuda {

// Rows by channels of a block, or of two blocks in a cluster, which share the weights.
enum class Int8Tile : std::uint8_t { kPair256x256, k128x256, kPair256x128, k128x128, k64x64, kNone };
inline constexpr int kInt8Tiles = static_cast<int>(Int8Tile::kNone);

// int8_linear by this tile, whatever the table says; false, and nothing is done, where it cannot run.
HALFSTEP_API bool int8_linear_by_tile(Int8Tile tile, const Int8LinearShape& shape, const std::int8_t* input,
                                      const std::int8_t* weight, const std::int32_t* weight_sums,
                                      const Int8Epilogue& epilogue, CudaStream stream);
// int8_conv2d by the same kernel, of which it takes the tiles of one block: for channels that are a multiple of 16, one
// group, and sizes that fit 16 bits.
HALFSTEP_API bool int8_conv2d_by_tile(Int8Tile tile, const Int8ConvShape& shape, const std::int8_t* input,
                                      const std::int8_t* weight, const std::int32_t* weight_sums,
                                      const Int8Epilogue& epilogue, CudaStream stream);
// What the table says; kNone for the kernels of other GPUs.
HALFSTEP_API Int8Tile int8_tile_for(const Int8LinearShape& shape, int processors);
HALFSTEP_API Int8Tile int8_conv_tile_for(const Int8LinearShape& shape, int processors);

}  // namespace halfstep::cuda
