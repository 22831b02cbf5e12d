// The int8 product of rows by Hopper's warpgroup products, where that can run.
#pragma once

#include "int8_epilogue.cuh"
#include "int8_image.cuh"
#include "int8_tiles.h"

namespace halfstep::cuda {

// The fastest tile for this size, kNone where this product cannot run: it takes a GPU of compute capability 9.0 and a
// library built for 90a, terms, weights and input at multiples of 16 bytes, and channels that are a multiple of 32.
Int8Tile hopper_tile(const Int8LinearShape& shape, const std::int8_t* input, const std::int8_t* weight,
                     const Int8Finish& finish);

// Whether a product of this shape can run on any tile.
bool can_run_hopper(const Int8LinearShape& shape, const std::int8_t* input, const std::int8_t* weight,
                    const Int8Finish& finish);

void launch_int8_hopper(Int8Tile tile, const Int8LinearShape& shape, const std::int8_t* input,
                        const std::int8_t* weight, const Int8Finish& finish, cudaStream_t stream);

// The same for convolutions of one group: their product as rows of pixels by terms of taps. launch_int8_hopper_conv
// does nothing and returns false where the sizes do not fit its copies: channels of the input that are a multiple of
// 16, and sizes of 16 bits.
Int8Tile hopper_conv_tile(const Int8LinearShape& shape, const std::int8_t* input, const std::int8_t* weight,
                          const Int8Finish& finish);
bool launch_int8_hopper_conv(Int8Tile tile, const Int8ConvShape& shape, const Image& image, const std::int8_t* weight,
                             const Int8Finish& finish, cudaStream_t stream);

}  // namespace halfstep::cuda
