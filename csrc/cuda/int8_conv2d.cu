// int8 convolutions of images with their channels last. Contract: halfstep/int8.h.
//
//   1 by 1, stride 1, no padding   the product of plain rows
//   few outputs in a group         a thread for each output, or for four neighbouring channels of a depthwise one
//   on Hopper, where it can        the tiles of int8_hopper_conv.cu
//   everything else                the tiles of int8_gemm.cuh, whose rows are the pixels of the output and whose terms
//                                  are the taps' channels, gathered while they are copied to shared memory
//
// Padding holds the zero point, so that subtracting zero_point * (sum of the channel's weights) is right everywhere.
//
// Windows side by side, as of a vision transformer's patches, are windows one pixel wide over an image of fewer and
// deeper pixels: the 3 channels of 16 pixels in a row are 48 channels of one.
//
// Limit: that of the tiled product, with the input read once for each tap, from the caches; depthwise, the bytes of
// input and output over the memory bandwidth.
#include "int8_gemm.cuh"
#include "int8_hopper.h"
#include "int8_image.cuh"
#include "int8_linear.cuh"

namespace halfstep::cuda {
namespace {

template <int unit>
struct GatheredRows {
  static constexpr int kUnit = unit;
  static constexpr bool kThroughL1 = true;  // each pixel is under several taps

  Image image;

  template <int kRows, int kThreads>
  class Loader {
   public:
    __device__ Loader(const GatheredRows& input, std::int64_t group, std::int64_t first_row) : in_(input.image) {
      group_first_ = group * in_.group_channels;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const std::int64_t pixel = first_row + i * kPass + static_cast<int>(threadIdx.x) / kChunks;
        const Origin origin(in_, pixel < in_.out_pixels ? pixel : 0);
        y_[i] = pixel < in_.out_pixels ? origin.y : kNowhere;
        x_[i] = origin.x;
        first_[i] = ((origin.image * in_.height + origin.y) * in_.width + origin.x) * in_.channels;
      }
    }

    template <class Place>
    __device__ void load(int term, const Place& place) const {
      const int chunk = static_cast<int>(threadIdx.x) % kChunks;
      const Tap first(in_, term + chunk * kChunk);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        Tap tap = first;
        const int row = i * kPass + static_cast<int>(threadIdx.x) / kChunks;
        load_chunk<kUnit, kThroughL1>(place(row, chunk), in_.padding, [&](int) -> const std::int8_t* {
          const int dy = tap.ky * in_.dilation_height;
          const int dx = tap.kx * in_.dilation_width;
          const std::int64_t away = (static_cast<std::int64_t>(dy) * in_.width + dx) * in_.channels + tap.channel;
          const bool exists = tap.ky < in_.kernel_height && is_inside(in_, y_[i] + dy, x_[i] + dx);
          if constexpr (kUnit < kChunk) tap.advance(in_, kUnit);
          return exists ? in_.data + (first_[i] + away + group_first_) : nullptr;
        });
      }
    }

   private:
    static constexpr int kPass = kThreads / kChunks;
    static constexpr int kPasses = kRows / kPass;
    static constexpr int kNowhere = -(1 << 30);  // no tap reaches the image from there

    const Image& in_;
    std::int64_t group_first_;
    std::int64_t first_[kPasses];
    int y_[kPasses];
    int x_[kPasses];
  };
};

constexpr int kDirectBlock = 256;

// A thread for kWidth (4 or 1) neighbouring channels of a pixel, each its own group.
template <int kWidth>
__global__ __launch_bounds__(kDirectBlock) void depthwise_kernel(const __grid_constant__ Image in,
                                                                 const std::int8_t* weight,
                                                                 const __grid_constant__ Int8Finish finish) {
  const std::int64_t packs = in.channels / kWidth;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kDirectBlock + threadIdx.x;
  if (at >= in.out_pixels * packs) return;
  const std::int64_t pixel = at / packs;
  const std::int64_t channel = at % packs * kWidth;
  const Origin origin(in, pixel);
  const int taps = in.kernel_height * in.kernel_width;
  const std::int8_t* const weights = weight + channel * taps;
  std::int32_t sums[kWidth] = {};
  int tap = 0;
  for (int ky = 0; ky < in.kernel_height; ++ky) {
    const int y = origin.y + ky * in.dilation_height;
    for (int kx = 0; kx < in.kernel_width; ++kx, ++tap) {
      const int x = origin.x + kx * in.dilation_width;
      std::uint32_t word = in.padding;
      if (is_inside(in, y, x)) {
        const std::int8_t* const from =
            in.data + ((origin.image * in.height + y) * in.width + x) * in.channels + channel;
        if constexpr (kWidth == 4) {
          word = __ldg(reinterpret_cast<const std::uint32_t*>(from));
        } else {
          word = static_cast<std::uint8_t>(*from);
        }
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e)
        sums[e] +=
            static_cast<std::int8_t>(word >> (e * 8) & 0xffU) * static_cast<std::int32_t>(weights[e * taps + tap]);
    }
  }
  finish_sums(finish, ChannelTerms<kWidth>(finish, channel, in.channels), pixel, channel, in.channels, sums);
}

