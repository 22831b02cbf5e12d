// The ranges of activations for int8 inference: one histogram observer, and every estimator computed from it.
//
// A histogram divides the open range (-R, R) into 4096 bins of equal width R / 2048. R is the least power of two above
// every magnitude seen, 2^-126 at least. Bins are mirrored at 0: with k = floor(|x| / width), x >= 0 lies in bin
// 2048 + k and x < 0 in bin 2047 - k. When a larger magnitude comes, R doubles as often as needed and bins are added in
// pairs outward from 0, which is exact. So a histogram depends neither on the order of its data nor on how they were
// cut into batches; two histograms merge to that of all their data; and the CPU and the GPU give the same counts.
//
// Infinite and NaN elements are counted and otherwise passed over. Zeros of either sign are 0.
//
// The functions of the namespaces cpu and cuda are the core's own; programs that link libhalfstep_torch use Observer of
// halfstep/torch/calibration.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <vector>

#include "halfstep/export.h"
#include "halfstep/int8.h"
#include "halfstep/stream.h"
#include "halfstep/tensor_list.h"

namespace halfstep {

inline constexpr int kRangeBinsPerSide = 2048;
inline constexpr int kRangeBins = 2 * kRangeBinsPerSide;

// How the range is chosen, all of which is to be represented; what lies outside saturates. kPercentile, kEntropy and
// kMse give a range that holds 0. Exact zeros, which have no error, are left out of kEntropy and kMse.
//
//   kMinMax         everything seen
//   kMovingAverage  averages of the batches' minima and maxima: of the first batch, then average += 0.01 * (batch's -
//                   average), as torch.ao.quantization's MovingAverageMinMaxObserver. The only one that depends on the
//                   order of the data; of merged histograms it is the mean, weighted by batches.
//   kPercentile     keeps `percentile` percent of the values. Symmetric, or where all values have one sign: cut are the
//                   largest magnitudes; else half of what is cut on each side. Interpolated within a bin. If all that
//                   is not 0 would be cut, nothing is.
//   kEntropy        the threshold T with the least Kullback-Leibler divergence, of [-T, T] cut to what was seen, by
//                   the procedure of Migacz (8-bit inference with TensorRT, GTC 2017): magnitudes below T, with all
//                   outliers in the last bin, against the same magnitudes, without outliers, merged to 2^(bits - 1)
//                   levels that are spread evenly over the bins that are not empty. Where an affine range has one side
//                   only that has 2^bits levels. T is a whole number of bins, at least as many as levels.
//   kMse            the least mean squared error of rounding and clipping together, integrated over each bin as if its
//                   values were spread evenly. Ends are tried from what was seen down to 2^-11 of it, in steps of
//                   2^(1/64). Of an affine range with two sides, first both in steps of 2^(1/8), then each in turns,
//                   and so again in small steps around the best.
enum class RangeMethod : std::uint8_t { kMinMax, kMovingAverage, kPercentile, kEntropy, kMse };

// Of "min_max", "moving_average", "percentile", "entropy", "mse"; InvalidArgument for another name.
HALFSTEP_API RangeMethod range_method(std::string_view name);

struct RangeOptions {
  bool symmetric = false;     // zero point 0
  int bits = 8;               // 2 .. 8
  double percentile = 99.99;  // above 0, at most 100; read by kPercentile
};

struct Range {
  double low;
  double high;
};

// The scale and zero point that quantize `range`, which is widened to hold 0, to integers of `bits` bits:
//   symmetric   -n .. n with n = 2^(bits - 1) - 1; scale = largest magnitude / n, zero point 0
//   affine      -2^(bits - 1) .. 2^(bits - 1) - 1; scale = (high - low) / (2^bits - 1), and 0 is represented exactly;
//               of a range without negative values the zero point is the lowest integer (-128)
// The scale is at least the smallest normal float32; of the range [0, 0] it is 1. InvalidArgument unless the ends are
// finite float32 values in order and 2 <= bits <= 8.
HALFSTEP_API Int8Parameters parameters_of(const Range& range, bool symmetric, int bits);

// What one pass over a batch finds. A key is a float32's bits, ordered as integers like the values are.
struct RangeKeys {
  std::int32_t lowest = std::numeric_limits<std::int32_t>::max();
  std::int32_t highest = std::numeric_limits<std::int32_t>::min();
  std::uint64_t zeros = 0;
  std::uint64_t non_finite = 0;
};

// A value type; its functions are not synchronised. `numbers` and counts of a batch come apart because the GPU finds
// the one before it can count the other: add_batch and then add_counts make one observation.
class HALFSTEP_API RangeHistogram {
 public:
  // The numbers of one batch of `numel` elements; nothing if that is 0. Widens the range.
  void add_batch(const RangeKeys& keys, std::int64_t numel);
  // The exponent of the range that holds this batch and everything before it.
  int exponent_with(const RangeKeys& keys) const;
  // Counts over the range of `exponent`, kRangeBins of them.
  void add_counts(std::span<const std::uint64_t> counts, int exponent);
  // Everything that `other` has seen.
  void merge(const RangeHistogram& other);

