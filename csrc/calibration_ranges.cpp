// The estimators of ranges. Contract: halfstep/calibration.h.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/clones.h"
#include "halfstep/calibration.h"
#include "halfstep/status.h"

namespace halfstep {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

using Counts = std::vector<double>;  // of one side, from 0 outward, or of magnitudes; exact zeros left out

Counts side(const RangeHistogram& histogram, bool positive) {
  const auto counts = histogram.counts();
  Counts result(kRangeBinsPerSide);
  for (std::size_t k = 0; k < result.size(); ++k)
    result[k] = static_cast<double>(counts[positive ? kRangeBinsPerSide + k : kRangeBinsPerSide - 1 - k]);
  if (positive) result[0] -= static_cast<double>(histogram.zeros());
  return result;
}

Counts magnitudes(const RangeHistogram& histogram) {
  Counts result = side(histogram, /*positive=*/true);
  const Counts negative = side(histogram, /*positive=*/false);
  for (std::size_t k = 0; k < result.size(); ++k) result[k] += negative[k];
  return result;
}

bool one_sided(const Range& seen) {
  return seen.low >= 0.0 || seen.high <= 0.0;
}

// How far from 0, in bins, a side reaches without its `dropped` outermost values.
double reach_without(const Counts& counts, double dropped) {
  for (std::size_t k = counts.size(); k-- > 0;) {
    if (dropped < counts[k]) return static_cast<double>(k + 1) - dropped / counts[k];
    dropped -= counts[k];
  }
  return 0.0;
}

Range percentile_range(const RangeHistogram& histogram, const Range& seen, const RangeOptions& options) {
  const double dropped = (100.0 - options.percentile) / 100.0 * static_cast<double>(histogram.count());
  Range range;
  if (options.symmetric || one_sided(seen)) {
    const double threshold = reach_without(magnitudes(histogram), dropped) * histogram.width();
    range = {std::max(seen.low, -threshold), std::min(seen.high, threshold)};
  } else {
    const double low = reach_without(side(histogram, /*positive=*/false), dropped / 2.0) * histogram.width();
    const double high = reach_without(side(histogram, /*positive=*/true), dropped / 2.0) * histogram.width();
    range = {std::max(seen.low, -low), std::min(seen.high, high)};
  }
  // So few values differ from 0 that all of them would be cut: they are what is to be represented.
  if (range.low == 0.0 && range.high == 0.0) return seen;
  return range;
}

// The number of bins with the least divergence. With c the counts, T their sum, C_i the sum of the first i bins, and
// level l of the candidate holding S_l values in n_l bins that are not empty, the divergence at i bins is
//
//   sum over bins of P log(P / Q),  P = c / T, but (c + T - C_i) / T in bin i - 1,  Q = S_l / (n_l * C_i)
//
// whose sums over whole levels come from running sums. Without a value in bin i - 1 but with outliers it is infinite.
std::size_t entropy_bins(const Counts& counts, std::size_t levels) {
  std::size_t filled = counts.size();
  while (filled > 0 && counts[filled - 1] == 0.0) --filled;
  if (filled <= levels) return filled;
  std::vector<double> sums(filled + 1, 0.0);     // of c
  std::vector<double> used(filled + 1, 0.0);     // bins that are not empty
  std::vector<double> own_log(filled + 1, 0.0);  // of c log c
  for (std::size_t k = 0; k < filled; ++k) {
    const double c = counts[k];
    sums[k + 1] = sums[k] + c;
    used[k + 1] = used[k] + (c > 0.0 ? 1.0 : 0.0);
    own_log[k + 1] = own_log[k] + (c > 0.0 ? c * std::log(c) : 0.0);
  }
  const double total = sums[filled];
  std::size_t best = filled;
  double least = kInfinity;
  for (std::size_t bins = levels; bins <= filled; ++bins) {
    const double last = counts[bins - 1];
    if (last == 0.0) continue;
    const double outliers = total - sums[bins];
    double divergence = own_log[bins - 1] + (last + outliers) * std::log(last + outliers);
    for (std::size_t level = 0; level < levels; ++level) {
      const std::size_t begin = level * bins / levels;
      const std::size_t end = (level + 1) * bins / levels;
      const double inside = sums[end] - sums[begin];
      if (inside == 0.0) continue;
      const double reference = inside + (level + 1 == levels ? outliers : 0.0);
      divergence -= reference * std::log(inside / (used[end] - used[begin]));
    }
    divergence = divergence / total - std::log(total) + std::log(sums[bins]);
    if (divergence < least) {
      least = divergence;
      best = bins;
    }
  }
  return best;
}

Range entropy_range(const RangeHistogram& histogram, const Range& seen, const RangeOptions& options) {
  const bool whole_scale = !options.symmetric && one_sided(seen);
  const auto levels = std::size_t{1} << (whole_scale ? options.bits : options.bits - 1);
  const double threshold = static_cast<double>(entropy_bins(magnitudes(histogram), levels)) * histogram.width();
  return {std::max(seen.low, -threshold), std::min(seen.high, threshold)};
}

// The bins that are not empty: their ends, cut to what was seen, and their share of the values.
struct Pieces {
  std::vector<double> begin, end, weight;
};

Pieces pieces_of(const RangeHistogram& histogram) {
  const double low = histogram.min();
  const double high = histogram.max();
  const double width = histogram.width();
  const auto counts = histogram.counts();
  Pieces pieces;
  for (int bin = 0; bin < kRangeBins; ++bin) {
    const std::uint64_t count =
        counts[static_cast<std::size_t>(bin)] - (bin == kRangeBinsPerSide ? histogram.zeros() : 0);
    if (count == 0) continue;
    const double from = (bin - kRangeBinsPerSide) * width;
    double begin = std::max(from, low);
    double end = std::min(from + width, high);
    // All values of the bin are one: an integral needs some width.
    if (end - begin < 0x1p-20 * width) {
      const double middle = 0.5 * (begin + end);
      begin = middle - 0x1p-21 * width;
      end = middle + 0x1p-21 * width;
    }
    pieces.begin.push_back(begin);
    pieces.end.push_back(end);
    pieces.weight.push_back(static_cast<double>(count) / (end - begin));
  }
  return pieces;
}

// The integral from 0 to x of the squared error of rounding to multiples of `scale` between lowest and highest: each
// whole step has scale^3 / 12, and r^3 / 3 is that of the distance r from the last one, clipped values included.
HS_CLONES void piece_errors(const double* begin, const double* end, const double* weight, std::size_t count,
                            double scale, double lowest, double highest, double* errors) {
  const double inverse = 1.0 / scale;
  const double step = scale * scale * scale / 12.0;
  for (std::size_t i = 0; i < count; ++i) {
    double from = std::nearbyint(begin[i] * inverse);
    from = from < lowest ? lowest : from;
    from = from > highest ? highest : from;
    double to = std::nearbyint(end[i] * inverse);
    to = to < lowest ? lowest : to;
    to = to > highest ? highest : to;
    const double before = begin[i] - from * scale;
    const double after = end[i] - to * scale;
    errors[i] = weight[i] * ((to - from) * step + (after * after * after - before * before * before) / 3.0);
  }
}

class MseSearch {
 public:
  MseSearch(const RangeHistogram& histogram, const Range& seen, const RangeOptions& options)
      : pieces_(pieces_of(histogram)), seen_(seen), options_(options), errors_(pieces_.begin.size()) {}

