// Rows of a norm on the GPU, for the kernels that compute something of them. Contract: halfstep/norms.h.
//
// A warp or a block works on one row. It reads the row once with 16-byte loads and keeps it in registers; rows too long
// for that are read a second time, mostly from the L2 cache.
#pragma once

#include <cstdint>
#include <type_traits>

#include "halfstep/norms.h"
#include "pack.cuh"
#include "reduce.cuh"
#include "rows.cuh"

namespace halfstep::cuda {

// How a row is divided: kThreads threads (a warp, or a block), each of which holds `hold` packs of kWidth elements of
// it; with none held the row is read again, by groups of kUnroll packs.
constexpr int kUnroll = 4;

template <int width, int threads, int hold>
struct Layout {
  static constexpr int kWidth = width;
  static constexpr int kThreads = threads;
  static constexpr bool kHeld = hold > 0;
  static constexpr int kGroup = kHeld ? hold : kUnroll;
  static constexpr int kBlock = kRowBlock<threads>;

  // Calls visit(base) for the groups of packs base, base + kThreads, ... that this thread works on.
  template <class Visit>
  static __device__ void for_groups(std::int64_t packs, const Visit& visit) {
    const std::int64_t lane = threadIdx.x % kThreads;
    if constexpr (kHeld) {
      visit(lane);
    } else {
      for (std::int64_t base = lane; base < packs; base += kThreads * kGroup) visit(base);
    }
  }
};

// How the weights or biases of the elements col .. col + kWidth - 1 of a row are found; `neutral` without any.
struct Neutral {
  template <int kWidth>
  static __device__ void fill(float neutral, float (&values)[kWidth]) {
#pragma unroll
    for (float& value : values) value = neutral;
  }
};

// One for each element of a row, stored as Stored: layer norm and RMS norm.
template <class Stored>
struct ByColumn : Neutral {
  template <int kWidth>
  static __device__ void load(const TensorView& view, const NormShape&, std::int64_t, std::int64_t col, float neutral,
                              float (&values)[kWidth]) {
    if (!view.data) return fill(neutral, values);
    const auto pack = load_pack<Stored, kWidth>(view.data, col);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) values[e] = widen_device(pack.elements[e]);
  }
};

// One for the pack, whose elements are of the same channel: group norm on images, and everything by packs of one.
struct ByPack : Neutral {
  template <int kWidth>
  static __device__ void load(const TensorView& view, const NormShape& shape, std::int64_t row, std::int64_t col,
                              float neutral, float (&values)[kWidth]) {
    if (!view.data) return fill(neutral, values);
    const std::int64_t channel = row % shape.groups * shape.channels + col / shape.spatial;
    float value;
    with_storage(view.dtype, [&](auto storage) {
      value = widen_device(static_cast<const decltype(storage)*>(view.data)[channel]);
    });
    fill(value, values);
  }
};

// Elements of one thread, and their sum and sum of squares about their own mean.
struct Moments {
  float count = 0.0F;
  float mean = 0.0F;
  float squares = 0.0F;

  __device__ void merge(const Moments& other) {
    const float total = count + other.count;
    const float delta = other.mean - mean;
    const float share = other.count / total;
    mean += delta * share;
    squares += other.squares + delta * delta * count * share;
    count = total;
  }
};

// One row of a forward pass, of which this thread reads its share. All kernels compute it here, so that they give the
// same bits for the same Layout. The constructor takes the statistics; all threads of the row call it.
template <class Storage, class Layout, class Parameters>
class NormRow {
  static constexpr int kWidth = Layout::kWidth;
  static constexpr int kGroup = Layout::kGroup;
  static constexpr int kThreads = Layout::kThreads;

 public:
  __device__ NormRow(const NormForward& call, std::int64_t row)
      : call_(call), row_(row), cols_(call.shape.cols()), packs_(cols_ / kWidth) {
    // 1. What each thread has read: about its own mean, or about 0.
    Moments own;
    Layout::for_groups(packs_, [&](std::int64_t base) {
      load(base);
      Moments group;
      for_elements(base, [&](float value) {
        group.count += 1.0F;
        group.mean += value;
      });
      if (group.count == 0.0F) return;
      group.mean = call_.center ? group.mean / group.count : 0.0F;
      float rest = 0.0F;  // what rounding has left of the sum about the mean
      for_elements(base, [&](float value) {
        const float away = value - group.mean;
        rest += away;
        group.squares += away * away;
      });
      if (call_.center) {
        group.mean += rest / group.count;
        group.squares -= rest * rest / group.count;
      }
      own.merge(group);
    });
    // 2. The row's: a first mean, then its error and the squares about it.
    const auto n = static_cast<float>(cols_ > 0 ? cols_ : 1);
    if (call_.center) mean_ = reduce_row<kThreads>(own.count * own.mean, Add{}, 0.0F) / n;
    const float away = own.mean - mean_;
    const float2 sums = reduce_row<kThreads>(float2{own.count * away, own.squares + own.count * away * away}, Add{},
                                             float2{0.0F, 0.0F});
    const float error = call_.center ? sums.x / n : 0.0F;
    mean_ += error;
    const float variance = sums.y / n - error * error;  // below 0 by rounding alone; a NaN stays
    rstd_ = rsqrtf((variance < 0.0F ? 0.0F : variance) + static_cast<float>(call_.eps));
    if (threadIdx.x % kThreads == 0) {
      if (call_.center && call_.mean) call_.mean[row_] = mean_;
      if (call_.rstd) call_.rstd[row_] = rstd_;
    }
  }

