// Cross entropy on the CPU. Contract: halfstep/cross_entropy.h.
//
// A row passes through a buffer of kBlock float32 logits. Sums of a block go to kLanes interleaved float32 sums,
// whatever the vector width, and on in float64 in a fixed order. Blocks are summed about their own maximum and then
// brought to the row's.
#include "halfstep/cross_entropy.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "clones.h"
#include "convert.h"
#include "halfstep/status.h"
#include "lanes.h"

namespace halfstep::cpu {
namespace {

constexpr std::int64_t kBlock = 4096;
constexpr std::int64_t kElementsPerTask = 16384;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// exp(x) for x <= 0 within 2 units in the last place; NaN stays, and below the smallest normal number it is 0. As
// Cephes does it: x = n ln 2 + r, a polynomial for exp(r), and n into the exponent.
[[gnu::always_inline]] inline float exp_lane(float x) {
  constexpr float kLowest = -87.33654F;  // exp of it is 2^-126
  constexpr float kRound = 0x1.8p23F;    // adding it leaves the nearest integer in the low bits
  const float bounded = x < kLowest ? kLowest : x;
  const float shifted = bounded * 1.44269504F + kRound;
  const float n = shifted - kRound;
  const float r = (bounded - n * 0.693359375F) - n * -2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  const std::uint32_t exponent = (std::bit_cast<std::uint32_t>(shifted) - std::bit_cast<std::uint32_t>(kRound) + 127U);
  const float result = p * std::bit_cast<float>(exponent << 23);
  return x < kLowest ? 0.0F : result;
}

HS_CLONES float maximum(const float* x, std::int64_t count) {
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -kInfinity);
  const std::int64_t whole = count - count % kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
  for (std::int64_t i = whole; i < count; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  return *std::max_element(lanes, lanes + kLanes);
}

template <class Term>
[[gnu::always_inline]] inline double sum_lanes(std::int64_t count, const Term& term) {
  float lanes[kLanes] = {};
  const std::int64_t whole = count - count % kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  for (std::int64_t i = whole; i < count; ++i) lanes[i - whole] += term(i);
  return add_lanes(lanes);
}

HS_CLONES double sum_of_exponentials(const float* x, std::int64_t count, float about) {
  return sum_lanes(count, [&](std::int64_t i) __attribute__((always_inline)) { return exp_lane(x[i] - about); });
}
// Of w * (x - about), with w = 1 if null.
HS_CLONES double weighted_sum(const float* x, const float* weight, std::int64_t count, float about) {
  if (!weight) return sum_lanes(count, [&](std::int64_t i) __attribute__((always_inline)) { return x[i] - about; });
  return sum_lanes(count, [&](std::int64_t i) __attribute__((always_inline)) { return weight[i] * (x[i] - about); });
}

// x = p * exp(x - lse) - q * weight, with weight = 1 if null.
HS_CLONES void gradient_run(float* x, const float* weight, std::int64_t count, float lse, float p, float q) {
  if (weight) {
    for (std::int64_t i = 0; i < count; ++i) x[i] = p * exp_lane(x[i] - lse) - q * weight[i];
  } else {
    for (std::int64_t i = 0; i < count; ++i) x[i] = p * exp_lane(x[i] - lse) - q;
  }
}

template <class Visit>
void for_blocks(std::int64_t classes, const Visit& visit) {
  for (std::int64_t begin = 0; begin < classes; begin += kBlock) visit(begin, std::min(kBlock, classes - begin));
}

void for_rows(const CrossEntropy& call, const Executor& executor, const std::function<void(std::int64_t)>& visit) {
  const std::int64_t rows_per_task =
      std::max<std::int64_t>(1, kElementsPerTask / std::max<std::int64_t>(1, call.classes));
  const auto task = [&](std::int64_t i) {
    const std::int64_t end = std::min(call.rows, (i + 1) * rows_per_task);
    for (std::int64_t row = i * rows_per_task; row < end; ++row) visit(row);
  };
  const std::int64_t tasks = (call.rows + rows_per_task - 1) / rows_per_task;
  if (call.rows * call.classes <= 2 * kElementsPerTask) {  // not worth waking a thread
    SerialExecutor().for_each(tasks, task);
  } else {
    executor.for_each(tasks, task);
  }
}

void check_targets(const CrossEntropy& call) {
  for (std::int64_t row = 0; row < call.rows; ++row) {
    const std::int64_t target = call.targets[row];
    HS_CHECK(target == call.ignore_index || (target >= 0 && target < call.classes), "Target ", target,
             " is out of bounds. (cross_entropy: row ", row, ", expected 0 to ", call.classes - 1,
             " or the ignore_index ", call.ignore_index, ")");
  }
}

float logit(const CrossEntropy& call, std::int64_t row, std::int64_t column) {
  float value = 0.0F;
  widen_run(call.logits.dtype, call.logits.data, row * call.classes + column, 1, &value);
  return value;
}

double weight_of(const CrossEntropy& call, std::int64_t target) {
  return call.weight ? static_cast<double>(call.weight[target]) : 1.0;
}

// Writes lse and returns the loss of one row.
double run_row(const CrossEntropy& call, std::int64_t row, double sum_of_weights, float* lse) {
  const std::int64_t target = call.targets[row];
  *lse = 0.0F;
  if (target == call.ignore_index) return 0.0;
  const float at_target = logit(call, row, target);
  const float about = std::isfinite(at_target) ? at_target : 0.0F;
  float x[kBlock];
  double largest = -kInfinity;
  double sum = 0.0;  // of exp(x - largest)
  double weighted = 0.0;
  for_blocks(call.classes, [&](std::int64_t begin, std::int64_t count) {
    widen_run(call.logits.dtype, call.logits.data, row * call.classes + begin, count, x);
    if (call.label_smoothing > 0.0)
      weighted += weighted_sum(x, call.weight ? call.weight + begin : nullptr, count, about);
    const float block_largest = maximum(x, count);
    // Of a block of -inf alone nothing is added, but a NaN in it shows.
    const double block_sum = sum_of_exponentials(x, count, block_largest == -kInfinity ? 0.0F : block_largest);
    if (block_sum == 0.0) return;
    const double both = std::max(largest, static_cast<double>(block_largest));
    sum = (sum == 0.0 ? 0.0 : sum * std::exp(largest - both)) + block_sum * std::exp(block_largest - both);
    largest = both;
  });
  const double log_sum = std::log(sum);
  *lse = static_cast<float>(largest + log_sum);
  const double own = weight_of(call, target) * ((largest - at_target) + log_sum);
  if (call.label_smoothing == 0.0) return own;
  const double others = sum_of_weights * ((largest - about) + log_sum) - weighted;
  return (1.0 - call.label_smoothing) * own + call.label_smoothing / static_cast<double>(call.classes) * others;
}

}  // namespace

void cross_entropy(const CrossEntropy& call, const CrossEntropyOutputs& out, const Executor& executor) {
  check_targets(call);
  double sum_of_weights = static_cast<double>(call.classes);
  if (call.weight) {
    sum_of_weights = 0.0;
    for (std::int64_t c = 0; c < call.classes; ++c) sum_of_weights += static_cast<double>(call.weight[c]);
  }
  std::vector<double> losses(static_cast<std::size_t>(call.rows));
  for_rows(call, executor, [&](std::int64_t row) {
    losses[static_cast<std::size_t>(row)] = run_row(call, row, sum_of_weights, out.lse + row);
  });
  double loss = 0.0;
  double total = 0.0;
  for (std::int64_t row = 0; row < call.rows; ++row) {
    loss += losses[static_cast<std::size_t>(row)];
    if (call.targets[row] != call.ignore_index) total += weight_of(call, call.targets[row]);
  }
  out.totals[0] = static_cast<float>(total);
  out.totals[1] = static_cast<float>(sum_of_weights);
  if (call.reduction == LossReduction::kNone) {
    std::transform(losses.begin(), losses.end(), out.loss, [](double x) { return static_cast<float>(x); });
  } else {
    *out.loss = static_cast<float>(call.reduction == LossReduction::kMean ? loss / total : loss);
  }
}

void cross_entropy_backward(const CrossEntropy& call, const CrossEntropyGradient& gradient, const Executor& executor) {
  check_targets(call);
  const auto smoothing = static_cast<float>(call.label_smoothing);
  const float share = smoothing / static_cast<float>(call.classes);
  for_rows(call, executor, [&](std::int64_t row) {
    const std::int64_t target = call.targets[row];
    float x[kBlock];
    if (target == call.ignore_index) {
      std::fill_n(x, kBlock, 0.0F);
      for_blocks(call.classes, [&](std::int64_t begin, std::int64_t count) {
        narrow_run(call.logits.dtype, x, count, gradient.grad_logits, row * call.classes + begin);
      });
      return;
    }
    float scale = call.reduction == LossReduction::kNone ? gradient.grad_loss[row] : *gradient.grad_loss;
    if (call.reduction == LossReduction::kMean) scale /= gradient.totals[0];
    const float own = scale * (1.0F - smoothing) * static_cast<float>(weight_of(call, target));
    const float q = scale * share;
    const float p = own + q * gradient.totals[1];
    for_blocks(call.classes, [&](std::int64_t begin, std::int64_t count) {
      widen_run(call.logits.dtype, call.logits.data, row * call.classes + begin, count, x);
      gradient_run(x, call.weight ? call.weight + begin : nullptr, count, gradient.lse[row], p, q);
      if (target >= begin && target < begin + count) x[target - begin] -= own;
      narrow_run(call.logits.dtype, x, count, gradient.grad_logits, row * call.classes + begin);
    });
  });
}

}  // namespace halfstep::cpu
