// Decisions, and how an array of any layout becomes tiles for the kernels. Contract: halfstep/shrink.h.
#include "halfstep/shrink.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "cpu/shrink.h"
#include "halfstep/status.h"

namespace halfstep {
namespace {

constexpr std::int64_t kTile = 2048;        // elements: a tile and its copies fit in the first cache
constexpr std::int64_t kTask = 1LL << 19;   // elements: a task takes some hundred microseconds
constexpr std::int64_t kNarrow = 64;        // columns; of fewer, several rows are one row of a tile
constexpr std::int64_t kVector = 8;         // lanes that the kernels take at once
constexpr std::int64_t kSharedLanes = 128;  // bytes: the lanes of a run that belongs to one column
constexpr double kTolerance = 0x1p-24;      // half a unit in float32's last place
constexpr double kSpread = 0x1p-12;         // see kSpreadRule
constexpr double kLargestInteger = 0x1p53;  // up to here float64 tells integers apart

struct Axis {
  std::int64_t size;
  std::int64_t in;  // strides in bytes
  std::int64_t out;
  bool column;
};

// Axes from the outermost to the innermost in memory, those that can be walked as one merged.
std::vector<Axis> axes_of(const ArrayView& in, const ArrayView* out, int column_axis) {
  std::vector<Axis> axes;
  for (std::size_t i = 0; i < in.shape.size(); ++i) {
    if (in.shape[i] == 1) continue;
    const bool column = static_cast<int>(i) == column_axis;
    axes.push_back({in.shape[i], in.strides[i], out == nullptr ? 0 : out->strides[i], column});
  }
  std::stable_sort(axes.begin(), axes.end(),
                   [](const Axis& a, const Axis& b) { return std::abs(a.in) > std::abs(b.in); });
  std::vector<Axis> merged;
  for (const Axis& axis : axes) {
    if (!merged.empty()) {
      Axis& last = merged.back();
      const bool one = last.in == axis.size * axis.in && (out == nullptr || last.out == axis.size * axis.out);
      if (one && !last.column && !axis.column) {
        last = {last.size * axis.size, axis.in, axis.out, false};
        continue;
      }
    }
    merged.push_back(axis);
  }
  return merged;
}

// Copies `count` elements that lie `stride` bytes apart to a dense buffer; or from one, with the roles exchanged.
template <class Word>
void gather(const std::byte* from, std::int64_t stride, std::int64_t count, bool swapped, std::byte* to) {
  for (std::int64_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, from + i * stride, sizeof(Word));
    if (swapped) {
      if constexpr (sizeof(Word) == 2) word = __builtin_bswap16(word);
      if constexpr (sizeof(Word) == 4) word = __builtin_bswap32(word);
      if constexpr (sizeof(Word) == 8) word = __builtin_bswap64(word);
    }
    std::memcpy(to + i * static_cast<std::int64_t>(sizeof(Word)), &word, sizeof(Word));
  }
}
template <class Word>
void scatter(const std::byte* from, std::int64_t count, std::byte* to, std::int64_t stride) {
  for (std::int64_t i = 0; i < count; ++i)
    std::memcpy(to + i * stride, from + i * static_cast<std::int64_t>(sizeof(Word)), sizeof(Word));
}

void gather_run(std::int64_t size, const std::byte* from, std::int64_t stride, std::int64_t count, bool swapped,
                std::byte* to) {
  if (stride == size && !swapped) {
    std::memcpy(to, from, static_cast<std::size_t>(count * size));
    return;
  }
  switch (size) {
    case 1:
      return gather<std::uint8_t>(from, stride, count, swapped, to);
    case 2:
      return gather<std::uint16_t>(from, stride, count, swapped, to);
    case 4:
      return gather<std::uint32_t>(from, stride, count, swapped, to);
    default:
      return gather<std::uint64_t>(from, stride, count, swapped, to);
  }
}

void scatter_run(std::int64_t size, const std::byte* from, std::int64_t count, std::byte* to, std::int64_t stride) {
  switch (size) {
    case 1:
      return scatter<std::uint8_t>(from, count, to, stride);
    case 2:
      return scatter<std::uint16_t>(from, count, to, stride);
    default:
      return scatter<std::uint32_t>(from, count, to, stride);
  }
}

// One call of shrink(). The innermost axis is a run, the others together count the runs. Either the run is the column
// axis, and lane i of a tile is column i of it; or each run belongs to one column, and some lanes share it.
class Shrinker {
 public:
  Shrinker(const ArrayView& in, const ArrayView* out, int column_axis, ColumnStats* stats, bool streaming)
      : in_(static_cast<const std::byte*>(in.data)),
        out_(out == nullptr ? nullptr : static_cast<std::byte*>(out->data)),
        in_size_(size_of(in.type)),
        out_size_(out == nullptr ? 0 : size_of(out->type)),
        swapped_(in.swapped),
        streaming_(streaming),
        stats_(stats),
        kernel_(cpu::shrink_kernel(in.type, out == nullptr ? in.type : out->type)) {
    outer_ = axes_of(in, out, column_axis);
    if (outer_.empty()) outer_.push_back({1, in_size_, out_size_, false});
    run_ = outer_.back();
    outer_.pop_back();
    // Runs of one column one after the other.
    std::stable_partition(outer_.begin(), outer_.end(), [](const Axis& axis) { return axis.column; });
    for (const Axis& axis : outer_) runs_ *= axis.size;
    runs_per_column_ = !outer_.empty() && outer_.front().column ? runs_ / outer_.front().size : runs_;

    const std::int64_t in_ld = outer_.empty() ? run_.size * in_size_ : outer_.back().in;
    const std::int64_t out_ld = outer_.empty() ? run_.size * out_size_ : outer_.back().out;
    in_direct_ =
        run_.in == in_size_ && !swapped_ && aligned(in_, in_size_) && outer_.size() <= 1 && in_ld % in_size_ == 0;
    in_dense_ = in_direct_ && in_ld == run_.size * in_size_;
    in_ld_ = in_ld / in_size_;
    out_dense_ = out_ != nullptr && run_.out == out_size_ && outer_.size() <= 1 && out_ld == run_.size * out_size_ &&
                 aligned(out_, out_size_);

    if (run_.column) {
      width_ = std::min(run_.size, cpu::kMaxLanes);
      parts_ = (run_.size + width_ - 1) / width_;
      per_task_ = std::max<std::int64_t>(1, kTask / width_);
      tasks_ = (runs_ + per_task_ - 1) / per_task_ * parts_;
      lane_width_ = lane_width(width_);
    } else {
      width_ = std::min(run_.size, kTask);
      parts_ = (run_.size + width_ - 1) / width_;
      per_task_ = std::max<std::int64_t>(1, kTask / width_);
      tasks_ = (runs_ * parts_ + per_task_ - 1) / per_task_;
      lane_width_ = kSharedLanes / in_size_;
    }
  }