  Range run() {
    constexpr double kWhole = 11.0;  // 2^-11: about a bin
    if (options_.symmetric || one_sided(seen_)) {
      // Few levels make many local minima, so all of it in small steps.
      sweep({true, true}, 0.0, kWhole, kFine);
      return range(best_);
    }
    sweep({true, true}, 0.0, kWhole, kCoarse);
    in_turns([&](Ends moved) { sweep(moved, 0.0, kWhole, kCoarse); });
    in_turns([&](Ends moved) {
      const double middle = moved.low ? best_.low : best_.high;
      sweep(moved, middle - kCoarse, middle + kCoarse, kFine);
    });
    return range(best_);
  }

 private:
  static constexpr double kCoarse = 0x1p-3;
  static constexpr double kFine = 0x1p-6;

  // How often each end is halved.
  struct Point {
    double low = 0.0, high = 0.0;
    bool operator==(const Point&) const = default;
  };
  struct Ends {
    bool low, high;
  };

  template <class Sweep>
  void in_turns(const Sweep& of_end) {
    for (int round = 0; round < 4; ++round) {
      const Point before = best_;
      of_end({false, true});
      of_end({true, false});
      if (best_ == before) return;
    }
  }

  Range range(const Point& point) const {
    if (!options_.symmetric) return {seen_.low * std::exp2(-point.low), seen_.high * std::exp2(-point.high)};
    const double largest = std::max(-seen_.low, seen_.high) * std::exp2(-point.high);
    return {-largest, largest};
  }

