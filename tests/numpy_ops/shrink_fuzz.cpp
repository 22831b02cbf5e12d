// Random calls of the C interface: any layout, any type, any values, and descriptions that are wrong. Each array lies
// in an allocation of exactly its size, so that the address sanitizer sees a byte too far; results are compared with
// plain loops. Usage: halfstep_shrink_fuzz <runs> [seed].
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "halfstep/numpy.h"

namespace {

std::mt19937_64 g_random;

std::int64_t below(std::int64_t n) {
  return static_cast<std::int64_t>(g_random() % static_cast<std::uint64_t>(n));
}

[[noreturn]] void fail(const char* what, std::int64_t run) {
  std::fprintf(stderr, "run %lld: %s\n", static_cast<long long>(run), what);
  std::abort();
}

constexpr std::int64_t kSizes[] = {1, 2, 4, 8, 1, 2, 4, 8, 4, 8};

// An array of random shape and strides that owns exactly the bytes it spans.
struct Array {
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;
  std::unique_ptr<std::byte[]> memory;
  halfstep_array c{};

  Array(std::vector<std::int64_t> sizes, std::int32_t type, bool plain) : shape(std::move(sizes)) {
    const std::int64_t size = kSizes[type];
    std::vector<std::size_t> order(shape.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), g_random);
    strides.resize(shape.size());
    std::int64_t step = size;
    std::int64_t first = 0;
    std::int64_t last = 0;
    for (const std::size_t i : order) {
      const std::int64_t gap = plain || below(3) != 0 ? 0 : below(3) * size + (below(8) == 0 ? below(5) : 0);
      strides[i] = step + gap;
      step = strides[i] * std::max<std::int64_t>(shape[i], 1);
      if (!plain && below(4) == 0) strides[i] = -strides[i];
      if (!plain && below(12) == 0) strides[i] = 0;
      (strides[i] < 0 ? first : last) += strides[i] * std::max<std::int64_t>(shape[i] - 1, 0);
    }
    const std::int64_t shift = plain || below(4) != 0 ? 0 : below(8);
    const auto bytes = static_cast<std::size_t>(last - first + size + shift);
    memory = std::make_unique<std::byte[]>(bytes);
    for (std::size_t i = 0; i < bytes; ++i) memory[i] = static_cast<std::byte>(g_random());
    c.data = memory.get() + shift - first;
    c.type = type;
    c.dimensions = static_cast<std::int32_t>(shape.size());
    c.shape = shape.data();
    c.strides = strides.data();
  }

  std::int64_t count() const {
    std::int64_t n = 1;
    for (const std::int64_t size : shape) n *= size;
    return n;
  }

  // Element `position` in C order, and its index along `axis`.
  std::byte* at(std::int64_t position, int axis, std::int64_t& along) const {
    auto* place = static_cast<std::byte*>(c.data);
    along = 0;
    for (std::size_t i = shape.size(); i-- > 0;) {
      const std::int64_t index = position % shape[i];
      position /= shape[i];
      place += index * strides[i];
      if (static_cast<int>(i) == axis) along = index;
    }
    return place;
  }
};

std::uint64_t read_bits(const std::byte* at, std::int64_t size, bool swapped) {
  std::uint64_t bits = 0;
  for (std::int64_t i = 0; i < size; ++i) bits |= static_cast<std::uint64_t>(at[swapped ? size - 1 - i : i]) << (8 * i);
  return bits;
}

std::int64_t as_integer(std::uint64_t bits, std::int64_t size, bool is_signed) {
  const auto shift = static_cast<int>(64 - 8 * size);
  return is_signed ? static_cast<std::int64_t>(bits << shift) >> shift : static_cast<std::int64_t>(bits);
}

bool is_signed(std::int32_t type) {
  return type <= 3;
}

