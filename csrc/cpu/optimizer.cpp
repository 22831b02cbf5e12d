// The optimizers on the CPU. Contract: halfstep/optimizer.h; one element of each: optimizer_math.h.
//
// Tensors are cut into chunks that run in parallel; a chunk goes through blocks of kLanes elements, stage by stage, so
// that every stage is a loop that compilers turn into vector code for any storage.
//
// Limit: the bytes of gradient (read once), values and states (read and written) over the memory bandwidth.
#include "halfstep/optimizer.h"

#include <algorithm>
#include <vector>

#include "clones.h"
#include "halfstep/status.h"
#include "optimizer_math.h"

namespace halfstep::cpu {
namespace {

constexpr std::int64_t kChunk = 16384;
constexpr int kLanes = 64;

// A tensor of this step: with its gradient, and with its group's hyperparameters widened by its step count.
struct Work {
  const OptimizerTensor* tensor;
  const void* gradient;
  GradientFactors factors;
  AdamConstants<double> adam;
  SgdConstants<double> sgd;
};

template <class Compute>
[[gnu::always_inline]] inline auto constants(const AdamConstants<double>& c) {
  return AdamConstants<Compute>{c.lr,
                                c.weight_decay,
                                c.beta1,
                                c.beta2,
                                c.eps,
                                static_cast<Compute>(c.step_size),
                                static_cast<Compute>(c.bias_correction2_sqrt),
                                c.decoupled,
                                c.maximize};
}

template <class Compute>
[[gnu::always_inline]] inline auto constants(const SgdConstants<double>& c) {
  return SgdConstants<Compute>{c.lr, c.weight_decay, c.momentum, c.dampening, c.first, c.nesterov, c.maximize};
}

template <class Storage, class Compute>
[[gnu::always_inline]] inline void load(const void* array, std::int64_t at, int lanes, Compute* block) {
  const Storage* const from = static_cast<const Storage*>(array) + at;
  for (int lane = 0; lane < lanes; ++lane) block[lane] = widen(from[lane]);
}

template <class Storage, class Compute>
[[gnu::always_inline]] inline void store(void* array, std::int64_t at, int lanes, const Compute* block) {
  Storage* const to = static_cast<Storage*>(array) + at;
  for (int lane = 0; lane < lanes; ++lane) to[lane] = narrow<Storage>(block[lane]);
}

// A block of elements in registers. Choices that hold for the whole tensor are made outside the loops over lanes.
template <class Compute>
struct Block {
  Compute grad[kLanes], param[kLanes], state[3][kLanes];
};

template <class Compute, class Constants>
[[gnu::always_inline]] inline void negate_and_decay(Block<Compute>& b, int lanes, const Constants& c, bool decoupled) {
  if (c.maximize)
    for (int lane = 0; lane < lanes; ++lane) b.grad[lane] = -b.grad[lane];
  if (c.weight_decay == 0) return;
  if (decoupled) {
    for (int lane = 0; lane < lanes; ++lane) b.param[lane] = decayed_parameter(b.param[lane], c.lr, c.weight_decay);
  } else {
    for (int lane = 0; lane < lanes; ++lane)
      b.grad[lane] = decayed_gradient(b.grad[lane], b.param[lane], c.weight_decay);
  }
}

template <bool amsgrad>
struct Adam {
  static constexpr int states = amsgrad ? 3 : 2;

  template <class Compute>
  [[gnu::always_inline]] static void update(Block<Compute>& b, int lanes, const Work& work) {
    const auto c = constants<Compute>(work.adam);
    negate_and_decay(b, lanes, c, c.decoupled);
    for (int lane = 0; lane < lanes; ++lane)
      adam_element<amsgrad>(b.param[lane], b.grad[lane], b.state[0][lane], b.state[1][lane], b.state[2][lane], c);
  }
};

template <bool with_momentum>
struct Sgd {
  static constexpr int states = with_momentum ? 1 : 0;

