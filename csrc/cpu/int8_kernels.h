// The inner products of int8 rows with packed weights: one kernel for each instruction set.
//
// Packed weights, of one group: for each block of 16 channels its terms in quads, [quads][16 channels][4 terms] int8
// with zeros at the ends, then the 16 sums of the channels' weights, int32.
#pragma once

#include <cstdint>

#include "halfstep/int8.h"

namespace halfstep::cpu {

inline constexpr std::int64_t kInt8Block = 16;  // channels
inline constexpr std::int64_t kInt8Quad = 4;    // terms
// The terms that a kernel takes at once: a block of them, widened to int16, is half of a first-level cache. Prepared
// rows lie this many terms apart.
inline constexpr std::int64_t kInt8Chunk = 512;

constexpr std::int64_t int8_blocks(std::int64_t channels) {
  return (channels + kInt8Block - 1) / kInt8Block;
}
constexpr std::int64_t int8_quads(std::int64_t terms) {
  return (terms + kInt8Quad - 1) / kInt8Quad;
}
constexpr std::int64_t int8_block_bytes(std::int64_t terms) {
  return (int8_quads(terms) + 1) * kInt8Block * kInt8Quad;
}

// sums[row][channel] = or += the products of `rows` prepared rows with `blocks` blocks of weights, over `quads` quads,
// at most a chunk. Sums are modulo 2^32: with a shift they may pass the limits before they are corrected.
struct Int8Tile {
  const void* prepared;
  std::int64_t row_bytes;  // from row to row
  std::int64_t rows;
  const std::int8_t* weights;
  std::int64_t block_bytes;  // from block to block
  std::int64_t blocks;
  std::int64_t quads;
  std::int32_t* sums;  // [rows][blocks * 16]
  bool add;
};

struct Int8Kernel {
  std::int64_t term_bytes;  // of a prepared term
  std::int32_t shift;       // what preparing adds to a term
  // Brings `count` terms of a row into the kernel's form; the last quad is filled up with anything. Null: the kernel
  // takes int8 rows as they lie, at any distance and of any length, if they are whole quads.
  void (*prepare)(const std::int8_t* terms, std::int64_t count, void* prepared);
  void (*multiply)(const Int8Tile& tile);
};

// int8 rows with their last quad filled up.
void int8_prepare_plain(const std::int8_t* terms, std::int64_t count, void* prepared);

// Throws InvalidArgument where the processor has not got the instruction set.
const Int8Kernel& int8_kernel(Int8Isa isa);

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define HS_INT8_X86
extern const Int8Kernel kInt8Avx2;
extern const Int8Kernel kInt8AvxVnni;
extern const Int8Kernel kInt8Avx512Vnni;
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define HS_INT8_AMX
extern const Int8Kernel kInt8Amx;
bool int8_amx_is_allowed();
#endif
#endif

}  // namespace halfstep::cpu