// A valid call, compared with the loops.
void valid(std::int64_t run) {
  std::vector<std::int64_t> shape(static_cast<std::size_t>(below(5)));
  for (std::int64_t& size : shape) size = below(10) == 0 ? below(700) : below(9);
  if (shape.size() == 4) shape[0] = below(3);
  std::int32_t type = static_cast<std::int32_t>(below(9));
  if (type == 8) type = 9;
  Array in(shape, type, below(3) == 0);
  in.c.swapped = below(4) == 0;
  if (type == 9 && below(2) == 0 && in.c.swapped == 0) {  // numbers as they occur, instead of random bits
    std::int64_t along = 0;
    for (std::int64_t i = 0; i < in.count(); ++i) {
      const double x = below(9) == 0 ? std::ldexp(1.0, static_cast<int>(below(400)) - 200)
                                     : std::round(1e3 * std::normal_distribution<double>()(g_random)) / 8;
      std::memcpy(in.at(i, -1, along), &x, 8);
    }
  }
  std::int32_t to = type;  // a scan
  if (type == 9 && below(4) != 0) to = 8;
  if (type < 8 && kSizes[type] > 1 && below(4) != 0) to = (type / 4) * 4 + static_cast<std::int32_t>(below(type % 4));
  Array out(shape, to, true);
  const int axis = static_cast<int>(below(static_cast<std::int64_t>(shape.size()) + 1)) - 1;
  const std::int64_t columns = axis < 0 ? 1 : shape[static_cast<std::size_t>(axis)];
  std::vector<halfstep_column> stats(static_cast<std::size_t>(columns));
  char message[200] = "";
  if (halfstep_shrink_reset(type, columns, stats.data(), message, sizeof message) != 0) fail(message, run);
  const auto threads = static_cast<std::int32_t>(1 + below(3));
  if (halfstep_shrink(&in.c, to == type ? nullptr : &out.c, axis, stats.data(), static_cast<std::int32_t>(below(2)),
                      threads, message, sizeof message) != 0)
    fail(message, run);

  std::vector<halfstep_column> expected(stats.size());
  halfstep_shrink_reset(type, columns, expected.data(), message, sizeof message);
  std::int64_t along = 0;
  for (std::int64_t i = 0; i < in.count(); ++i) {
    const std::uint64_t bits = read_bits(in.at(i, axis, along), kSizes[type], in.c.swapped != 0);
    halfstep_column& column = expected[static_cast<std::size_t>(along)];
    std::int64_t ignored = 0;
    const std::uint64_t got = to == type ? 0 : read_bits(out.at(i, axis, ignored), kSizes[to], false);
    if (type == 9) {
      const auto x = std::bit_cast<double>(bits);
      const auto narrow = static_cast<float>(x);
      const auto result = std::bit_cast<float>(static_cast<std::uint32_t>(got));
      if (to != type && !(result == narrow && std::signbit(result) == std::signbit(narrow)) &&
          !(std::isnan(result) && std::isnan(narrow)))
        fail("a float differs", run);
      if (!std::isfinite(x)) continue;
      if (x != 0.0) column.error = std::max(column.error, std::fabs(x - static_cast<double>(narrow)) / std::fabs(x));
      if (std::isinf(narrow)) continue;
      column.minimum = std::min(column.minimum, x + 0.0);
      column.maximum = std::max(column.maximum, x + 0.0);
      if (std::trunc(x) != x) column.fractional = 1;
    } else {
      const std::int64_t x = as_integer(bits, kSizes[type], is_signed(type));
      const std::uint64_t mask = kSizes[to] == 8 ? ~std::uint64_t{0} : (std::uint64_t{1} << (8 * kSizes[to])) - 1;
      if (to != type && got != (static_cast<std::uint64_t>(x) & mask)) fail("an integer differs", run);
      const auto less = [&](std::int64_t a, std::int64_t b) {
        return is_signed(type) ? a < b : static_cast<std::uint64_t>(a) < static_cast<std::uint64_t>(b);
      };
      if (less(x, column.low)) column.low = x;
      if (less(column.high, x)) column.high = x;
    }
  }
  for (std::size_t i = 0; i < stats.size(); ++i) {
    const halfstep_column& a = stats[i];
    const halfstep_column& b = expected[i];
    if (a.minimum != b.minimum || a.maximum != b.maximum || a.error != b.error || a.fractional != b.fractional ||
        a.low != b.low || a.high != b.high)
      fail("statistics differ", run);
  }
  if (type == 9 && columns > 0) {
    std::vector<std::int32_t> blocked(stats.size());
    std::vector<std::int64_t> positions(stats.size());
    const auto mode = static_cast<std::int32_t>(below(3));
    if (halfstep_shrink_decide(stats.data(), columns, mode, static_cast<std::int32_t>(below(4)), blocked.data(),
                               nullptr, message, sizeof message) != 0 ||
        halfstep_shrink_find(&in.c, axis, blocked.data(), positions.data(), message, sizeof message) != 0)
      fail(message, run);
    for (std::size_t i = 0; i < stats.size(); ++i)
      if ((blocked[i] != 0) != (positions[i] >= 0)) fail("what is blocked was not found, or the reverse", run);
  }
}

