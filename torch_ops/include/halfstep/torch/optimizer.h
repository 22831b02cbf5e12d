// Adam, AdamW and SGD in one pass, with unscaling, clipping and skipping folded in (contract: halfstep/optimizer.h).
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include "halfstep/export.h"
#include "halfstep/optimizer.h"
#include "halfstep/tensor_list.h"

namespace halfstep {

// torch.ops.halfstep.adam_step_ and sgd_step_ as C++ functions: one step of all parameters of a device.
//   params    written; dense in any order of dimensions
//   grads     read only; float32 parameters take float32, float16 or bfloat16, others their own dtype. Gradients whose
//             strides differ from their parameter's are copied first
//   states    of their parameter's dtype and strides; written. max_exp_avg_sqs empty: no AMSGrad; momentum_buffers
//             empty: no momentum
//   steps     float32, one element each, on the parameters' device: the applied steps; written
//   found     float32, one element: the whole step does nothing unless it is 0
//   scale     float32, one element: gradients are divided by it
//   norm      float32, one element, of the unscaled gradients: they are clipped to max_norm
// On a GPU they enqueue on the current stream and do not wait. They build their table of addresses anew in each call;
// FusedOptimizer keeps it.
HALFSTEP_API void adam_step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                             at::TensorList exp_avg_sqs, at::TensorList max_exp_avg_sqs, at::TensorList steps,
                             double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                             bool maximize, const std::optional<at::Tensor>& found = std::nullopt,
                             const std::optional<at::Tensor>& scale = std::nullopt,
                             const std::optional<at::Tensor>& norm = std::nullopt, double max_norm = 0.0);
HALFSTEP_API void sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                            at::TensorList steps, double lr, double momentum, double dampening, double weight_decay,
                            bool nesterov, bool maximize, const std::optional<at::Tensor>& found = std::nullopt,
                            const std::optional<at::Tensor>& scale = std::nullopt,
                            const std::optional<at::Tensor>& norm = std::nullopt, double max_norm = 0.0);

// The L2 norm of one-element float32 norms, which may lie on several devices: a new float32 scalar on the first's.
HALFSTEP_API at::Tensor combine_norms(at::TensorList norms);

// torch.classes.halfstep.FusedOptimizer: the parameters of one optimizer on one device with their states, and the
// device's table of their addresses, which is rebuilt only when one of them moved. It reads each parameter's own .grad,
// or that of the half parameter whose master it is.
// Not thread-safe. A step uses the current stream; steps on different streams must be ordered by the caller, as all
// writes to the same parameters.
class HALFSTEP_API FusedOptimizer : public torch::CustomClassHolder {
 public:
  // Lists of one entry per parameter; of `states` (three lists) those that are not used are empty. `idle` are
  // parameters without a gradient so far, and without a state. Throws where a state does not fit its parameter.
  FusedOptimizer(OptimizerKind kind, std::vector<at::Tensor> params, std::vector<std::vector<at::Tensor>> states,
                 std::vector<at::Tensor> steps, std::vector<std::int64_t> groups, std::vector<at::Tensor> idle = {});

  // Finds the gradients of now; parameters without one are left out. Changes nothing. Returns "", kNoLongerIdle if an
  // idle parameter has a gradient, kNoLongerHalf if the parameter of a master is neither float16 nor bfloat16 now,
  // or why these gradients cannot be stepped here: a sparse one, a float16 one of a float16 parameter without a master
  // unless `allow_float16`, another device ...
  static constexpr const char* kNoLongerIdle = "no longer idle";
  static constexpr const char* kNoLongerHalf = "no longer half";
  std::string collect(bool allow_float16 = true);
  // In place of collect(): one gradient per parameter, in order, that collect() would accept.
  void set_gradients(at::TensorList grads);
  // Steps also write these half copies of the float32 parameters at `positions`: float16 or bfloat16, of the
  // parameter's strides. In place of those set before; no positions, no copies.
  void set_half_copies(const std::vector<std::int64_t>& positions, at::TensorList copies);
  // The float32 parameters at `positions` are masters of these float16 or bfloat16 parameters, which are stepped
  // through them: gradients are theirs, and steps write both. After set_half_copies(), and once. Values that others
  // write to such a parameter (seen by its version or address) reach the master in the next step: where the parameter
  // is not the master, rounded, the master becomes the parameter.
  void set_masters(const std::vector<std::int64_t>& positions, at::TensorList parameters);
  // Does that now. `replay`: a replay of a captured step comes next, after which all versions are counted up by one.
  void refresh_masters(bool replay = false);
  // How many gradients were collected, and the positions of their parameters.
  std::int64_t count() const { return static_cast<std::int64_t>(positions_.size()); }
  const std::vector<std::int64_t>& collected() const { return positions_; }

  // One read of the collected gradients. All float32 on the device: scale, found and norm one element each; stats
  // [count(), 6] (see check_gradients_).
  void check(const at::Tensor& scale, const at::Tensor& found, const at::Tensor& norm,
             const std::optional<at::Tensor>& stats);
  // Steps what collect() found, then forgets the gradients. Throws if one of them was replaced in between.
  void step(const std::vector<OptimizerGroup>& groups, const std::optional<at::Tensor>& found,
            const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& norm, double max_norm);

  // For a CUDA graph: reserve() before the capture, step() once in it, then the object belongs to that graph and
  // set_groups() before each replay lets it follow the hyperparameters. Synchronise the device between the end of the
  // capture and the first replay: the table is filled on another stream meanwhile.
  void reserve(std::int64_t groups);
  void set_groups(const std::vector<OptimizerGroup>& groups);
  at::Device device() const { return params_.empty() ? at::Device(at::kCPU) : params_[0].device(); }

 private:
  struct Table;
  void take(std::size_t position, const at::Tensor& grad);
  void reorder(const std::function<const at::Tensor&(std::size_t)>& gradient);
  void forget();
  void add_half_copies(const std::vector<std::int64_t>& positions, at::TensorList copies);
  bool is_master(std::size_t i) const { return !masters_.empty() && masters_[i].is; }
  // Whose gradient steps parameter i.
  const at::Tensor& owner(std::size_t i) const { return is_master(i) ? half_copies_[i] : params_[i]; }
  std::string misfit(std::size_t i) const;
  void refresh_master(std::size_t i);
  void note_equal(std::size_t i);
  bool from_parameters_ = true;  // collect(), not set_gradients()

  OptimizerKind kind_;
  std::vector<at::Tensor> params_, steps_, idle_;
  std::vector<std::vector<at::Tensor>> states_;
  std::vector<std::int64_t> groups_;
  std::vector<at::Tensor> half_copies_;  // none, or one per parameter, undefined where it has none
  // When master and parameter were last equal, but for rounding: the parameter's version, -1 for never, and address.
  struct Master {
    bool is = false;
    std::int64_t version = -1;
    const void* address = nullptr;
  };
  std::vector<Master> masters_;  // none, or one per parameter
  // Of the collected gradients, in order. They are not held: counting references costs more than all else here.
  std::vector<std::int64_t> positions_;
  std::vector<const at::TensorImpl*> gradients_;
  std::vector<TensorView> views_;
  std::vector<std::size_t> reordered_;  // positions in views_
  std::vector<at::Tensor> copies_;
  // Of a step, kept for their memory alone.
  std::vector<OptimizerTensor> rows_;
  std::vector<const void*> addresses_;
  std::shared_ptr<Table> table_;
};

}  // namespace halfstep
