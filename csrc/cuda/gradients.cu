// The gradient check on the GPU. Contract: halfstep/gradients.h.
//
// One block reads one chunk of kChunk elements of one tensor with 16-byte loads and leaves one Partial in the
// workspace; a second launch adds the partials in a fixed order. No atomics, so the same input gives the same bits.
// The tensor table travels as a kernel parameter (CUDA 12.1 and newer take 32,764 bytes of them).
//
// Limit: the bytes of the gradients over the memory bandwidth, twice that for unscale, which writes them too.
#include <algorithm>

#include "convert.cuh"
#include "halfstep/gradients.h"
#include "reduce.cuh"
#include "try.h"

namespace halfstep::cuda {
namespace {

constexpr std::int64_t kChunk = 32768;
constexpr int kThreads = 512;
constexpr int kUnroll = 4;  // independent 16-byte loads in flight per thread

struct Partial {
  double sum_of_squares;
  float max_magnitude;
  std::uint32_t non_finite;
  std::uint32_t zeros;
  std::uint32_t below_half;
};

// Tensors of one launch. first_chunk[i] is the launch's first block that works on tensor i.
template <int capacity>
struct TensorTable {
  void* data[capacity];
  std::int64_t numel[capacity];
  std::uint32_t first_chunk[capacity + 1];
  DType dtype[capacity];
  int count;
};
constexpr int kSmallTable = 128;  // most models; a large parameter block costs launch time
constexpr int kLargeTable = 1024;

std::int64_t chunks_of(std::int64_t numel) {
  return (numel + kChunk - 1) / kChunk;
}

// What one thread has seen. Squares are summed in the type the gradient computes in.
template <class Compute>
struct Tally {
  Compute sum_of_squares = 0;
  float max_magnitude = 0;
  std::uint32_t non_finite = 0;
  std::uint32_t zeros = 0;
  std::uint32_t below_half = 0;

  template <bool with_stats>
  __device__ void add(Compute u) {
    sum_of_squares += u * u;
    const bool finite = isfinite(u);
    non_finite += !finite;
    if constexpr (with_stats) {
      const auto magnitude = static_cast<float>(fabs(u));
      max_magnitude = finite ? fmaxf(max_magnitude, magnitude) : max_magnitude;
      zeros += u == 0;
      below_half += u != 0 && fabs(u) < static_cast<Compute>(kHalfMinNormal);
    }
  }
};

template <class Storage, bool write, bool with_stats, class Compute>
__device__ void visit(Storage& element, Compute factor, Tally<Compute>& tally) {
  Compute u = widen_device(element) * factor;
  if constexpr (write) {
    element = narrow_device<Storage>(u);
    u = widen_device(element);
  }
  tally.template add<with_stats>(u);
}

// Elements [0, count) at `data`: up to the first 16-byte boundary one by one, then 16 bytes at a time, then the rest.
template <class Storage, bool write, bool with_stats>
__device__ auto run_chunk(Storage* data, std::int64_t count, float multiplier) {
  using Compute = decltype(widen_device(Storage{}));
  constexpr int kPerVector = 16 / sizeof(Storage);
  struct alignas(16) Vector {
    Storage elements[kPerVector];
  };
  const auto factor = static_cast<Compute>(multiplier);
  Tally<Compute> tally;

  const auto misaligned = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(data) % 16 / sizeof(Storage));
  const std::int64_t head = min(count, misaligned == 0 ? 0 : kPerVector - misaligned);
  auto* const vectors = reinterpret_cast<Vector*>(data + head);
  const std::int64_t vector_count = (count - head) / kPerVector;
  const std::int64_t tail = head + vector_count * kPerVector;

