// The observation of tensors on the GPU. Contract: halfstep/calibration.h.
//
// Keys and counts are integers, combined by atomics of integers, which give the same result in every order. Each block
// counts in shared memory, zeros and their neighbours (half of what a ReLU returns) in registers. Sums of channels have
// no atomics: each strip of a channel's elements leaves a partial in the workspace, and a second kernel adds them in
// order.
//
// Limit: the bytes of the tensor over the memory bandwidth, for each of the three; for counts of spread-out data the
// rate of shared atomics.
#include <algorithm>

#include "calibration_math.h"
#include "convert.cuh"
#include "halfstep/calibration.h"
#include "halfstep/status.h"
#include "pack.cuh"
#include "reduce.cuh"
#include "try.h"

namespace halfstep::cuda {
namespace {

using Count = unsigned long long;  // what atomics call std::uint64_t
static_assert(sizeof(Count) == sizeof(std::uint64_t));

constexpr int kThreads = 512;
constexpr int kUnroll = 4;
constexpr std::int64_t kElementsPerBlock = 32768;
constexpr std::int64_t kMaxBlocks = 1024;

unsigned blocks_of(std::int64_t numel) {
  return static_cast<unsigned>(std::min((numel + kElementsPerBlock - 1) / kElementsPerBlock, kMaxBlocks));
}

struct Least {
  template <class Value>
  __device__ Value operator()(Value a, Value b) const {
    return a < b ? a : b;
  }
};
struct Largest {
  template <class Value>
  __device__ Value operator()(Value a, Value b) const {
    return a > b ? a : b;
  }
};

// Calls visit(bits of the element as float32) for all elements, over all threads of the grid: up to the first 16-byte
// boundary one by one, then 16 bytes at a time, then the rest.
template <class Storage, class Visit>
__device__ void for_elements(const Storage* data, std::int64_t count, const Visit& visit) {
  constexpr int kWidth = 16 / sizeof(Storage);
  const auto misaligned = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(data) % 16 / sizeof(Storage));
  const std::int64_t head = min(count, misaligned == 0 ? 0 : kWidth - misaligned);
  const std::int64_t packs = (count - head) / kWidth;
  const std::int64_t tail = head + packs * kWidth;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const auto visit_one = [&](Storage element) { visit(__float_as_uint(widen_device(element))); };
  if (thread < head) visit_one(data[thread]);
  for (std::int64_t base = thread; base < packs; base += threads * kUnroll) {
    Pack<Storage, kWidth> loaded[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (base + k * threads < packs)
        loaded[k] = load_pack<Storage, kWidth>(data + head, (base + k * threads) * kWidth);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (base + k * threads < packs) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) visit_one(loaded[k].elements[e]);
      }
    }
  }
  if (tail + thread < count) visit_one(data[tail + thread]);
}

__global__ void clear_keys_kernel(RangeKeys* keys) {
  *keys = RangeKeys{};
}

template <class Storage>
__global__ __launch_bounds__(kThreads) void keys_kernel(const Storage* data, std::int64_t count, RangeKeys* keys) {
  RangeKeys own;
  for_elements(data, count, [&](std::uint32_t bits) {
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    if (magnitude >= kInfinityBits) {
      ++own.non_finite;
      return;
    }
    const std::int32_t key = range_key(bits);
    own.lowest = min(own.lowest, key);
    own.highest = max(own.highest, key);
    own.zeros += magnitude == 0;
  });
  const std::int32_t lowest = reduce_block(own.lowest, Least{}, RangeKeys{}.lowest);
  const std::int32_t highest = reduce_block(own.highest, Largest{}, RangeKeys{}.highest);
  const Count zeros = reduce_block(static_cast<Count>(own.zeros), Add{}, Count{0});
  const Count non_finite = reduce_block(static_cast<Count>(own.non_finite), Add{}, Count{0});
  if (threadIdx.x != 0) return;
  atomicMin(&keys->lowest, lowest);
  atomicMax(&keys->highest, highest);
  if (zeros != 0) atomicAdd(reinterpret_cast<Count*>(&keys->zeros), zeros);
  if (non_finite != 0) atomicAdd(reinterpret_cast<Count*>(&keys->non_finite), non_finite);
}

