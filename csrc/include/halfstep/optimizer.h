// Adam, AdamW and SGD in one pass over parameters and states, with unscaling, clipping and skipping folded in.
//
// The gradient is read once, multiplied by 1 / *scale and by the clip factor in registers, and never written. If
// *found is not 0 (NaN included) nothing at all is written: no parameter, no state, no step count, no half copy.
//
//   u = g * float(1 / double(*scale)) * min(1, max_norm / (*norm + 1e-6))        as torch.amp and clip_grad_norm_
//   Adam (Kingma & Ba, arXiv:1412.6980) with L2 decay, AdamW (Loshchilov & Hutter, arXiv:1711.05101), either with
//   AMSGrad (Reddi et al., arXiv:1904.09237); SGD with momentum as torch.optim.SGD defines it.
//
// Arithmetic is that of torch.optim's fused=True kernels (torch 2.11): hyperparameters are rounded to the compute type
// (float32; float64 for float64 values) before they are used, and the GPU fuses the same products with the same sums.
// Given the same gradient, results on the GPU are torch's bits, but for Adam's L2 decay in float32, where torch's own
// kernel fuses for three elements of four. The CPU follows within one unit in the last place per step.
//
// `values` are float32, float64, float16 or bfloat16. float32 values take float32, float16 or bfloat16 gradients, the
// others gradients of their own dtype. States have the values' dtype. A half copy, written in the same pass, is the new
// value rounded to float16 or bfloat16; only float32 values have one: they are then the master copy of half weights.
// Sizes are 64-bit; tensors may be empty, and aligned to no more than their element size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "halfstep/dtype.h"
#include "halfstep/stream.h"

namespace halfstep {

enum class OptimizerKind : std::uint8_t { kAdam, kSgd };

// The hyperparameters of one param group.
struct OptimizerGroup {
  double lr = 0.0;
  const float* lr_tensor = nullptr;  // read in place of `lr` where not null; on the device of the step
  double weight_decay = 0.0;
  double beta1 = 0.0, beta2 = 0.0, eps = 0.0;  // Adam
  double momentum = 0.0, dampening = 0.0;      // SGD; momentum 0 means no buffer
  bool decoupled = false;                      // AdamW: decay the parameter, not through the gradient
  bool nesterov = false;
  bool maximize = false;

  bool operator==(const OptimizerGroup&) const = default;
};

// One parameter and its state. All arrays have `numel` elements; those not used are null.
struct OptimizerTensor {
  void* values;
  void* state[3];  // Adam: exp_avg, exp_avg_sq, max_exp_avg_sq (AMSGrad or null); SGD: momentum_buffer or null
  void* half_copy;
  float* step;  // how many steps were applied; the step adds 1. SGD: at 0 the momentum buffer is only written
  std::int64_t numel;
  std::int32_t group;
  DType dtype;
  DType gradient_dtype;
  DType copy_dtype;

  bool operator==(const OptimizerTensor&) const = default;
};

// What decides over the step and scales its gradients: one float32 each, where the step runs. A null `found` means that
// nothing was found, a null `scale` that the gradients are unscaled already, a null `norm` that nothing is clipped.
struct StepControl {
  const float* found;
  const float* scale;
  const float* norm;
  float max_norm;
};

namespace cpu {
// gradients[i] belongs to tensors[i].
void optimizer_step(OptimizerKind kind, std::span<const OptimizerTensor> tensors,
                    std::span<const void* const> gradients, std::span<const OptimizerGroup> groups,
                    const StepControl& control, const Executor& executor);
}  // namespace cpu

namespace cuda {

// The device's table of tensors, gradient addresses and hyperparameters, in memory that the caller owns. It stays there
// between steps; only what changed is set again. The setters copy their argument through kernel parameters: nothing is
// staged, nothing waits. A captured step holds the table's addresses: setting the hyperparameters before a replay
// reaches it.
class OptimizerTable {
 public:
  static std::size_t bytes(std::size_t tensors, std::size_t groups);
  // `memory` is device memory of bytes(...) bytes, aligned to 16.
  OptimizerTable(void* memory, std::size_t tensors, std::size_t groups);

  void set_tensors(OptimizerKind kind, std::span<const OptimizerTensor> tensors, CudaStream stream);
  void set_gradients(std::span<const void* const> gradients, CudaStream stream);
  void set_groups(std::span<const OptimizerGroup> groups, CudaStream stream);

  struct Header;
  struct Addresses {
    Header* header;
    OptimizerTensor* tensors;
    const void** gradients;
    OptimizerGroup* groups;
    float* constants;  // [tensors, 4], written by each step's first kernel
    std::uint32_t* first_chunk;
  };
  const Addresses& addresses() const { return addresses_; }
  std::size_t tensors() const { return tensors_; }
  std::uint32_t chunks() const { return chunks_; }

 private:
  Addresses addresses_;
  std::size_t tensors_;
  std::size_t groups_;
  std::uint32_t chunks_ = 0;
};

// Two kernels on `stream`; no synchronisation, no host read, capturable.
void optimizer_step(OptimizerKind kind, const OptimizerTable& table, const StepControl& control, CudaStream stream);

}  // namespace cuda
}  // namespace halfstep
