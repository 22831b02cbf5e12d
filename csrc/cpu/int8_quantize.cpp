// Quantization, its inverse and embeddings on the CPU. Contract: halfstep/int8.h.
#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>

#include "clones.h"
#include "convert.h"
#include "halfstep/int8.h"
#include "halfstep/status.h"
#include "int8_runs.h"
#include "lanes.h"

namespace halfstep::cpu {
namespace {

constexpr std::int64_t kTile = 2048;
constexpr std::int64_t kElementsPerTask = 65536;
constexpr int kSearched = 80;

// A run of elements as float32: in place, or widened to `buffer`.
const float* as_floats(const TensorView& view, std::int64_t begin, std::int64_t count, float* buffer) {
  if (view.dtype == DType::kFloat32) return static_cast<const float*>(view.data) + begin;
  widen_run(view.dtype, view.data, begin, count, buffer);
  return buffer;
}

HS_CLONES void multiply(const float* __restrict x, const float* __restrict factors, std::int64_t count,
                        float* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = x[i] * factors[i];
}

// The same, multiplied by their channels' factors if there are any.
const float* as_floats(const TensorView& view, const ChannelFactors& factors, std::int64_t begin, std::int64_t count,
                       float* buffer) {
  const float* const x = as_floats(view, begin, count, buffer);
  if (!factors.values) return x;
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t channel = (begin + done) % factors.channels;
    const std::int64_t run = std::min(count - done, factors.channels - channel);
    if (x == buffer) {
      for (std::int64_t i = 0; i < run; ++i) buffer[done + i] *= factors.values[channel + i];
    } else {
      multiply(x + done, factors.values + channel, run, buffer + done);
    }
    done += run;
  }
  return buffer;
}

template <class Visit>
void for_tiles(std::int64_t begin, std::int64_t end, const Visit& visit) {
  for (; begin < end; begin += kTile) visit(begin, std::min(kTile, end - begin));
}

// Calls run(begin, end) for pieces of `items`, each of `size` elements.
template <class Run>
void for_pieces(std::int64_t items, std::int64_t size, const Executor& executor, const Run& run) {
  const std::int64_t piece = std::max<std::int64_t>(1, kElementsPerTask / std::max<std::int64_t>(1, size));
  const std::int64_t tasks = (items + piece - 1) / piece;
  const auto task = [&](std::int64_t i) { run(i * piece, std::min(items, (i + 1) * piece)); };
  if (tasks <= 1) {
    SerialExecutor().for_each(tasks, task);
  } else {
    executor.for_each(tasks, task);
  }
}

HS_CLONES void dequantize_run(const std::int8_t* __restrict q, std::int64_t count, std::int32_t zero_point, float scale,
                              float* __restrict out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(q[i] - zero_point) * scale;
}

// round(x / scale), within the levels, as float32. Rounded by the addition, as in int8_runs.cpp.
[[gnu::always_inline]] inline float weight_level(float x, float inverse_scale, float levels) {
  constexpr float kRound = 0x1.8p+23F;
  float bounded = x * inverse_scale;
  bounded = bounded > -levels ? bounded : -levels;
  bounded = bounded < levels ? bounded : levels;
  return (bounded + kRound) - kRound;
}

HS_CLONES void weight_run(const float* __restrict x, std::int64_t count, float scale, float levels,
                          std::int8_t* __restrict out) {
  const float inverse = 1.0F / scale;
  for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<std::int8_t>(weight_level(x[i], inverse, levels));
}

HS_CLONES double squared_error(const float* x, std::int64_t count, float scale, float levels) {
  const float inverse = 1.0F / scale;
  float lanes[kLanes] = {};
  const auto add = [&](std::int64_t i, int lane) __attribute__((always_inline)) {
    const float error = x[i] - weight_level(x[i], inverse, levels) * scale;
    lanes[lane] += error * error;
  };
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  for (int lane = 0; i + lane < count; ++lane) add(i + lane, lane);
  return add_lanes(lanes);
}

void check_float(const char* function, const char* argument, DType dtype) {
  HS_CHECK(dtype != DType::kFloat64, function, ": ", argument, " is float64; expected float32, float16 or bfloat16");
}

void check_parameters(const char* function, const Int8Parameters& parameters) {
  HS_CHECK(parameters.zero_point >= -128 && parameters.zero_point <= 127, function, ": zero_point is ",
           parameters.zero_point, "; expected -128 .. 127");
  HS_CHECK(parameters.scale > 0.0F && parameters.scale <= std::numeric_limits<float>::max(), function, ": scale is ",
           parameters.scale, "; expected a positive finite number");
}

void check_factors(const char* function, const TensorView& input, const ChannelFactors& factors) {
  HS_CHECK(!factors.values || (factors.channels > 0 && input.numel % factors.channels == 0), function, ": ",
           input.numel, " elements are no multiple of ", factors.channels, " channels");
}

// The columns of a matrix with `rows` rows.
std::int64_t columns(const char* function, const TensorView& view, std::int64_t rows) {
  HS_CHECK(rows >= 0 && (rows == 0 ? view.numel == 0 : view.numel % rows == 0), function, ": ", view.numel,
           " elements do not make ", rows, " rows");
  return rows == 0 ? 0 : view.numel / rows;
}

template <class Row>
void quantize_row(const TensorView& input, const ChannelFactors& factors, std::int64_t row, std::int64_t width,
                  const Row& scale_of, std::int8_t* out) {
  float buffer[kTile];
  std::uint32_t magnitude = 0;
  for_tiles(row * width, (row + 1) * width, [&](std::int64_t begin, std::int64_t count) {
    magnitude = std::max(magnitude, largest_magnitude_bits(as_floats(input, factors, begin, count, buffer), count));
  });
  const float inverse = 1.0F / scale_of(magnitude);
  for_tiles(row * width, (row + 1) * width, [&](std::int64_t begin, std::int64_t count) {
    quantize_run(as_floats(input, factors, begin, count, buffer), count, inverse, 0, out + begin);
  });
}

// The scale of one channel; the squared error of a tile is float64, in the order of the tiles.
float weight_scale(const TensorView& weight, std::int64_t begin, std::int64_t end, float magnitude, float levels,
                   bool search) {
  const auto scale_of = [&](float fraction) { return std::max(magnitude * fraction / levels, 0x1p-126F); };
  if (!search) return scale_of(1.0F);
  float buffer[kTile];
  double errors[kSearched] = {};
  float scales[kSearched];
  for (int i = 0; i < kSearched; ++i)
    scales[i] = scale_of(1.0F - 0.8F * static_cast<float>(i) / static_cast<float>(kSearched - 1));
  for_tiles(begin, end, [&](std::int64_t at, std::int64_t count) {
    const float* const x = as_floats(weight, at, count, buffer);
    for (int i = 0; i < kSearched; ++i) errors[i] += squared_error(x, count, scales[i], levels);
  });
  return scales[std::min_element(errors, errors + kSearched) - errors];
}

}  // namespace

