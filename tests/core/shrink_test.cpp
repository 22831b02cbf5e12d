// shrink() against a slow reference that visits one element after the other.
#include "halfstep/shrink.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "halfstep/status.h"
#include "halfstep/threads.h"
#include "threaded_executor.h"

namespace halfstep {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <class T>
ArrayType type_of() {
  using enum ArrayType;
  if constexpr (std::is_same_v<T, double>) return kFloat64;
  if constexpr (std::is_same_v<T, float>) return kFloat32;
  const auto base = static_cast<std::int32_t>(std::is_signed_v<T> ? kInt8 : kUInt8);
  return static_cast<ArrayType>(base + std::countr_zero(sizeof(T)));
}

template <class T>
ArrayView view(std::vector<T>& data, std::vector<std::int64_t> shape, std::vector<std::int64_t> strides = {}) {
  if (strides.empty()) {
    strides.resize(shape.size());
    std::int64_t step = sizeof(T);
    for (std::size_t i = shape.size(); i-- > 0; step *= shape[i]) strides[i] = step;
  }
  return {data.data(), type_of<T>(), false, std::move(shape), std::move(strides)};
}

ColumnStats scan(std::vector<double> values) {
  ColumnStats stats = ColumnStats::of(ArrayType::kFloat64);
  const auto n = static_cast<std::int64_t>(values.size());
  shrink(view(values, {n}), nullptr, -1, &stats, false, SerialExecutor());
  return stats;
}

Blocked decide(const std::vector<double>& values, ShrinkMode mode) {
  return decide_float(scan(values), mode, kIntegerRule | kSpreadRule);
}

ColumnStats reference(const std::vector<double>& values) {
  ColumnStats stats;
  for (const double x : values) {
    if (!std::isfinite(x)) continue;
    const double back = static_cast<float>(x);
    if (x != 0.0) stats.error = std::max(stats.error, std::fabs(x - back) / std::fabs(x));
    if (std::isinf(back)) continue;
    stats.minimum = std::min(stats.minimum, x + 0.0);
    stats.maximum = std::max(stats.maximum, x + 0.0);
    stats.fractional |= std::trunc(x) != x;
  }
  return stats;
}

void expect_same(const ColumnStats& a, const ColumnStats& b, const std::string& what) {
  EXPECT_EQ(a.minimum, b.minimum) << what;
  EXPECT_EQ(a.maximum, b.maximum) << what;
  EXPECT_EQ(a.error, b.error) << what;
  EXPECT_EQ(a.fractional, b.fractional) << what;
}

// Values of every kind: all exponents, halfway cases, neighbours of float32's ends, integers, special ones.
std::vector<double> mixed_values(std::size_t count, bool wild) {
  std::mt19937_64 random(7);
  std::vector<double> values(count);
  for (double& x : values) {
    switch (random() % (wild ? 6 : 3)) {
      case 0:
        x = std::normal_distribution<double>(3.0, 100.0)(random);
        break;
      case 1:
        x = static_cast<double>(static_cast<float>(std::normal_distribution<double>()(random)));
        break;
      case 2:
        x = static_cast<double>(static_cast<std::int64_t>(random() % 2001) - 1000);
        break;
      case 3:
        x = std::bit_cast<double>(random());  // any bits, NaN among them
        break;
      case 4:
        x = (random() % 2 != 0 ? 1.0 : -1.0) * (random() % 2 != 0 ? kInf : 0.0);
        break;
      default:
        x = std::ldexp(1.0 + std::ldexp(1.0, -24), static_cast<int>(random() % 300) - 160);
    }
  }
  return values;
}

TEST(Shrink, EdgesOfFloat32) {
  using enum ShrinkMode;
  const double largest = std::numeric_limits<float>::max();
  const double overflow = 0x1p128 - 0x1p103;  // the smallest that rounds to infinity
  const double below = std::nextafter(overflow, 0.0);
  const double tiny = std::numeric_limits<float>::min();
  for (const ShrinkMode mode : {kExact, kRelative, kForce}) {
    for (const double x : {0.0, -0.0, 1.0, -1.5, largest, -largest, tiny, 0x1p-149, kInf, -kInf, kNaN})
      EXPECT_EQ(decide({x, 0.25}, mode), Blocked::kNot) << x;
    for (const double x : {overflow, -overflow, 1e39, std::numeric_limits<double>::max()})
      EXPECT_EQ(decide({x, 0.25}, mode), Blocked::kOverflow) << x;
  }
  EXPECT_EQ(decide({below, 0.25}, kRelative), Blocked::kNot);
  EXPECT_EQ(decide({below, 0.25}, kExact), Blocked::kInexact);
  EXPECT_EQ(decide({1.0 + 0x1p-24, 0.5}, kRelative), Blocked::kNot) << "halfway: an error of just below 2^-24";
  for (const double x : {0x1p-150, 1e-50, 5e-324, 0x1.8p-149, 1.1e-45, 0x1.00001p-130}) {
    EXPECT_EQ(decide({x, 0.25}, kRelative), Blocked::kUnderflow) << x;
    EXPECT_EQ(decide({-x, 0.25}, kExact), Blocked::kInexact) << x;
    EXPECT_EQ(decide({x, 0.25}, kForce), Blocked::kNot) << x;
  }
  EXPECT_EQ(decide({}, kRelative), Blocked::kNot);
  EXPECT_EQ(decide({kNaN, kNaN}, kExact), Blocked::kNot);
}

TEST(Shrink, IntegersInFloat64) {
  using enum ShrinkMode;
  EXPECT_EQ(decide({1.0, 0x1p24, kNaN}, kRelative), Blocked::kNot);
  EXPECT_EQ(decide({1.0, 0x1p24 + 1.0}, kRelative), Blocked::kInteger);
  EXPECT_EQ(decide({608202549.0, 1.0}, kRelative), Blocked::kInteger) << "pandas issue 43693";
  EXPECT_EQ(decide({-1e9, 3.0}, kRelative), Blocked::kNot) << "a fill value that float32 holds";
  EXPECT_EQ(decide({1.0, 0x1p24 + 1.0, 0.5}, kRelative), Blocked::kNot) << "a fraction: no identifiers";
  EXPECT_EQ(decide({1.0, 0x1p53 - 1.0}, kRelative), Blocked::kInteger);
  EXPECT_EQ(decide({1.0, 0x1p54 + 4.0}, kRelative), Blocked::kNot) << "float64 itself holds no integers there";
  EXPECT_EQ(decide({0x1p52 + 1.0, 0x1p52 + 3.0}, kRelative), Blocked::kInteger);
  EXPECT_EQ(decide({1.0, 0x1p24 + 1.0}, kForce), Blocked::kNot);
  EXPECT_EQ(decide_float(scan({1.0, 0x1p24 + 1.0}), kRelative, kSpreadRule), Blocked::kNot);
  EXPECT_TRUE(integer_like(scan({-3.0, 0x1p53, kInf})));
  EXPECT_FALSE(integer_like(scan({-3.0, 0x1p53 + 2.0})));
  EXPECT_FALSE(integer_like(scan({kNaN, kInf})));
}

TEST(Shrink, SpreadBesideOffset) {
  using enum ShrinkMode;
  EXPECT_EQ(decide({1.7e9 + 0.1, 1.7e9 + 5.3}, kRelative), Blocked::kSpread);
  EXPECT_EQ(decide({1.7e9 + 0.1, 1.7e9 + 1e6}, kRelative), Blocked::kNot);
  EXPECT_EQ(decide({4096.1, 4097.3}, kRelative), Blocked::kNot);
  EXPECT_EQ(decide({4096.1, 4097.0}, kRelative), Blocked::kSpread);
  EXPECT_EQ(decide({4096.5, 4096.75}, kRelative), Blocked::kNot) << "float32 holds both";
  EXPECT_EQ(decide({0.1, 0.1, kNaN}, kRelative), Blocked::kNot) << "one value has no differences to lose";
  EXPECT_EQ(decide({1.7e9 + 0.1, 1.7e9 + 5.3}, kForce), Blocked::kNot);
  EXPECT_EQ(decide_float(scan({1.7e9 + 0.1, 1.7e9 + 5.3}), kRelative, kIntegerRule), Blocked::kNot);
}

TEST(Shrink, StatisticsAreThoseOfTheReference) {
  for (const std::size_t count : {1, 2, 15, 16, 17, 127, 2047, 2048, 2049, 70001})
    for (const bool wild : {false, true}) {
      const std::vector<double> values = mixed_values(count, wild);
      expect_same(scan(values), reference(values), std::to_string(count));
    }
}

// Every layout of a matrix gives each column the same statistics and values.
TEST(Shrink, LayoutsAndColumns) {
  for (const std::int64_t columns : {1, 2, 3, 7, 8, 63, 64, 65, 511, 513, 2000}) {
    const std::int64_t rows = columns > 500 ? 37 : 1003;
    const std::int64_t gap = 3;
    for (int layout = 0; layout < 6; ++layout) {
      std::vector<std::int64_t> strides{columns, 1};
      if (layout == 1) strides = {1, rows};
      if (layout == 2) strides = {columns + gap, 1};  // the first columns of a wider matrix
      if (layout == 3) strides = {2 * columns, 2};
      if (layout == 4) strides = {-columns, 1};
      if (layout == 5) strides = {1, rows + gap};
      std::vector<double> data = mixed_values(static_cast<std::size_t>(2 * rows * (columns + gap) + rows * gap), true);
      ArrayView in = view(data, {rows, columns}, {8 * strides[0], 8 * strides[1]});
      if (layout == 4) in.data = data.data() + (rows - 1) * columns;
      const auto at = [&](std::int64_t i, std::int64_t j) {
        return static_cast<const double*>(in.data)[i * strides[0] + j * strides[1]];
      };
      for (const bool streaming : {false, true}) {
        std::vector<float> result(static_cast<std::size_t>(rows * columns), -7.0F);
        const std::vector<std::int64_t> c_order{4 * columns, 4};
        const std::vector<std::int64_t> f_order{4, 4 * rows};
        const ArrayView out = view(result, {rows, columns}, layout % 2 == 0 ? c_order : f_order);
        std::vector<ColumnStats> stats(static_cast<std::size_t>(columns), ColumnStats::of(ArrayType::kFloat64));
        shrink(in, &out, 1, stats.data(), streaming, ThreadedExecutor(3));
        for (std::int64_t j = 0; j < columns; ++j) {
          std::vector<double> column;
          for (std::int64_t i = 0; i < rows; ++i) {
            column.push_back(at(i, j));
            const float got = result[static_cast<std::size_t>(i * out.strides[0] / 4 + j * out.strides[1] / 4)];
            const auto expected = static_cast<float>(at(i, j));
            ASSERT_TRUE(got == expected || (std::isnan(got) && std::isnan(expected))) << i << " " << j;
            ASSERT_EQ(std::signbit(got), std::signbit(expected));
          }
          expect_same(stats[static_cast<std::size_t>(j)], reference(column),
                      std::to_string(columns) + " columns, layout " + std::to_string(layout));
        }
      }
    }
  }
}

TEST(Shrink, ManyDimensionsAndByteOrder) {
  std::vector<double> data = mixed_values(6 * 5 * 4 * 30, true);
  for (double& x : data) x = std::bit_cast<double>(__builtin_bswap64(std::bit_cast<std::uint64_t>(x)));
  ArrayView in = view(data, {3, 5, 2, 15}, {8 * 5 * 4 * 30 * 2, 8 * 4 * 30, 8 * 60, 16});
  in.swapped = true;
  std::vector<float> result(3 * 5 * 2 * 15);
  const ArrayView out = view(result, in.shape);
  ColumnStats stats = ColumnStats::of(ArrayType::kFloat64);
  shrink(in, &out, -1, &stats, false, test::ThreadedExecutor());
  std::vector<double> seen;
  std::size_t position = 0;
  for (int a = 0; a < 3; ++a)
    for (int b = 0; b < 5; ++b)
      for (int c = 0; c < 2; ++c)
        for (int d = 0; d < 15; ++d) {
          const std::byte* at = static_cast<std::byte*>(in.data) + a * in.strides[0] + b * in.strides[1] +
                                c * in.strides[2] + d * in.strides[3];
          std::uint64_t bits = 0;
          std::memcpy(&bits, at, 8);
          seen.push_back(std::bit_cast<double>(__builtin_bswap64(bits)));
          const auto expected = static_cast<float>(seen.back());
          const float got = result[position++];
          EXPECT_TRUE(got == expected || (std::isnan(got) && std::isnan(expected)));
        }
  expect_same(stats, reference(seen), "swapped");
}

TEST(Shrink, UnalignedData) {
  std::vector<std::byte> bytes(8 * 1000 + 3);
  const std::vector<double> values = mixed_values(1000, true);
  std::memcpy(bytes.data() + 3, values.data(), 8000);
  const ArrayView in{bytes.data() + 3, ArrayType::kFloat64, false, {1000}, {8}};
  ColumnStats stats = ColumnStats::of(ArrayType::kFloat64);
  shrink(in, nullptr, -1, &stats, false, SerialExecutor());
  expect_same(stats, reference(values), "unaligned");
}

TEST(Shrink, TheNumberOfThreadsChangesNothing) {
  std::vector<double> data = mixed_values(3'000'000, false);
  const auto run = [&](const Executor& executor, std::int64_t columns) {
    std::vector<ColumnStats> stats(static_cast<std::size_t>(columns), ColumnStats::of(ArrayType::kFloat64));
    const ArrayView in = view(data, {3'000'000 / columns, columns});
    shrink(in, nullptr, 1, stats.data(), false, executor);
    return stats;
  };
  for (const std::int64_t columns : {1, 100}) {
    const auto one = run(SerialExecutor(), columns);
    for (const auto& other : {run(ThreadedExecutor(2), columns), run(test::ThreadedExecutor(), columns)})
      for (std::size_t i = 0; i < one.size(); ++i) expect_same(one[i], other[i], std::to_string(i));
  }
}

TEST(Shrink, NothingBesideTheOutputIsWritten) {
  std::vector<double> data(3001, 1.5);
  for (const bool streaming : {false, true}) {
    std::vector<float> result(3001 + 32, -7.0F);
    const ArrayView out{result.data() + 16, ArrayType::kFloat32, false, {3001}, {4}};
    ColumnStats stats = ColumnStats::of(ArrayType::kFloat64);
    shrink(view(data, {3001}), &out, -1, &stats, streaming, SerialExecutor());
    for (std::size_t i = 0; i < result.size(); ++i) ASSERT_EQ(result[i], i >= 16 && i < 3001 + 16 ? 1.5F : -7.0F) << i;
  }
}

template <class In, class Out>
void check_integers(std::mt19937_64& random) {
  for (const std::int64_t count : {1, 15, 64, 129, 5000}) {
    std::vector<In> data(static_cast<std::size_t>(count));
    for (In& x : data) x = static_cast<In>(random());
    In low = data[0], high = data[0];
    for (const In x : data) low = std::min(low, x), high = std::max(high, x);
    std::vector<Out> result(data.size());
    ColumnStats stats = ColumnStats::of(type_of<In>());
    const ArrayView out = view(result, {count});
    shrink(view(data, {count}), &out, -1, &stats, false, SerialExecutor());
    EXPECT_EQ(static_cast<In>(stats.low), low);
    EXPECT_EQ(static_cast<In>(stats.high), high);
    for (std::size_t i = 0; i < data.size(); ++i) ASSERT_EQ(result[i], static_cast<Out>(data[i]));
  }
}

TEST(Shrink, EveryPairOfIntegers) {
  std::mt19937_64 random(3);
  check_integers<std::int64_t, std::int32_t>(random);
  check_integers<std::int64_t, std::int16_t>(random);
  check_integers<std::int64_t, std::int8_t>(random);
  check_integers<std::int32_t, std::int16_t>(random);
  check_integers<std::int32_t, std::int8_t>(random);
  check_integers<std::int16_t, std::int8_t>(random);
  check_integers<std::uint64_t, std::uint32_t>(random);
  check_integers<std::uint64_t, std::uint16_t>(random);
  check_integers<std::uint64_t, std::uint8_t>(random);
  check_integers<std::uint32_t, std::uint16_t>(random);
  check_integers<std::uint32_t, std::uint8_t>(random);
  check_integers<std::uint16_t, std::uint8_t>(random);
}

template <class T>
ArrayType smallest(std::vector<T> values) {
  ColumnStats stats = ColumnStats::of(type_of<T>());
  shrink(view(values, {static_cast<std::int64_t>(values.size())}), nullptr, -1, &stats, false, SerialExecutor());
  return decide_integer(stats, type_of<T>());
}

TEST(Shrink, TheSmallestInteger) {
  using enum ArrayType;
  EXPECT_EQ(smallest<std::int64_t>({-128, 127}), kInt8);
  EXPECT_EQ(smallest<std::int64_t>({-129, 127}), kInt16);
  EXPECT_EQ(smallest<std::int64_t>({0, 128}), kInt16);
  EXPECT_EQ(smallest<std::int64_t>({-32768, 32767}), kInt16);
  EXPECT_EQ(smallest<std::int64_t>({-32769}), kInt32);
  EXPECT_EQ(smallest<std::int64_t>({2147483647, -2147483648LL}), kInt32);
  EXPECT_EQ(smallest<std::int64_t>({2147483648LL}), kInt64);
  EXPECT_EQ(smallest<std::int64_t>({std::numeric_limits<std::int64_t>::min()}), kInt64);
  EXPECT_EQ(smallest<std::int32_t>({40000}), kInt32);
  EXPECT_EQ(smallest<std::int8_t>({1}), kInt8);
  EXPECT_EQ(smallest<std::uint64_t>({0, 255}), kUInt8);
  EXPECT_EQ(smallest<std::uint64_t>({256}), kUInt16);
  EXPECT_EQ(smallest<std::uint64_t>({65536}), kUInt32);
  EXPECT_EQ(smallest<std::uint64_t>({std::numeric_limits<std::uint64_t>::max(), 0}), kUInt64);
  EXPECT_EQ(smallest<std::uint64_t>({std::uint64_t{1} << 63}), kUInt64);
  EXPECT_EQ(smallest<std::int64_t>({}), kInt64);
  EXPECT_EQ(smallest<std::uint16_t>({}), kUInt16);
}

TEST(Shrink, FindsWhereItIsBlocked) {
  std::vector<double> data{0.5, 1e39, 3.0, 1e-50, 0.1, 4.0, 1e40, 1e-50, 0x1p24 + 1};  // 3 x 3
  std::vector<std::int64_t> positions(3);
  using enum Blocked;
  std::vector<Blocked> reasons{kOverflow, kUnderflow, kInteger};
  find_first(view(data, {3, 3}), 1, reasons.data(), positions.data());
  EXPECT_EQ(positions, (std::vector<std::int64_t>{2, 2, 2}));
  reasons = {kUnderflow, kNot, kOverflow};
  find_first(view(data, {3, 3}), 1, reasons.data(), positions.data());
  EXPECT_EQ(positions, (std::vector<std::int64_t>{1, -1, -1}));
  reasons = {kInexact};
  find_first(view(data, {9}), -1, reasons.data(), positions.data());
  EXPECT_EQ(positions[0], 1);
}

TEST(Shrink, BadArguments) {
  std::vector<double> data(6);
  std::vector<float> floats(6);
  std::vector<std::int8_t> bytes(6);
  ColumnStats stats[3];
  const auto run = [&](const ArrayView& in, const ArrayView* out, int axis) {
    shrink(in, out, axis, stats, false, SerialExecutor());
  };
  const ArrayView out = view(floats, {3, 2});
  EXPECT_THROW(run(view(data, {2, 3}), &out, -1), InvalidArgument);
  EXPECT_THROW(run(view(data, {2, 3}), nullptr, 2), InvalidArgument);
  EXPECT_THROW(run(view(data, {2, 3}), nullptr, -2), InvalidArgument);
  EXPECT_THROW(run(view(floats, {6}), nullptr, -1), InvalidArgument);
  const ArrayView integers = view(bytes, {6});
  EXPECT_THROW(run(view(data, {6}), &integers, -1), InvalidArgument);
  EXPECT_THROW(run({data.data(), ArrayType::kFloat64, false, {-1}, {8}}, nullptr, -1), InvalidArgument);
  EXPECT_THROW(run({data.data(), ArrayType::kFloat64, false, {1LL << 40, 1LL << 40}, {8, 8}}, nullptr, -1),
               InvalidArgument);
  run(view(data, {0, 3}), nullptr, 1);  // nothing to see
  EXPECT_GT(stats[0].minimum, stats[0].maximum);
}

}  // namespace
}  // namespace halfstep
