// The optimizers on the GPU. Contract: halfstep/optimizer.h; one element of each: optimizer_math.h.
//
// A first kernel, one thread per tensor, decides whether to skip, counts the step and leaves what the tensor's elements
// have in common. Then one block updates one chunk of kChunk elements with 16-byte accesses to float32
// and float64.
// Work is split by elements, so a thousand small tensors cost the same two launches as one large one.
//
// Limit: the bytes of gradient (read once), values and states (read and written) and copies over the memory bandwidth.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "halfstep/optimizer.h"
#include "halfstep/status.h"
#include "optimizer_math.h"
#include "pack.cuh"
#include "try.h"

namespace halfstep::cuda {

// Of one step, for all blocks.
struct OptimizerTable::Header {
  GradientFactors factors;
  std::int32_t skip;
  std::int32_t padding;
};

namespace {

constexpr std::int64_t kChunk = 16384;
constexpr int kThreads = 256;
template <class Value>
constexpr int kVector = sizeof(Value) == 8 ? 2 : 4;  // elements at a time

using Header = OptimizerTable::Header;
using Addresses = OptimizerTable::Addresses;

// Per tensor, in Addresses::constants: doubles, since float64 values compute in float64.
struct alignas(16) Constants {
  double step_size;              // SGD: 1 at the first step, else 0
  double bias_correction2_sqrt;  // Adam
};
static_assert(sizeof(Constants) == 4 * sizeof(float));

// --------------------------------------------------------------------------------------------------------- the table

struct Bytes {
  static constexpr int kCapacity = 16384;
  char bytes[kCapacity];
};
__global__ void store_kernel(const __grid_constant__ Bytes source, char* target, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) target[i] = source.bytes[i];
}

// Copies host memory to the device in stream order, through kernel parameters.
template <class T>
void store(std::span<const T> source, void* target, CudaStream stream) {
  static_assert(std::is_trivially_copyable_v<T>);
  const auto* const from = reinterpret_cast<const char*>(source.data());
  for (std::size_t begin = 0; begin < source.size_bytes(); begin += Bytes::kCapacity) {
    const std::size_t count = std::min<std::size_t>(Bytes::kCapacity, source.size_bytes() - begin);
    Bytes part;
    std::memcpy(part.bytes, from + begin, count);
    store_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(part, static_cast<char*>(target) + begin,
                                                                               static_cast<int>(count));
    HS_CUDA_TRY(cudaGetLastError());
  }
}

constexpr std::size_t padded(std::size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

// ------------------------------------------------------------------------------------------------------- the kernels

__device__ double learning_rate(const OptimizerGroup& group) {
  return group.lr_tensor ? static_cast<double>(*group.lr_tensor) : group.lr;
}

template <class Compute>
__device__ Constants adam_step_constants(const OptimizerGroup& group, float step) {
  return {step_size(static_cast<Compute>(learning_rate(group)), static_cast<Compute>(group.beta1), step),
          bias_correction2_sqrt(static_cast<Compute>(group.beta2), step)};
}

template <OptimizerKind kind>
__global__ void prepare_kernel(Addresses table, int tensors, StepControl control) {
  const bool skip = control.found && *control.found != 0;  // NaN too
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i == 0) *table.header = {gradient_factors(control), skip, 0};
  if (i >= tensors || skip) return;
  const OptimizerTensor& tensor = table.tensors[i];
  const float applied = *tensor.step;
  *tensor.step = applied + 1;
  Constants constants{};
  if constexpr (kind == OptimizerKind::kAdam) {
    const OptimizerGroup& group = table.groups[tensor.group];
    constants = tensor.dtype == DType::kFloat64 ? adam_step_constants<double>(group, applied + 1)
                                                : adam_step_constants<float>(group, applied + 1);
  } else {
    constants.step_size = applied == 0;
  }
  reinterpret_cast<Constants*>(table.constants)[i] = constants;
}

template <class Storage, int count>
__device__ bool is_aligned(const void* array) {
  return reinterpret_cast<std::uintptr_t>(array) % (count * sizeof(Storage)) == 0;
}

template <class Storage, int count, class Compute>
__device__ void load(const void* array, std::int64_t vector, Compute (&values)[count]) {
  const auto loaded = load_pack<Storage, count>(array, vector * count);
#pragma unroll
  for (int k = 0; k < count; ++k) values[k] = widen_device(loaded.elements[k]);
}

// Elements [begin, end) of a tensor: as vectors if every array of it is aligned, else one by one.
template <class Value, class Gradient, int states, class Element>
__device__ void update(const OptimizerTensor& tensor, const void* gradient, GradientFactors factors, std::int64_t begin,
                       std::int64_t end, Element element) {
  using Compute = decltype(widen_device(Value{}));
  const auto inverse_scale = static_cast<Compute>(factors.inverse_scale);
  const auto clip = static_cast<Compute>(factors.clip);
  constexpr bool can_copy = std::is_same_v<Value, float>;
  const bool copy_float16 = can_copy && tensor.half_copy && tensor.copy_dtype == DType::kFloat16;
  const bool copy_bfloat16 = can_copy && tensor.half_copy && tensor.copy_dtype == DType::kBFloat16;

  constexpr int count = kVector<Value>;
  bool vectors = is_aligned<Value, count>(tensor.values) && is_aligned<Gradient, count>(gradient) &&
                 is_aligned<Half, count>(tensor.half_copy);
#pragma unroll
  for (int s = 0; s < states; ++s) vectors = vectors && is_aligned<Value, count>(tensor.state[s]);

  const std::int64_t vector_end = vectors ? end / count : begin / count;  // begin is a multiple of count
  for (std::int64_t i = begin / count + threadIdx.x; i < vector_end; i += kThreads) {
    Compute grad[count], param[count], state[3][count] = {};
    load<Gradient>(gradient, i, grad);
    load<Value>(tensor.values, i, param);
#pragma unroll
    for (int s = 0; s < states; ++s) load<Value>(tensor.state[s], i, state[s]);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      Compute mine[3] = {state[0][k], state[1][k], state[2][k]};
      element(param[k], grad[k] * inverse_scale * clip, mine);
#pragma unroll
      for (int s = 0; s < states; ++s) state[s][k] = mine[s];
    }
    store_pack<Value>(tensor.values, i * count, param);
#pragma unroll
    for (int s = 0; s < states; ++s) store_pack<Value>(tensor.state[s], i * count, state[s]);
    if constexpr (can_copy) {
      if (copy_float16) store_pack<Half>(tensor.half_copy, i * count, param);
      if (copy_bfloat16) store_pack<BFloat16>(tensor.half_copy, i * count, param);
    }
  }
  for (std::int64_t i = vector_end * count + threadIdx.x; i < end; i += kThreads) {
    Compute param = widen_device(static_cast<const Value*>(tensor.values)[i]);
    const Compute grad = widen_device(static_cast<const Gradient*>(gradient)[i]) * inverse_scale * clip;
    Compute state[3] = {};
#pragma unroll
    for (int s = 0; s < states; ++s) state[s] = widen_device(static_cast<const Value*>(tensor.state[s])[i]);
    element(param, grad, state);
    static_cast<Value*>(tensor.values)[i] = narrow_device<Value>(param);
#pragma unroll
    for (int s = 0; s < states; ++s) static_cast<Value*>(tensor.state[s])[i] = narrow_device<Value>(state[s]);
    if constexpr (can_copy) {
      if (copy_float16) static_cast<Half*>(tensor.half_copy)[i] = narrow_device<Half>(param);
      if (copy_bfloat16) static_cast<BFloat16*>(tensor.half_copy)[i] = narrow_device<BFloat16>(param);
    }
  }
}

