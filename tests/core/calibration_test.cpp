// The histogram of ranges against its definition in float64, its growth and merging, parameters, state and channels.
// The estimators are compared with NumPy in tests/python/test_calibration.py.
#include "calibration_math.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <random>

#include <gtest/gtest.h>

#include "calibration_fixture.h"
#include "halfstep/status.h"
#include "threaded_executor.h"

namespace halfstep {
namespace {

using test::GradientList;
using test::ObservedCase;

RangeHistogram histogram_of(const std::vector<double>& values, DType dtype = DType::kFloat32) {
  GradientList tensors;
  tensors.add(dtype, values);
  RangeHistogram histogram;
  cpu::observe(tensors.views()[0], histogram, SerialExecutor());
  return histogram;
}

void expect_same(const RangeHistogram& a, const RangeHistogram& b) {
  EXPECT_EQ(a.state_counts(), b.state_counts());
  EXPECT_EQ(a.state_numbers(), b.state_numbers());
  EXPECT_EQ(a.exponent(), b.exponent());
}

// What the header says, element by element.
void expect_definition(const RangeHistogram& histogram, const std::vector<double>& values) {
  std::vector<std::uint64_t> counts(kRangeBins);
  std::uint64_t zeros = 0;
  std::uint64_t count = 0;
  double low = HUGE_VAL;
  double high = -HUGE_VAL;
  for (const double x : values) {
    if (!std::isfinite(x)) continue;
    low = std::min(low, x);
    high = std::max(high, x);
    ++count;
    zeros += x == 0.0;
  }
  int exponent = -126;
  while (count > 0 && std::ldexp(1.0, exponent) <= std::max(-low, high)) ++exponent;
  for (const double x : values) {
    if (!std::isfinite(x)) continue;
    const auto k = static_cast<std::size_t>(std::floor(std::fabs(x) / std::ldexp(1.0, exponent - 11)));
    ++counts[x < 0.0 ? kRangeBinsPerSide - 1 - k : kRangeBinsPerSide + k];
  }
  EXPECT_EQ(histogram.exponent(), exponent);
  EXPECT_TRUE(std::ranges::equal(histogram.counts(), counts));
  EXPECT_EQ(histogram.count(), count);
  EXPECT_EQ(histogram.zeros(), zeros);
  EXPECT_EQ(histogram.non_finite(), values.size() - count);
  EXPECT_EQ(histogram.batches(), values.empty() ? 0U : 1U);
  if (count == 0) return;
  EXPECT_EQ(histogram.min(), low);
  EXPECT_EQ(histogram.max(), high);
  EXPECT_FALSE(std::signbit(histogram.min()) && low == 0.0);
  EXPECT_EQ(histogram.average_min(), low);
  EXPECT_EQ(histogram.average_max(), high);
}

TEST(Calibration, CountsByTheDefinitionWithAnyExecutor) {
  for (const ObservedCase& c : test::observed_cases()) {
    SCOPED_TRACE(testing::Message() << c);
    GradientList tensors;
    tensors.add(c.dtype, c.values, c.misaligned);
    std::vector<double> stored(c.values.size());
    for (std::size_t i = 0; i < stored.size(); ++i) stored[i] = tensors.get(0, i);
    RangeHistogram serial;
    cpu::observe(tensors.views()[0], serial, SerialExecutor());
    expect_definition(serial, stored);
    RangeHistogram threaded;
    cpu::observe(tensors.views()[0], threaded, test::ThreadedExecutor());
    expect_same(serial, threaded);
  }
}

TEST(Calibration, BinsOfRandomBitsInEveryRange) {
  std::mt19937 random(1);
  for (int i = 0; i < 200000; ++i) {
    const auto bits = static_cast<std::uint32_t>(random());
    const double x = double{std::bit_cast<float>(bits)};
    if (!std::isfinite(x)) continue;
    const int least = range_exponent(bits & 0x7fffffffU);
    EXPECT_LT(std::fabs(x), std::ldexp(1.0, least));
    EXPECT_TRUE(least == -126 || std::fabs(x) >= std::ldexp(1.0, least - 1));
    const int exponent = std::min(128, least + i % 300);
    const auto k = static_cast<std::uint32_t>(std::floor(std::ldexp(std::fabs(x), 11 - exponent)));
    ASSERT_EQ(range_bin(bits, exponent), x < 0.0 ? 2047 - k : 2048 + k) << x << " in 2^" << exponent;
  }
}

TEST(Calibration, NeitherOrderNorBatchesMatter) {
  std::vector<std::vector<double>> batches = {{0.0, -0.0},
                                              test::normal_values(1000, 0.01, 5),
                                              {1e30, -3.0},
                                              {1e-40, -1e-40, -1e-30},
                                              test::normal_values(5000, 100.0, 6),
                                              {std::nan("")},
                                              {-0x1p127}};
  std::vector<double> all;
  for (const auto& batch : batches) all.insert(all.end(), batch.begin(), batch.end());
  const RangeHistogram whole = histogram_of(all);
  std::mt19937 random(2);
  for (int trial = 0; trial < 30; ++trial) {
    std::ranges::shuffle(batches, random);
    RangeHistogram histogram;
    RangeHistogram first;
    RangeHistogram second;
    for (std::size_t i = 0; i < batches.size(); ++i) {
      GradientList tensors;
      tensors.add(DType::kFloat32, batches[i]);
      cpu::observe(tensors.views()[0], histogram, SerialExecutor());
      cpu::observe(tensors.views()[0], i % 2 != 0 ? first : second, SerialExecutor());
    }
    first.merge(second);
    for (const RangeHistogram& other : {histogram, first}) {
      EXPECT_TRUE(std::ranges::equal(other.counts(), whole.counts()));
      EXPECT_EQ(other.exponent(), whole.exponent());
      EXPECT_EQ(other.min(), whole.min());
      EXPECT_EQ(other.max(), whole.max());
      EXPECT_EQ(other.zeros(), whole.zeros());
      EXPECT_EQ(other.non_finite(), whole.non_finite());
      EXPECT_EQ(other.batches(), batches.size());
    }
  }
}

TEST(Calibration, MergesWithItselfAndWithNothing) {
  RangeHistogram histogram = histogram_of({1.0, -2.0, std::nan("")});
  const RangeHistogram before = histogram;
  histogram.merge(RangeHistogram());
  expect_same(histogram, before);
  RangeHistogram other;
  other.merge(before);
  expect_same(other, before);
  histogram.merge(histogram);
  EXPECT_EQ(histogram.count(), 4U);
  EXPECT_EQ(histogram.non_finite(), 2U);
  EXPECT_EQ(histogram.average_max(), 1.0);
}

TEST(Calibration, MovingAverages) {
  RangeHistogram histogram = histogram_of({std::nan("")});
  for (const std::vector<double>& values : {std::vector<double>{-1.0, 4.0}, {-3.0, 2.0}, {HUGE_VAL}, {5.0}}) {
    GradientList tensors;
    tensors.add(DType::kFloat32, values);
    cpu::observe(tensors.views()[0], histogram, SerialExecutor());
  }
  const double low = -1.0 + 0.01 * (-3.0 + 1.0);
  const double high = 4.0 + 0.01 * (2.0 - 4.0);
  EXPECT_EQ(histogram.average_min(), low + 0.01 * (5.0 - low));
  EXPECT_EQ(histogram.average_max(), high + 0.01 * (5.0 - high));
  EXPECT_EQ(histogram.batches(), 5U);
}

TEST(Calibration, ParametersOfRanges) {
  const auto expect = [](Range range, bool symmetric, int bits, double scale, int zero_point) {
    const Int8Parameters parameters = parameters_of(range, symmetric, bits);
    EXPECT_EQ(parameters.scale, static_cast<float>(scale)) << range.low << " to " << range.high;
    EXPECT_EQ(parameters.zero_point, zero_point) << range.low << " to " << range.high;
  };
  expect({-1.0, 2.0}, true, 8, 2.0 / 127.0, 0);
  expect({-3.0, 2.0}, true, 4, 3.0 / 7.0, 0);
  expect({0.5, 2.0}, true, 2, 2.0, 0);
  expect({-1.0, 2.0}, false, 8, 3.0 / 255.0, -43);
  expect({0.0, 2.0}, false, 8, 2.0 / 255.0, -128);
  expect({1.0, 2.0}, false, 8, 2.0 / 255.0, -128);
  expect({-2.0, -1.0}, false, 8, 2.0 / 255.0, 127);
  expect({-1.0, 1.0}, false, 4, 2.0 / 15.0, 0);  // -8 + 7.5, to even
  expect({0.0, 3.0}, false, 2, 1.0, -2);
  expect({0.0, 0.0}, true, 8, 1.0, 0);
  expect({0.0, 0.0}, false, 8, 1.0, -128);
  constexpr double kMax = 0x1.fffffep127;
  expect({-kMax, kMax}, false, 8, 2.0 * kMax / 255.0, 0);
  expect({-kMax, kMax}, false, 2, 2.0 * kMax / 3.0, 0);
  expect({-kMax, 0.0}, true, 2, kMax, 0);
  expect({-0x1p-149, 0x1p-149}, false, 8, 0x1p-126, -128);
  expect({0.0, 0x1p-130}, true, 8, 0x1p-126, 0);
  for (const int bits : {1, 9, -3}) EXPECT_THROW(parameters_of({0.0, 1.0}, false, bits), InvalidArgument);
  for (const Range range : {Range{1.0, 0.0}, Range{std::nan(""), 1.0}, Range{0.0, HUGE_VAL}, Range{0.0, 1e39}})
    EXPECT_THROW(parameters_of(range, false, 8), InvalidArgument);
}

constexpr RangeMethod kMethods[] = {RangeMethod::kMinMax, RangeMethod::kMovingAverage, RangeMethod::kPercentile,
                                    RangeMethod::kEntropy, RangeMethod::kMse};

TEST(Calibration, ScalesAreNormalNumbersForEveryKindOfValue) {
  for (const ObservedCase& c : test::observed_cases()) {
    const RangeHistogram histogram = histogram_of(c.values, c.dtype);
    for (const RangeMethod method : kMethods) {
      for (const int bits : {2, 5, 8}) {
        for (const bool symmetric : {false, true}) {
          SCOPED_TRACE(testing::Message() << c << ", method " << static_cast<int>(method) << ", bits " << bits);
          const RangeOptions options{.symmetric = symmetric, .bits = bits};
          if (histogram.count() == 0) {
            EXPECT_THROW(histogram.parameters(method, options), InvalidArgument);
            continue;
          }
          const Int8Parameters parameters = histogram.parameters(method, options);
          EXPECT_TRUE(std::isnormal(parameters.scale) && parameters.scale > 0.0F) << parameters.scale;
          EXPECT_GE(parameters.zero_point, symmetric ? 0 : -(1 << (bits - 1)));
          EXPECT_LE(parameters.zero_point, symmetric ? 0 : (1 << (bits - 1)) - 1);
        }
      }
    }
  }
}

TEST(Calibration, ConstantsAreRepresentedExactlyEnough) {
  for (const double value : {5.0, -0.37, 1e-37, -1e38, 1024.0}) {
    const RangeHistogram histogram = histogram_of(std::vector<double>(100, value));
    for (const RangeMethod method : {RangeMethod::kMinMax, RangeMethod::kMovingAverage, RangeMethod::kMse}) {
      const Int8Parameters p = histogram.parameters(method, {.symmetric = true});
      EXPECT_NEAR(127.0 * double{p.scale} / std::fabs(value), 1.0, 1e-6) << value << ' ' << static_cast<int>(method);
    }
  }
}

TEST(Calibration, FewValuesBesideZerosAreKept) {
  std::vector<double> values(100000, 0.0);
  values[7] = 3.0;
  for (const RangeMethod method : kMethods)
    EXPECT_NEAR(histogram_of(values).range(method).high, 3.0, 0.01) << static_cast<int>(method);
}

TEST(Calibration, OptionsAreChecked) {
  const RangeHistogram histogram = histogram_of({1.0});
  for (const int bits : {0, 1, 9}) EXPECT_THROW(histogram.range(RangeMethod::kMinMax, {.bits = bits}), InvalidArgument);
  for (const double percentile : {0.0, -1.0, 100.5, std::nan("")})
    EXPECT_THROW(histogram.range(RangeMethod::kPercentile, {.percentile = percentile}), InvalidArgument);
  EXPECT_THROW(range_method("max"), InvalidArgument);
  EXPECT_EQ(range_method("entropy"), RangeMethod::kEntropy);
  const RangeHistogram empty = histogram_of({std::nan("")});
  EXPECT_THROW(empty.min(), InvalidArgument);
  EXPECT_THROW(empty.average_max(), InvalidArgument);
  try {
    empty.parameters(RangeMethod::kMse);
    ADD_FAILURE();
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("no finite value was observed, in 1 batches with 1"), std::string::npos)
        << error.what();
  }
}

TEST(Calibration, StatesComeBack) {
  for (const ObservedCase& c : test::observed_cases()) {
    SCOPED_TRACE(testing::Message() << c);
    RangeHistogram histogram = histogram_of(c.values, c.dtype);
    RangeHistogram restored = RangeHistogram::restored(histogram.state_counts(), histogram.state_numbers());
    expect_same(histogram, restored);
    for (RangeHistogram* const each : {&histogram, &restored}) each->merge(histogram_of({100.0, -1e-20}));
    expect_same(histogram, restored);
  }
}

TEST(Calibration, DamagedStatesAreRefused) {
  using Counts = std::vector<std::int64_t>;
  using Numbers = std::vector<double>;
  const RangeHistogram histogram = histogram_of({1.0, -2.5, 0.0, std::nan("")});
  const std::vector<std::function<void(Counts&, Numbers&)>> damages = {
      [](Counts& counts, Numbers&) { counts.pop_back(); },
      [](Counts& counts, Numbers&) { counts.push_back(0); },
      [](Counts&, Numbers& numbers) { numbers.pop_back(); },
      [](Counts& counts, Numbers&) { counts[5] = -1; },
      [](Counts& counts, Numbers&) { counts[5] = 1; },     // outside of minimum and maximum
      [](Counts& counts, Numbers&) { counts[2048] = 0; },  // fewer than zeros
      [](Counts& counts, Numbers&) { counts[2100] = counts[2101] = std::numeric_limits<std::int64_t>::max(); },
      [](Counts& counts, Numbers&) { counts[kRangeBins + 1] = -1; },
      [](Counts& counts, Numbers&) { counts[kRangeBins + 2] = 0; },  // no batches
      [](Counts& counts, Numbers&) { std::fill(counts.begin(), counts.begin() + kRangeBins + 1, 0); },
      [](Counts&, Numbers& numbers) { numbers[0] = std::nan(""); },
      [](Counts&, Numbers& numbers) { numbers[1] = HUGE_VAL; },
      [](Counts&, Numbers& numbers) { numbers[1] = 1e39; },
      [](Counts&, Numbers& numbers) { numbers[1] = 1.0 + 1e-12; },  // no float32
      [](Counts&, Numbers& numbers) { numbers[1] = 3.0; },          // another bin
      [](Counts&, Numbers& numbers) { numbers[0] = -5.0; },         // another range
      [](Counts&, Numbers& numbers) { std::swap(numbers[0], numbers[1]); },
      [](Counts&, Numbers& numbers) { numbers[2] = -3.0; },
      [](Counts&, Numbers& numbers) { numbers[3] = std::nan(""); }};
  for (std::size_t i = 0; i < damages.size(); ++i) {
    Counts counts = histogram.state_counts();
    Numbers numbers = histogram.state_numbers();
    damages[i](counts, numbers);
    EXPECT_THROW(RangeHistogram::restored(counts, numbers), InvalidArgument) << i;
  }
  Numbers numbers = RangeHistogram().state_numbers();
  numbers[1] = 1.0;
  EXPECT_THROW(RangeHistogram::restored(RangeHistogram().state_counts(), numbers), InvalidArgument);
}

TEST(Calibration, ChannelsAgreeWithFloat64AndWithAnyExecutor) {
  for (const test::ChannelCase& c : test::channel_cases()) {
    SCOPED_TRACE(testing::Message() << c.shape.outer << " x " << c.shape.channels << " x " << c.shape.inner << ' '
                                    << name_of(c.dtype));
    GradientList tensors;
    tensors.add(c.dtype, test::channel_values(c.shape), 1);
    const TensorView view = tensors.views()[0];
    const ChannelStatistics found = cpu::channel_statistics(view, c.shape, SerialExecutor());
    const ChannelStatistics threaded = cpu::channel_statistics(view, c.shape, test::ThreadedExecutor());
    EXPECT_EQ(found.sum, threaded.sum);
    EXPECT_EQ(found.max, threaded.max);
    EXPECT_EQ(found.count, threaded.count);
    found.check();
    ASSERT_EQ(found.max.size(), static_cast<std::size_t>(c.shape.channels));
    for (std::int64_t channel = 0; channel < c.shape.channels; ++channel) {
      double sum = 0.0;
      double magnitudes = 0.0;
      double largest = 0.0;
      std::uint64_t count = 0;
      for (std::int64_t i = 0; i < c.shape.outer * c.shape.inner; ++i) {
        const std::int64_t at = (i / c.shape.inner * c.shape.channels + channel) * c.shape.inner + i % c.shape.inner;
        const double x = tensors.get(0, static_cast<std::size_t>(at));
        if (!std::isfinite(x)) continue;
        sum += x;
        magnitudes += std::fabs(x);
        largest = std::max(largest, std::fabs(x));
        ++count;
      }
      const auto at = static_cast<std::size_t>(channel);
      EXPECT_EQ(found.max[at], largest);
      EXPECT_EQ(found.count[at], count);
      ASSERT_NEAR(found.sum[at], sum, 1e-12 * magnitudes);
    }
  }
}

TEST(Calibration, ChannelsMerge) {
  ChannelStatistics all;
  all.merge({{1.0F, 2.0F}, {-1.0, 3.0}, {2, 2}});
  all.merge({{3.0F, 1.0F}, {4.0, 1.0}, {5, 1}});
  all.merge({});
  EXPECT_EQ(all.max, (std::vector<float>{3.0F, 2.0F}));
  EXPECT_EQ(all.sum, (std::vector<double>{3.0, 4.0}));
  EXPECT_EQ(all.count, (std::vector<std::uint64_t>{7, 3}));
  EXPECT_THROW(all.merge({{1.0F}, {1.0}, {1}}), InvalidArgument);
  for (const ChannelStatistics& damaged :
       {ChannelStatistics{{1.0F}, {1.0}, {}}, ChannelStatistics{{-1.0F}, {0.0}, {1}},
        ChannelStatistics{{HUGE_VALF}, {0.0}, {1}}, ChannelStatistics{{1.0F}, {3.0}, {2}},
        ChannelStatistics{{1.0F}, {std::nan("")}, {2}}})
    EXPECT_THROW(damaged.check(), InvalidArgument);
}

}  // namespace
}  // namespace halfstep
