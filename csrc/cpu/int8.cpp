// int8 linear layers and convolutions on the CPU. Contract: halfstep/int8.h.
#include <algorithm>
#include <cstring>

#include "copy_few.h"
#include "halfstep/int8.h"
#include "halfstep/status.h"
#include "int8_depthwise.h"
#include "int8_kernels.h"
#include "int8_product.h"

namespace halfstep::cpu {
namespace {

void check(const Int8ConvShape& s) {
  HS_CHECK(s.groups >= 1 && s.channels % s.groups == 0 && s.out_channels % s.groups == 0, "int8_conv2d: groups is ",
           s.groups, "; expected a divisor of channels, ", s.channels, ", and of out_channels, ", s.out_channels);
  HS_CHECK(s.stride_height >= 1 && s.stride_width >= 1 && s.dilation_height >= 1 && s.dilation_width >= 1,
           "int8_conv2d: stride is ", s.stride_height, " x ", s.stride_width, " and dilation ", s.dilation_height,
           " x ", s.dilation_width, "; expected at least 1");
}

// Copies the inputs of output pixels to rows of terms, the zero point where the kernel stands over the border.
class Gather {
 public:
  Gather(const Int8ConvShape& shape, const std::int8_t* input, std::int32_t zero_point)
      : s_(shape), input_(input), zero_point_(zero_point) {}

  // `count` pixels from `pixel` on, as terms of one group.
  void operator()(std::int64_t pixel, std::int64_t count, std::int64_t group, std::int8_t* out) const {
    while (count > 0) {
      const std::int64_t x = pixel % s_.out_width;
      const std::int64_t run = std::min(count, s_.out_width - x);
      gather_run(pixel / s_.out_width, x, run, group, out);
      pixel += run;
      count -= run;
      out += run * s_.terms();
    }
  }

 private:
  void fill(std::int8_t* out, std::int64_t count) const {
    std::memset(out, zero_point_, static_cast<std::size_t>(count));
  }

  // Pixels beside each other in one row of the outputs, line by line of the kernel.
  void gather_run(std::int64_t row, std::int64_t x, std::int64_t count, std::int64_t group, std::int8_t* out) const {
    const std::int64_t terms = s_.terms();
    const std::int64_t width = s_.kernel_width * s_.group_channels();
    const std::int64_t first = x * s_.stride_width - s_.pad_width;
    const std::int8_t* const image = input_ + row / s_.out_height * s_.height * s_.width * s_.channels;
    const bool neighbours = s_.groups == 1 && s_.dilation_width == 1;  // the kernel's taps on a line are, in memory
    for (std::int64_t ky = 0; ky < s_.kernel_height; ++ky, out += width) {
      const std::int64_t y = row % s_.out_height * s_.stride_height - s_.pad_height + ky * s_.dilation_height;
      if (y < 0 || y >= s_.height) {
        for (std::int64_t i = 0; i < count; ++i) fill(out + i * terms, width);
        continue;
      }
      const std::int8_t* const line = image + y * s_.width * s_.channels + group * s_.group_channels();
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t left = first + i * s_.stride_width;
        if (neighbours && left >= 0 && left + s_.kernel_width <= s_.width) {
          copy_few(line + left * s_.channels, width, out + i * terms);
        } else {
          gather_line(line, left, out + i * terms);
        }
      }
    }
  }

  // The kernel's taps on one line of the image, from column `left` on.
  void gather_line(const std::int8_t* line, std::int64_t left, std::int8_t* out) const {
    const std::int64_t channels = s_.group_channels();
    for (std::int64_t kx = 0; kx < s_.kernel_width; ++kx, out += channels) {
      const std::int64_t x = left + kx * s_.dilation_width;
      if (x < 0 || x >= s_.width) {
        fill(out, channels);
      } else {
        copy_few(line + x * s_.channels, channels, out);
      }
    }
  }

  const Int8ConvShape& s_;
  const std::int8_t* input_;
  std::int32_t zero_point_;
};

bool is_linear(const Int8ConvShape& s) {
  return s.kernel_height == 1 && s.kernel_width == 1 && s.stride_height == 1 && s.stride_width == 1 &&
         s.pad_height == 0 && s.pad_width == 0 && s.out_height == s.height && s.out_width == s.width && s.groups == 1;
}

}  // namespace

void int8_linear(const Int8LinearShape& shape, const std::int8_t* input, const void* packed,
                 const Int8Epilogue& epilogue, Int8Isa isa, const Executor& executor) {
  check_int8_epilogue("int8_linear", epilogue, shape.terms);
  Int8Product product{.rows = shape.rows, .terms = shape.terms, .channels = shape.channels, .get_rows = {}};
  product.get_rows = [&](std::int64_t row, std::int64_t, std::int64_t, std::int8_t*) {
    return Int8Rows{input + row * shape.terms, shape.terms};
  };
  multiply_packed(product, packed, epilogue, isa, executor);
}

void int8_conv2d(const Int8ConvShape& shape, const std::int8_t* input, const void* packed, const Int8Epilogue& epilogue,
                 Int8Isa isa, const Executor& executor) {
  check(shape);
  check_int8_epilogue("int8_conv2d", epilogue, shape.terms());
  if (shape.out_pixels() == 0) return;
  if (is_depthwise({shape.out_channels, shape.terms(), shape.groups})) {
    int8_kernel(isa);  // is there, or throws
    return depthwise_conv2d(shape, input, packed, epilogue, isa, executor);
  }
  const std::int64_t terms = shape.terms();
  Int8Product product{.rows = shape.out_pixels(),
                      .terms = terms,
                      .channels = shape.out_channels,
                      .groups = shape.groups,
                      .rows_per_scale = shape.out_height * shape.out_width,
                      .gathers = !is_linear(shape),
                      .get_rows = {}};
  const Gather gather(shape, input, epilogue.input.zero_point);
  product.get_rows = [&](std::int64_t row, std::int64_t count, std::int64_t group, std::int8_t* buffer) {
    if (!product.gathers) return Int8Rows{input + row * terms, terms};
    gather(row, count, group, buffer);
    return Int8Rows{buffer, terms};
  };
  multiply_packed(product, packed, epilogue, isa, executor);
}

}  // namespace halfstep::cpu