// A call with something wrong in it must say so, with and without room for the message.
void invalid(std::int64_t run) {
  Array in({3, 4}, 9, true);
  Array out({3, 4}, 8, true);
  std::vector<halfstep_column> stats(4);
  std::vector<std::int32_t> blocked(4);
  std::vector<std::int64_t> positions(4);
  std::int32_t axis = 1;
  std::int32_t threads = 1;
  const halfstep_array* input = &in.c;
  const halfstep_array* output = &out.c;
  halfstep_column* columns = stats.data();
  switch (below(14)) {
    case 0:
      in.c.type = static_cast<std::int32_t>(below(2) == 0 ? -1 - below(1000) : 10 + below(1000));
      break;
    case 1:
      in.c.dimensions = static_cast<std::int32_t>(below(2) == 0 ? -1 - below(1000) : 65 + below(1000));
      break;
    case 2:
      in.c.shape = nullptr;
      break;
    case 3:
      in.c.strides = nullptr;
      break;
    case 4:
      in.c.data = nullptr;
      break;
    case 5:
      in.shape[0] = -1 - below(100);
      break;
    case 6:
      in.shape = {std::numeric_limits<std::int64_t>::max(), 4};
      in.c.shape = in.shape.data();
      out.c.shape = in.shape.data();
      break;
    case 7:
      axis = static_cast<std::int32_t>(below(2) == 0 ? -2 - below(100) : 2 + below(100));
      break;
    case 8:
      threads = static_cast<std::int32_t>(-below(100));
      break;
    case 9:
      columns = nullptr;
      break;
    case 10:
      input = nullptr;
      break;
    case 11:
      out.c.type = static_cast<std::int32_t>(below(8));
      break;
    case 12:
      out.shape[1] = 3;
      break;
    default:
      out.c.swapped = 1;
  }
  char message[200] = "";
  const bool room = below(2) == 0;
  const std::int32_t code =
      halfstep_shrink(input, output, axis, columns, 0, threads, room ? message : nullptr, room ? sizeof message : 0);
  if (code == 0) fail("an invalid call was taken", run);
  if (room && message[0] == 0) fail("an error without a message", run);
  char tiny[4];
  halfstep_shrink(input, output, axis, columns, 0, threads, tiny, sizeof tiny);
  if (std::memchr(tiny, 0, sizeof tiny) == nullptr) fail("a message without an end", run);
  blocked[0] = 6 + static_cast<std::int32_t>(below(100));
  if (halfstep_shrink_find(&in.c, 1, blocked.data(), positions.data(), message, sizeof message) == 0)
    fail("an unknown reason was taken", run);
  if (halfstep_shrink_decide(stats.data(), 4, 3, 0, blocked.data(), nullptr, message, sizeof message) == 0)
    fail("an unknown mode was taken", run);
  if (halfstep_shrink_integers(stats.data(), 4, 99, blocked.data(), message, sizeof message) == 0)
    fail("an unknown type was taken", run);
}

}  // namespace

int main(int argc, char** argv) {
  const std::int64_t runs = argc > 1 ? std::atoll(argv[1]) : 1000;
  g_random.seed(argc > 2 ? static_cast<std::uint64_t>(std::atoll(argv[2])) : 1);
  for (std::int64_t run = 0; run < runs; ++run) run % 8 == 0 ? invalid(run) : valid(run);
  std::printf("%lld runs\n", static_cast<long long>(runs));
}
