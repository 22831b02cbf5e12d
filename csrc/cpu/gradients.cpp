// The gradient check on the CPU. Contract: halfstep/gradients.h.
//
// A list is cut into chunks of at most kChunk elements that never cross a tensor. A chunk is summed in kLanes
// interleaved partial sums, whatever the vector width, and chunks are combined in order: hence the same bits for any
// number of threads and any instruction set (the core is compiled without contraction into fused multiply-adds).
#include "halfstep/gradients.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>
#include <vector>

#include "clones.h"
#include "halfstep/status.h"

namespace halfstep::cpu {
namespace {

constexpr std::int64_t kChunk = 16384;
constexpr int kLanes = 32;

struct Partial {
  double sum_of_squares = 0.0;
  double max_magnitude = 0.0;
  std::int64_t non_finite = 0;
  std::int64_t zeros = 0;
  std::int64_t below_half = 0;
};

// The bits of |x|, and from where on they mean infinite or NaN.
inline std::uint32_t magnitude_bits(float x) {
  return std::bit_cast<std::uint32_t>(x) & 0x7fffffffU;
}
inline std::uint64_t magnitude_bits(double x) {
  return std::bit_cast<std::uint64_t>(x) & 0x7fffffffffffffffULL;
}
template <class Compute>
inline constexpr auto kNonFiniteBits = std::is_same_v<Compute, double> ? 0x7ff0000000000000ULL : 0x7f800000ULL;

// `out` is `data` itself or apart from it; only `write` touches it.
template <class Storage, bool write, bool with_stats>
[[gnu::always_inline]] inline void run_chunk(const Storage* data, Storage* out, std::int64_t count, double multiplier,
                                             Partial& result) {
  using Compute = decltype(widen(Storage{}));
  using Bits = decltype(magnitude_bits(Compute{}));
  const auto factor = static_cast<Compute>(multiplier);
  constexpr auto limit = static_cast<Bits>(kNonFiniteBits<Compute>);

  Compute sums[kLanes] = {};
  Bits non_finite[kLanes] = {};
  Bits largest[kLanes] = {};  // as bits: |x| grows with them
  Bits zeros[kLanes] = {};
  Bits below_half[kLanes] = {};

  // Stage by stage over one block of lanes: loops this simple become vector code for every storage.
  // Inlined, or it would be compiled for no instruction set but the oldest.
  const auto visit = [&](std::int64_t at, int lanes) __attribute__((always_inline)) {
    Compute u[kLanes];
    for (int lane = 0; lane < lanes; ++lane) u[lane] = widen(data[at + lane]) * factor;
    if constexpr (write) {
      for (int lane = 0; lane < lanes; ++lane) out[at + lane] = narrow<Storage>(u[lane]);
      for (int lane = 0; lane < lanes; ++lane) u[lane] = widen(out[at + lane]);
    }
    for (int lane = 0; lane < lanes; ++lane) sums[lane] += u[lane] * u[lane];
    for (int lane = 0; lane < lanes; ++lane) non_finite[lane] += magnitude_bits(u[lane]) >= limit;
    if constexpr (with_stats) {
      for (int lane = 0; lane < lanes; ++lane) {
        const Bits bits = magnitude_bits(u[lane]);
        largest[lane] = std::max(largest[lane], bits < limit ? bits : Bits{0});
        zeros[lane] += bits == 0;
        below_half[lane] += bits != 0 && bits < magnitude_bits(static_cast<Compute>(kHalfMinNormal));
      }
    }
  };

  const std::int64_t whole = count - count % kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) visit(i, kLanes);
  visit(whole, static_cast<int>(count - whole));

