// Smaller types for arrays: float64 -> float32, integers -> the smallest type of their sign kind.
//
// shrink() reads an array once. It takes the statistics of each column, from which decide_float() and decide_integer()
// tell whether the values fit, and in the same pass it writes the converted values: optimistically, the caller throws
// the result away if they did not fit. Without an output it only scans.
//
// A column is an index along `column_axis`, or the whole array. Any strides, any alignment, both byte orders. Results
// depend neither on the number of threads nor on the instruction set.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "halfstep/export.h"
#include "halfstep/stream.h"

namespace halfstep {

enum class ArrayType : std::int32_t {
  kInt8 = 0,
  kInt16 = 1,
  kInt32 = 2,
  kInt64 = 3,
  kUInt8 = 4,
  kUInt16 = 5,
  kUInt32 = 6,
  kUInt64 = 7,
  kFloat32 = 8,
  kFloat64 = 9,
};
inline constexpr std::int32_t kArrayTypes = 10;

HALFSTEP_API std::int64_t size_of(ArrayType type);

// How many elements an array of this shape has; InvalidArgument if no array can have it.
HALFSTEP_API std::int64_t element_count(const std::vector<std::int64_t>& shape);

// A view of an array: element (i, j, ...) is at data + i * strides[0] + j * strides[1] + ..., in bytes. `swapped`: the
// elements have the byte order that is not this machine's.
struct ArrayView {
  void* data = nullptr;
  ArrayType type = ArrayType::kFloat64;
  bool swapped = false;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;
};

// What shrink() has seen of a column. Of several calls it is the union.
struct ColumnStats {
  // float64: over finite values; minimum > maximum if there are none.
  double minimum = std::numeric_limits<double>::infinity();
  double maximum = -std::numeric_limits<double>::infinity();
  // float64: largest |x - float32(x)| / |x| over finite values; infinite if float32 has no finite value for one.
  double error = 0.0;
  // float64: whether a finite value is not integral.
  bool fractional = false;
  // Integers. For unsigned types the two are std::uint64_t, bit for bit. low > high if there are no elements.
  std::int64_t low = 0;
  std::int64_t high = 0;

  static ColumnStats of(ArrayType type);  // of no elements
};

// Which elements of float64 may change when a column becomes float32. Infinities, NaN and -0.0 are always kept.
enum class ShrinkMode : std::int32_t {
  kExact = 0,     // none
  kRelative = 1,  // those that change by at most 2^-24 of their size, under the rules for columns below
  kForce = 2,     // all that stay finite
};

// Rules of kRelative that look at a whole column.
enum ColumnRules : std::int32_t {
  // A column of integers (each finite value integral, at most 2^53 in size) must be exact: identifiers, counts.
  kIntegerRule = 1,
  // The rounding of the largest value must be at most 2^-12 of the spread, as time stamps with fractions are not.
  kSpreadRule = 2,
};

enum class Blocked : std::int32_t {
  kNot = 0,
  kOverflow = 1,   // a finite value would become infinite
  kUnderflow = 2,  // a value would lose more than 2^-24 of its size: it lies below float32's normal range
  kInexact = 3,    // kExact: a value is no float32
  kInteger = 4,    // kIntegerRule
  kSpread = 5,     // kSpreadRule
};

// Whether each finite value is integral and at most 2^53 in size, and there is one.
HALFSTEP_API bool integer_like(const ColumnStats& stats);

// Whether a float64 column may become float32, and if not, why. A column that float32 holds exactly always may; so may
// one of a single value as far as the spread is concerned.
HALFSTEP_API Blocked decide_float(const ColumnStats& stats, ShrinkMode mode, std::int32_t rules);

// The smallest type of the same sign kind that holds an integer column; `type` itself if there are no elements.
HALFSTEP_API ArrayType decide_integer(const ColumnStats& stats, ArrayType type);

// Scans `in`, an array of integers or float64, and adds to stats[column]; converts into `out` unless that is null.
// `column_axis` is -1 for one column. `out` has the shape of `in` and a smaller type of the same kind, in this
// machine's byte order, and shares no memory with it. Values that do not fit it are written wrapped (integers) or
// rounded. `stats` has one element per column, first made by ColumnStats::of(in.type). `streaming`: write around the
// caches, for outputs larger than these.
HALFSTEP_API void shrink(const ArrayView& in, const ArrayView* out, int column_axis, ColumnStats* stats, bool streaming,
                         const Executor& executor);

// The first element of each float64 column that `reasons[column]` speaks of, as its position in C order among the
// elements of that column; -1 where there is none (kNot among them). kSpread: the first that float32 does not hold.
HALFSTEP_API void find_first(const ArrayView& in, int column_axis, const Blocked* reasons, std::int64_t* positions);

}  // namespace halfstep
