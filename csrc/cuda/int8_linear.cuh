// The product of plain rows, which a convolution of 1 by 1 is too.
#pragma once

#include "int8_epilogue.cuh"

namespace halfstep::cuda {

void launch_int8_linear(const Int8LinearShape& shape, const std::int8_t* input, const std::int8_t* weight,
                        const Int8Finish& finish, cudaStream_t stream);

}  // namespace halfstep::cuda