template <class Storage>
__global__ __launch_bounds__(kThreads) void counts_kernel(const Storage* data, std::int64_t count, int exponent,
                                                          Count* counts) {
  __shared__ std::uint32_t table[kRangeBins];  // a block sees fewer than 2^32 elements: memory ends long before
  for (int bin = static_cast<int>(threadIdx.x); bin < kRangeBins; bin += kThreads) table[bin] = 0;
  __syncthreads();
  std::uint32_t middle = 0;  // of the bin of 0
  for_elements(data, count, [&](std::uint32_t bits) {
    if ((bits & 0x7fffffffU) >= kInfinityBits) return;
    const std::uint32_t bin = range_bin(bits, exponent);
    if (bin == kRangeBinsPerSide) {
      ++middle;
    } else {
      atomicAdd(&table[bin], 1U);
    }
  });
  const Count in_middle = reduce_block(static_cast<Count>(middle), Add{}, Count{0});  // waits for all, too
  for (int bin = static_cast<int>(threadIdx.x); bin < kRangeBins; bin += kThreads) {
    const Count found = bin == kRangeBinsPerSide ? in_middle : table[bin];
    if (found != 0) atomicAdd(counts + bin, found);
  }
}

// ------------------------------------------------------------------------------------------------------------ channels

struct ChannelPartial {
  double sum;
  Count count;
  std::uint32_t magnitude;

  __device__ void add(float x) {
    const std::uint32_t bits = __float_as_uint(x) & 0x7fffffffU;
    if (bits >= kInfinityBits) return;
    sum += static_cast<double>(x);
    ++count;
    magnitude = max(magnitude, bits);
  }
  __device__ void merge(const ChannelPartial& other) {
    sum += other.sum;
    count += other.count;
    magnitude = max(magnitude, other.magnitude);
  }
};

constexpr int kChannelWarps = 8;
constexpr int kChannelThreads = kChannelWarps * kWarp;
constexpr std::int64_t kMaxStrips = 1024;  // a grid's second dimension ends at 65535
constexpr std::int64_t kElementsPerStrip = 2048;
constexpr std::int64_t kWantedBlocks = 1024;  // that fill a large GPU

// Blocks of the first dimension: by 32 neighbouring channels, or by channel.
std::int64_t channel_blocks(const ChannelShape& shape) {
  return shape.inner == 1 ? (shape.channels + kWarp - 1) / kWarp : shape.channels;
}

// By the shape alone, so that the order of a sum is always the same.
std::int64_t strips_of(const ChannelShape& shape) {
  const std::int64_t of_channel = shape.outer * shape.inner;
  const std::int64_t of_block = shape.inner == 1 ? of_channel * kWarp : of_channel;
  const std::int64_t wanted = kWantedBlocks / std::max<std::int64_t>(1, channel_blocks(shape));
  return std::clamp<std::int64_t>(std::min(of_block / kElementsPerStrip, wanted), 1, kMaxStrips);
}

// inner == 1: a warp reads 32 neighbouring channels row by row, the block's warps share the strip of rows.
template <class Storage>
__global__ __launch_bounds__(kChannelThreads) void columns_kernel(const Storage* data, ChannelShape shape,
                                                                  ChannelPartial* partials) {
  __shared__ ChannelPartial shared[kChannelWarps][kWarp];
  const std::int64_t strip = blockIdx.y;
  const std::int64_t strips = gridDim.y;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t channel = static_cast<std::int64_t>(blockIdx.x) * kWarp + lane;
  ChannelPartial own{};
  if (channel < shape.channels) {
#pragma unroll 4
    for (std::int64_t row = shape.outer * strip / strips + warp; row < shape.outer * (strip + 1) / strips;
         row += kChannelWarps)
      own.add(widen_device(data[row * shape.channels + channel]));
  }
  shared[warp][lane] = own;
  __syncthreads();
  if (warp != 0 || channel >= shape.channels) return;
  for (int other = 1; other < kChannelWarps; ++other) own.merge(shared[other][lane]);
  partials[strip * shape.channels + channel] = own;
}

