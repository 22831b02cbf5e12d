// The AMX kernel: tdpbssd adds the products of a tile of 16 rows by 64 terms with one of 64 terms by 16 channels to 256
// int32 sums, signed by signed and exactly. A block of packed weights lies in memory as such a tile, and rows are read
// where they are.
#include "int8_kernels.h"

#if defined(HS_INT8_AMX)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cpuid.h>
#include <algorithm>

namespace halfstep::cpu {
namespace {

constexpr std::int64_t kTileRows = 16;
constexpr std::int64_t kTileQuads = 16;
constexpr std::int64_t kQuadBytes = kInt8Block * kInt8Quad;

// What ldtilecfg reads: the shape of each of the eight tiles.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t column_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, std::int64_t tile_rows, std::int64_t bytes) {
    rows[tile] = static_cast<std::uint8_t>(tile_rows);
    column_bytes[tile] = static_cast<std::uint16_t>(bytes);
  }
};

// Tiles 0 to 3 are sums of first and second rows with first and second block, 4 and 5 rows, 6 and 7 weights.
[[gnu::target("amx-tile")]] void set_shapes(std::int64_t first_rows, std::int64_t second_rows, std::int64_t quads) {
  TileShapes shapes;
  const std::int64_t sum_bytes = kInt8Block * static_cast<std::int64_t>(sizeof(std::int32_t));
  for (const int tile : {0, 1}) shapes.set(tile, first_rows, sum_bytes);
  shapes.set(4, first_rows, quads * kInt8Quad);
  if (second_rows > 0) {
    for (const int tile : {2, 3}) shapes.set(tile, second_rows, sum_bytes);
    shapes.set(5, second_rows, quads * kInt8Quad);
  }
  for (const int tile : {6, 7}) shapes.set(tile, quads, kQuadBytes);
  // The compilers' own function names 8 of the 64 bytes, and the writes of the others vanish.
  __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
}

struct Step {
  const std::int8_t* rows;
  std::int64_t pitch;
  const std::int8_t* weights;
  std::int64_t block_bytes;
  std::int64_t quads;  // of a step
  std::int64_t steps;
  std::int32_t* sums;
  std::int64_t sums_pitch;  // bytes
  bool add;
};

template <bool kTwoRows, bool kTwoBlocks>
[[gnu::target("amx-tile,amx-int8")]] void multiply_tiles(const Step& step) {
  std::int32_t* const lower =
      step.sums + kTileRows * (step.sums_pitch / static_cast<std::int64_t>(sizeof(std::int32_t)));
  if (step.add) {
    _tile_loadd(0, step.sums, step.sums_pitch);
    if constexpr (kTwoBlocks) _tile_loadd(1, step.sums + kInt8Block, step.sums_pitch);
    if constexpr (kTwoRows) _tile_loadd(2, lower, step.sums_pitch);
    if constexpr (kTwoRows && kTwoBlocks) _tile_loadd(3, lower + kInt8Block, step.sums_pitch);
  } else {
    _tile_zero(0);
    if constexpr (kTwoBlocks) _tile_zero(1);
    if constexpr (kTwoRows) _tile_zero(2);
    if constexpr (kTwoRows && kTwoBlocks) _tile_zero(3);
  }
  const std::int8_t* rows = step.rows;
  const std::int8_t* weights = step.weights;
  for (std::int64_t i = 0; i < step.steps; ++i) {
    _tile_loadd(4, rows, step.pitch);
    _tile_loadd(6, weights, kQuadBytes);
    _tile_dpbssd(0, 4, 6);
    if constexpr (kTwoBlocks) {
      _tile_loadd(7, weights + step.block_bytes, kQuadBytes);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, rows + kTileRows * step.pitch, step.pitch);
      _tile_dpbssd(2, 5, 6);
    }
    if constexpr (kTwoRows && kTwoBlocks) _tile_dpbssd(3, 5, 7);
    rows += step.quads * kInt8Quad;
    weights += step.quads * kQuadBytes;
  }
  _tile_stored(0, step.sums, step.sums_pitch);
  if constexpr (kTwoBlocks) _tile_stored(1, step.sums + kInt8Block, step.sums_pitch);
  if constexpr (kTwoRows) _tile_stored(2, lower, step.sums_pitch);
  if constexpr (kTwoRows && kTwoBlocks) _tile_stored(3, lower + kInt8Block, step.sums_pitch);
}

// `steps` times `quads` quads of all rows and blocks, from quad `from` on.
void multiply_quads(const Int8Tile& tile, std::int64_t from, std::int64_t quads, std::int64_t steps, bool add) {
  if (steps == 0 || quads == 0) return;
  const std::int64_t pitch = tile.blocks * kInt8Block;
  std::int64_t first = 0;
  std::int64_t second = 0;
  for (std::int64_t row = 0; row < tile.rows; row += 2 * kTileRows) {
    const std::int64_t new_first = std::min(kTileRows, tile.rows - row);
    const std::int64_t new_second = std::clamp<std::int64_t>(tile.rows - row - kTileRows, 0, kTileRows);
    if (new_first != first || new_second != second) set_shapes(first = new_first, second = new_second, quads);
    for (std::int64_t block = 0; block < tile.blocks; block += 2) {
      const Step step{static_cast<const std::int8_t*>(tile.prepared) + row * tile.row_bytes + from * kInt8Quad,
                      tile.row_bytes,
                      tile.weights + block * tile.block_bytes + from * kQuadBytes,
                      tile.block_bytes,
                      quads,
                      steps,
                      tile.sums + row * pitch + block * kInt8Block,
                      pitch * static_cast<std::int64_t>(sizeof(std::int32_t)),
                      add};
      const bool two_blocks = block + 1 < tile.blocks;
      if (second > 0) {
        two_blocks ? multiply_tiles<true, true>(step) : multiply_tiles<true, false>(step);
      } else {
        two_blocks ? multiply_tiles<false, true>(step) : multiply_tiles<false, false>(step);
      }
    }
  }
}

[[gnu::target("amx-tile")]] void multiply(const Int8Tile& tile) {
  if (tile.quads == 0 && !tile.add) std::fill_n(tile.sums, tile.rows * tile.blocks * kInt8Block, 0);
  const std::int64_t whole = tile.quads / kTileQuads;
  multiply_quads(tile, 0, kTileQuads, whole, tile.add);
  multiply_quads(tile, whole * kTileQuads, tile.quads % kTileQuads, 1, tile.add || whole > 0);
  _tile_release();  // a thread with tiles in use takes longer to switch
}

}  // namespace

const Int8Kernel kInt8Amx{1, 0, nullptr, multiply};

// The kernel keeps tiles from a process that has not asked for them.
bool int8_amx_is_allowed() {
  constexpr unsigned kTile = 1U << 24;
  constexpr unsigned kInt8 = 1U << 25;
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTile) == 0 || (d & kInt8) == 0) return false;
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace halfstep::cpu
#endif
