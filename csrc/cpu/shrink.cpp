// Kernels of shrink(). Contract: shrink.h.
#include "shrink.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <type_traits>

#if defined(__x86_64__)
#define HS_X86
#include <immintrin.h>
#endif

namespace halfstep::cpu {
namespace {

constexpr int kRows = 4;
// A value counts as worse than the worst so far if its error is larger by more than rounding can make it: otherwise a
// column of few different values would set a new record again and again.
constexpr double kSlack = 1.0 + 0x1p-50;

struct FloatLanes {
  double* minimum;
  double* maximum;
  double* error;
  std::uint64_t* fractional;

  explicit FloatLanes(Lanes& lanes)
      : minimum(lanes.array<double>(0)),
        maximum(lanes.array<double>(1)),
        error(lanes.array<double>(2)),
        fractional(lanes.array<std::uint64_t>(3)) {}
};

using Tile = decltype(ShrinkKernel::tile);
using enum ArrayType;

enum Writes { kNothing, kStore, kStream };

struct TileOfPair {
  ArrayType from;
  ArrayType to;
  Tile tile;
  Tile stream_tile;
};

// One copy of the tiles for each instruction set. Not HS_CLONES: its copies are cut from one that was already made for
// the oldest registers.
namespace portable {
#define HS_VECTOR_BYTES 16
#include "shrink_tiles.h"
#undef HS_VECTOR_BYTES
}  // namespace portable

#if defined(HS_X86) && !defined(__clang__)  // which knows no such pragma
#define HS_INSTRUCTION_SETS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define HS_VECTOR_BYTES 32
#include "shrink_tiles.h"
#undef HS_VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#define HS_VECTOR_BYTES 64
#include "shrink_tiles.h"
#undef HS_VECTOR_BYTES
}  // namespace avx512
#pragma GCC pop_options
#endif

void float_reset(Lanes& all, std::int64_t width) {
  const ColumnStats none;
  const FloatLanes lanes(all);
  std::fill_n(lanes.minimum, width, none.minimum);
  std::fill_n(lanes.maximum, width, none.maximum);
  std::fill_n(lanes.error, width, 0.0);
  std::fill_n(lanes.fractional, width, std::uint64_t{0});
}

void float_merge(Lanes& all, std::int64_t width, std::int64_t columns, ColumnStats* stats) {
  const FloatLanes lanes(all);
  for (std::int64_t i = 0; i < width; ++i) {
    ColumnStats& column = stats[i % columns];
    // + 0.0: of two zeros the sign would depend on the order.
    column.minimum = std::min(column.minimum, lanes.minimum[i] + 0.0);
    column.maximum = std::max(column.maximum, lanes.maximum[i] + 0.0);
    column.error = std::max(column.error, lanes.error[i]);
    column.fractional |= lanes.fractional[i] != 0;
  }
}

template <class T>
void integer_reset(Lanes& lanes, std::int64_t width) {
  std::fill_n(lanes.array<T>(0), width, std::numeric_limits<T>::max());
  std::fill_n(lanes.array<T>(1), width, std::numeric_limits<T>::min());
}

// Widened to 64 bits of the same sign kind.
template <class T, class Wide>
void integer_merge(Lanes& lanes, std::int64_t width, std::int64_t columns, ColumnStats* stats) {
  const T* low = lanes.array<T>(0);
  const T* high = lanes.array<T>(1);
  for (std::int64_t i = 0; i < width; ++i) {
    ColumnStats& column = stats[i % columns];
    if (low[i] > high[i]) continue;
    column.low = static_cast<std::int64_t>(std::min(static_cast<Wide>(column.low), static_cast<Wide>(low[i])));
    column.high = static_cast<std::int64_t>(std::max(static_cast<Wide>(column.high), static_cast<Wide>(high[i])));
  }
}

TileOfPair find_tiles(ArrayType from, ArrayType to) {
  const auto find = [&](const auto& tiles) {
    const auto* pair =
        std::find_if(std::begin(tiles), std::end(tiles), [&](const auto& t) { return t.from == from && t.to == to; });
    return pair == std::end(tiles) ? TileOfPair{from, to, nullptr, nullptr} : *pair;
  };
#ifdef HS_INSTRUCTION_SETS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return find(avx512::kTiles);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return find(avx2::kTiles);
#endif
  return find(portable::kTiles);
}

template <class T>
ShrinkKernel integer_kernel(const TileOfPair& tiles) {
  using Wide = std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>;
  return {tiles.tile, tiles.stream_tile, integer_reset<T>, integer_merge<T, Wide>};
}

}  // namespace

ShrinkKernel shrink_kernel(ArrayType from, ArrayType to) {
  const TileOfPair tiles = find_tiles(from, to);
  switch (from) {
    case kFloat64:
      return {tiles.tile, tiles.stream_tile, float_reset, float_merge};
    case kInt8:
      return integer_kernel<std::int8_t>(tiles);
    case kInt16:
      return integer_kernel<std::int16_t>(tiles);
    case kInt32:
      return integer_kernel<std::int32_t>(tiles);
    case kInt64:
      return integer_kernel<std::int64_t>(tiles);
    case kUInt8:
      return integer_kernel<std::uint8_t>(tiles);
    case kUInt16:
      return integer_kernel<std::uint16_t>(tiles);
    case kUInt32:
      return integer_kernel<std::uint32_t>(tiles);
    case kUInt64:
      return integer_kernel<std::uint64_t>(tiles);
    case kFloat32:
      break;
  }
  return {nullptr, nullptr, nullptr, nullptr};
}

namespace {

#ifdef HS_X86
using CopyLines = void (*)(std::byte* to, const std::byte* from, std::size_t bytes);

// Whole lines of 64 bytes, to addresses that are multiples of it.
void copy_lines(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
}

[[gnu::target("avx512f")]] void copy_lines_avx512(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
}
#endif

}  // namespace

void stream_copy(void* to, const void* from, std::size_t bytes) {
#ifdef HS_X86
  static const CopyLines copy = __builtin_cpu_supports("avx512f") ? copy_lines_avx512 : copy_lines;
  auto* target = static_cast<std::byte*>(to);
  const auto* source = static_cast<const std::byte*>(from);
  // What lies before the first whole line and after the last goes through the caches.
  const std::size_t head = std::min(bytes, (64 - reinterpret_cast<std::uintptr_t>(target) % 64) % 64);
  const std::size_t lines = (bytes - head) / 64 * 64;
  std::memcpy(target, source, head);
  copy(target + head, source + head, lines);
  std::memcpy(target + head + lines, source + head + lines, bytes - head - lines);
#else
  std::memcpy(to, from, bytes);
#endif
}

void stream_fence() {
#ifdef HS_X86
  _mm_sfence();
#endif
}

}  // namespace halfstep::cpu