template <OptimizerKind kind, class Value, class Gradient>
__device__ void update_chunk(const OptimizerTensor& tensor, const void* gradient, const OptimizerGroup& group,
                             Constants constants, GradientFactors factors, std::int64_t begin, std::int64_t end) {
  using Compute = decltype(widen_device(Value{}));
  if constexpr (kind == OptimizerKind::kAdam) {
    const AdamConstants<Compute> c{static_cast<Compute>(learning_rate(group)),
                                   static_cast<Compute>(group.weight_decay),
                                   static_cast<Compute>(group.beta1),
                                   static_cast<Compute>(group.beta2),
                                   static_cast<Compute>(group.eps),
                                   static_cast<Compute>(constants.step_size),
                                   static_cast<Compute>(constants.bias_correction2_sqrt),
                                   group.decoupled,
                                   group.maximize};
    const auto run = [&]<bool amsgrad>() {
      update<Value, Gradient, amsgrad ? 3 : 2>(tensor, gradient, factors, begin, end,
                                               [&](Compute& param, Compute grad, Compute(&state)[3]) {
                                                 if (c.maximize) grad = -grad;
                                                 if (c.weight_decay != 0) {
                                                   if (c.decoupled) {
                                                     param = decayed_parameter(param, c.lr, c.weight_decay);
                                                   } else {
                                                     grad = decayed_gradient(grad, param, c.weight_decay);
                                                   }
                                                 }
                                                 adam_element<amsgrad>(param, grad, state[0], state[1], state[2], c);
                                               });
    };
    tensor.state[2] ? run.template operator()<true>() : run.template operator()<false>();
  } else {
    const SgdConstants<Compute> c{static_cast<Compute>(learning_rate(group)),
                                  static_cast<Compute>(group.weight_decay),
                                  static_cast<Compute>(group.momentum),
                                  static_cast<Compute>(group.dampening),
                                  constants.step_size != 0,
                                  group.nesterov,
                                  group.maximize};
    const auto run = [&]<bool with_momentum>() {
      update<Value, Gradient, with_momentum ? 1 : 0>(
          tensor, gradient, factors, begin, end, [&](Compute& param, Compute grad, Compute(&state)[3]) {
            if (c.maximize) grad = -grad;
            if (c.weight_decay != 0) grad = decayed_gradient(grad, param, c.weight_decay);
            if constexpr (with_momentum) {
              if (c.first) {
                grad = c.nesterov ? sgd_direction<true, true>(grad, state[0], c)
                                  : sgd_direction<true, false>(grad, state[0], c);
              } else {
                grad = c.nesterov ? sgd_direction<false, true>(grad, state[0], c)
                                  : sgd_direction<false, false>(grad, state[0], c);
              }
            }
            param = sgd_element(param, grad, c.lr);
          });
    };
    tensor.state[0] ? run.template operator()<true>() : run.template operator()<false>();
  }
}

