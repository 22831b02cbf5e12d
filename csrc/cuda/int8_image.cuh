// Images as the kernels of convolutions see them: sizes that fit 32 bits, and what lies under each tap.
#pragma once

#include <cstdint>

#include "halfstep/int8.h"
#include "halfstep/status.h"

namespace halfstep::cuda {

// The sizes that fit 32 bits, and the zero point as four bytes.
struct Image {
  const std::int8_t* data;
  std::int64_t channels;
  std::int64_t out_pixels;
  int height, width;
  int out_height, out_width;
  int group_channels;
  int kernel_height, kernel_width;
  int stride_height, stride_width;
  int pad_height, pad_width;
  int dilation_height, dilation_width;
  std::uint32_t padding;
};

// An output pixel as the taps see it: the input pixel under the first tap, which may lie outside.
struct Origin {
  std::int64_t image;
  int y, x;

  __device__ Origin(const Image& in, std::int64_t pixel)
      : image(pixel / in.out_width / in.out_height),
        y(static_cast<int>(pixel / in.out_width % in.out_height) * in.stride_height - in.pad_height),
        x(static_cast<int>(pixel % in.out_width) * in.stride_width - in.pad_width) {}
};

__device__ inline bool is_inside(const Image& in, int y, int x) {
  return static_cast<unsigned>(y) < static_cast<unsigned>(in.height) &&
         static_cast<unsigned>(x) < static_cast<unsigned>(in.width);
}

// The input elements under one term, (ky, kx, channel) in this order.
struct Tap {
  int ky, kx, channel;

  __device__ Tap(const Image& in, int term) {
    const auto group_channels = static_cast<unsigned>(in.group_channels);
    const unsigned tap = static_cast<unsigned>(term) / group_channels;
    channel = static_cast<int>(static_cast<unsigned>(term) - tap * group_channels);
    ky = static_cast<int>(tap / static_cast<unsigned>(in.kernel_width));
    kx = static_cast<int>(tap) - ky * in.kernel_width;
  }
  // By channels that divide those of a group.
  __device__ void advance(const Image& in, int channels) {
    channel += channels;
    if (channel < in.group_channels) return;
    channel = 0;
    if (++kx < in.kernel_width) return;
    kx = 0;
    ++ky;
  }
  // By any number of channels.
  __device__ void advance_far(const Image& in, int channels) {
    channel += channels;
    while (channel >= in.group_channels) {
      channel -= in.group_channels;
      if (++kx < in.kernel_width) continue;
      kx = 0;
      ++ky;
    }
  }
};

// Every size is at most a quarter of what an int holds, and so is what the taps reach.
inline Image checked_image(const char* function, const Int8ConvShape& s, const std::int8_t* input,
                           std::int32_t zero_point) {
  const auto fit = [&](const char* name, std::int64_t value, std::int64_t least) {
    constexpr std::int64_t kMost = std::int64_t{1} << 28;
    HS_CHECK(value >= least && value <= kMost, function, ": ", name, " is ", value, ", expected ", least, " .. ",
             kMost);
    return static_cast<int>(value);
  };
  HS_CHECK(s.groups > 0 && s.channels % s.groups == 0 && s.out_channels % s.groups == 0, function, ": ", s.groups,
           " groups do not divide ", s.channels, " and ", s.out_channels, " channels");
  fit("kernel_height * dilation_height", s.kernel_height * s.dilation_height, 1);
  fit("kernel_width * dilation_width", s.kernel_width * s.dilation_width, 1);
  fit("out_height * stride_height", s.out_height * s.stride_height, 0);
  fit("out_width * stride_width", s.out_width * s.stride_width, 0);
  return {.data = input,
          .channels = s.channels,
          .out_pixels = s.out_pixels(),
          .height = fit("height", s.height, 0),
          .width = fit("width", s.width, 0),
          .out_height = fit("out_height", s.out_height, 0),
          .out_width = fit("out_width", s.out_width, 0),
          .group_channels = fit("channels of a group", s.group_channels(), 0),
          .kernel_height = fit("kernel_height", s.kernel_height, 1),
          .kernel_width = fit("kernel_width", s.kernel_width, 1),
          .stride_height = fit("stride_height", s.stride_height, 1),
          .stride_width = fit("stride_width", s.stride_width, 1),
          .pad_height = fit("pad_height", s.pad_height, 0),
          .pad_width = fit("pad_width", s.pad_width, 0),
          .dilation_height = fit("dilation_height", s.dilation_height, 1),
          .dilation_width = fit("dilation_width", s.dilation_width, 1),
          .padding = static_cast<std::uint8_t>(zero_point) * 0x01010101U};
}

}  // namespace halfstep::cuda
