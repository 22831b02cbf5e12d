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
constexpr int kLanes = 16;  // one AVX-512 register: a block then stays in registers, 1.4 times as fast as 64

// A tensor of this step, with its gradient.
struct Work {
  const OptimizerTensor* tensor;
  const void* gradient;
  const OptimizerGroup* group;
  GradientFactors factors;
  double lr;
  float step;  // this one included
};

template <class Compute>
[[gnu::always_inline]] inline auto adam_constants(const Work& work) {
  const OptimizerGroup& g = *work.group;
  const auto lr = static_cast<Compute>(work.lr);
  const auto beta1 = static_cast<Compute>(g.beta1);
  const auto beta2 = static_cast<Compute>(g.beta2);
  return AdamConstants<Compute>{lr,
                                static_cast<Compute>(g.weight_decay),
                                beta1,
                                beta2,
                                static_cast<Compute>(g.eps),
                                step_size(lr, beta1, work.step),
                                bias_correction2_sqrt(beta2, work.step),
                                g.decoupled,
                                g.maximize};
}

template <class Compute>
[[gnu::always_inline]] inline auto sgd_constants(const Work& work) {
  const OptimizerGroup& g = *work.group;
  return SgdConstants<Compute>{static_cast<Compute>(work.lr),
                               static_cast<Compute>(g.weight_decay),
                               static_cast<Compute>(g.momentum),
                               static_cast<Compute>(g.dampening),
                               work.step == 1,
                               g.nesterov,
                               g.maximize};
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
  [[gnu::always_inline]] static auto constants(const Work& work) {
    return adam_constants<Compute>(work);
  }

  template <class Compute>
  [[gnu::always_inline]] static void update(Block<Compute>& b, int lanes, const AdamConstants<Compute>& c) {
    negate_and_decay(b, lanes, c, c.decoupled);
    for (int lane = 0; lane < lanes; ++lane)
      adam_element<amsgrad>(b.param[lane], b.grad[lane], b.state[0][lane], b.state[1][lane], b.state[2][lane], c);
  }
};

template <bool with_momentum>
struct Sgd {
  static constexpr int states = with_momentum ? 1 : 0;

  template <class Compute>
  [[gnu::always_inline]] static auto constants(const Work& work) {
    return sgd_constants<Compute>(work);
  }

  template <class Compute>
  [[gnu::always_inline]] static void update(Block<Compute>& b, int lanes, const SgdConstants<Compute>& c) {
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

  const auto c = Optimizer::template constants<Compute>(work);

  const auto visit = [&](std::int64_t at, int lanes) __attribute__((always_inline)) {
    Block<Compute> block;
    load<Gradient>(work.gradient, at, lanes, block.grad);
    load<Value>(tensor.values, at, lanes, block.param);
    for (int i = 0; i < Optimizer::states; ++i) load<Value>(tensor.state[i], at, lanes, block.state[i]);
    for (int lane = 0; lane < lanes; ++lane) block.grad[lane] = block.grad[lane] * inverse_scale * clip;
    Optimizer::update(block, lanes, c);
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
    const OptimizerGroup& group = groups[static_cast<std::size_t>(tensor.group)];
    const double lr = group.lr_tensor ? static_cast<double>(*group.lr_tensor) : group.lr;
    works.push_back({&tensor, gradients[i], &group, factors, lr, *tensor.step += 1});
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
