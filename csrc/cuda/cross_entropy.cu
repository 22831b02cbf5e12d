// Cross entropy on the GPU. Contract: halfstep/cross_entropy.h.
//
// A warp or a block works on one row, with 16-byte loads between a head and a tail of single elements: with an odd
// number of classes most rows start off a 16-byte boundary. Forward leaves one loss per row; one block adds them up.
//
// Limit: the bytes of the logits over the memory bandwidth, and twice that for backward, which writes as much.
#undef NDEBUG  // the assertion on targets stays in release builds, as torch's does

#include <cassert>

#include "halfstep/cross_entropy.h"
#include "pack.cuh"
#include "reduce.cuh"
#include "rows.cuh"
#include "try.h"

namespace halfstep::cuda {
namespace {

constexpr int kUnroll = 4;  // independent 16-byte loads in flight per thread
constexpr int kTotalsThreads = 1024;

// The hardware's exponential, 2 units in the last place near 0, is finer than half precision by far.
template <class Storage>
__device__ float exponential(float x) {
  return sizeof(Storage) == 2 ? __expf(x) : expf(x);
}

// A row between 16-byte boundaries: elements [0, head), then packs, then [tail, count).
template <class Storage>
struct Split {
  static constexpr int kWidth = 16 / sizeof(Storage);
  std::int64_t head;
  std::int64_t packs;
  std::int64_t tail;

  __device__ Split(const Storage* data, std::int64_t count) {
    const auto misaligned = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(data) % 16 / sizeof(Storage));
    head = min(count, misaligned == 0 ? 0 : kWidth - misaligned);
    packs = (count - head) / kWidth;
    tail = head + packs * kWidth;
  }
};

// The running maximum of what a thread has read, and the sum of exponentials about it.
template <class Storage>
struct Online {
  float largest = -INFINITY;
  float sum = 0.0F;

  // While all is -inf any shift will do, and 0 leaves no NaN.
  __device__ float shift() const { return largest == -INFINITY ? 0.0F : largest; }

  // Before values whose largest is `candidate` are added.
  __device__ void raise(float candidate) {
    if (candidate <= largest) return;
    sum *= exponential<Storage>(largest - candidate);
    largest = candidate;
  }
  __device__ void add(float value) { sum += exponential<Storage>(value - shift()); }
};

template <class Storage, int kThreads>
__global__ __launch_bounds__(kRowBlock<kThreads>) void forward_kernel(const __grid_constant__ CrossEntropy call,
                                                                      float* losses, float* lse) {
  constexpr int kWidth = Split<Storage>::kWidth;
  const auto smoothing = static_cast<float>(call.label_smoothing);
  const int lane = static_cast<int>(threadIdx.x) % kThreads;
  for_rows<kThreads>(call.rows, [&](std::int64_t row) {
    const std::int64_t target = call.targets[row];
    if (target == call.ignore_index) {
      if (lane == 0) losses[row] = lse[row] = 0.0F;
      return;
    }
    assert(target >= 0 && target < call.classes);
    const auto* const x = static_cast<const Storage*>(call.logits.data) + row * call.classes;
    const float at_target = widen_device(x[target]);
    const float about = isfinite(at_target) ? at_target : 0.0F;
    const Split<Storage> split(x, call.classes);
    Online<Storage> online;
    float2 smooth{0.0F, 0.0F};  // sums of w * (x - about) and of w
    const auto weigh = [&](std::int64_t column, float value) {
      const float weight = call.weight ? call.weight[column] : 1.0F;
      smooth.x += weight * (value - about);
      smooth.y += weight;
    };
    const auto add_one = [&](std::int64_t column) {
      const float value = widen_device(x[column]);
      online.raise(value);
      online.add(value);
      if (smoothing > 0.0F) weigh(column, value);
    };

    for (std::int64_t i = lane; i < split.head; i += kThreads) add_one(i);
    for (std::int64_t base = lane; base < split.packs; base += kThreads * kUnroll) {
      Pack<Storage, kWidth> packs[kUnroll];
      float largest = -INFINITY;
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const std::int64_t i = base + k * kThreads;
        if (i < split.packs) packs[k] = load_pack<Storage, kWidth>(x, split.head + i * kWidth);
      }
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        if (base + k * kThreads >= split.packs) break;
#pragma unroll
        for (const Storage& element : packs[k].elements) largest = fmaxf(largest, widen_device(element));
      }
      online.raise(largest);
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        if (base + k * kThreads >= split.packs) break;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) online.add(widen_device(packs[k].elements[e]));
        if (smoothing > 0.0F) {
          const std::int64_t first = split.head + (base + k * kThreads) * kWidth;
#pragma unroll
          for (int e = 0; e < kWidth; ++e) weigh(first + e, widen_device(packs[k].elements[e]));
        }
      }
    }
    for (std::int64_t i = split.tail + lane; i < call.classes; i += kThreads) add_one(i);

    const float largest = reduce_row<kThreads>(online.largest, Max{}, -INFINITY);
    online.raise(largest);
    const float log_sum = logf(reduce_row<kThreads>(online.sum, Add{}, 0.0F));
    if (smoothing > 0.0F) smooth = reduce_row<kThreads>(smooth, Add{}, float2{0.0F, 0.0F});
    if (lane != 0) return;
    lse[row] = largest + log_sum;
    float loss = (call.weight ? call.weight[target] : 1.0F) * ((largest - at_target) + log_sum);
    if (smoothing > 0.0F) {
      const float others = smooth.y * ((largest - about) + log_sum) - smooth.x;
      loss = (1.0F - smoothing) * loss + smoothing / static_cast<float>(call.classes) * others;
    }
    losses[row] = loss;
  });
}