void quantize(const TensorView& input, const ChannelFactors& factors, const Int8Parameters& parameters,
              std::int8_t* out, const Executor& executor) {
  check_float("quantize", "input", input.dtype);
  check_factors("quantize", input, factors);
  check_parameters("quantize", parameters);
  const float inverse = 1.0F / parameters.scale;
  for_pieces(input.numel, 1, executor, [&](std::int64_t first, std::int64_t last) {
    if (input.dtype == DType::kFloat32 && !factors.values)
      return quantize_run(static_cast<const float*>(input.data) + first, last - first, inverse, parameters.zero_point,
                          out + first);
    float buffer[kTile];
    for_tiles(first, last, [&](std::int64_t begin, std::int64_t count) {
      quantize_run(as_floats(input, factors, begin, count, buffer), count, inverse, parameters.zero_point, out + begin);
    });
  });
}

void quantize_rows(const TensorView& input, const ChannelFactors& factors, std::int64_t rows, std::int8_t* out,
                   float* scales, const Executor& executor) {
  check_float("quantize_rows", "input", input.dtype);
  check_factors("quantize_rows", input, factors);
  const std::int64_t width = columns("quantize_rows", input, rows);
  for_pieces(rows, width, executor, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      const auto scale_of = [&](std::uint32_t magnitude) { return scales[row] = row_scale(magnitude); };
      quantize_row(input, factors, row, width, scale_of, out);
    }
  });
}

