// Contract: halfstep/numpy.h.
#include "halfstep/shrink.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <vector>

#include "halfstep/numpy.h"
#include "halfstep/status.h"
#include "halfstep/threads.h"

#define HALFSTEP_C extern "C" __attribute__((visibility("default")))

namespace {

using halfstep::ArrayType;
using halfstep::ArrayView;
using halfstep::Blocked;
using halfstep::ColumnStats;

constexpr std::int64_t kHugePage = 1 << 21;

// Runs `body`; nothing may leave a C function but its result.
template <class Body>
std::int32_t guarded(char* message, std::int64_t message_size, const Body& body) noexcept {
  const auto say = [&](const char* text) {
    if (message != nullptr && message_size > 0)
      std::snprintf(message, static_cast<std::size_t>(message_size), "%s", text);
  };
  try {
    body();
    return 0;
  } catch (const halfstep::InvalidArgument& error) {
    say(error.what());
    return 1;
  } catch (const std::exception& error) {
    say(error.what());
    return 2;
  } catch (...) {
    say("unknown error");
    return 2;
  }
}

ArrayType type_of(std::int32_t type) {
  HS_CHECK(type >= 0 && type < halfstep::kArrayTypes, "type is ", type, ", expected 0 to ", halfstep::kArrayTypes - 1);
  return static_cast<ArrayType>(type);
}

ArrayView view_of(const halfstep_array* array) {
  HS_CHECK(array != nullptr, "an array is null");
  const std::int32_t n = array->dimensions;
  HS_CHECK(n >= 0 && n <= HALFSTEP_NUMPY_MAX_DIMENSIONS, "an array has ", n, " dimensions, expected 0 to ",
           HALFSTEP_NUMPY_MAX_DIMENSIONS);
  HS_CHECK(n == 0 || (array->shape != nullptr && array->strides != nullptr), "shape or strides are null");
  ArrayView view;
  view.data = array->data;
  view.type = type_of(array->type);
  view.swapped = array->swapped != 0;
  view.shape.assign(array->shape, array->shape + n);
  view.strides.assign(array->strides, array->strides + n);
  HS_CHECK(halfstep::element_count(view.shape) == 0 || array->data != nullptr, "data is null");
  return view;
}

ColumnStats stats_of(const halfstep_column& column) {
  return {column.minimum, column.maximum, column.error, column.fractional != 0, column.low, column.high};
}

halfstep_column column_of(const ColumnStats& stats) {
  return {stats.minimum, stats.maximum, stats.error, stats.low, stats.high, stats.fractional, 0};
}

std::int64_t columns_of(const ArrayView& view, std::int32_t column_axis) {
  HS_CHECK(column_axis >= -1 && column_axis < static_cast<std::int32_t>(view.shape.size()), "column_axis is ",
           column_axis, ", expected -1 to ", static_cast<std::int64_t>(view.shape.size()) - 1);
  return column_axis < 0 ? 1 : view.shape[static_cast<std::size_t>(column_axis)];
}

Blocked blocked_of(std::int32_t blocked) {
  HS_CHECK(blocked >= 0 && blocked <= static_cast<std::int32_t>(Blocked::kSpread), "blocked is ", blocked,
           ", expected 0 to ", static_cast<std::int32_t>(Blocked::kSpread));
  return static_cast<Blocked>(blocked);
}

// Fresh memory costs a fault a page, which takes longer than the conversion. Memory of a file refuses, harmlessly.
void ask_for_huge_pages(const ArrayView& out) {
  std::int64_t bytes = halfstep::size_of(out.type);
  for (std::size_t i = 0; i < out.shape.size(); ++i) {
    std::int64_t reach = 0;
    if (out.strides[i] < 0 || out.shape[i] < 1 || __builtin_mul_overflow(out.shape[i] - 1, out.strides[i], &reach) ||
        __builtin_add_overflow(bytes, reach, &bytes))
      return;
  }
  const auto begin = (reinterpret_cast<std::intptr_t>(out.data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<std::intptr_t>(out.data) + bytes) / kHugePage * kHugePage;
  if (end - begin >= kHugePage) {
    // NOLINTNEXTLINE(performance-no-int-to-ptr)
    madvise(reinterpret_cast<void*>(begin), static_cast<std::size_t>(end - begin), MADV_HUGEPAGE);
  }
}

}  // namespace

HALFSTEP_C std::int32_t halfstep_numpy_abi(void) {
  return HALFSTEP_NUMPY_ABI;
}

HALFSTEP_C const char* halfstep_numpy_version(void) {
  return HALFSTEP_VERSION;
}

HALFSTEP_C std::int32_t halfstep_shrink_reset(std::int32_t type, std::int64_t count, halfstep_column* columns,
                                              char* message, std::int64_t message_size) {
  return guarded(message, message_size, [&] {
    HS_CHECK(columns != nullptr || count <= 0, "columns are null");
    std::fill_n(columns, count, column_of(ColumnStats::of(type_of(type))));
  });
}

HALFSTEP_C std::int32_t halfstep_shrink(const halfstep_array* in, const halfstep_array* out, std::int32_t column_axis,
                                        halfstep_column* columns, std::int32_t streaming, std::int32_t threads,
                                        char* message, std::int64_t message_size) {
  return guarded(message, message_size, [&] {
    HS_CHECK(threads >= 1, "threads is ", threads, ", expected >= 1");
    const ArrayView from = view_of(in);
    const std::int64_t count = columns_of(from, column_axis);
    HS_CHECK(columns != nullptr || count == 0, "columns are null");
    ArrayView to;
    if (out != nullptr) {
      to = view_of(out);
      if (to.shape == from.shape) ask_for_huge_pages(to);
    }
    std::vector<ColumnStats> stats;
    stats.reserve(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) stats.push_back(stats_of(columns[i]));
    halfstep::shrink(from, out == nullptr ? nullptr : &to, column_axis, stats.data(), streaming != 0,
                     halfstep::ThreadedExecutor(threads));
    std::transform(stats.begin(), stats.end(), columns, column_of);
  });
}

HALFSTEP_C std::int32_t halfstep_shrink_decide(const halfstep_column* columns, std::int64_t count, std::int32_t mode,
                                               std::int32_t rules, std::int32_t* blocked, std::int32_t* integer_like,
                                               char* message, std::int64_t message_size) {
  return guarded(message, message_size, [&] {
    HS_CHECK(count <= 0 || (columns != nullptr && blocked != nullptr), "columns or blocked are null");
    HS_CHECK(mode >= 0 && mode <= 2, "mode is ", mode, ", expected 0 to 2");
    HS_CHECK(rules >= 0 && rules <= 3, "rules are ", rules, ", expected 0 to 3");
    for (std::int64_t i = 0; i < count; ++i) {
      const ColumnStats stats = stats_of(columns[i]);
      blocked[i] =
          static_cast<std::int32_t>(halfstep::decide_float(stats, static_cast<halfstep::ShrinkMode>(mode), rules));
      if (integer_like != nullptr) integer_like[i] = halfstep::integer_like(stats);
    }
  });
}

HALFSTEP_C std::int32_t halfstep_shrink_integers(const halfstep_column* columns, std::int64_t count, std::int32_t type,
                                                 std::int32_t* types, char* message, std::int64_t message_size) {
  return guarded(message, message_size, [&] {
    HS_CHECK(count <= 0 || (columns != nullptr && types != nullptr), "columns or types are null");
    const ArrayType from = type_of(type);
    for (std::int64_t i = 0; i < count; ++i)
      types[i] = static_cast<std::int32_t>(halfstep::decide_integer(stats_of(columns[i]), from));
  });
}

HALFSTEP_C std::int32_t halfstep_shrink_find(const halfstep_array* in, std::int32_t column_axis,
                                             const std::int32_t* blocked, std::int64_t* positions, char* message,
                                             std::int64_t message_size) {
  return guarded(message, message_size, [&] {
    const ArrayView from = view_of(in);
    const std::int64_t count = columns_of(from, column_axis);
    HS_CHECK(count == 0 || (blocked != nullptr && positions != nullptr), "blocked or positions are null");
    std::vector<Blocked> reasons;
    for (std::int64_t i = 0; i < count; ++i) reasons.push_back(blocked_of(blocked[i]));
    halfstep::find_first(from, column_axis, reasons.data(), positions);
  });
}
