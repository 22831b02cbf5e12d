// Maximum pooling of int8 images on the CPU. Contract: halfstep/int8_pool.h.
//
// A row of the output takes the maxima of the input's rows under it, whole, and then those of neighbouring pixels.
//
// Limit: the bytes of input and output over the memory bandwidth.
#include "halfstep/int8_pool.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "clones.h"
#include "halfstep/status.h"
#include "int8_product.h"

namespace halfstep {

void Int8PoolShape::check() const {
  constexpr std::int64_t kMost = std::int64_t{1} << 28;
  const auto fit = [&](const char* name, std::int64_t value, std::int64_t least) {
    HS_CHECK(value >= least && value <= kMost, "int8_max_pool2d: ", name, " is ", value, ", expected ", least, " .. ",
             kMost);
  };
  fit("batch", batch, 0);
  fit("channels", channels, 0);
  for (int i = 0; i < 2; ++i) {
    fit("a size of the input", in[i], 0);
    fit("a size of the output", out[i], 0);
    fit("kernel", kernel[i], 1);
    fit("stride", stride[i], 1);
    fit("pad", pad[i], 0);
    fit("dilation", dilation[i], 1);
    fit("kernel * dilation", kernel[i] * dilation[i], 1);
    fit("output * stride", out[i] * stride[i], 0);
  }
}

namespace cpu {
namespace {

HS_CLONES void take_larger(const std::int8_t* __restrict x, std::int64_t count, std::int8_t* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = std::max(out[i], x[i]);
}

HS_CLONES void larger_of(const std::int8_t* __restrict x, const std::int8_t* __restrict y, std::int64_t count,
                         std::int8_t* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = std::max(x[i], y[i]);
}

// A row of the output from one of the input.
HS_CLONES void pool_row(const Int8PoolShape& shape, const std::int8_t* __restrict row, std::int8_t* __restrict out) {
  const std::int64_t channels = shape.channels;
  for (std::int64_t x = 0; x < shape.out[1]; ++x, out += channels) {
    const Int8PoolTaps taps(shape, 1, x);
    if (taps.first >= taps.end) {
      std::fill_n(out, channels, std::numeric_limits<std::int8_t>::min());
      continue;
    }
    std::copy_n(row + taps.first * channels, channels, out);
    for (std::int64_t tap = taps.first + shape.dilation[1]; tap < taps.end; tap += shape.dilation[1]) {
      const std::int8_t* const pixel = row + tap * channels;
      for (std::int64_t i = 0; i < channels; ++i) out[i] = std::max(out[i], pixel[i]);
    }
  }
}

}  // namespace

void int8_max_pool2d(const Int8PoolShape& shape, const std::int8_t* input, std::int8_t* out, const Executor& executor) {
  shape.check();
  if (shape.out_pixels() == 0 || shape.channels == 0) return;
  const std::int64_t in_row = shape.in[1] * shape.channels;
  const std::int64_t out_row = shape.out[1] * shape.channels;
  const std::int64_t rows = shape.batch * shape.out[0];
  const std::int64_t rows_per_task =
      std::max<std::int64_t>(1, kInt8TaskCost / std::max<std::int64_t>(1, in_row * shape.kernel[0]));
  run_int8_tasks((rows + rows_per_task - 1) / rows_per_task, executor, [&](std::int64_t task) {
    std::vector<std::int8_t> largest(static_cast<std::size_t>(in_row));
    for (std::int64_t row = task * rows_per_task; row < std::min(rows, (task + 1) * rows_per_task); ++row) {
      const std::int8_t* const image = input + row / shape.out[0] * shape.in[0] * in_row;
      std::int8_t* const to = out + row * out_row;
      const Int8PoolTaps taps(shape, 0, row % shape.out[0]);
      const std::int64_t second = taps.first + shape.dilation[0];
      if (taps.first >= taps.end) {
        std::fill_n(to, out_row, std::numeric_limits<std::int8_t>::min());
      } else if (second >= taps.end) {
        pool_row(shape, image + taps.first * in_row, to);
      } else {
        larger_of(image + taps.first * in_row, image + second * in_row, in_row, largest.data());
        for (std::int64_t tap = second + shape.dilation[0]; tap < taps.end; tap += shape.dilation[0])
          take_larger(image + tap * in_row, in_row, largest.data());
        pool_row(shape, largest.data(), to);
      }
    }
  });
}

}  // namespace cpu
}  // namespace halfstep
