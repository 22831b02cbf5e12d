// The histogram of ranges: growth, merging and state. Contract: halfstep/calibration.h.
#include <algorithm>
#include <bit>
#include <cmath>
#include <tuple>

#include "calibration_math.h"
#include "halfstep/status.h"

namespace halfstep {
namespace {

constexpr double kMomentum = 0.01;  // torch.ao.quantization's averaging_constant

float value_of(std::int32_t key) {
  if (key == -1) return 0.0F;  // -0
  return std::bit_cast<float>(static_cast<std::uint32_t>(range_key(static_cast<std::uint32_t>(key))));
}

std::int32_t key_of(float value) {
  return range_key(std::bit_cast<std::uint32_t>(value));
}

int exponent_of(const RangeKeys& keys) {
  if (keys.lowest > keys.highest) return kLowestRangeExponent;  // nothing
  const auto magnitude = [](std::int32_t key) {
    return static_cast<std::uint32_t>(range_key(static_cast<std::uint32_t>(key))) & 0x7fffffffU;
  };
  return range_exponent(std::max(magnitude(keys.lowest), magnitude(keys.highest)));
}

// To a range 2^doublings as wide.
void coarsen(std::span<std::uint64_t> counts, int doublings) {
  for (int i = 0; i < doublings; ++i) {
    for (std::size_t k = 0; k < kRangeBinsPerSide; ++k) {
      const bool inside = k < kRangeBinsPerSide / 2;
      const std::size_t above = kRangeBinsPerSide + 2 * k;
      const std::size_t below = kRangeBinsPerSide - 1 - 2 * k;
      counts[kRangeBinsPerSide + k] = inside ? counts[above] + counts[above + 1] : 0;
      counts[kRangeBinsPerSide - 1 - k] = inside ? counts[below] + counts[below - 1] : 0;
    }
  }
}

bool is_float32(double x) {
  return std::isfinite(x) && std::fabs(x) <= DTypeTraits<DType::kFloat32>::max &&
         static_cast<double>(static_cast<float>(x)) == x;
}

}  // namespace

RangeMethod range_method(std::string_view name) {
  if (name == "min_max") return RangeMethod::kMinMax;
  if (name == "moving_average") return RangeMethod::kMovingAverage;
  if (name == "percentile") return RangeMethod::kPercentile;
  if (name == "entropy") return RangeMethod::kEntropy;
  HS_CHECK(name == "mse", "method is '", name,
           "', expected 'min_max', 'moving_average', 'percentile', 'entropy' or 'mse'");
  return RangeMethod::kMse;
}

void RangeHistogram::add_batch(const RangeKeys& keys, std::int64_t numel) {
  HS_CHECK(numel >= 0 && keys.non_finite <= static_cast<std::uint64_t>(numel), "RangeHistogram: a batch of ", numel,
           " elements, of which ", keys.non_finite, " are not finite");
  if (numel == 0) return;
  ++batches_;
  non_finite_ += keys.non_finite;
  const std::uint64_t finite = static_cast<std::uint64_t>(numel) - keys.non_finite;
  if (finite == 0) return;
  const double low = value_of(keys.lowest);
  const double high = value_of(keys.highest);
  average_min_ = count_ == 0 ? low : average_min_ + kMomentum * (low - average_min_);
  average_max_ = count_ == 0 ? high : average_max_ + kMomentum * (high - average_max_);
  count_ += finite;
  zeros_ += keys.zeros;
  keys_.lowest = std::min(keys_.lowest, keys.lowest);
  keys_.highest = std::max(keys_.highest, keys.highest);
  coarsen(counts_, exponent() - counts_exponent_);
  counts_exponent_ = exponent();
}

int RangeHistogram::exponent_with(const RangeKeys& keys) const {
  return std::max(exponent(), exponent_of(keys));
}

void RangeHistogram::add_counts(std::span<const std::uint64_t> counts, int exponent) {
  HS_CHECK(counts.size() == kRangeBins && exponent >= kLowestRangeExponent && exponent <= counts_exponent_,
           "RangeHistogram.add_counts: ", counts.size(), " counts with exponent ", exponent, ", expected ", kRangeBins,
           " and at most ", counts_exponent_);
  std::vector<std::uint64_t> added(counts.begin(), counts.end());
  coarsen(added, counts_exponent_ - exponent);
  for (std::size_t i = 0; i < added.size(); ++i) counts_[i] += added[i];
}

void RangeHistogram::merge(const RangeHistogram& other) {
  if (&other == this) return merge(RangeHistogram(other));
  if (other.count_ > 0) {
    const auto mean = [&](double own, double others) {
      const auto a = static_cast<double>(batches_);
      const auto b = static_cast<double>(other.batches_);
      return count_ == 0 ? others
                         : std::clamp((a * own + b * others) / (a + b), std::min(own, others),
                                      std::max(own, others));  // rounding must not leave them
    };
    average_min_ = mean(average_min_, other.average_min_);
    average_max_ = mean(average_max_, other.average_max_);
  }
  keys_.lowest = std::min(keys_.lowest, other.keys_.lowest);
  keys_.highest = std::max(keys_.highest, other.keys_.highest);
  count_ += other.count_;
  zeros_ += other.zeros_;
  non_finite_ += other.non_finite_;
  batches_ += other.batches_;
  coarsen(counts_, exponent() - counts_exponent_);
  counts_exponent_ = exponent();
  add_counts(other.counts_, other.counts_exponent_);
}

void RangeHistogram::check_data(const char* what) const {
  HS_CHECK(count_ > 0, "RangeHistogram.", what, ": no finite value was observed, in ", batches_, " batches with ",
           non_finite_, " infinite or NaN elements; observe data first");
}

int RangeHistogram::exponent() const {
  return exponent_of(keys_);
}
double RangeHistogram::high() const {
  return std::ldexp(1.0, exponent());
}
double RangeHistogram::width() const {
  return high() / kRangeBinsPerSide;
}
float RangeHistogram::min() const {
  check_data("min");
  return value_of(keys_.lowest);
}
float RangeHistogram::max() const {
  check_data("max");
  return value_of(keys_.highest);
}
double RangeHistogram::average_min() const {
  check_data("average_min");
  return average_min_;
}
double RangeHistogram::average_max() const {
  check_data("average_max");
  return average_max_;
}

std::vector<std::int64_t> RangeHistogram::state_counts() const {
  std::vector<std::int64_t> state(counts_.begin(), counts_.end());
  for (const std::uint64_t number : {zeros_, non_finite_, batches_}) state.push_back(static_cast<std::int64_t>(number));
  return state;
}

std::vector<double> RangeHistogram::state_numbers() const {
  if (count_ == 0) return std::vector<double>(kStateNumbers, 0.0);
  return {min(), max(), average_min_, average_max_};
}

RangeHistogram RangeHistogram::restored(std::span<const std::int64_t> counts, std::span<const double> numbers) {
  HS_CHECK(counts.size() == kStateCounts && numbers.size() == kStateNumbers, "RangeHistogram: the state has ",
           counts.size(), " counts and ", numbers.size(), " numbers, expected ", kStateCounts, " and ", kStateNumbers);
  RangeHistogram result;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    HS_CHECK(counts[i] >= 0, "RangeHistogram: the state's count ", i, " is ", counts[i], ", expected at least 0");
    if (i >= kRangeBins) continue;
    result.counts_[i] = static_cast<std::uint64_t>(counts[i]);
    result.count_ += result.counts_[i];
    HS_CHECK(result.count_ <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()),
             "RangeHistogram: the state's counts add up to more than 2^63");
  }
  result.zeros_ = static_cast<std::uint64_t>(counts[kRangeBins]);
  result.non_finite_ = static_cast<std::uint64_t>(counts[kRangeBins + 1]);
  result.batches_ = static_cast<std::uint64_t>(counts[kRangeBins + 2]);
  HS_CHECK(result.zeros_ <= result.counts_[kRangeBinsPerSide], "RangeHistogram: the state has ", result.zeros_,
           " zeros, but ", result.counts_[kRangeBinsPerSide], " values in their bin");
  const bool seen = result.count_ > 0 || result.non_finite_ > 0;
  HS_CHECK(seen == (result.batches_ > 0), "RangeHistogram: the state has ", result.batches_, " batches with ",
           result.count_, " finite and ", result.non_finite_, " other elements");
  const auto [low, high, average_min, average_max] = std::tuple(numbers[0], numbers[1], numbers[2], numbers[3]);
  if (result.count_ == 0) {
    HS_CHECK(low == 0.0 && high == 0.0 && average_min == 0.0 && average_max == 0.0,
             "RangeHistogram: the state has no finite value, but minima or maxima that are not 0");
    return result;
  }
  HS_CHECK(is_float32(low) && is_float32(high) && low <= high, "RangeHistogram: the state's minimum and maximum are ",
           low, " and ", high, ", expected finite float32 values in order");
  HS_CHECK(average_min >= low && average_min <= average_max && average_max <= high,
           "RangeHistogram: the state's averages are ", average_min, " and ", average_max, ", expected values between ",
           low, " and ", high);
  result.average_min_ = average_min;
  result.average_max_ = average_max;
  result.keys_.lowest = key_of(static_cast<float>(low));
  result.keys_.highest = key_of(static_cast<float>(high));
  result.counts_exponent_ = result.exponent();
  const auto bin = [&](double x) {
    return std::ptrdiff_t{range_bin(std::bit_cast<std::uint32_t>(static_cast<float>(x)), result.counts_exponent_)};
  };
  const auto filled = [](std::uint64_t count) { return count > 0; };
  const auto first = std::find_if(result.counts_.begin(), result.counts_.end(), filled) - result.counts_.begin();
  const auto last =
      kRangeBins - 1 - (std::find_if(result.counts_.rbegin(), result.counts_.rend(), filled) - result.counts_.rbegin());
  HS_CHECK(first == bin(low) && last == bin(high), "RangeHistogram: the state's bins ", first, " to ", last,
           " are filled, but minimum and maximum lie in bins ", bin(low), " and ", bin(high));
  return result;
}

