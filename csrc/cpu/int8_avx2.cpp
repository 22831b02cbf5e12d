// The AVX2 kernel: terms widened to int16, pairs of products by vpmaddwd, which is exact. (vpmaddubsw would take int8
// as it is, and saturate.) A vector has 4 terms of 4 channels; the two halves of a channel's sum meet at the end.
//
// Each weight vector serves all rows of a register tile: 6 rows by 8 channels are 12 sums, and leave 4 registers for 2
// weight vectors, the terms and a product. Many rows share a block of weights that is widened once; for few rows
// widening is part of the loop.
#include "int8_kernels.h"

#if defined(HS_INT8_X86)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace halfstep::cpu {
namespace {

constexpr int kTileRows = 6;
constexpr int kParts = 2;           // vectors of 4 channels in a tile
constexpr int kPartTerms = 16;      // 4 channels x 4 terms
constexpr int kBlockTerms = 64;     // of one quad
constexpr std::int64_t kWiden = 7;  // rows from which on weights are widened beforehand

[[gnu::target("avx2")]] void prepare(const std::int8_t* terms, std::int64_t count, void* prepared) {
  auto* const out = static_cast<std::int16_t*>(prepared);
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(terms + i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), wide);
  }
  for (; i < count; ++i) out[i] = terms[i];
  for (; i % kInt8Quad != 0; ++i) out[i] = 0;
}

// Weight vectors from int8 in memory, or from int16.
[[gnu::target("avx2"), gnu::always_inline]] inline __m256i load_weights(const std::int8_t* at) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
[[gnu::target("avx2"), gnu::always_inline]] inline __m256i load_weights(const std::int16_t* at) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
}

// `kRows` rows by 8 channels. Weights of a quad are kStep elements after those of the last.
template <int kRows, int kStep, class Weight>
[[gnu::target("avx2")]] void multiply_tile(const std::int16_t* prepared, const Weight* weights, std::int64_t quads,
                                           std::int32_t* sums, std::int64_t pitch, bool add) {
  __m256i total[kRows][kParts];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
    for (int part = 0; part < kParts; ++part) total[row][part] = _mm256_setzero_si256();
  for (std::int64_t quad = 0; quad < quads; ++quad) {
    const __m256i first = load_weights(weights);
    const __m256i second = load_weights(weights + kPartTerms);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      std::int64_t bits = 0;
      std::memcpy(&bits, prepared + row * kInt8Chunk, sizeof(bits));
      const __m256i terms = _mm256_set1_epi64x(bits);
      total[row][0] = _mm256_add_epi32(total[row][0], _mm256_madd_epi16(terms, first));
      total[row][1] = _mm256_add_epi32(total[row][1], _mm256_madd_epi16(terms, second));
      // Row by row and in place: compilers would load all rows first, and then not have the registers for the sums.
      asm volatile("" : "+x"(total[row][0]), "+x"(total[row][1])::"memory");
    }
    weights += kStep;
    prepared += kInt8Quad;
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    auto* const out = reinterpret_cast<__m256i*>(sums + row * pitch);
    __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(total[row][0], total[row][1]), 0xd8);
    if (add) sum = _mm256_add_epi32(sum, _mm256_loadu_si256(out));
    _mm256_storeu_si256(out, sum);
  }
}

template <int kStep, class Weight>
void multiply_rows(const std::int16_t* prepared, std::int64_t rows, const Weight* weights, std::int64_t quads,
                   std::int32_t* sums, std::int64_t pitch, bool add) {
  for (; rows > 0; rows -= kTileRows) {
    switch (std::min<std::int64_t>(rows, kTileRows)) {
      case 1:
        return multiply_tile<1, kStep>(prepared, weights, quads, sums, pitch, add);
      case 2:
        return multiply_tile<2, kStep>(prepared, weights, quads, sums, pitch, add);
      case 3:
        return multiply_tile<3, kStep>(prepared, weights, quads, sums, pitch, add);
      case 4:
        return multiply_tile<4, kStep>(prepared, weights, quads, sums, pitch, add);
      case 5:
        return multiply_tile<5, kStep>(prepared, weights, quads, sums, pitch, add);
      default:
        multiply_tile<6, kStep>(prepared, weights, quads, sums, pitch, add);
    }
    prepared += kTileRows * kInt8Chunk;
    sums += kTileRows * pitch;
  }
}

[[gnu::target("avx2")]] void widen_half_block(const std::int8_t* weights, std::int64_t quads, std::int16_t* wide) {
  for (std::int64_t quad = 0; quad < quads; ++quad) {
    for (int part = 0; part < kParts; ++part) {
      const __m256i terms = load_weights(weights + quad * kBlockTerms + part * kPartTerms);
      _mm256_store_si256(reinterpret_cast<__m256i*>(wide + (quad * kParts + part) * kPartTerms), terms);
    }
  }
}

void multiply(const Int8Tile& tile) {
  constexpr int kHalf = kParts * kPartTerms;
  alignas(32) std::int16_t wide[kInt8Chunk / kInt8Quad * kHalf];
  const auto* const prepared = static_cast<const std::int16_t*>(tile.prepared);
  const std::int64_t pitch = tile.blocks * kInt8Block;
  for (std::int64_t half = 0; half < 2 * tile.blocks; ++half) {
    const std::int8_t* const weights = tile.weights + half / 2 * tile.block_bytes + half % 2 * kHalf;
    std::int32_t* const sums = tile.sums + half * kInt8Block / 2;
    if (tile.rows >= kWiden) {
      widen_half_block(weights, tile.quads, wide);
      multiply_rows<kHalf>(prepared, tile.rows, wide, tile.quads, sums, pitch, tile.add);
    } else {
      multiply_rows<kBlockTerms>(prepared, tile.rows, weights, tile.quads, sums, pitch, tile.add);
    }
  }
}

}  // namespace

const Int8Kernel kInt8Avx2{2, 0, prepare, multiply};

}  // namespace halfstep::cpu
#endif
