// Instances of the Hopper product: without activation, relu and relu6.
#include <limits>

#include "int8_hopper_launch.cuh"

namespace halfstep::cuda {

void launch_hopper_clamp(Int8Tile tile, const Int8LinearShape& shape, const std::int8_t* input,
                         const std::int8_t* weight, const Int8Finish& finish, cudaStream_t stream) {
  const Activation activation = finish.epilogue.activation;
  const ClampActivation clamp{0.0F, activation == Activation::kRelu6 ? 6.0F : std::numeric_limits<float>::infinity(),
                              activation == Activation::kNone};
  launch_hopper(tile, shape, input, weight, finish, clamp, stream);
}

}  // namespace halfstep::cuda
