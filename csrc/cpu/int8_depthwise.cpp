// Contract: int8_depthwise.h.
#include "int8_depthwise.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "clones.h"
#include "int8_kernels.h"
#include "int8_product.h"
#include "int8_runs.h"

#if defined(HS_INT8_X86)
#include <immintrin.h>
#endif

namespace halfstep::cpu {
namespace {

// sums[channel] of one output pixel. taps[term] has the inputs of all channels.
HS_CLONES void add_taps(const std::int8_t* const* taps, std::int64_t terms, const std::int8_t* weights,
                        std::int64_t pitch, std::int64_t channels, std::int32_t* __restrict sums) {
  std::fill(sums, sums + channels, 0);
  for (std::int64_t term = 0; term < terms; ++term) {
    const std::int8_t* const x = taps[term];
    const std::int8_t* const w = weights + term * pitch;
    for (std::int64_t i = 0; i < channels; ++i) sums[i] += static_cast<std::int16_t>(x[i] * w[i]);
  }
}

#if defined(HS_INT8_X86)
constexpr std::int64_t kStrip = 16;

[[gnu::target("avx2"), gnu::always_inline]] inline __m256i load_wide(const std::int8_t* at) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// 16 channels, two terms at a time: the products of a pair are added by vpmaddwd.
[[gnu::target("avx2")]] void add_strip_avx2(const std::int8_t* const* taps, std::int64_t terms,
                                            const std::int8_t* weights, std::int64_t pitch, std::int64_t channel,
                                            std::int32_t* sums) {
  __m256i low = _mm256_setzero_si256();   // channels 0 .. 3 and 8 .. 11
  __m256i high = _mm256_setzero_si256();  // the others
  for (std::int64_t term = 0; term < terms; term += 2) {
    const bool pair = term + 1 < terms;
    const std::int8_t* const w = weights + term * pitch + channel;
    const __m256i x0 = load_wide(taps[term] + channel);
    const __m256i x1 = load_wide(taps[pair ? term + 1 : term] + channel);
    const __m256i w0 = load_wide(w);
    const __m256i w1 = pair ? load_wide(w + pitch) : _mm256_setzero_si256();
    low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(x0, x1), _mm256_unpacklo_epi16(w0, w1)));
    high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(x0, x1), _mm256_unpackhi_epi16(w0, w1)));
  }
  auto* const out = reinterpret_cast<__m256i*>(sums + channel);
  _mm256_storeu_si256(out, _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(low, high, 0x31));
}

// The last strip overlaps the one before it.
void add_taps_avx2(const std::int8_t* const* taps, std::int64_t terms, const std::int8_t* weights, std::int64_t pitch,
                   std::int64_t channels, std::int32_t* sums) {
  if (channels < kStrip) return add_taps(taps, terms, weights, pitch, channels, sums);
  for (std::int64_t channel = 0; channel < channels; channel += kStrip)
    add_strip_avx2(taps, terms, weights, pitch, std::min(channel, channels - kStrip), sums);
}
#endif

using AddTaps = void (*)(const std::int8_t* const* taps, std::int64_t terms, const std::int8_t* weights,
                         std::int64_t pitch, std::int64_t channels, std::int32_t* sums);

AddTaps add_taps_of(Int8Isa isa) {
#if defined(HS_INT8_X86)
  if (isa != Int8Isa::kPortable) return add_taps_avx2;  // the later sets hold AVX2
#endif
  static_cast<void>(isa);
  return add_taps;
}

// The inputs of one output pixel, as add_taps() reads them.
class Taps {
 public:
  Taps(const Int8ConvShape& shape, const std::int8_t* input, std::int32_t zero_point)
      : shape_(shape),
        input_(input),
        padding_(static_cast<std::size_t>(shape.channels), static_cast<std::int8_t>(zero_point)),
        taps_(static_cast<std::size_t>(shape.terms())) {
    if (!one_to_one()) spread_.resize(static_cast<std::size_t>(shape.terms() * shape.out_channels));
  }

  const std::int8_t* const* of(std::int64_t pixel) {
    const std::int64_t image = pixel / (shape_.out_height * shape_.out_width);
    const std::int64_t y = pixel / shape_.out_width % shape_.out_height * shape_.stride_height - shape_.pad_height;
    const std::int64_t x = pixel % shape_.out_width * shape_.stride_width - shape_.pad_width;
    std::size_t tap = 0;
    for (std::int64_t ky = 0; ky < shape_.kernel_height; ++ky) {
      for (std::int64_t kx = 0; kx < shape_.kernel_width; ++kx) {
        const std::int8_t* const at = pixel_at(image, y + ky * shape_.dilation_height, x + kx * shape_.dilation_width);
        if (one_to_one()) {
          taps_[tap++] = at;
        } else {
          for (std::int64_t i = 0; i < shape_.group_channels(); ++i) taps_[tap] = spread(at + i, tap), ++tap;
        }
      }
    }
    return taps_.data();
  }