  template <class Compute>
  [[gnu::always_inline]] static void update(Block<Compute>& b, int lanes, const Work& work) {
    const auto c = constants<Compute>(work.sgd);
    negate_and_decay(b, lanes, c, /*decoupled=*/false);
    if constexpr (with_momentum) {
      const auto turn = [&]<bool first, bool nesterov>() __attribute__((always_inline)) {
        for (int lane = 0; lane < lanes; ++lane)
          b.grad[lane] = sgd_direction<first, nesterov>(b.grad[lane], b.state[0][lane], c);
      };
      if (c.first) {
        c.nesterov ? turn.template operator()<true, true>() : turn.template operator()<true, false>();
      } else {
        c.nesterov ? turn.template operator()<false, true>() : turn.template operator()<false, false>();
      }
    }
    for (int lane = 0; lane < lanes; ++lane) b.param[lane] = sgd_element(b.param[lane], b.grad[lane], c.lr);
  }
};

template <class Optimizer, class Value, class Gradient>
[[gnu::always_inline]] inline void run_chunk(const Work& work, std::int64_t begin, std::int64_t end) {
  using Compute = decltype(widen(Value{}));
  const OptimizerTensor& tensor = *work.tensor;
  const auto inverse_scale = static_cast<Compute>(work.factors.inverse_scale);
  const auto clip = static_cast<Compute>(work.factors.clip);

  const auto visit = [&](std::int64_t at, int lanes) __attribute__((always_inline)) {
    Block<Compute> block;
    load<Gradient>(work.gradient, at, lanes, block.grad);
    load<Value>(tensor.values, at, lanes, block.param);
    for (int i = 0; i < Optimizer::states; ++i) load<Value>(tensor.state[i], at, lanes, block.state[i]);
    for (int lane = 0; lane < lanes; ++lane) block.grad[lane] = block.grad[lane] * inverse_scale * clip;
    Optimizer::update(block, lanes, work);
    store<Value>(tensor.values, at, lanes, block.param);
    for (int i = 0; i < Optimizer::states; ++i) store<Value>(tensor.state[i], at, lanes, block.state[i]);
    if constexpr (std::is_same_v<Value, float>) {
      if (tensor.half_copy == nullptr) return;
      if (tensor.copy_dtype == DType::kFloat16) {
        store<Half>(tensor.half_copy, at, lanes, block.param);
      } else {
        store<BFloat16>(tensor.half_copy, at, lanes, block.param);
      }
    }
  };
  const std::int64_t whole = begin + (end - begin) / kLanes * kLanes;
  for (std::int64_t at = begin; at < whole; at += kLanes) visit(at, kLanes);
  if (whole < end) visit(whole, static_cast<int>(end - whole));
}

// One plain function per optimizer and storage, because clones cannot be templates.
using ChunkFunction = void (*)(const Work& work, std::int64_t begin, std::int64_t end);
#define HS_CHUNK_FUNCTION(name, Optimizer, Value, Gradient)                     \
  HS_CLONES void name(const Work& work, std::int64_t begin, std::int64_t end) { \
    run_chunk<Optimizer, Value, Gradient>(work, begin, end);                    \
  }
#define HS_OPTIMIZERS(prefix, Value, Gradient)                     \
  HS_CHUNK_FUNCTION(prefix##_adam, Adam<false>, Value, Gradient)   \
  HS_CHUNK_FUNCTION(prefix##_amsgrad, Adam<true>, Value, Gradient) \
  HS_CHUNK_FUNCTION(prefix##_sgd, Sgd<false>, Value, Gradient)     \
  HS_CHUNK_FUNCTION(prefix##_momentum, Sgd<true>, Value, Gradient) \
  constexpr ChunkFunction prefix[] = {prefix##_adam, prefix##_amsgrad, prefix##_sgd, prefix##_momentum};
HS_OPTIMIZERS(float32, float, float)
HS_OPTIMIZERS(float32_of_float16, float, Half)
HS_OPTIMIZERS(float32_of_bfloat16, float, BFloat16)
HS_OPTIMIZERS(float64, double, double)
HS_OPTIMIZERS(float16, Half, Half)
HS_OPTIMIZERS(bfloat16, BFloat16, BFloat16)
#undef HS_OPTIMIZERS
#undef HS_CHUNK_FUNCTION

ChunkFunction chunk_function(OptimizerKind kind, const OptimizerTensor& tensor) {
  const bool adam = kind == OptimizerKind::kAdam;
  const int index = adam ? (tensor.state[2] ? 1 : 0) : (tensor.state[0] ? 3 : 2);
  switch (tensor.dtype) {
    case DType::kFloat32:
      if (tensor.gradient_dtype == DType::kFloat16) return float32_of_float16[index];
      if (tensor.gradient_dtype == DType::kBFloat16) return float32_of_bfloat16[index];
      return float32[index];
    case DType::kFloat64:
      return float64[index];
    case DType::kFloat16:
      return float16[index];
    case DType::kBFloat16:
      return bfloat16[index];
  }
  HS_UNREACHABLE("dtype ", static_cast<int>(tensor.dtype));
}

Work prepare(const OptimizerTensor& tensor, const void* gradient, const OptimizerGroup& group,
             GradientFactors factors) {
  const double lr = group.lr_tensor ? static_cast<double>(*group.lr_tensor) : group.lr;
  const bool first = *tensor.step == 0;
  const float step = *tensor.step += 1;
  const auto widened = [&]<class Compute>(Compute) {
    return std::pair<double, double>(halfstep::step_size<Compute>(lr, group.beta1, step),
                                     halfstep::bias_correction2_sqrt<Compute>(group.beta2, step));
  };
  const auto [size, correction] = tensor.dtype == DType::kFloat64 ? widened(double{}) : widened(float{});
  return {
      &tensor,
      gradient,
      factors,
      {lr, group.weight_decay, group.beta1, group.beta2, group.eps, size, correction, group.decoupled, group.maximize},
      {lr, group.weight_decay, group.momentum, group.dampening, first, group.nesterov, group.maximize}};
}

}  // namespace

void optimizer_step(OptimizerKind kind, std::span<const OptimizerTensor> tensors,
                    std::span<const void* const> gradients, std::span<const OptimizerGroup> groups,
                    const StepControl& control, const Executor& executor) {
  check_optimizer_tensors(kind, tensors, groups.size());
  HS_CHECK(gradients.size() == tensors.size(), "optimizer_step: got ", gradients.size(), " gradients, expected ",
           tensors.size());
  if (control.found && *control.found != 0) return;  // NaN too

  struct Chunk {
    const Work* work;
    std::int64_t begin;
  };
  const GradientFactors factors = gradient_factors(control);
  std::vector<Work> works;
  works.reserve(tensors.size());  // chunks point into it
  std::vector<Chunk> chunks;
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const OptimizerTensor& tensor = tensors[i];
    works.push_back(prepare(tensor, gradients[i], groups[static_cast<std::size_t>(tensor.group)], factors));
    for (std::int64_t begin = 0; begin < tensor.numel; begin += kChunk) chunks.push_back({&works.back(), begin});
    elements += tensor.numel;
  }
  const auto task = [&](std::int64_t i) {
    const auto& [work, begin] = chunks[static_cast<std::size_t>(i)];
    chunk_function(kind, *work->tensor)(*work, begin, std::min(begin + kChunk, work->tensor->numel));
  };
  const auto count = static_cast<std::int64_t>(chunks.size());
  if (elements <= kChunk) {  // not worth waking a thread
    SerialExecutor().for_each(count, task);
  } else {
    executor.for_each(count, task);
  }
}

}  // namespace halfstep::cpu