template <OptimizerKind kind>
__global__ __launch_bounds__(kThreads, 3) void step_kernel(Addresses table, int tensors) {
  if (table.header->skip) return;
  // The last tensor whose first chunk is not behind this block: all threads look at once.
  int tensor_index = -1;
  for (int base = 0; base < tensors; base += kThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    tensor_index += __syncthreads_count(i < tensors && table.first_chunk[i] <= blockIdx.x);
  }
  const OptimizerTensor tensor = table.tensors[tensor_index];
  const void* const gradient = table.gradients[tensor_index];
  const OptimizerGroup group = table.groups[tensor.group];
  const Constants constants = reinterpret_cast<const Constants*>(table.constants)[tensor_index];
  const GradientFactors factors = table.header->factors;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x - table.first_chunk[tensor_index]) * kChunk;
  const std::int64_t end = min(begin + kChunk, tensor.numel);

  const auto run = [&]<class Value, class Gradient>(Value, Gradient) {
    update_chunk<kind, Value, Gradient>(tensor, gradient, group, constants, factors, begin, end);
  };
  switch (tensor.dtype) {
    case DType::kFloat32:
      if (tensor.gradient_dtype == DType::kFloat16) return run(float{}, Half{});
      if (tensor.gradient_dtype == DType::kBFloat16) return run(float{}, BFloat16{});
      return run(float{}, float{});
    case DType::kFloat64:
      return run(double{}, double{});
    case DType::kFloat16:
      return run(Half{}, Half{});
    case DType::kBFloat16:
      return run(BFloat16{}, BFloat16{});
  }
}