  // visit(at, results of the elements at .. at + kWidth - 1 before they are rounded) for the thread's share of the row;
  // it can be called again.
  template <class Visit>
  __device__ void for_results(const Visit& visit) {
    Layout::for_groups(packs_, [&](std::int64_t base) {
      if constexpr (!Layout::kHeld) load(base);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const std::int64_t col = (base + k * kThreads) * kWidth;
        if (col >= cols_) break;
        float weight[kWidth];
        float bias[kWidth];
        Parameters::load(call_.weight, call_.shape, row_, col, 1.0F, weight);
        Parameters::load(call_.bias, call_.shape, row_, col, 0.0F, bias);
        float out[kWidth];
        // Fused by hand: left to the compiler, another kernel could round otherwise.
#pragma unroll
        for (int e = 0; e < kWidth; ++e)
          out[e] = __fmaf_rn(__fmul_rn(widen_device(x_[k].elements[e]) - mean_, rstd_), weight[e], bias[e]);
        visit(row_ * cols_ + col, out);
      }
    });
  }

 private:
  __device__ void load(std::int64_t base) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k)
      if (base + k * kThreads < packs_)
        x_[k] = load_pack<Storage, kWidth>(call_.input.data, row_ * cols_ + (base + k * kThreads) * kWidth);
  }
  template <class Visit>
  __device__ void for_elements(std::int64_t base, const Visit& visit) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (base + k * kThreads < packs_) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) visit(widen_device(x_[k].elements[e]));
      }
    }
  }

  const NormForward& call_;
  const std::int64_t row_;
  const std::int64_t cols_;
  const std::int64_t packs_;
  float mean_ = 0.0F;
  float rstd_;
  Pack<Storage, kWidth> x_[kGroup];
};

// Packs that a thread of a warp holds of a row in the forward pass.
constexpr int kHoldOfForward = 8;

inline bool by_column(const NormShape& shape) {
  return shape.spatial == 1 && shape.groups == 1;
}

// Calls run(Layout, Parameters) with those for the rows of `shape`; parameters are absent or of one dtype each.
template <class Storage, int kHoldOfWarp, class Run>
void with_layout(const NormShape& shape, bool aligned, const TensorView& weight, const TensorView& bias,
                 const Run& run) {
  constexpr int kWidth = 16 / sizeof(Storage);
  const std::int64_t cols = shape.cols();
  const auto narrow = [&] {
    if (cols <= 1024) return run(Layout<1, kWarp, 0>{}, ByPack{});
    return run(Layout<1, 512, 0>{}, ByPack{});
  };
  const auto wide = [&](auto parameters) {
    const std::int64_t packs = cols / kWidth;
    if (packs <= kWarp * kHoldOfWarp) return run(Layout<kWidth, kWarp, kHoldOfWarp>{}, parameters);
    if (packs <= 256 * 4) return run(Layout<kWidth, 256, 4>{}, parameters);
    return run(Layout<kWidth, 512, 0>{}, parameters);
  };
  if (!aligned || cols % kWidth != 0) return narrow();
  if (!by_column(shape)) return shape.spatial % kWidth == 0 ? wide(ByPack{}) : narrow();
  const auto are = [&](DType dtype) {
    return (!weight.data || weight.dtype == dtype) && (!bias.data || bias.dtype == dtype);
  };
  if (are(DType::kFloat32)) return wide(ByColumn<float>{});
  constexpr DType kOwn = std::is_same_v<Storage, Half> ? DType::kFloat16 : DType::kBFloat16;
  if constexpr (!std::is_same_v<Storage, float>)
    if (are(kOwn)) return wide(ByColumn<Storage>{});
  return narrow();
}

}  // namespace halfstep::cuda