  std::int64_t tasks() const { return tasks_; }

  void run_task(std::int64_t task) {
    Scratch scratch(lane_width_);
    kernel_.reset(scratch.lanes, lane_width_);
    if (run_.column) {
      const std::int64_t begin = task % parts_ * width_;
      const std::int64_t width = std::min(width_, run_.size - begin);
      const std::int64_t end = std::min(runs_, (task / parts_ + 1) * per_task_);
      const std::int64_t rows = std::max<std::int64_t>(1, kTile / width);
      for (std::int64_t row = task / parts_ * per_task_; row < end; row += rows)
        visit({row, std::min(rows, end - row), begin, width}, width, scratch);
      merge(scratch, width, begin);
    } else {
      const std::int64_t end = std::min(runs_ * parts_, (task + 1) * per_task_);
      std::int64_t column = task * per_task_ / parts_ / runs_per_column_;
      for (std::int64_t part = task * per_task_; part < end;) {
        const std::int64_t run = part / parts_;
        if (run / runs_per_column_ != column) {
          merge(scratch, 1, column);
          kernel_.reset(scratch.lanes, lane_width_);
          column = run / runs_per_column_;
        }
        if (width_ < kTile) {  // several runs are one tile
          const std::int64_t same = std::min(end, (column + 1) * runs_per_column_) - run;
          const std::int64_t runs = std::min(same, kTile / width_);
          visit({run, runs, 0, width_}, 1, scratch);
          part += runs;
        } else {
          const std::int64_t first = part % parts_ * width_;
          const std::int64_t last = std::min(run_.size, first + width_);
          for (std::int64_t begin = first; begin < last; begin += kTile)
            visit({run, 1, begin, std::min(kTile, last - begin)}, 1, scratch);
          ++part;
        }
      }
      merge(scratch, 1, column);
    }
    if (out_ != nullptr && streaming_) cpu::stream_fence();
  }

