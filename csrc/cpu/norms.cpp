// The norms on the CPU. Contract: halfstep/norms.h.
//
// A row passes through a buffer of kBlock float32 elements, which holds most rows whole; longer ones are read again.
// Sums of a block go to kLanes interleaved float32 sums, whatever the vector width, and on in float64 in a fixed order.
// The gradients of weight and bias are summed by strips of samples, at most kStrips, which are then added in order.
#include "halfstep/norms.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "clones.h"
#include "convert.h"
#include "lanes.h"
#include "norm_rows.h"

namespace halfstep::cpu {
namespace {

constexpr std::int64_t kBlock = kNormBlock;
constexpr std::int64_t kElementsPerTask = 16384;
constexpr std::int64_t kStrips = 64;

struct Sums {
  double first = 0.0;
  double second = 0.0;
};

// Adds pair(i) = {a, b} over i < count, in lanes. Inlined, or it would be compiled for the oldest instruction set only.
template <class Pair>
[[gnu::always_inline]] inline Sums sum_lanes(std::int64_t count, const Pair& pair) {
  float first[kLanes] = {};
  float second[kLanes] = {};
  const auto visit = [&](std::int64_t begin, int lanes) __attribute__((always_inline)) {
    for (int lane = 0; lane < lanes; ++lane) {
      float a = 0.0F;
      float b = 0.0F;
      pair(begin + lane, a, b);
      first[lane] += a;
      second[lane] += b;
    }
  };
  const std::int64_t whole = count - count % kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) visit(i, kLanes);
  visit(whole, static_cast<int>(count - whole));
  return {add_lanes(first), add_lanes(second)};
}

// Of x - center, and of its square.
HS_CLONES Sums sums_about(float center, const float* x, std::int64_t count) {
  return sum_lanes(count, [&](std::int64_t i, float& a, float& b) __attribute__((always_inline)) {
    a = x[i] - center;
    b = a * a;
  });
}

// Of g = grad * weight, and of g * h.
HS_CLONES Sums gradient_sums(const float* grad, const float* weight, const float* h, std::int64_t count) {
  if (!weight) {
    return sum_lanes(count, [&](std::int64_t i, float& a, float& b) __attribute__((always_inline)) {
      a = grad[i];
      b = a * h[i];
    });
  }
  return sum_lanes(count, [&](std::int64_t i, float& a, float& b) __attribute__((always_inline)) {
    a = grad[i] * weight[i];
    b = a * h[i];
  });
}

HS_CLONES double sum(const float* x, std::int64_t count) {
  float lanes[kLanes] = {};
  const std::int64_t whole = count - count % kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane];
  for (std::int64_t i = whole; i < count; ++i) lanes[i - whole] += x[i];
  return add_lanes(lanes);
}

HS_CLONES void standardize(float* x, std::int64_t count, float mean, float rstd) {
  for (std::int64_t i = 0; i < count; ++i) x[i] = (x[i] - mean) * rstd;
}
// standardize(), multiply() and add() in one pass, rounded as in three.
HS_CLONES void standardize_affine(float* __restrict x, const float* __restrict factor, const float* __restrict term,
                                  std::int64_t count, float mean, float rstd) {
  for (std::int64_t i = 0; i < count; ++i) x[i] = (x[i] - mean) * rstd * factor[i] + term[i];
}
HS_CLONES void multiply(float* x, const float* factor, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] *= factor[i];
}
HS_CLONES void add(float* x, const float* term, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] += term[i];
}
HS_CLONES void add_product(float* x, const float* a, const float* b, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] += a[i] * b[i];
}
HS_CLONES void add_wide(double* x, const float* term, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] += static_cast<double>(term[i]);
}
// grad = rstd * (grad - mean_g - h * mean_gh), for a grad that was multiplied by the weight already.
HS_CLONES void finish_gradient(float* grad, const float* h, std::int64_t count, float rstd, float mean_g,
                               float mean_gh) {
  for (std::int64_t i = 0; i < count; ++i) grad[i] = rstd * (grad[i] - mean_g - h[i] * mean_gh);
}

struct Moments {
  double count = 0.0;
  double mean = 0.0;
  double squares = 0.0;  // about the mean

  void merge(const Moments& other) {
    const double total = count + other.count;
    const double delta = other.mean - mean;
    mean += delta * other.count / total;
    squares += other.squares + delta * delta * count * other.count / total;
    count = total;
  }
};

