// The observation of tensors on the CPU. Contract: halfstep/calibration.h.
//
// Keys and counts are integers, so tasks may end in any order. Sums of channels go by strips of `outer`, whose number
// follows from the shape alone and which are added in order; within a channel's run they go to kSumLanes float64 sums.
#include "halfstep/calibration.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <mutex>
#include <vector>

#include "calibration_math.h"
#include "clones.h"
#include "convert.h"
#include "halfstep/status.h"
#include "lanes.h"

namespace halfstep::cpu {
namespace {

constexpr std::int64_t kBlock = 4096;  // elements that are widened at a time
constexpr std::int64_t kElementsPerTask = 16 * kBlock;
constexpr std::int64_t kMaxTasks = 64;
constexpr int kSumLanes = 16;
constexpr int kTables = 4;  // of counts: one value many times in a row must not wait for itself

std::int64_t tasks_for(std::int64_t numel) {
  return std::clamp<std::int64_t>(numel / kElementsPerTask, 1, kMaxTasks);
}

// Not worth waking a thread for one task.
void run_tasks(std::int64_t tasks, const Executor& executor, const std::function<void(std::int64_t)>& task) {
  if (tasks == 1) return task(0);
  executor.for_each(tasks, task);
}

// Elements begin .. begin + count - 1 as float32; `buffer` has room for kBlock.
const float* load(const TensorView& input, std::int64_t begin, std::int64_t count, float* buffer) {
  if (input.dtype == DType::kFloat32) return static_cast<const float*>(input.data) + begin;
  widen_run(input.dtype, input.data, begin, count, buffer);
  return buffer;
}

// Calls visit(x, count) for the blocks of one of `tasks` tasks.
template <class Visit>
void for_blocks(const TensorView& input, std::int64_t task, std::int64_t tasks, const Visit& visit) {
  float buffer[kBlock];
  const std::int64_t blocks = (input.numel + kBlock - 1) / kBlock;
  for (std::int64_t block = blocks * task / tasks; block < blocks * (task + 1) / tasks; ++block) {
    const std::int64_t begin = block * kBlock;
    const std::int64_t count = std::min(kBlock, input.numel - begin);
    visit(load(input, begin, count, buffer), count);
  }
}

HS_CLONES void scan_keys(const float* x, std::int64_t count, RangeKeys& keys) {
  std::int32_t lowest[kLanes];
  std::int32_t highest[kLanes];
  std::uint32_t zeros[kLanes] = {};
  std::uint32_t non_finite[kLanes] = {};
  std::fill(lowest, lowest + kLanes, keys.lowest);
  std::fill(highest, highest + kLanes, keys.highest);
  const auto visit = [&](std::int64_t at, int lanes) __attribute__((always_inline)) {
    for (int lane = 0; lane < lanes; ++lane) {
      const auto bits = std::bit_cast<std::uint32_t>(x[at + lane]);
      const std::uint32_t magnitude = bits & 0x7fffffffU;
      const bool finite = magnitude < kInfinityBits;
      const std::int32_t key = range_key(bits);
      const std::int32_t low = finite ? key : std::numeric_limits<std::int32_t>::max();
      const std::int32_t high = finite ? key : std::numeric_limits<std::int32_t>::min();
      lowest[lane] = lowest[lane] < low ? lowest[lane] : low;
      highest[lane] = highest[lane] > high ? highest[lane] : high;
      zeros[lane] += magnitude == 0;
      non_finite[lane] += !finite;
    }
  };
  const std::int64_t whole = count - count % kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) visit(i, kLanes);
  visit(whole, static_cast<int>(count - whole));
  for (int lane = 0; lane < kLanes; ++lane) {
    keys.lowest = std::min(keys.lowest, lowest[lane]);
    keys.highest = std::max(keys.highest, highest[lane]);
    keys.zeros += zeros[lane];
    keys.non_finite += non_finite[lane];
  }
}

// Bins of finite elements; kRangeBins of the others.
HS_CLONES void find_bins(const float* x, std::int64_t count, int exponent, std::uint32_t* bins) {
  for (std::int64_t i = 0; i < count; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(x[i]);
    const std::uint32_t bin = range_bin(bits, exponent);
    bins[i] = (bits & 0x7fffffffU) < kInfinityBits ? bin : static_cast<std::uint32_t>(kRangeBins);
  }
}

// A run of one channel.
struct ChannelPartial {
  double sum = 0.0;
  std::uint64_t count = 0;
  std::uint32_t magnitude = 0;
};

HS_CLONES void add_run(const float* x, std::int64_t count, ChannelPartial& partial) {
  double sums[kSumLanes] = {};
  std::uint32_t magnitudes[kSumLanes] = {};
  std::uint32_t finite_count[kSumLanes] = {};
  const auto visit = [&](std::int64_t at, int lanes) __attribute__((always_inline)) {
    for (int lane = 0; lane < lanes; ++lane) {
      const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(x[at + lane]) & 0x7fffffffU;
      const bool finite = magnitude < kInfinityBits;
      sums[lane] += static_cast<double>(finite ? x[at + lane] : 0.0F);
      magnitudes[lane] = std::max(magnitudes[lane], finite ? magnitude : 0U);
      finite_count[lane] += finite;
    }
  };
  const std::int64_t whole = count - count % kSumLanes;
  for (std::int64_t i = 0; i < whole; i += kSumLanes) visit(i, kSumLanes);
  visit(whole, static_cast<int>(count - whole));
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  partial.sum += sums[0];
  for (int lane = 0; lane < kSumLanes; ++lane) {
    partial.magnitude = std::max(partial.magnitude, magnitudes[lane]);
    partial.count += finite_count[lane];
  }
}

// One element each of `count` neighbouring channels, in arrays of their own.
HS_CLONES void add_columns(const float* x, std::int64_t count, double* __restrict sums,
                           std::uint32_t* __restrict magnitudes, std::uint64_t* __restrict counts) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(x[i]) & 0x7fffffffU;
    const bool finite = magnitude < kInfinityBits;
    sums[i] += static_cast<double>(finite ? x[i] : 0.0F);
    const std::uint32_t kept = finite ? magnitude : 0U;
    magnitudes[i] = magnitudes[i] > kept ? magnitudes[i] : kept;
    counts[i] += finite ? 1U : 0U;
  }
}