// One block: the loss from those of the rows, and the totals.
__global__ __launch_bounds__(kTotalsThreads) void totals_kernel(const __grid_constant__ CrossEntropy call,
                                                                const float* losses, float* loss, float* totals) {
  double sum = 0.0;
  double total = 0.0;
  for (std::int64_t row = threadIdx.x; row < call.rows; row += kTotalsThreads) {
    sum += losses[row];
    const std::int64_t target = call.targets[row];
    if (target != call.ignore_index) total += call.weight ? call.weight[target] : 1.0F;
  }
  sum = reduce_block(sum, Add{}, 0.0);
  total = reduce_block(total, Add{}, 0.0);
  double weights = 0.0;
  for (std::int64_t i = threadIdx.x; call.weight && i < call.classes; i += kTotalsThreads) weights += call.weight[i];
  weights = reduce_block(weights, Add{}, 0.0);
  if (threadIdx.x != 0) return;
  totals[0] = static_cast<float>(total);
  totals[1] = call.weight ? static_cast<float>(weights) : static_cast<float>(call.classes);
  if (call.reduction == LossReduction::kSum) *loss = static_cast<float>(sum);
  if (call.reduction == LossReduction::kMean) *loss = static_cast<float>(sum / total);
}

template <class Storage, int kThreads>
__global__ __launch_bounds__(kRowBlock<kThreads>) void backward_kernel(
    const __grid_constant__ CrossEntropy call, const __grid_constant__ CrossEntropyGradient gradient) {
  constexpr int kWidth = Split<Storage>::kWidth;
  const auto smoothing = static_cast<float>(call.label_smoothing);
  const int lane = static_cast<int>(threadIdx.x) % kThreads;
  for_rows<kThreads>(call.rows, [&](std::int64_t row) {
    const auto* const x = static_cast<const Storage*>(call.logits.data) + row * call.classes;
    auto* const grad = static_cast<Storage*>(gradient.grad_logits) + row * call.classes;
    const std::int64_t target = call.targets[row];
    const bool ignored = target == call.ignore_index;
    assert(ignored || (target >= 0 && target < call.classes));
    float scale = gradient.grad_loss[call.reduction == LossReduction::kNone ? row : 0];
    if (call.reduction == LossReduction::kMean) scale /= gradient.totals[0];
    const float own = ignored ? 0.0F : scale * (1.0F - smoothing) * (call.weight ? call.weight[target] : 1.0F);
    const float q = ignored ? 0.0F : scale * smoothing / static_cast<float>(call.classes);
    const float p = own + q * gradient.totals[1];
    const float lse = gradient.lse[row];
    const auto smoothed = [&](std::int64_t column) { return q * (call.weight ? call.weight[column] : 1.0F); };
    const auto write_one = [&](std::int64_t column) {
      float result = ignored ? 0.0F : p * exponential<Storage>(widen_device(x[column]) - lse);
      if (smoothing > 0.0F) result -= smoothed(column);
      if (column == target && !ignored) result -= own;
      grad[column] = narrow_device<Storage>(result);
    };

    Split<Storage> split(grad, call.classes);
    if (reinterpret_cast<std::uintptr_t>(x) % 16 != reinterpret_cast<std::uintptr_t>(grad) % 16) {
      split.head = split.tail = call.classes;  // no boundary in common: one by one
      split.packs = 0;
    }
    for (std::int64_t i = lane; i < split.head; i += kThreads) write_one(i);
    for (std::int64_t base = lane; base < split.packs; base += kThreads * kUnroll) {
      Pack<Storage, kWidth> packs[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const std::int64_t i = base + k * kThreads;
        if (i < split.packs && !ignored) packs[k] = load_pack<Storage, kWidth>(x, split.head + i * kWidth);
      }
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const std::int64_t i = base + k * kThreads;
        if (i >= split.packs) break;
        const std::int64_t first = split.head + i * kWidth;
        float values[kWidth];
#pragma unroll
        for (int e = 0; e < kWidth; ++e)
          values[e] = ignored ? 0.0F : p * exponential<Storage>(widen_device(packs[k].elements[e]) - lse);
        // What few rows or few columns need is decided once per pack: per element it took longer than the rest.
        if (smoothing > 0.0F) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) values[e] -= smoothed(first + e);
        }
        if (target >= first && target < first + kWidth && !ignored) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) values[e] -= target == first + e ? own : 0.0F;
        }
        store_pack<Storage>(grad, first, values);
      }
    }
    for (std::int64_t i = split.tail + lane; i < call.classes; i += kThreads) write_one(i);
  });
}