  for (std::int64_t i = threadIdx.x; i < head; i += kThreads) visit<Storage, write, with_stats>(data[i], factor, tally);
  for (std::int64_t base = threadIdx.x; base < vector_count; base += kThreads * kUnroll) {
    Vector loaded[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const std::int64_t i = base + k * kThreads;
      if (i < vector_count) loaded[k] = vectors[i];
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const std::int64_t i = base + k * kThreads;
      if (i < vector_count) {
#pragma unroll
        for (Storage& element : loaded[k].elements) visit<Storage, write, with_stats>(element, factor, tally);
        if constexpr (write) vectors[i] = loaded[k];
      }
    }
  }
  for (std::int64_t i = tail + threadIdx.x; i < count; i += kThreads)
    visit<Storage, write, with_stats>(data[i], factor, tally);
  return tally;
}

__device__ float multiplier_of(UnscaleFactor factor) {
  const float scale = *factor.scale;
  return factor.inverse ? scale : static_cast<float>(1.0 / static_cast<double>(scale));
}

template <int capacity, bool write, bool with_stats>
__global__ __launch_bounds__(kThreads, 2) void check_kernel(const __grid_constant__ TensorTable<capacity> table,
                                                            UnscaleFactor factor, float* found, Partial* partials) {
  // The last tensor whose first chunk is not behind this block.
  int tensor = 0;
  for (int low = 1, high = table.count; low < high;) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= blockIdx.x) {
      tensor = middle;
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x - table.first_chunk[tensor]) * kChunk;
  const std::int64_t count = min(kChunk, table.numel[tensor] - begin);
  const float multiplier = multiplier_of(factor);

  const auto finish = [&](auto tally) {
    Partial partial{};
    partial.sum_of_squares = reduce_block(static_cast<double>(tally.sum_of_squares), Add{}, 0.0);
    if constexpr (with_stats) {
      partial.max_magnitude = reduce_block(tally.max_magnitude, Max{}, 0.0F);
      partial.non_finite = reduce_block(tally.non_finite, Add{}, 0U);
      partial.zeros = reduce_block(tally.zeros, Add{}, 0U);
      partial.below_half = reduce_block(tally.below_half, Add{}, 0U);
    } else {
      partial.non_finite = __syncthreads_or(static_cast<int>(tally.non_finite));
    }
    if (threadIdx.x == 0) {
      if (partial.non_finite != 0) *found = 1.0F;  // every writer writes the same
      partials[blockIdx.x] = partial;
    }
  };
  switch (table.dtype[tensor]) {
    case DType::kFloat32:
      return finish(
          run_chunk<float, write, with_stats>(static_cast<float*>(table.data[tensor]) + begin, count, multiplier));
    case DType::kFloat64:
      return finish(
          run_chunk<double, write, with_stats>(static_cast<double*>(table.data[tensor]) + begin, count, multiplier));
    case DType::kFloat16:
      return finish(
          run_chunk<Half, write, with_stats>(static_cast<Half*>(table.data[tensor]) + begin, count, multiplier));
    case DType::kBFloat16:
      return finish(run_chunk<BFloat16, write, with_stats>(static_cast<BFloat16*>(table.data[tensor]) + begin, count,
                                                           multiplier));
  }
}