// A thread for each output; the channels of its group by kUnit (4 or 1) at a time.
template <int kUnit>
__global__ __launch_bounds__(kDirectBlock, 4) void small_groups_kernel(const __grid_constant__ Image in,
                                                                       const std::int8_t* weight,
                                                                       std::int64_t group_outputs,
                                                                       const __grid_constant__ Int8Finish finish) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kDirectBlock + threadIdx.x;
  if (at >= in.out_pixels * finish.channels) return;
  const std::int64_t pixel = at / finish.channels;
  const std::int64_t channel = at % finish.channels;
  const std::int64_t group_first = channel / group_outputs * in.group_channels;
  const Origin origin(in, pixel);
  const std::int8_t* weights = weight + channel * in.kernel_height * in.kernel_width * in.group_channels;
  std::int32_t sums[1] = {};
  for (int ky = 0; ky < in.kernel_height; ++ky) {
    const int y = origin.y + ky * in.dilation_height;
    for (int kx = 0; kx < in.kernel_width; ++kx, weights += in.group_channels) {
      const int x = origin.x + kx * in.dilation_width;
      const bool inside = is_inside(in, y, x);
      const std::int8_t* const from =
          in.data + ((origin.image * in.height + y) * in.width + x) * in.channels + group_first;
      for (int c = 0; c < in.group_channels; c += kUnit) {
        if constexpr (kUnit == 4) {
          const auto own =
              static_cast<int>(inside ? __ldg(reinterpret_cast<const std::uint32_t*>(from + c)) : in.padding);
          sums[0] = __dp4a(own, __ldg(reinterpret_cast<const int*>(weights + c)), sums[0]);
        } else {
          const auto own = static_cast<std::int32_t>(inside ? from[c] : static_cast<std::int8_t>(in.padding & 0xffU));
          sums[0] += own * weights[c];
        }
      }
    }
  }
  finish_sums(finish, ChannelTerms<1>(finish, channel, finish.channels), pixel, channel, finish.channels, sums);
}

unsigned direct_blocks(std::int64_t threads) {
  const std::int64_t blocks = (threads + kDirectBlock - 1) / kDirectBlock;
  HS_CHECK(blocks < std::int64_t{1} << 31, "int8_conv2d: ", threads, " outputs are too many");
  return static_cast<unsigned>(blocks);
}

void launch_direct(const Int8ConvShape& shape, const Image& image, const std::int8_t* weight, const Int8Finish& finish,
                   std::uint64_t multiples, cudaStream_t stream) {
  const std::int64_t group_outputs = shape.out_channels / shape.groups;
  if (shape.group_channels() == 1 && group_outputs == 1) {
    const bool packs = (address_of(image.data) | static_cast<std::uint64_t>(shape.channels)) % 4 == 0;
    if (packs) {
      depthwise_kernel<4>
          <<<direct_blocks(image.out_pixels * (shape.channels / 4)), kDirectBlock, 0, stream>>>(image, weight, finish);
    } else {
      depthwise_kernel<1>
          <<<direct_blocks(image.out_pixels * shape.channels), kDirectBlock, 0, stream>>>(image, weight, finish);
    }
  } else {
    const unsigned blocks = direct_blocks(image.out_pixels * shape.out_channels);
    if (multiples % 4 == 0) {
      small_groups_kernel<4><<<blocks, kDirectBlock, 0, stream>>>(image, weight, group_outputs, finish);
    } else {
      small_groups_kernel<1><<<blocks, kDirectBlock, 0, stream>>>(image, weight, group_outputs, finish);
    }
  }
  HS_CUDA_TRY(cudaGetLastError());
}

bool is_product(const Int8ConvShape& s) {
  return s.groups == 1 && s.kernel_height == 1 && s.kernel_width == 1 && s.stride_height == 1 && s.stride_width == 1 &&
         s.pad_height == 0 && s.pad_width == 0 && s.out_height == s.height && s.out_width == s.width;
}

Int8ConvShape with_deep_pixels(Int8ConvShape s) {
  const bool side_by_side = s.groups == 1 && s.kernel_width > 1 && s.stride_width == s.kernel_width &&
                            s.dilation_width == 1 && s.pad_width == 0 && s.width % s.kernel_width == 0 &&
                            s.out_width <= s.width / s.kernel_width;
  if (!side_by_side) return s;
  s.channels *= s.kernel_width;
  s.width /= s.kernel_width;
  s.kernel_width = 1;
  s.stride_width = 1;
  return s;
}

}  // namespace

void int8_conv2d(const Int8ConvShape& given, const std::int8_t* input, const std::int8_t* weight,
                 const std::int32_t* weight_sums, const Int8Epilogue& epilogue, CudaStream stream) {
  checked_image("int8_conv2d", given, input, epilogue.input.zero_point);  // before its sizes are multiplied
  const Int8ConvShape shape = with_deep_pixels(given);
  const Image image = checked_image("int8_conv2d", shape, input, epilogue.input.zero_point);
  const Int8Finish finish = int8_finish("int8_conv2d", epilogue, weight_sums, shape.terms(), shape.out_channels,
                                        /*rows_per_scale=*/shape.out_height * shape.out_width);
  if (image.out_pixels == 0 || shape.out_channels == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream.handle);
  const std::int64_t group_outputs = shape.out_channels / shape.groups;
  if (is_product(shape))
    return launch_int8_linear({image.out_pixels, shape.channels, shape.out_channels}, input, weight, finish,
                              cuda_stream);
  constexpr std::int64_t kFewOutputs = 16;  // of a group: a tile would be mostly empty
  const std::uint64_t multiples =
      address_of(input) | address_of(weight) | static_cast<std::uint64_t>(shape.group_channels());
  if (shape.groups > 1 && group_outputs < kFewOutputs)
    return launch_direct(shape, image, weight, finish, multiples, cuda_stream);
  if (launch_int8_hopper_conv(shape, image, weight, finish, cuda_stream)) return;
  with_unit(multiples, [&](auto unit) {
    const GemmCall call{weight, image.out_pixels, shape.terms(), group_outputs, 0, 0, 0, finish};
    launch_gemm(GatheredRows<decltype(unit)::value>{image}, call, shape.groups, cuda_stream);
  });
}

}  // namespace halfstep::cuda