 private:
  // Rows of a matrix without gaps are taken together, to full vectors and at least kNarrow lanes if they are not too
  // wide.
  static std::int64_t lane_width(std::int64_t columns) {
    std::int64_t rows = 1;
    while (rows * columns < kNarrow || rows * columns % kVector != 0) ++rows;
    return rows * columns <= cpu::kMaxLanes ? rows * columns : columns;
  }

  struct Scratch {
    explicit Scratch(std::int64_t width) : lanes(width) {}
    cpu::Lanes lanes;
    alignas(64) std::array<std::byte, kTile * 8> in;
    alignas(64) std::array<std::byte, kTile * 4> out;
  };

  struct Tile {
    std::int64_t run;  // first run
    std::int64_t runs;
    std::int64_t begin;  // within each
    std::int64_t length;
    std::int64_t count() const { return runs * length; }
  };

  static bool aligned(const void* data, std::int64_t size) {
    return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(size) == 0;
  }

  // Where a run lies from the first element on, in bytes.
  void locate(std::int64_t run, std::int64_t& in, std::int64_t& out) const {
    in = 0;
    out = 0;
    for (std::size_t i = outer_.size(); i-- > 1; run /= outer_[i].size) {
      in += run % outer_[i].size * outer_[i].in;
      out += run % outer_[i].size * outer_[i].out;
    }
    if (!outer_.empty()) {
      in += run * outer_[0].in;
      out += run * outer_[0].out;
    }
  }

  void visit(const Tile& tile, std::int64_t period, Scratch& scratch) {
    std::int64_t in = 0;
    std::int64_t out = 0;
    locate(tile.run, in, out);
    const std::byte* x = in_ + in + tile.begin * run_.in;
    std::int64_t ld = tile.length;
    const bool whole = tile.length == run_.size;  // runs that are dense in memory are so in the tile
    if (!in_direct_ || (tile.runs > 1 && !(in_dense_ && whole))) {
      if (in_direct_ && run_.column && tile.length >= kNarrow) {
        ld = in_ld_;
      } else {
        for (std::int64_t i = 0; i < tile.runs; ++i) {
          locate(tile.run + i, in, out);
          gather_run(in_size_, in_ + in + tile.begin * run_.in, run_.in, tile.length, swapped_,
                     scratch.in.data() + i * tile.length * in_size_);
        }
        x = scratch.in.data();
      }
    }

    locate(tile.run, in, out);
    std::byte* target = out_ == nullptr ? nullptr : out_ + out + tile.begin * run_.out;
    const bool out_whole = out_dense_ && (tile.runs == 1 || whole);
    std::byte* to = target == nullptr ? nullptr : out_whole && !streaming_ ? target : scratch.out.data();
    if (ld == tile.length) {
      const std::int64_t wide = period == 1 ? lane_width_ : std::max(lane_width_ / period, std::int64_t{1}) * period;
      const std::int64_t rows = tile.count() / wide;
      const std::int64_t done = rows * wide;
      auto run_tile = kernel_.tile;
      if (out_whole && streaming_ && kernel_.stream_tile != nullptr && wide % kVector == 0 && aligned(target, 16)) {
        run_tile = kernel_.stream_tile;
        to = target;
      }
      run_tile(x, wide, rows, wide, to, wide, scratch.lanes);
      kernel_.tile(x + done * in_size_, wide, 1, tile.count() - done, to == nullptr ? to : to + done * out_size_, wide,
                   scratch.lanes);
    } else {
      kernel_.tile(x, ld, tile.runs, tile.length, to, tile.length, scratch.lanes);
    }
    if (target == nullptr || to == target) return;

    if (out_whole) {
      cpu::stream_copy(target, to, static_cast<std::size_t>(tile.count() * out_size_));
      return;
    }
    for (std::int64_t i = 0; i < tile.runs; ++i) {
      locate(tile.run + i, in, out);
      std::byte* place = out_ + out + tile.begin * run_.out;
      const std::byte* from = to + i * tile.length * out_size_;
      const auto bytes = static_cast<std::size_t>(tile.length * out_size_);
      if (run_.out != out_size_)
        scatter_run(out_size_, from, tile.length, place, run_.out);
      else if (streaming_)
        cpu::stream_copy(place, from, bytes);
      else
        std::memcpy(place, from, bytes);
    }
  }