// One block: the norm over all partials of the call.
__global__ __launch_bounds__(kThreads) void norm_kernel(const Partial* partials, std::int64_t count, float* norm) {
  double sum = 0.0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[i].sum_of_squares;
  sum = reduce_block(sum, Add{}, 0.0);
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

// One block per tensor: its row of statistics.
template <int capacity>
__global__ __launch_bounds__(kThreads) void stats_kernel(const __grid_constant__ TensorTable<capacity> table,
                                                         const Partial* partials, float* stats) {
  const int tensor = static_cast<int>(blockIdx.x);
  double sum_of_squares = 0.0;
  float max_magnitude = 0.0F;
  unsigned long long non_finite = 0;
  unsigned long long zeros = 0;
  unsigned long long below_half = 0;
  for (std::uint32_t i = table.first_chunk[tensor] + threadIdx.x; i < table.first_chunk[tensor + 1]; i += kThreads) {
    const Partial partial = partials[i];
    sum_of_squares += partial.sum_of_squares;
    max_magnitude = fmaxf(max_magnitude, partial.max_magnitude);
    non_finite += partial.non_finite;
    zeros += partial.zeros;
    below_half += partial.below_half;
  }
  sum_of_squares = reduce_block(sum_of_squares, Add{}, 0.0);
  max_magnitude = reduce_block(max_magnitude, Max{}, 0.0F);
  non_finite = reduce_block(non_finite, Add{}, 0ULL);
  zeros = reduce_block(zeros, Add{}, 0ULL);
  below_half = reduce_block(below_half, Add{}, 0ULL);
  if (threadIdx.x != 0) return;
  float* const row = stats + static_cast<std::int64_t>(tensor) * kGradientStats;
  row[kNonFinite] = static_cast<float>(non_finite);
  row[kMaxMagnitude] = max_magnitude;
  row[kSumOfSquares] = static_cast<float>(sum_of_squares);
  row[kZeros] = static_cast<float>(zeros);
  row[kBelowHalf] = static_cast<float>(below_half);
  row[kElements] = static_cast<float>(table.numel[tensor]);
}

template <int capacity>
TensorTable<capacity> make_table(TensorList grads) {
  TensorTable<capacity> table;
  std::int64_t chunks = 0;
  table.count = static_cast<int>(grads.size());
  for (std::size_t i = 0; i < grads.size(); ++i) {
    table.data[i] = grads[i].data;
    table.numel[i] = grads[i].numel;
    table.dtype[i] = grads[i].dtype;
    table.first_chunk[i] = static_cast<std::uint32_t>(chunks);
    chunks += chunks_of(grads[i].numel);
  }
  HS_CHECK(chunks < (std::int64_t{1} << 31), "check_gradients: got ", chunks, " chunks of ", kChunk,
           " elements, expected fewer than 2^31");
  table.first_chunk[grads.size()] = static_cast<std::uint32_t>(chunks);
  return table;
}

// Launches the kernels for at most `capacity` tensors; returns how many partials they write.
template <int capacity>
std::int64_t launch(TensorList grads, UnscaleFactor factor, float* found, float* stats, bool write, Partial* partials,
                    cudaStream_t stream) {
  const auto table = make_table<capacity>(grads);
  const std::uint32_t chunks = table.first_chunk[grads.size()];
  if (chunks > 0) {
    auto* const kernel = write ? (stats ? check_kernel<capacity, true, true> : check_kernel<capacity, true, false>)
                               : (stats ? check_kernel<capacity, false, true> : check_kernel<capacity, false, false>);
    kernel<<<chunks, kThreads, 0, stream>>>(table, factor, found, partials);
    HS_CUDA_TRY(cudaGetLastError());
  }
  if (stats) {
    stats_kernel<capacity><<<static_cast<unsigned>(grads.size()), kThreads, 0, stream>>>(table, partials, stats);
    HS_CUDA_TRY(cudaGetLastError());
  }
  return chunks;
}

void run(TensorList grads, UnscaleFactor factor, const CheckOutputs& out, void* workspace, CudaStream stream,
         bool write) {
  HS_CHECK(factor.scale && out.found, "check_gradients: scale and found must not be null");
  const auto cuda_stream = static_cast<cudaStream_t>(stream.handle);
  auto* const partials = static_cast<Partial*>(workspace);
  std::int64_t written = 0;
  for (std::size_t begin = 0; begin < grads.size(); begin += kLargeTable) {
    const TensorList part = grads.subspan(begin, std::min<std::size_t>(kLargeTable, grads.size() - begin));
    float* const stats = out.stats ? out.stats + begin * kGradientStats : nullptr;
    const auto launch_part = part.size() <= kSmallTable ? launch<kSmallTable> : launch<kLargeTable>;
    written += launch_part(part, factor, out.found, stats, write, partials + written, cuda_stream);
  }
  if (out.norm) {
    norm_kernel<<<1, kThreads, 0, cuda_stream>>>(partials, written, out.norm);
    HS_CUDA_TRY(cudaGetLastError());
  }
}

}  // namespace

std::size_t gradients_workspace_bytes(TensorList grads) {
  std::int64_t chunks = 0;
  for (const TensorView& grad : grads) chunks += chunks_of(grad.numel);
  return static_cast<std::size_t>(chunks) * sizeof(Partial);
}

void check_gradients(TensorList grads, UnscaleFactor factor, const CheckOutputs& out, void* workspace,
                     CudaStream stream) {
  run(grads, factor, out, workspace, stream, /*write=*/false);
}

void unscale(TensorList grads, UnscaleFactor factor, const CheckOutputs& out, void* workspace, CudaStream stream) {
  run(grads, factor, out, workspace, stream, /*write=*/true);
}

}  // namespace halfstep::cuda
