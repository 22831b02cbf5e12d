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

// The convolution, as a product of pixels by the terms of taps, on the fastest tile; false, and nothing is done, where
// it cannot run, where its sizes do not fit the copies (see int8_conv2d_by_tile), or where it is not the fastest.
bool launch_int8_hopper_conv(const Int8ConvShape& shape, const Image& image, const std::int8_t* weight,
                             const Int8Finish& finish, cudaStream_t stream);

}  // namespace halfstep::cuda