  for (int lane = 0; lane < kLanes; ++lane) {
    result.sum_of_squares += static_cast<double>(sums[lane]);
    result.max_magnitude = std::max(result.max_magnitude, static_cast<double>(std::bit_cast<Compute>(largest[lane])));
    result.non_finite += static_cast<std::int64_t>(non_finite[lane]);
    result.zeros += static_cast<std::int64_t>(zeros[lane]);
    result.below_half += static_cast<std::int64_t>(below_half[lane]);
  }
}

// One plain function per storage and mode, because clones cannot be templates.
using ChunkFunction = void (*)(const void* data, void* out, std::int64_t count, double multiplier, Partial& result);
#define HS_CHUNK_FUNCTION(name, Storage, write, with_stats)                                                     \
  HS_CLONES void name(const void* data, void* out, std::int64_t count, double multiplier, Partial& result) {    \
    run_chunk<Storage, write, with_stats>(static_cast<const Storage*>(data), static_cast<Storage*>(out), count, \
                                          multiplier, result);                                                  \
  }
#define HS_CHUNK_FUNCTIONS(prefix, Storage)                                              \
  HS_CHUNK_FUNCTION(prefix##_check, Storage, /*write=*/false, /*with_stats=*/false)      \
  HS_CHUNK_FUNCTION(prefix##_check_stats, Storage, /*write=*/false, /*with_stats=*/true) \
  HS_CHUNK_FUNCTION(prefix##_unscale, Storage, /*write=*/true, /*with_stats=*/false)     \
  HS_CHUNK_FUNCTION(prefix##_unscale_stats, Storage, /*write=*/true, /*with_stats=*/true)
HS_CHUNK_FUNCTIONS(float32, float)
HS_CHUNK_FUNCTIONS(float64, double)
HS_CHUNK_FUNCTIONS(float16, Half)
HS_CHUNK_FUNCTIONS(bfloat16, BFloat16)
#undef HS_CHUNK_FUNCTIONS
#undef HS_CHUNK_FUNCTION

ChunkFunction chunk_function(DType dtype, bool write, bool with_stats) {
  const auto choose = [&](ChunkFunction check, ChunkFunction check_stats, ChunkFunction unscale,
                          ChunkFunction unscale_stats) {
    return write ? (with_stats ? unscale_stats : unscale) : (with_stats ? check_stats : check);
  };
  switch (dtype) {
    case DType::kFloat32:
      return choose(float32_check, float32_check_stats, float32_unscale, float32_unscale_stats);
    case DType::kFloat64:
      return choose(float64_check, float64_check_stats, float64_unscale, float64_unscale_stats);
    case DType::kFloat16:
      return choose(float16_check, float16_check_stats, float16_unscale, float16_unscale_stats);
    case DType::kBFloat16:
      return choose(bfloat16_check, bfloat16_check_stats, bfloat16_unscale, bfloat16_unscale_stats);
  }
  HS_UNREACHABLE("dtype ", static_cast<int>(dtype));
}

struct Chunk {
  std::size_t tensor;
  std::int64_t begin;
  std::int64_t count;
};

void write_stats(TensorList grads, const std::vector<Chunk>& chunks, const std::vector<Partial>& partials,
                 float* stats) {
  std::fill_n(stats, grads.size() * kGradientStats, 0.0F);
  std::vector<Partial> totals(grads.size());
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    Partial& total = totals[chunks[i].tensor];
    total.sum_of_squares += partials[i].sum_of_squares;
    total.max_magnitude = std::max(total.max_magnitude, partials[i].max_magnitude);
    total.non_finite += partials[i].non_finite;
    total.zeros += partials[i].zeros;
    total.below_half += partials[i].below_half;
  }
  for (std::size_t tensor = 0; tensor < grads.size(); ++tensor) {
    float* const row = stats + tensor * kGradientStats;
    row[kNonFinite] = static_cast<float>(totals[tensor].non_finite);
    row[kMaxMagnitude] = static_cast<float>(totals[tensor].max_magnitude);
    row[kSumOfSquares] = static_cast<float>(totals[tensor].sum_of_squares);
    row[kZeros] = static_cast<float>(totals[tensor].zeros);
    row[kBelowHalf] = static_cast<float>(totals[tensor].below_half);
    row[kElements] = static_cast<float>(grads[tensor].numel);
  }
}

// Writes to `unscaled`, a list like `grads`, or nowhere if that is empty.
void run(TensorList grads, TensorList unscaled, UnscaleFactor factor, const CheckOutputs& out,
         const Executor& executor) {
  const bool write = !unscaled.empty();
  HS_CHECK(factor.scale && out.found, "check_gradients: scale and found must not be null");
  const float scale = *factor.scale;
  const double multiplier = factor.inverse ? scale : static_cast<float>(1.0 / static_cast<double>(scale));

  std::vector<Chunk> chunks;
  std::int64_t elements = 0;
  for (std::size_t tensor = 0; tensor < grads.size(); ++tensor) {
    const std::int64_t numel = grads[tensor].numel;
    elements += numel;
    for (std::int64_t begin = 0; begin < numel; begin += kChunk)
      chunks.push_back({tensor, begin, std::min(kChunk, numel - begin)});
  }

  std::vector<Partial> partials(chunks.size());
  const auto task = [&](std::int64_t i) {
    const auto& [tensor, begin, count] = chunks[static_cast<std::size_t>(i)];
    const auto& [data, numel, dtype] = grads[tensor];
    const std::size_t offset = static_cast<std::size_t>(begin) * size_of(dtype);
    char* const target = write ? static_cast<char*>(unscaled[tensor].data) + offset : nullptr;
    chunk_function(dtype, write, out.stats != nullptr)(static_cast<const char*>(data) + offset, target, count,
                                                       multiplier, partials[static_cast<std::size_t>(i)]);
  };
  const auto count = static_cast<std::int64_t>(chunks.size());
  if (elements <= 2 * kChunk) {  // not worth waking a thread
    SerialExecutor().for_each(count, task);
  } else {
    executor.for_each(count, task);
  }

  double sum_of_squares = 0.0;
  bool found = false;
  for (const Partial& partial : partials) {
    sum_of_squares += partial.sum_of_squares;
    found |= partial.non_finite != 0;
  }
  if (found) *out.found = 1.0F;
  if (out.norm) *out.norm = static_cast<float>(std::sqrt(sum_of_squares));
  if (out.stats) write_stats(grads, chunks, partials, out.stats);
}

}  // namespace

void check_gradients(TensorList grads, UnscaleFactor factor, const CheckOutputs& out, const Executor& executor) {
  run(grads, {}, factor, out, executor);
}

void unscale(TensorList grads, UnscaleFactor factor, const CheckOutputs& out, const Executor& executor) {
  run(grads, grads, factor, out, executor);
}

void unscale_into(TensorList grads, TensorList unscaled, UnscaleFactor factor, const CheckOutputs& out,
                  const Executor& executor) {
  HS_CHECK(grads.size() == unscaled.size(), "unscale_into: unscaled has ", unscaled.size(), " tensors, expected ",
           grads.size());
  for (std::size_t i = 0; i < grads.size(); ++i) {
    HS_CHECK(grads[i].numel == unscaled[i].numel && grads[i].dtype == unscaled[i].dtype, "unscale_into: unscaled[", i,
             "] has ", unscaled[i].numel, " elements of ", name_of(unscaled[i].dtype), ", expected ", grads[i].numel,
             " of ", name_of(grads[i].dtype));
  }
  run(grads, unscaled, factor, out, executor);
}

}  // namespace halfstep::cpu