  void merge(Scratch& scratch, std::int64_t columns, std::int64_t first) {
    const std::lock_guard lock(mutex_);
    kernel_.merge(scratch.lanes, lane_width_ / columns * columns, columns, stats_ + first);
  }

  const std::byte* in_;
  std::byte* out_;
  std::int64_t in_size_;
  std::int64_t out_size_;
  bool swapped_;
  bool streaming_;
  ColumnStats* stats_;
  cpu::ShrinkKernel kernel_;
  std::vector<Axis> outer_;
  Axis run_{};
  std::int64_t runs_ = 1;
  std::int64_t runs_per_column_ = 1;
  bool in_direct_ = false;  // the kernels can read it where it lies
  bool in_dense_ = false;   // and runs follow each other without a gap
  bool out_dense_ = false;
  std::int64_t in_ld_ = 0;
  std::int64_t width_ = 1;  // of a run's part
  std::int64_t parts_ = 1;  // of a run
  std::int64_t per_task_ = 1;
  std::int64_t tasks_ = 0;
  std::int64_t lane_width_ = 1;
  std::mutex mutex_;
};

void check(const ArrayView& in, const ArrayView* out, int column_axis) {
  HS_CHECK(in.shape.size() == in.strides.size(), "shrink: got ", in.shape.size(), " sizes and ", in.strides.size(),
           " strides");
  HS_CHECK(column_axis >= -1 && column_axis < static_cast<int>(in.shape.size()), "shrink: column_axis is ", column_axis,
           ", expected -1 to ", static_cast<int>(in.shape.size()) - 1);
  element_count(in.shape);
  if (out == nullptr) {
    HS_CHECK(cpu::shrink_kernel(in.type, in.type).tile != nullptr, "shrink: cannot scan type ",
             static_cast<int>(in.type), ", expected an integer type or float64");
    return;
  }
  HS_CHECK(out->shape == in.shape && out->strides.size() == in.shape.size(),
           "shrink: the output has another shape than the input");
  HS_CHECK(out->type != in.type && cpu::shrink_kernel(in.type, out->type).tile != nullptr,
           "shrink: cannot convert type ", static_cast<int>(in.type), " to ", static_cast<int>(out->type),
           ", expected a smaller one of the same kind");
  HS_CHECK(!out->swapped, "shrink: the output must have this machine's byte order");
}

}  // namespace

std::int64_t size_of(ArrayType type) {
  constexpr std::int64_t sizes[kArrayTypes] = {1, 2, 4, 8, 1, 2, 4, 8, 4, 8};
  return sizes[static_cast<std::size_t>(type)];
}

std::int64_t element_count(const std::vector<std::int64_t>& shape) {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) {
    HS_CHECK(size >= 0, "shrink: a size is ", size, ", expected >= 0");
    HS_CHECK(!__builtin_mul_overflow(count, size, &count), "shrink: the array has more than 2^63 - 1 elements");
  }
  return count;
}

ColumnStats ColumnStats::of(ArrayType type) {
  ColumnStats stats;
  const bool is_unsigned = type >= ArrayType::kUInt8 && type <= ArrayType::kUInt64;
  stats.low = is_unsigned ? -1 : std::numeric_limits<std::int64_t>::max();  // -1: the largest std::uint64_t
  stats.high = is_unsigned ? 0 : std::numeric_limits<std::int64_t>::min();
  return stats;
}

bool integer_like(const ColumnStats& stats) {
  return stats.minimum <= stats.maximum && !stats.fractional && stats.minimum >= -kLargestInteger &&
         stats.maximum <= kLargestInteger;
}

Blocked decide_float(const ColumnStats& stats, ShrinkMode mode, std::int32_t rules) {
  if (std::isinf(stats.error)) return Blocked::kOverflow;
  if (stats.error == 0.0 || mode == ShrinkMode::kForce) return Blocked::kNot;
  if (mode == ShrinkMode::kExact) return Blocked::kInexact;
  if (stats.error > kTolerance) return Blocked::kUnderflow;
  if (integer_like(stats)) return (rules & kIntegerRule) != 0 ? Blocked::kInteger : Blocked::kNot;
  const double size = std::max(std::fabs(stats.minimum), std::fabs(stats.maximum));
  const double spread = stats.maximum - stats.minimum;
  const bool close = spread > 0.0 && kTolerance * size > kSpread * spread;
  return close && (rules & kSpreadRule) != 0 ? Blocked::kSpread : Blocked::kNot;
}