// What one task does: `count` channels from `first` on, in the rows begin .. end - 1 of `outer`.
struct ChannelTask {
  std::int64_t begin, end, first, count;
};

void add_channels(const TensorView& input, const ChannelShape& shape, const ChannelTask& task,
                  ChannelPartial* partials) {
  float buffer[kBlock];
  if (shape.inner == 1) {  // task.count <= kBlock
    const auto count = static_cast<std::size_t>(task.count);
    std::vector<double> sums(count);
    std::vector<std::uint32_t> magnitudes(count);
    std::vector<std::uint64_t> counts(count);
    for (std::int64_t row = task.begin; row < task.end; ++row) {
      const float* const x = load(input, row * shape.channels + task.first, task.count, buffer);
      add_columns(x, task.count, sums.data(), magnitudes.data(), counts.data());
    }
    for (std::size_t c = 0; c < count; ++c) partials[c] = {sums[c], counts[c], magnitudes[c]};
    return;
  }
  for (std::int64_t row = task.begin; row < task.end; ++row) {
    for (std::int64_t c = 0; c < task.count; ++c) {
      const std::int64_t start = (row * shape.channels + task.first + c) * shape.inner;
      for (std::int64_t at = 0; at < shape.inner; at += kBlock) {
        const std::int64_t count = std::min(kBlock, shape.inner - at);
        add_run(load(input, start + at, count, buffer), count, partials[c]);
      }
    }
  }
}

}  // namespace

RangeKeys range_keys(const TensorView& input, const Executor& executor) {
  const std::int64_t tasks = tasks_for(input.numel);
  std::array<RangeKeys, kMaxTasks> found{};
  run_tasks(tasks, executor, [&](std::int64_t task) {
    RangeKeys keys;  // not in the array, which tasks share
    for_blocks(input, task, tasks, [&](const float* x, std::int64_t count) { scan_keys(x, count, keys); });
    found[static_cast<std::size_t>(task)] = keys;
  });
  RangeKeys keys;
  for (const RangeKeys& of_task : found) {
    keys.lowest = std::min(keys.lowest, of_task.lowest);
    keys.highest = std::max(keys.highest, of_task.highest);
    keys.zeros += of_task.zeros;
    keys.non_finite += of_task.non_finite;
  }
  return keys;
}