// Calls run(Storage{}, number of threads a row).
template <class Run>
void with_layout(const CrossEntropy& call, const Run& run) {
  const auto with_threads = [&](auto storage) {
    if (call.classes <= 1024) return run(storage, std::integral_constant<int, kWarp>{});
    return run(storage, std::integral_constant<int, 512>{});
  };
  switch (call.logits.dtype) {
    case DType::kFloat32:
      return with_threads(float{});
    case DType::kFloat16:
      return with_threads(Half{});
    case DType::kBFloat16:
      return with_threads(BFloat16{});
    case DType::kFloat64:
      break;
  }
  HS_UNREACHABLE("dtype ", static_cast<int>(call.logits.dtype));
}

}  // namespace

void cross_entropy(const CrossEntropy& call, const CrossEntropyOutputs& out, float* workspace, CudaStream stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream.handle);
  float* const losses = call.reduction == LossReduction::kNone ? out.loss : workspace;
  if (call.rows > 0) {
    with_layout(call, [&](auto storage, auto threads) {
      forward_kernel<decltype(storage), threads>
          <<<blocks_for(call.rows, kRowsPerBlock<threads>), kRowBlock<threads>, 0, cuda_stream>>>(call, losses,
                                                                                                  out.lse);
    });
    HS_CUDA_TRY(cudaGetLastError());
  }
  totals_kernel<<<1, kTotalsThreads, 0, cuda_stream>>>(call, losses, out.loss, out.totals);
  HS_CUDA_TRY(cudaGetLastError());
}

void cross_entropy_backward(const CrossEntropy& call, const CrossEntropyGradient& gradient, CudaStream stream) {
  if (call.rows == 0 || call.classes == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream.handle);
  with_layout(call, [&](auto storage, auto threads) {
    backward_kernel<decltype(storage), threads>
        <<<blocks_for(call.rows, kRowsPerBlock<threads>), kRowBlock<threads>, 0, cuda_stream>>>(call, gradient);
  });
  HS_CUDA_TRY(cudaGetLastError());
}

}  // namespace halfstep::cuda