// About 0 if not `center`: then the mean stays 0 in every merge.
Moments moments(const float* x, std::int64_t count, bool center) {
  const auto n = static_cast<double>(count);
  if (!center) return {n, 0.0, sums_about(0.0F, x, count).second};
  const auto near = static_cast<float>(sum(x, count) / n);
  const Sums shifted = sums_about(near, x, count);
  const double squares = shifted.second - shifted.first * shifted.first / n;
  return {n, near + shifted.first / n, squares < 0.0 ? 0.0 : squares};  // below 0 by rounding alone; a NaN stays
}

void run_tasks(const NormShape& shape, std::int64_t tasks, const Executor& executor,
               const std::function<void(std::int64_t)>& task) {
  if (shape.rows * shape.cols() <= 2 * kElementsPerTask) {  // not worth waking a thread
    SerialExecutor().for_each(tasks, task);
  } else {
    executor.for_each(tasks, task);
  }
}

// The sums of weight and bias gradients of one row, added to [channels] each; null ones are left out.
void add_parameter_gradients(const NormShape& shape, const float* grad, const float* h, std::int64_t begin,
                             std::int64_t count, float* grad_weight, float* grad_bias) {
  if (shape.spatial == 1) {
    if (grad_weight) add_product(grad_weight + begin, grad, h, count);
    if (grad_bias) add(grad_bias + begin, grad, count);
    return;
  }
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t channel = (begin + i) / shape.spatial;
    const std::int64_t end = std::min(count, (channel + 1) * shape.spatial - begin);
    const Sums sums = gradient_sums(grad + i, nullptr, h + i, end - i);
    if (grad_weight) grad_weight[channel] += static_cast<float>(sums.second);
    if (grad_bias) grad_bias[channel] += static_cast<float>(sums.first);
    i = end;
  }
}

void backward_row(const NormBackward& call, const NormParameters& weight, std::int64_t row, float* grad_weight,
                  float* grad_bias) {
  const std::int64_t cols = call.shape.cols();
  const float mean = call.center ? call.mean[row] : 0.0F;
  const float rstd = call.rstd[row];
  float h[kBlock];
  float grad[kBlock];
  float scratch[kBlock];
  const auto load = [&](std::int64_t begin, std::int64_t count) {
    widen_run(call.input.dtype, call.input.data, row * cols + begin, count, h);
    widen_run(call.grad_out.dtype, call.grad_out.data, row * cols + begin, count, grad);
    standardize(h, count, mean, rstd);
  };
  Sums total;
  for_norm_blocks(cols, [&](std::int64_t begin, std::int64_t count) {
    load(begin, count);
    add_parameter_gradients(call.shape, grad, h, begin, count, grad_weight, grad_bias);
    if (!call.grad_input) return;
    const Sums sums = gradient_sums(grad, weight.block(row, begin, count, scratch), h, count);
    total.first += sums.first;
    total.second += sums.second;
  });
  if (!call.grad_input) return;
  const auto n = static_cast<double>(cols);
  const auto mean_g = call.center ? static_cast<float>(total.first / n) : 0.0F;
  const auto mean_gh = static_cast<float>(total.second / n);
  for_norm_blocks(cols, [&](std::int64_t begin, std::int64_t count) {
    if (cols > kBlock) load(begin, count);
    if (const float* const w = weight.block(row, begin, count, scratch)) multiply(grad, w, count);
    finish_gradient(grad, h, count, rstd, mean_g, mean_gh);
    narrow_run(call.input.dtype, grad, count, call.grad_input, row * cols + begin);
  });
}

// result[i] = sum over strips of partials[strip][i].
void add_strips(const std::vector<float>& partials, std::int64_t strips, std::int64_t size, float* result,
                const Executor& executor) {
  executor.for_each((size + kBlock - 1) / kBlock, [&](std::int64_t block) {
    const std::int64_t begin = block * kBlock;
    const std::int64_t count = std::min(kBlock, size - begin);
    double sums[kBlock] = {};
    for (std::int64_t strip = 0; strip < strips; ++strip) add_wide(sums, partials.data() + strip * size + begin, count);
    for (std::int64_t i = 0; i < count; ++i) result[begin + i] = static_cast<float>(sums[i]);
  });
}

}  // namespace

NormParameters::NormParameters(const TensorView& view, const NormShape& shape) : shape_(shape) {
  if (!view.data) return;
  values_.resize(static_cast<std::size_t>(shape.parameters()));
  widen_run(view.dtype, view.data, 0, shape.parameters(), values_.data());
}

