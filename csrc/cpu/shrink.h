// Kernels of shrink(): one tile of rows at a time, every lane of which has statistics of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "halfstep/shrink.h"

namespace halfstep::cpu {

inline constexpr std::int64_t kMaxLanes = 512;  // widest tile: its statistics stay in the first cache beside the data

// Statistics of up to kMaxLanes lanes; a lane is a position in the rows of a tile. Four arrays of 8 bytes a lane, which
// the kernels use as they need: float64 {minimum, maximum, error, not 0 if fractional}, integers {low, high} of their
// own type.
class Lanes {
 public:
  explicit Lanes(std::int64_t width) : width_(width), memory_(static_cast<std::size_t>(4 * width)) {}
  template <class T>
  T* array(int which) {
    return reinterpret_cast<T*>(memory_.data() + which * width_);
  }

 private:
  std::int64_t width_;
  std::vector<std::uint64_t> memory_;
};

struct ShrinkKernel {
  // Adds `rows` rows of `width` elements, the first at x and the next `ld` elements on, to the statistics of lanes 0 to
  // width - 1, and writes them converted to out, rows `out_ld` elements apart, unless that is null.
  void (*tile)(const void* x, std::int64_t ld, std::int64_t rows, std::int64_t width, void* out, std::int64_t out_ld,
               Lanes& lanes);
  // The same around the caches, for an `out` at a multiple of 16 bytes and `out_ld` and `width` multiples of 8. Null
  // where it would be no faster than tile() and stream_copy().
  decltype(tile) stream_tile;
  // Sets lanes 0 to width - 1 to those of no elements.
  void (*reset)(Lanes& lanes, std::int64_t width);
  // Adds lane i to stats[i % columns], for lanes 0 to width - 1.
  void (*merge)(Lanes& lanes, std::int64_t width, std::int64_t columns, ColumnStats* stats);
};

// The kernel for a pair of types; `to` == `from` only scans. `tile` is null if there is none for the pair.
ShrinkKernel shrink_kernel(ArrayType from, ArrayType to);

// Copies around the caches. Needs a store fence before another thread may read: stream_fence().
void stream_copy(void* to, const void* from, std::size_t bytes);
void stream_fence();

}  // namespace halfstep::cpu