template <OptimizerKind kind>
void launch(const OptimizerTable& table, const StepControl& control, cudaStream_t stream) {
  constexpr int kTensorsPerBlock = 128;
  const auto tensors = static_cast<int>(table.tensors());
  prepare_kernel<kind><<<(tensors + kTensorsPerBlock - 1) / kTensorsPerBlock, kTensorsPerBlock, 0, stream>>>(
      table.addresses(), tensors, control);
  HS_CUDA_TRY(cudaGetLastError());
  if (table.chunks() == 0) return;
  step_kernel<kind><<<table.chunks(), kThreads, 0, stream>>>(table.addresses(), tensors);
  HS_CUDA_TRY(cudaGetLastError());
}

}  // namespace

std::size_t OptimizerTable::bytes(std::size_t tensors, std::size_t groups) {
  return padded(sizeof(Header)) + padded(tensors * sizeof(OptimizerTensor)) + padded(tensors * sizeof(void*)) +
         padded(groups * sizeof(OptimizerGroup)) + padded(tensors * sizeof(Constants)) +
         padded(tensors * sizeof(std::uint32_t));
}

OptimizerTable::OptimizerTable(void* memory, std::size_t tensors, std::size_t groups)
    : tensors_(tensors), groups_(groups) {
  auto* next = static_cast<char*>(memory);
  const auto take = [&](std::size_t bytes) { return std::exchange(next, next + padded(bytes)); };
  addresses_.header = reinterpret_cast<Header*>(take(sizeof(Header)));
  addresses_.tensors = reinterpret_cast<OptimizerTensor*>(take(tensors * sizeof(OptimizerTensor)));
  addresses_.gradients = reinterpret_cast<const void**>(take(tensors * sizeof(void*)));
  addresses_.groups = reinterpret_cast<OptimizerGroup*>(take(groups * sizeof(OptimizerGroup)));
  addresses_.constants = reinterpret_cast<float*>(take(tensors * sizeof(Constants)));
  addresses_.first_chunk = reinterpret_cast<std::uint32_t*>(take(tensors * sizeof(std::uint32_t)));
}

void OptimizerTable::set_tensors(OptimizerKind kind, std::span<const OptimizerTensor> tensors, CudaStream stream) {
  HS_CHECK(tensors.size() == tensors_, "optimizer_step: got ", tensors.size(), " tensors, expected ", tensors_);
  check_optimizer_tensors(kind, tensors, groups_);
  std::vector<std::uint32_t> first_chunk;
  std::int64_t chunks = 0;
  for (const OptimizerTensor& tensor : tensors) {
    first_chunk.push_back(static_cast<std::uint32_t>(chunks));
    chunks += (tensor.numel + kChunk - 1) / kChunk;
    HS_CHECK(chunks < (std::int64_t{1} << 31), "optimizer_step: got more than 2^31 chunks of ", kChunk, " elements");
  }
  chunks_ = static_cast<std::uint32_t>(chunks);
  store(tensors, addresses_.tensors, stream);
  store(std::span<const std::uint32_t>(first_chunk), addresses_.first_chunk, stream);
}

void OptimizerTable::set_gradients(std::span<const void* const> gradients, CudaStream stream) {
  HS_CHECK(gradients.size() == tensors_, "optimizer_step: got ", gradients.size(), " gradients, expected ", tensors_);
  store(gradients, addresses_.gradients, stream);
}

void OptimizerTable::set_groups(std::span<const OptimizerGroup> groups, CudaStream stream) {
  HS_CHECK(groups.size() == groups_, "optimizer_step: got ", groups.size(), " groups, expected ", groups_);
  store(groups, addresses_.groups, stream);
}

void optimizer_step(OptimizerKind kind, const OptimizerTable& table, const StepControl& control, CudaStream stream) {
  if (table.tensors() == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream.handle);
  if (kind == OptimizerKind::kAdam) {
    launch<OptimizerKind::kAdam>(table, control, cuda_stream);
  } else {
    launch<OptimizerKind::kSgd>(table, control, cuda_stream);
  }
}

}  // namespace halfstep::cuda
