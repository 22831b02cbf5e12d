// The VNNI kernels: vpdpbusd adds four products of unsigned terms with signed weights to each int32 sum, exactly.
// Terms are made unsigned by adding 128, which the correction of the sums takes away again.
#include "int8_kernels.h"

#if defined(HS_INT8_X86)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "clones.h"

namespace halfstep::cpu {
namespace {

constexpr std::int64_t kQuadBytes = kInt8Block * kInt8Quad;

HS_CLONES void prepare(const std::int8_t* terms, std::int64_t count, void* prepared) {
  auto* const out = static_cast<std::uint8_t*>(prepared);
  const auto shift = [&](std::int64_t begin, std::int64_t end) __attribute__((always_inline)) {
    for (std::int64_t i = begin; i < end; ++i) out[i] = static_cast<std::uint8_t>(terms[i] ^ 0x80);
  };
  // By whole vectors, the last of which overlaps the one before it: rows of a few dozen terms are mostly ends.
  constexpr std::int64_t kWide = 64;
  constexpr std::int64_t kNarrow = 16;
  std::int64_t i = 0;
  for (; i + kWide <= count; i += kWide) shift(i, i + kWide);
  for (; i + kNarrow <= count; i += kNarrow) shift(i, i + kNarrow);
  if (i < count && count >= kNarrow) {
    shift(count - kNarrow, count);
  } else {
    shift(i, count);
  }
  for (i = count; i % kInt8Quad != 0; ++i) out[i] = 0;
}

[[gnu::always_inline]] inline std::int32_t load_quad(const std::uint8_t* at) {
  std::int32_t bits = 0;
  std::memcpy(&bits, at, sizeof(bits));
  return bits;
}

// `kRows` rows by one block, 8 channels to a vector.
template <int kRows>
[[gnu::target("avx2,avxvnni")]] void multiply_256(const std::uint8_t* prepared, const std::int8_t* weights,
                                                  std::int64_t quads, std::int32_t* sums, std::int64_t pitch,
                                                  bool add) {
  __m256i total[kRows][2];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    auto* const out = reinterpret_cast<const __m256i*>(sums + row * pitch);
    for (int half = 0; half < 2; ++half)
      total[row][half] = add ? _mm256_loadu_si256(out + half) : _mm256_setzero_si256();
  }
  for (std::int64_t quad = 0; quad < quads; ++quad) {
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
    const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + kQuadBytes / 2));
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const __m256i terms = _mm256_set1_epi32(load_quad(prepared + row * kInt8Chunk));
      total[row][0] = _mm256_dpbusd_avx_epi32(total[row][0], terms, first);
      total[row][1] = _mm256_dpbusd_avx_epi32(total[row][1], terms, second);
    }
    weights += kQuadBytes;
    prepared += kInt8Quad;
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    auto* const out = reinterpret_cast<__m256i*>(sums + row * pitch);
    for (int half = 0; half < 2; ++half) _mm256_storeu_si256(out + half, total[row][half]);
  }
}

// `kRows` rows by `kBlocks` blocks, 16 channels to a vector.
template <int kRows, int kBlocks>
[[gnu::target("avx512f,avx512vnni")]] void multiply_512(const std::uint8_t* prepared, const std::int8_t* weights,
                                                        std::int64_t block_bytes, std::int64_t quads,
                                                        std::int32_t* sums, std::int64_t pitch, bool add) {
  __m512i total[kRows][kBlocks];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
    for (int block = 0; block < kBlocks; ++block)
      total[row][block] = add ? _mm512_loadu_si512(sums + row * pitch + block * kInt8Block) : _mm512_setzero_si512();
  for (std::int64_t quad = 0; quad < quads; ++quad) {
    __m512i w[kBlocks];
#pragma GCC unroll 8
    for (int block = 0; block < kBlocks; ++block) w[block] = _mm512_loadu_si512(weights + block * block_bytes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const __m512i terms = _mm512_set1_epi32(load_quad(prepared + row * kInt8Chunk));
#pragma GCC unroll 8
      for (int block = 0; block < kBlocks; ++block)
        total[row][block] = _mm512_dpbusd_epi32(total[row][block], terms, w[block]);
    }
    weights += kQuadBytes;
    prepared += kInt8Quad;
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
    for (int block = 0; block < kBlocks; ++block)
      _mm512_storeu_si512(sums + row * pitch + block * kInt8Block, total[row][block]);
}

// Calls tile(constant<kRows>, first row) for all rows of a tile: whole register tiles, then what is left.
template <int kRows, class Tile>
void for_rows(std::int64_t rows, const Tile& tile) {
  std::int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) tile(std::integral_constant<int, kRows>(), row);
  if constexpr (kRows > 1) {
    if (row < rows) for_rows<kRows / 2>(rows - row, [&](auto count, std::int64_t begin) { tile(count, row + begin); });
  }
}

void multiply_avx_vnni(const Int8Tile& tile) {
  const auto* const prepared = static_cast<const std::uint8_t*>(tile.prepared);
  const std::int64_t pitch = tile.blocks * kInt8Block;
  for (std::int64_t block = 0; block < tile.blocks; ++block) {
    for_rows<6>(tile.rows, [&](auto rows, std::int64_t row) {
      multiply_256<rows>(prepared + row * kInt8Chunk, tile.weights + block * tile.block_bytes, tile.quads,
                         tile.sums + row * pitch + block * kInt8Block, pitch, tile.add);
    });
  }
}

void multiply_avx512_vnni(const Int8Tile& tile) {
  const auto* const prepared = static_cast<const std::uint8_t*>(tile.prepared);
  const std::int64_t pitch = tile.blocks * kInt8Block;
  const auto multiply_blocks = [&](auto blocks, std::int64_t block) {
    for_rows<8>(tile.rows, [&](auto rows, std::int64_t row) {
      multiply_512<rows, blocks>(prepared + row * kInt8Chunk, tile.weights + block * tile.block_bytes, tile.block_bytes,
                                 tile.quads, tile.sums + row * pitch + block * kInt8Block, pitch, tile.add);
    });
  };
  std::int64_t block = 0;
  for (; block + 2 <= tile.blocks; block += 2) multiply_blocks(std::integral_constant<int, 2>(), block);
  if (block < tile.blocks) multiply_blocks(std::integral_constant<int, 1>(), block);
}

}  // namespace

const Int8Kernel kInt8AvxVnni{1, 128, prepare, multiply_avx_vnni};
const Int8Kernel kInt8Avx512Vnni{1, 128, prepare, multiply_avx512_vnni};

}  // namespace halfstep::cpu
#endif