 private:
  bool one_to_one() const { return shape_.group_channels() == 1 && shape_.out_channels == shape_.channels; }

  const std::int8_t* pixel_at(std::int64_t image, std::int64_t y, std::int64_t x) const {
    if (y < 0 || y >= shape_.height || x < 0 || x >= shape_.width) return padding_.data();
    return input_ + ((image * shape_.height + y) * shape_.width + x) * shape_.channels;
  }

  // One input channel of each group, for each of the group's outputs.
  const std::int8_t* spread(const std::int8_t* inputs, std::size_t tap) {
    std::int8_t* const row = spread_.data() + static_cast<std::int64_t>(tap) * shape_.out_channels;
    const std::int64_t outputs = shape_.out_channels / shape_.groups;
    std::int8_t* out = row;
    for (std::int64_t group = 0; group < shape_.groups; ++group)
      for (std::int64_t i = 0; i < outputs; ++i) *out++ = inputs[group * shape_.group_channels()];
    return row;
  }

  const Int8ConvShape& shape_;
  const std::int8_t* input_;
  std::vector<std::int8_t> padding_;
  std::vector<const std::int8_t*> taps_;
  std::vector<std::int8_t> spread_;
};

}  // namespace

void pack_depthwise(const Int8WeightShape& shape, const std::int8_t* weight, void* packed) {
  const std::int64_t pitch = depthwise_pitch(shape.channels);
  std::memset(packed, 0, static_cast<std::size_t>(depthwise_bytes(shape)));
  auto* const weights = static_cast<std::int8_t*>(packed);
  auto* const sums = reinterpret_cast<std::int32_t*>(weights + shape.terms * pitch);
  for (std::int64_t channel = 0; channel < shape.channels; ++channel) {
    for (std::int64_t term = 0; term < shape.terms; ++term) {
      const std::int8_t w = weight[channel * shape.terms + term];
      weights[term * pitch + channel] = w;
      sums[channel] += w;
    }
  }
}

void depthwise_conv2d(const Int8ConvShape& shape, const std::int8_t* input, const void* packed,
                      const Int8Epilogue& epilogue, Int8Isa isa, const Executor& executor) {
  const std::int64_t pitch = depthwise_pitch(shape.out_channels);
  const std::int64_t terms = shape.terms();
  const AddTaps add = add_taps_of(isa);
  const auto* const weights = static_cast<const std::int8_t*>(packed);
  const auto* const weight_sums = reinterpret_cast<const std::int32_t*>(weights + terms * pitch);
  std::vector<std::uint32_t> corrections(static_cast<std::size_t>(shape.out_channels));
  for (std::size_t i = 0; i < corrections.size(); ++i)
    corrections[i] = static_cast<std::uint32_t>(epilogue.input.zero_point) * static_cast<std::uint32_t>(weight_sums[i]);

  const std::int64_t pixels_per_task =
      std::max<std::int64_t>(1, kInt8TaskCost / 4 / std::max<std::int64_t>(1, terms * shape.out_channels));
  run_int8_tasks((shape.out_pixels() + pixels_per_task - 1) / pixels_per_task, executor, [&](std::int64_t task) {
    Taps taps(shape, input, epilogue.input.zero_point);
    std::vector<std::int32_t> sums(corrections.size());
    const std::int64_t end = std::min(shape.out_pixels(), (task + 1) * pixels_per_task);
    for (std::int64_t pixel = task * pixels_per_task; pixel < end; ++pixel) {
      add(taps.of(pixel), terms, weights, pitch, shape.out_channels, sums.data());
      finish_rows({.epilogue = epilogue,
                   .sums = sums.data(),
                   .sums_pitch = shape.out_channels,
                   .corrections = corrections.data(),
                   .rows = 1,
                   .channels = shape.out_channels,
                   .channel = 0,
                   .at = pixel * shape.out_channels,
                   .pitch = shape.out_channels,
                   .row = pixel,
                   .rows_per_scale = shape.out_height * shape.out_width});
    }
  });
}

}  // namespace halfstep::cpu
