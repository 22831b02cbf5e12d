// Instances of the Hopper product: without activation, relu and relu6.
#include "int8_hopper_launch.cuh"

namespace halfstep::cuda {

void launch_hopper_clamp(Int8Tile tile, const Int8LinearShape& shape, const std::int8_t* input,
                         const std::int8_t* weight, const Int8Finish& finish, cudaStream_t stream) {
  launch_hopper(tile, shape, input, weight, finish, clamp_activation(finish.epilogue.activation), stream);
}

}  // namespace halfstep::cuda
