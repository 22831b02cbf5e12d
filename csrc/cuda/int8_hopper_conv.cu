// int8 convolutions by Hopper's warpgroup products. Contract: int8_hopper.h; the arithmetic of the epilogue is
// int8_math.h's, as everywhere.
//
// The product of rows of int8_hopper.cuh, whose rows are the pixels of the output and whose terms are the taps'
// channels. The weights come by TMA as there; the input is gathered by the 128 threads of the warpgroup that copies, 16
// channels each, to where TMA would have put them. (TMA can walk over an image by itself, but fills what is outside of
// it with zeros, where this needs the zero point.)
//
// Limit: that of the product, or what 128 threads can gather: 16 KiB of input in the time of a slice's products.
#include <algorithm>
#include <limits>

#include "int8_gemm.cuh"
#include "int8_hopper.h"
#include "int8_hopper_launch.cuh"
#include "int8_image.cuh"

namespace halfstep::cuda {
namespace {

constexpr int kChunkBytes = 16;
constexpr int kSixteenBits = 32767;

// What lies outside of an image: 16 bytes of each zero point, from -128 on, which copies can read.
struct alignas(kChunkBytes) Outside {
  std::int8_t bytes[256][kChunkBytes];
  constexpr Outside() : bytes() {
    for (int zero_point = -128; zero_point < 128; ++zero_point)
      for (std::int8_t& byte : bytes[zero_point + 128]) byte = static_cast<std::int8_t>(zero_point);
  }
};
[[maybe_unused]] __device__ const Outside kOutside{};  // host and device must both declare it, only sm_90a reads it

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <class Tile>
__device__ void gather_tiles(HopperStages<Tile> stages, const CUtensorMap* weight, const HopperCall& call,
                             const Image& image) {
  constexpr int kChunksOfRow = kHopperSlice / kChunkBytes;
  constexpr int kPass = kWarpgroup / kChunksOfRow;  // rows that all threads bring at a time
  constexpr int kPasses = Tile::kRows / kPass;
  constexpr int kNowhere = -kSixteenBits - 1;  // no tap reaches the image from there
  const int thread = static_cast<int>(threadIdx.x) - Tile::kConsumerThreads;
  const int chunk = thread % kChunksOfRow;
  const int own_row = thread / kChunksOfRow;
  const std::uint32_t place = own_row * kHopperSlice + (chunk ^ own_row % 8) * kChunkBytes;
  const std::int8_t* const outside = kOutside.bytes[call.finish.epilogue.input.zero_point + 128];
  const int tiles = call.row_tiles * call.channel_tiles;
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    const HopperPlace at(call, tile);
    unsigned first[kPasses];  // the byte of the pixel under the first tap; outside of the image it means nothing
    int corner[kPasses];      // its y in the upper 16 bits, its x in the lower
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const auto pixel = static_cast<unsigned>(at.row * Tile::kRows + i * kPass + own_row);
      const unsigned line = pixel / static_cast<unsigned>(image.out_width);
      const auto x = static_cast<int>(pixel - line * static_cast<unsigned>(image.out_width)) * image.stride_width -
                     image.pad_width;
      const unsigned picture = line / static_cast<unsigned>(image.out_height);
      const auto y = static_cast<int>(line - picture * static_cast<unsigned>(image.out_height)) * image.stride_height -
                     image.pad_height;
      const bool exists = pixel < static_cast<std::uint64_t>(call.rows);
      first[i] = ((picture * static_cast<unsigned>(image.height) + static_cast<unsigned>(y)) *
                      static_cast<unsigned>(image.width) +
                  static_cast<unsigned>(x)) *
                 static_cast<unsigned>(image.group_channels);
      corner[i] = (exists ? y : kNowhere) * (1 << 16) | (x & 0xffff);
    }
    Tap tap(image, chunk * kChunkBytes);
    for (int slice = 0; slice < call.slices; ++slice) {
      barrier_wait(stages.empty(), stages.phase ^ 1);
      if (thread == 0) {
        barrier_expect(stages.full(), Tile::kStageBytes - Tile::kInputBytes);
        copy_groups(stages.weight(), weight, slice * kHopperSlice, at.channel * (Tile::kChannels / 32), stages.full());
      }
      const int dy = tap.ky * image.dilation_height;
      const int dx = tap.kx * image.dilation_width;
      const unsigned away =
          (static_cast<unsigned>(dy) * static_cast<unsigned>(image.width) + static_cast<unsigned>(dx)) *
              static_cast<unsigned>(image.group_channels) +
          static_cast<unsigned>(tap.channel);
      const bool is_term = tap.ky < image.kernel_height;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int y = (corner[i] >> 16) + dy;
        const int x = static_cast<std::int16_t>(corner[i]) + dx;
        const std::int8_t* const from = is_term && is_inside(image, y, x) ? image.data + (first[i] + away) : outside;
        copy_async<kChunkBytes, /*kThroughL1=*/true>(stages.input() + place + i * kPass * kHopperSlice, from);
      }
      barrier_arrive_after_copies(stages.full());
      tap.advance_far(image, kHopperSlice);
      stages.next();
    }
  }
  wait_for_all_copies();  // a thread does not leave while its copies are under way
}
#endif