const float* NormParameters::block(std::int64_t row, std::int64_t begin, std::int64_t count, float* scratch) const {
  if (values_.empty()) return nullptr;
  const float* const of_row = values_.data() + row % shape_.groups * shape_.channels;
  if (shape_.spatial == 1) return of_row + begin;
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t channel = (begin + i) / shape_.spatial;
    const std::int64_t end = std::min(count, (channel + 1) * shape_.spatial - begin);
    std::fill(scratch + i, scratch + end, of_row[channel]);
    i = end;
  }
  return scratch;
}

NormRows::NormRows(const NormForward& call)
    : call_(call), weight_(call.weight, call.shape), bias_(call.bias, call.shape) {}

RowStatistics NormRows::statistics(std::int64_t row, float* x) const {
  const std::int64_t cols = call_.shape.cols();
  Moments total;
  for_norm_blocks(cols, [&](std::int64_t begin, std::int64_t count) {
    widen_run(call_.input.dtype, call_.input.data, row * cols + begin, count, x);
    total.merge(moments(x, count, call_.center));
  });
  const double variance = cols > 0 ? total.squares / total.count : 0.0;
  const RowStatistics found{static_cast<float>(total.mean), static_cast<float>(1.0 / std::sqrt(variance + call_.eps))};
  if (call_.center && call_.mean) call_.mean[row] = found.mean;
  if (call_.rstd) call_.rstd[row] = found.rstd;
  return found;
}

void NormRows::results(const RowStatistics& of_row, std::int64_t row, std::int64_t begin, std::int64_t count,
                       bool loaded, float* x) const {
  if (!loaded) widen_run(call_.input.dtype, call_.input.data, row * call_.shape.cols() + begin, count, x);
  float scratch[kBlock];
  if (call_.weight.data && call_.bias.data && call_.shape.spatial == 1) {
    return standardize_affine(x, weight_.block(row, begin, count, scratch), bias_.block(row, begin, count, scratch),
                              count, of_row.mean, of_row.rstd);
  }
  standardize(x, count, of_row.mean, of_row.rstd);
  if (const float* const w = weight_.block(row, begin, count, scratch)) multiply(x, w, count);
  if (const float* const b = bias_.block(row, begin, count, scratch)) add(x, b, count);
}

void NormRows::for_each(const Executor& executor, const std::function<void(std::int64_t)>& visit) const {
  const NormShape& shape = call_.shape;
  const std::int64_t rows_per_task =
      std::max<std::int64_t>(1, kElementsPerTask / std::max<std::int64_t>(1, shape.cols()));
  run_tasks(shape, (shape.rows + rows_per_task - 1) / rows_per_task, executor, [&](std::int64_t task) {
    const std::int64_t end = std::min(shape.rows, (task + 1) * rows_per_task);
    for (std::int64_t row = task * rows_per_task; row < end; ++row) visit(row);
  });
}

void normalize(const NormForward& call, const Executor& executor) {
  const NormRows rows(call);
  const std::int64_t cols = call.shape.cols();
  rows.for_each(executor, [&](std::int64_t row) {
    float x[kBlock];
    const RowStatistics of_row = rows.statistics(row, x);
    for_norm_blocks(cols, [&](std::int64_t begin, std::int64_t count) {
      rows.results(of_row, row, begin, count, /*loaded=*/cols <= kBlock, x);
      narrow_run(call.out.dtype, x, count, call.out.data, row * cols + begin);
    });
  });
}

void normalize_backward(const NormBackward& call, const Executor& executor) {
  const NormShape& shape = call.shape;
  const std::int64_t samples = shape.samples();
  const std::int64_t strips = std::min(kStrips, samples);
  const auto partial_count = static_cast<std::size_t>(strips * shape.parameters());
  std::vector<float> weights(call.grad_weight ? partial_count : 0);
  std::vector<float> biases(call.grad_bias ? partial_count : 0);
  const NormParameters weight(call.weight, shape);
  // One task per strip and group: no two of them add to the same place.
  run_tasks(shape, strips * shape.groups, executor, [&](std::int64_t task) {
    const std::int64_t strip = task / shape.groups;
    const std::int64_t group = task % shape.groups;
    const std::int64_t offset = strip * shape.parameters() + group * shape.channels;
    for (std::int64_t sample = samples * strip / strips; sample < samples * (strip + 1) / strips; ++sample) {
      backward_row(call, weight, sample * shape.groups + group, call.grad_weight ? weights.data() + offset : nullptr,
                   call.grad_bias ? biases.data() + offset : nullptr);
    }
  });
  if (call.grad_weight) add_strips(weights, strips, shape.parameters(), call.grad_weight, executor);
  if (call.grad_bias) add_strips(biases, strips, shape.parameters(), call.grad_bias, executor);
}

}  // namespace halfstep::cpu