// Otherwise a block reads a strip of one channel, whose elements are numbered through `outer` and `inner`.
template <class Storage>
__global__ __launch_bounds__(kChannelThreads) void runs_kernel(const Storage* data, ChannelShape shape,
                                                               ChannelPartial* partials) {
  const std::int64_t strip = blockIdx.y;
  const std::int64_t strips = gridDim.y;
  const std::int64_t channel = blockIdx.x;
  const std::int64_t elements = shape.outer * shape.inner;
  const std::int64_t end = elements * (strip + 1) / strips;
  std::int64_t i = elements * strip / strips + threadIdx.x;
  std::int64_t row = i / shape.inner;
  std::int64_t at = i % shape.inner;
  const std::int64_t rows_each = kChannelThreads / shape.inner;
  const std::int64_t rest_each = kChannelThreads % shape.inner;
  ChannelPartial own{};
  for (; i < end; i += kChannelThreads) {
    own.add(widen_device(data[(row * shape.channels + channel) * shape.inner + at]));
    row += rows_each;
    at += rest_each;
    if (at >= shape.inner) {
      at -= shape.inner;
      ++row;
    }
  }
  own.sum = reduce_block(own.sum, Add{}, 0.0);
  own.count = reduce_block(own.count, Add{}, Count{0});
  own.magnitude = reduce_block(own.magnitude, Largest{}, 0U);
  if (threadIdx.x == 0) partials[strip * shape.channels + channel] = own;
}

__global__ __launch_bounds__(kChannelThreads) void channels_kernel(const ChannelPartial* partials,
                                                                   std::int64_t channels, std::int64_t strips,
                                                                   float* max_magnitude, double* sum, Count* count) {
  const std::int64_t channel = static_cast<std::int64_t>(blockIdx.x) * kChannelThreads + threadIdx.x;
  if (channel >= channels) return;
  ChannelPartial total{};
  for (std::int64_t strip = 0; strip < strips; ++strip) total.merge(partials[strip * channels + channel]);
  max_magnitude[channel] = __uint_as_float(total.magnitude);
  sum[channel] = total.sum;
  count[channel] = total.count;
}

// run(data as its storage)
template <class Run>
void with_data(const TensorView& input, const Run& run) {
  switch (input.dtype) {
    case DType::kFloat32:
      return run(static_cast<const float*>(input.data));
    case DType::kFloat16:
      return run(static_cast<const Half*>(input.data));
    case DType::kBFloat16:
      return run(static_cast<const BFloat16*>(input.data));
    case DType::kFloat64:
      break;
  }
  HS_UNREACHABLE("dtype ", static_cast<int>(input.dtype));
}

}  // namespace

void range_keys(const TensorView& input, RangeKeys* keys, CudaStream stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream.handle);
  clear_keys_kernel<<<1, 1, 0, cuda_stream>>>(keys);
  HS_CUDA_TRY(cudaGetLastError());
  if (input.numel == 0) return;
  with_data(input, [&](const auto* data) {
    keys_kernel<<<blocks_of(input.numel), kThreads, 0, cuda_stream>>>(data, input.numel, keys);
  });
  HS_CUDA_TRY(cudaGetLastError());
}

void add_to_counts(const TensorView& input, int exponent, std::uint64_t* counts, CudaStream stream) {
  if (input.numel == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream.handle);
  with_data(input, [&](const auto* data) {
    counts_kernel<<<blocks_of(input.numel), kThreads, 0, cuda_stream>>>(data, input.numel, exponent,
                                                                        reinterpret_cast<Count*>(counts));
  });
  HS_CUDA_TRY(cudaGetLastError());
}

std::size_t channel_workspace_bytes(const ChannelShape& shape) {
  return static_cast<std::size_t>(strips_of(shape) * shape.channels) * sizeof(ChannelPartial);
}

void channel_statistics(const TensorView& input, const ChannelShape& shape, float* max, double* sum,
                        std::uint64_t* count, void* workspace, CudaStream stream) {
  if (shape.channels == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream.handle);
  auto* const partials = static_cast<ChannelPartial*>(workspace);
  const std::int64_t strips = shape.numel() == 0 ? 0 : strips_of(shape);
  if (strips > 0) {
    const dim3 grid(static_cast<unsigned>(channel_blocks(shape)), static_cast<unsigned>(strips));
    with_data(input, [&](const auto* data) {
      if (shape.inner == 1) {
        columns_kernel<<<grid, kChannelThreads, 0, cuda_stream>>>(data, shape, partials);
      } else {
        runs_kernel<<<grid, kChannelThreads, 0, cuda_stream>>>(data, shape, partials);
      }
    });
    HS_CUDA_TRY(cudaGetLastError());
  }
  const auto blocks = static_cast<unsigned>((shape.channels + kChannelThreads - 1) / kChannelThreads);
  channels_kernel<<<blocks, kChannelThreads, 0, cuda_stream>>>(partials, shape.channels, strips, max, sum,
                                                               reinterpret_cast<Count*>(count));
  HS_CUDA_TRY(cudaGetLastError());
}

}  // namespace halfstep::cuda