template <class Tile, class Activate>
__global__ __launch_bounds__(Tile::kThreads, 1) void int8_hopper_conv_kernel(const __grid_constant__ CUtensorMap weight,
                                                                             const __grid_constant__ HopperCall call,
                                                                             const __grid_constant__ Image image,
                                                                             const Activate activate_values) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ std::uint8_t shared[];
  __shared__ std::uint64_t barriers[2 * Tile::kStages];
  __shared__ HopperTerms<Tile::kChannels> terms[2];
  HopperStages<Tile> stages{(shared_address(shared) + 1023) / 1024 * 1024, shared_address(barriers)};
  if (threadIdx.x == 0) {
    prefetch_map(&weight);
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_init(stages.barriers + stage * 8, 1 + kWarpgroup);  // who expects the weights, and all who gather
      barrier_init(stages.barriers + (Tile::kStages + stage) * 8, Tile::kConsumers);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < Tile::kConsumerThreads) {
    if constexpr (Tile::kConsumers == 2) take_registers<224>();
    multiply_tiles<true>(stages, terms, call, 0, activate_values);
  } else {
    if constexpr (Tile::kConsumers == 2) give_registers_back<56>();
    gather_tiles(stages, &weight, call, image);
  }
#endif
}

bool fits(const Int8ConvShape& s, const Image& image) {
  const std::int64_t numbers[] = {s.height,
                                  s.width,
                                  s.kernel_height * s.dilation_height,
                                  s.kernel_width * s.dilation_width,
                                  s.out_height * s.stride_height + s.pad_height,
                                  s.out_width * s.stride_width + s.pad_width};
  const bool small = std::ranges::all_of(numbers, [](std::int64_t number) { return number <= kSixteenBits; });
  return small && s.groups == 1 && s.group_channels() % kChunkBytes == 0 && address_of(image.data) % kChunkBytes == 0 &&
         s.batch * s.height * s.width * s.channels <= std::numeric_limits<int>::max() &&
         image.out_pixels <= std::numeric_limits<int>::max() - 256;
}

template <class Tile, class Activate>
void launch(const Int8LinearShape& product, const Image& image, const std::int8_t* weight, const Int8Finish& finish,
            const Activate& activate_values, cudaStream_t stream) {
  const HopperCall call = hopper_call<Tile>(product, finish);
  launch_clusters<Tile, int8_hopper_conv_kernel<Tile, Activate>>(
      call, stream, hopper_weight_map(product, weight, Tile::kChannels), call, image, activate_values);
}

template <class Activate>
bool launch_by(Int8Tile tile, const Int8LinearShape& product, const Image& image, const std::int8_t* weight,
               const Int8Finish& finish, const Activate& activate_values, cudaStream_t stream) {
  const auto run = [&](auto chosen) {
    launch<decltype(chosen)>(product, image, weight, finish, activate_values, stream);
    return true;
  };
  switch (tile) {
    case Int8Tile::k128x256:
      return run(HopperTile<128, 256, 1>{});
    case Int8Tile::k128x128:
      return run(HopperTile<128, 128, 1>{});
    case Int8Tile::k64x64:
      return run(HopperTile<64, 64, 1>{});
    case Int8Tile::kPair256x256:
    case Int8Tile::kPair256x128:
    case Int8Tile::kNone:
      return false;
  }
  return false;
}

Int8LinearShape product_of(const Int8ConvShape& shape) {
  return {shape.out_pixels(), shape.terms(), shape.out_channels};
}

bool can_run(const Int8ConvShape& shape, const Image& image, const std::int8_t* weight, const Int8Finish& finish) {
  const Int8LinearShape product = product_of(shape);
  return product.rows > 0 && fits(shape, image) && can_run_hopper(product, image.data, weight, finish);
}

bool launch_tile(Int8Tile tile, const Int8ConvShape& shape, const Image& image, const std::int8_t* weight,
                 const Int8Finish& finish, cudaStream_t stream) {
  const Int8LinearShape product = product_of(shape);
  const Activation activation = finish.epilogue.activation;
  if (is_clamp(activation))
    return launch_by(tile, product, image, weight, finish, clamp_activation(activation), stream);
  return launch_by(tile, product, image, weight, finish, OtherActivation{activation}, stream);
}

}  // namespace

bool launch_int8_hopper_conv(const Int8ConvShape& shape, const Image& image, const std::int8_t* weight,
                             const Int8Finish& finish, cudaStream_t stream) {
  return can_run(shape, image, weight, finish) &&
         launch_tile(int8_conv_tile_for(product_of(shape), processors_here()), shape, image, weight, finish, stream);
}

bool int8_conv2d_by_tile(Int8Tile tile, const Int8ConvShape& shape, const std::int8_t* input, const std::int8_t* weight,
                         const std::int32_t* weight_sums, const Int8Epilogue& epilogue, CudaStream stream) {
  constexpr const char* kName = "int8_conv2d_by_tile";
  const Image image = checked_image(kName, shape, input, epilogue.input.zero_point);
  const Int8Finish finish = int8_finish(kName, epilogue, weight_sums, shape.terms(), shape.out_channels,
                                        /*rows_per_scale=*/shape.out_height * shape.out_width);
  return can_run(shape, image, weight, finish) &&
         launch_tile(tile, shape, image, weight, finish, static_cast<cudaStream_t>(stream.handle));
}

}  // namespace halfstep::cuda