  void sweep(Ends moved, double from, double to, double step) {
    const Point start = best_;
    for (double halvings = from; halvings <= to; halvings += step) {
      if (halvings < 0.0) continue;
      const Point point{moved.low ? halvings : start.low, moved.high ? halvings : start.high};
      const double error = error_of(point);
      if (error >= least_) continue;
      least_ = error;
      best_ = point;
    }
  }

  double error_of(const Point& point) {
    const Int8Parameters parameters = parameters_of(range(point), options_.symmetric, options_.bits);
    const double levels = std::ldexp(1.0, options_.bits - 1);
    const double lowest = options_.symmetric ? 1.0 - levels : -levels - parameters.zero_point;
    const double highest = levels - 1.0 - parameters.zero_point;
    piece_errors(pieces_.begin.data(), pieces_.end.data(), pieces_.weight.data(), errors_.size(), parameters.scale,
                 lowest, highest, errors_.data());
    double sum = 0.0;
    for (const double error : errors_) sum += error;
    return sum;
  }

  Pieces pieces_;
  Range seen_;
  RangeOptions options_;
  std::vector<double> errors_;
  Point best_;
  double least_ = kInfinity;
};

}  // namespace

Int8Parameters parameters_of(const Range& range, bool symmetric, int bits) {
  constexpr double kMax = DTypeTraits<DType::kFloat32>::max;
  HS_CHECK(bits >= 2 && bits <= 8, "parameters: bits is ", bits, ", expected 2 to 8");
  HS_CHECK(range.low >= -kMax && range.low <= range.high && range.high <= kMax, "parameters: the range is ", range.low,
           " to ", range.high, ", expected finite float32 values in order");
  const double low = std::min(range.low, 0.0);
  const double high = std::max(range.high, 0.0);
  const double levels = std::ldexp(1.0, bits - 1);
  const double exact = symmetric ? std::max(-low, high) / (levels - 1.0) : (high - low) / (2.0 * levels - 1.0);
  const double scale = exact == 0.0 ? 1.0 : std::max(exact, DTypeTraits<DType::kFloat32>::min_normal);
  Int8Parameters parameters{.scale = static_cast<float>(scale), .zero_point = 0};
  if (!symmetric) {
    const double zero_point = std::nearbyint(-levels - low / double{parameters.scale});
    parameters.zero_point = static_cast<std::int32_t>(std::clamp(zero_point, -levels, levels - 1.0));
  }
  return parameters;
}

Range RangeHistogram::range(RangeMethod method, const RangeOptions& options) const {
  check_data("range");
  HS_CHECK(options.bits >= 2 && options.bits <= 8, "range: bits is ", options.bits, ", expected 2 to 8");
  HS_CHECK(options.percentile > 0.0 && options.percentile <= 100.0, "range: percentile is ", options.percentile,
           ", expected above 0 and at most 100");
  if (method == RangeMethod::kMovingAverage) return {average_min_, average_max_};
  if (method == RangeMethod::kMinMax || count_ == zeros_) return {min(), max()};
  const Range seen{std::min(double{min()}, 0.0), std::max(double{max()}, 0.0)};
  switch (method) {
    case RangeMethod::kPercentile:
      return percentile_range(*this, seen, options);
    case RangeMethod::kEntropy:
      return entropy_range(*this, seen, options);
    case RangeMethod::kMse:
      return MseSearch(*this, seen, options).run();
    case RangeMethod::kMinMax:
    case RangeMethod::kMovingAverage:
      break;
  }
  HS_UNREACHABLE("range method ", static_cast<int>(method));
}

Int8Parameters RangeHistogram::parameters(RangeMethod method, const RangeOptions& options) const {
  return parameters_of(range(method, options), options.symmetric, options.bits);
}

}  // namespace halfstep