void dequantize(const std::int8_t* input, const Int8Parameters& parameters, const TensorView& out,
                const Executor& executor) {
  check_float("dequantize", "out", out.dtype);
  check_parameters("dequantize", parameters);
  for_pieces(out.numel, 1, executor, [&](std::int64_t first, std::int64_t last) {
    float buffer[kTile];
    for_tiles(first, last, [&](std::int64_t begin, std::int64_t count) {
      dequantize_run(input + begin, count, parameters.zero_point, parameters.scale, buffer);
      narrow_run(out.dtype, buffer, count, out.data, begin);
    });
  });
}

void quantize_weight(const TensorView& weight, std::int64_t channels, int bits, bool search, std::int8_t* out,
                     float* scales, const Executor& executor) {
  check_float("quantize_weight", "weight", weight.dtype);
  HS_CHECK(bits >= 2 && bits <= 8, "quantize_weight: bits is ", bits, "; expected 2 .. 8");
  const std::int64_t width = columns("quantize_weight", weight, channels);
  const auto levels = static_cast<float>((1 << (bits - 1)) - 1);
  std::atomic<std::int64_t> infinite{-1};
  const auto quantize_channel = [&](std::int64_t channel) {
    const std::int64_t begin = channel * width;
    float buffer[kTile];
    std::uint32_t magnitude = 0;
    for_tiles(begin, begin + width, [&](std::int64_t at, std::int64_t count) {
      magnitude = std::max(magnitude, largest_magnitude_bits(as_floats(weight, at, count, buffer), count));
    });
    if (magnitude >= 0x7f800000U) {
      infinite = channel;
      return;
    }
    scales[channel] = magnitude == 0
                          ? 1.0F
                          : weight_scale(weight, begin, begin + width, std::bit_cast<float>(magnitude), levels, search);
    for_tiles(begin, begin + width, [&](std::int64_t at, std::int64_t count) {
      weight_run(as_floats(weight, at, count, buffer), count, scales[channel], levels, out + at);
    });
  };
  for_pieces(channels, width * (search ? kSearched : 1), executor, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t channel = first; channel < last; ++channel) quantize_channel(channel);
  });
  HS_CHECK(infinite < 0, "quantize_weight: channel ", infinite.load(), " of weight holds a NaN or an infinity");
}

void int8_embedding(const Int8Embedding& call, const Executor& executor) {
  check_float("int8_embedding", "out", call.out.dtype);
  HS_CHECK(call.out.numel == call.count * call.width, "int8_embedding: out has ", call.out.numel,
           " elements; expected ", call.count, " x ", call.width);
  const auto index_of = [&](std::int64_t i) {
    return call.wide_indices ? static_cast<const std::int64_t*>(call.indices)[i]
                             : static_cast<const std::int32_t*>(call.indices)[i];
  };
  std::atomic<std::int64_t> outside{-1};  // which of the indices
  for_pieces(call.count, call.width, executor, [&](std::int64_t first, std::int64_t last) {
    float buffer[kTile];
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t index = index_of(i);
      if (index < 0 || index >= call.entries) {
        outside = i;
        return;
      }
      for_tiles(0, call.width, [&](std::int64_t begin, std::int64_t count) {
        dequantize_run(call.weight + index * call.width + begin, count, 0, call.scales[index], buffer);
        narrow_run(call.out.dtype, buffer, count, call.out.data, i * call.width + begin);
      });
    }
  });
  HS_CHECK(outside < 0, "int8_embedding: index ", index_of(outside), " at ", outside.load(),
           " is outside of the table; expected 0 .. ", call.entries - 1);
}

}  // namespace halfstep::cpu