void add_to_counts(const TensorView& input, int exponent, std::uint64_t* counts, const Executor& executor) {
  constexpr std::size_t kTable = kRangeBins + 1;  // the last one of what is not finite, which nobody reads
  constexpr std::int64_t kBlocksPerFlush = std::int64_t{1} << 19;  // 2^31 elements: a table counts in 32 bits
  std::mutex mutex;
  const std::int64_t tasks = tasks_for(input.numel);
  run_tasks(tasks, executor, [&](std::int64_t task) {
    std::vector<std::uint32_t> tables(kTables * kTable);
    std::uint32_t bins[kBlock];
    const auto flush = [&] {
      const std::lock_guard lock(mutex);
      for (std::size_t table = 0; table < kTables; ++table)
        for (std::size_t bin = 0; bin < kRangeBins; ++bin) counts[bin] += tables[table * kTable + bin];
      std::fill(tables.begin(), tables.end(), 0U);
    };
    std::int64_t blocks = 0;
    for_blocks(input, task, tasks, [&](const float* x, std::int64_t count) {
      find_bins(x, count, exponent, bins);
      std::int64_t i = 0;
      for (; i + kTables <= count; i += kTables)
        for (std::size_t table = 0; table < kTables; ++table)
          ++tables[table * kTable + bins[i + static_cast<std::int64_t>(table)]];
      for (; i < count; ++i) ++tables[bins[i]];
      if (++blocks % kBlocksPerFlush == 0) flush();
    });
    flush();
  });
}

void observe(const TensorView& input, RangeHistogram& histogram, const Executor& executor) {
  if (input.numel == 0) return;
  const RangeKeys keys = range_keys(input, executor);
  std::vector<std::uint64_t> counts(kRangeBins);
  const int exponent = RangeHistogram().exponent_with(keys);
  add_to_counts(input, exponent, counts.data(), executor);
  histogram.add_batch(keys, input.numel);
  histogram.add_counts(counts, exponent);
}

ChannelStatistics channel_statistics(const TensorView& input, const ChannelShape& shape, const Executor& executor) {
  HS_CHECK(shape.numel() == input.numel, "channel_statistics: ", input.numel, " elements, expected ", shape.outer,
           " x ", shape.channels, " x ", shape.inner);
  const std::int64_t channels = shape.channels;
  const std::int64_t inner = std::max<std::int64_t>(1, shape.inner);
  const std::int64_t block = std::clamp<std::int64_t>(kBlock / inner, 1, std::max<std::int64_t>(1, channels));
  const std::int64_t blocks = (channels + block - 1) / block;
  // Partials take memory: no more strips than fill the threads of a large machine.
  const std::int64_t wanted =
      std::min(shape.outer * block * inner / kElementsPerTask, kMaxTasks / std::max<std::int64_t>(1, blocks));
  const std::int64_t strips = std::clamp<std::int64_t>(wanted, 1, std::max<std::int64_t>(1, shape.outer));
  std::vector<ChannelPartial> partials(static_cast<std::size_t>(strips * channels));
  run_tasks(strips * blocks, executor, [&](std::int64_t index) {
    const std::int64_t strip = index / blocks;
    const std::int64_t first = index % blocks * block;
    add_channels(
        input, shape,
        {shape.outer * strip / strips, shape.outer * (strip + 1) / strips, first, std::min(block, channels - first)},
        partials.data() + strip * channels + first);
  });
  const auto size = static_cast<std::size_t>(channels);
  ChannelStatistics result{std::vector<float>(size), std::vector<double>(size), std::vector<std::uint64_t>(size)};
  for (std::size_t i = 0; i < partials.size(); ++i) {
    const ChannelPartial& partial = partials[i];
    const std::size_t c = i % size;
    result.max[c] = std::max(result.max[c], std::bit_cast<float>(partial.magnitude));
    result.sum[c] += partial.sum;
    result.count[c] += partial.count;
  }
  return result;
}

}  // namespace halfstep::cpu