  // InvalidArgument if no finite value was seen, or for options out of range.
  Range range(RangeMethod method, const RangeOptions& options = {}) const;
  Int8Parameters parameters(RangeMethod method, const RangeOptions& options = {}) const;

  std::span<const std::uint64_t> counts() const { return counts_; }
  int exponent() const;  // R = 2^exponent, -126 .. 128
  double high() const;   // R
  double width() const;  // of a bin
  float min() const;     // of the finite values, exact, with max() and the averages: InvalidArgument if there are none
  float max() const;
  double average_min() const;
  double average_max() const;
  std::uint64_t count() const { return count_; }  // finite values
  std::uint64_t zeros() const { return zeros_; }
  std::uint64_t non_finite() const { return non_finite_; }
  std::uint64_t batches() const { return batches_; }  // that had elements

  // All of it: [kRangeBins + 3] counts (the bins, zeros, non_finite, batches), and min, max, average_min, average_max
  // (zeros if there are none). restored() throws InvalidArgument unless they can be of a histogram; exponent and
  // count follow from them.
  static constexpr int kStateCounts = kRangeBins + 3;
  static constexpr int kStateNumbers = 4;
  std::vector<std::int64_t> state_counts() const;
  std::vector<double> state_numbers() const;
  static RangeHistogram restored(std::span<const std::int64_t> counts, std::span<const double> numbers);

 private:
  void check_data(const char* what) const;

  std::vector<std::uint64_t> counts_ = std::vector<std::uint64_t>(kRangeBins);
  int counts_exponent_ = -126;
  RangeKeys keys_;  // of everything: lowest and highest
  std::uint64_t count_ = 0, zeros_ = 0, non_finite_ = 0, batches_ = 0;
  double average_min_ = 0.0, average_max_ = 0.0;
};

// A dense tensor as [outer, channels, inner].
struct ChannelShape {
  std::int64_t outer;
  std::int64_t channels;
  std::int64_t inner;

  HALFSTEP_HOST_DEVICE std::int64_t numel() const { return outer * channels * inner; }
};

// Of the finite elements of each channel. All [channels], or empty before anything was seen.
struct HALFSTEP_API ChannelStatistics {
  std::vector<float> max;   // largest magnitude, exact
  std::vector<double> sum;  // in a fixed order, on the CPU whatever the number of threads
  std::vector<std::uint64_t> count;

  // InvalidArgument if the channels differ in number.
  void merge(const ChannelStatistics& other);
  // InvalidArgument unless sizes agree, and the numbers can be of `count` values.
  void check() const;
};

// input: float32, float16 or bfloat16; no limit on elements.
namespace cpu {
RangeKeys range_keys(const TensorView& input, const Executor& executor);
// counts[kRangeBins] += the finite elements, all within the range of `exponent`.
void add_to_counts(const TensorView& input, int exponent, std::uint64_t* counts, const Executor& executor);
// One batch: all of the above.
HALFSTEP_API void observe(const TensorView& input, RangeHistogram& histogram, const Executor& executor);
// Of this batch alone.
HALFSTEP_API ChannelStatistics channel_statistics(const TensorView& input, const ChannelShape& shape,
                                                  const Executor& executor);
}  // namespace cpu

// The same on device memory. Enqueues on `stream` only: no synchronisation, no host read, capturable in a CUDA graph.
// The numbers are the CPU's, bit for bit, but for the sums of channels, whose fixed order is another. Counts are added
// by integer atomics, so several streams may add to the same ones.
namespace cuda {
void range_keys(const TensorView& input, RangeKeys* keys, CudaStream stream);
void add_to_counts(const TensorView& input, int exponent, std::uint64_t* counts, CudaStream stream);
// max, sum and count: [channels] each. `workspace`: device memory of channel_workspace_bytes(shape) bytes, aligned to
// 8, free again when the stream has passed the call.
std::size_t channel_workspace_bytes(const ChannelShape& shape);
void channel_statistics(const TensorView& input, const ChannelShape& shape, float* max, double* sum,
                        std::uint64_t* count, void* workspace, CudaStream stream);
}  // namespace cuda

}  // namespace halfstep