void ChannelStatistics::merge(const ChannelStatistics& other) {
  if (max.empty()) {
    *this = other;
    return;
  }
  if (other.max.empty()) return;
  HS_CHECK(max.size() == other.max.size(), "ChannelStatistics: got ", other.max.size(), " channels, expected ",
           max.size(), " as before");
  for (std::size_t c = 0; c < max.size(); ++c) {
    max[c] = std::max(max[c], other.max[c]);
    sum[c] += other.sum[c];
    count[c] += other.count[c];
  }
}

void ChannelStatistics::check() const {
  HS_CHECK(max.size() == sum.size() && max.size() == count.size(), "ChannelStatistics: ", max.size(), " maxima, ",
           sum.size(), " sums and ", count.size(), " counts, expected as many of each");
  for (std::size_t c = 0; c < max.size(); ++c) {
    // Rounding may carry a sum past the bound by a little.
    const double bound = double{max[c]} * static_cast<double>(count[c]) * (1.0 + 1e-6);
    HS_CHECK(std::isfinite(max[c]) && max[c] >= 0.0F && std::fabs(sum[c]) <= bound, "ChannelStatistics: channel ", c,
             " has largest magnitude ", max[c], " and sum ", sum[c], " of ", count[c], " values");
  }
}

}  // namespace halfstep