ArrayType decide_integer(const ColumnStats& stats, ArrayType type) {
  const auto fits = [&]<class T>(T) {
    using Wide = std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>;
    return static_cast<Wide>(stats.low) >= static_cast<Wide>(std::numeric_limits<T>::min()) &&
           static_cast<Wide>(stats.high) <= static_cast<Wide>(std::numeric_limits<T>::max());
  };
  using enum ArrayType;
  ArrayType smallest = type;
  if (type >= kInt8 && type <= kInt64) {
    if (stats.low > stats.high) return type;
    smallest = fits(std::int8_t{}) ? kInt8 : fits(std::int16_t{}) ? kInt16 : fits(std::int32_t{}) ? kInt32 : kInt64;
  } else if (type >= kUInt8 && type <= kUInt64) {
    if (static_cast<std::uint64_t>(stats.low) > static_cast<std::uint64_t>(stats.high)) return type;
    smallest = fits(std::uint8_t{})    ? kUInt8
               : fits(std::uint16_t{}) ? kUInt16
               : fits(std::uint32_t{}) ? kUInt32
                                       : kUInt64;
  }
  return size_of(smallest) < size_of(type) ? smallest : type;
}

void shrink(const ArrayView& in, const ArrayView* out, int column_axis, ColumnStats* stats, bool streaming,
            const Executor& executor) {
  check(in, out, column_axis);
  if (element_count(in.shape) == 0) return;
  Shrinker shrinker(in, out, column_axis, stats, streaming);
  executor.for_each(shrinker.tasks(), [&](std::int64_t task) { shrinker.run_task(task); });
}

void find_first(const ArrayView& in, int column_axis, const Blocked* reasons, std::int64_t* positions) {
  check(in, nullptr, column_axis);
  HS_CHECK(in.type == ArrayType::kFloat64, "find_first: type is ", static_cast<int>(in.type), ", expected float64");
  const auto axis = static_cast<std::size_t>(column_axis);
  const std::int64_t columns = column_axis < 0 ? 1 : in.shape[axis];
  std::int64_t open = 0;
  for (std::int64_t column = 0; column < columns; ++column) {
    positions[column] = -1;
    open += reasons[column] != Blocked::kNot;
  }
  if (element_count(in.shape) == 0) return;

  const auto speaks_of = [](double x, Blocked reason) {
    const auto narrow = static_cast<float>(x);
    const double lost = std::fabs(x - static_cast<double>(narrow));
    if (!std::isfinite(x)) return false;
    if (reason == Blocked::kOverflow) return std::isinf(narrow);
    if (reason == Blocked::kUnderflow) return !std::isinf(narrow) && lost > kTolerance * std::fabs(x);
    return lost != 0.0;
  };
  // In C order, one index a dimension.
  std::vector<std::int64_t> index(in.shape.size(), 0);
  const auto* at = static_cast<const std::byte*>(in.data);
  for (std::int64_t position = 0; open > 0; ++position) {
    const auto column = column_axis < 0 ? std::size_t{0} : static_cast<std::size_t>(index[axis]);
    if (reasons[column] != Blocked::kNot && positions[column] < 0) {
      double x = 0.0;
      gather_run(8, at, 8, 1, in.swapped, reinterpret_cast<std::byte*>(&x));
      if (speaks_of(x, reasons[column])) {
        // Of the position in the array to that in the column.
        std::int64_t inner = 1;
        for (std::size_t i = axis + 1; column_axis >= 0 && i < index.size(); ++i) inner *= in.shape[i];
        positions[column] = column_axis < 0 ? position : position / inner / columns * inner + position % inner;
        --open;
      }
    }
    std::size_t i = index.size();
    while (i-- > 0) {
      at += in.strides[i];
      if (++index[i] < in.shape[i]) break;
      at -= in.strides[i] * in.shape[i];
      index[i] = 0;
    }
    if (i == static_cast<std::size_t>(-1)) break;  // all of it was seen
  }
}

}  // namespace halfstep
