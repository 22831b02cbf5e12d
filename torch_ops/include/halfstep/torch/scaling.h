// The loss scaler for C++ programs, and the state it shares with Python and TorchScript.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include "halfstep/export.h"
#include "halfstep/policy.h"
#include "halfstep/scaling.h"

namespace torch::optim {
class Optimizer;
}
namespace torch::serialize {
class InputArchive;
class OutputArchive;
}  // namespace torch::serialize

namespace halfstep {

// torch.ops.halfstep.update_scale_ as a C++ function (contract: halfstep/scaling.h). All tensors on one device:
//   scale float32, growth_tracker int32, hysteresis_left int32: one element each
//   counters int64 [8], history float64 [1024, 4]: contiguous, optional
//   found, norm: float32, one element each
HALFSTEP_API void update_scale_(const at::Tensor& scale, const at::Tensor& growth_tracker,
                                const std::optional<at::Tensor>& hysteresis_left,
                                const std::optional<at::Tensor>& counters, const std::optional<at::Tensor>& history,
                                at::TensorList found, at::TensorList norm, const ScaleRule& rule);

// torch.ops.halfstep.request_scale_ (contract: halfstep/scaling.h), after update_scale_ with the same tensors:
//   record float64 [kRequestColumns], on their device
HALFSTEP_API void request_scale_(const at::Tensor& scale, const at::Tensor& counters, const at::Tensor& history,
                                 const at::Tensor& record, double requested, const ScaleRule& rule);

// 1 if any of the one-element float32 flags is not 0, else 0: a new float32 scalar on their device.
HALFSTEP_API at::Tensor combine_found(at::TensorList found);

// torch.classes.halfstep.GradScaler: the scaler's state and arithmetic, without an optimizer, so that a TorchScript
// module can hold one and `torch.jit.save` keeps it. All state lives on the device of the first scaled tensor.
class HALFSTEP_API GradScalerState : public torch::CustomClassHolder {
 public:
  explicit GradScalerState(const ScaleRule& rule);

  at::Tensor scale(const at::Tensor& outputs);
  // Checks, and with `write` unscales, the gradients; they may lie on several devices. Returns the flag, float32 0 or 1
  // on the scale's device. Throws if scale() was never called.
  at::Tensor check(at::TensorList grads, bool write);
  // The loss scale on the device, and flags and norms of gradients that were checked elsewhere.
  at::Tensor scale_tensor(const char* caller) const;
  at::Tensor record(at::TensorList found, at::TensorList norm);
  // Applies the rule to all flags since the last update. Throws if there are none.
  void update();
  void set_scale(double scale);  // throws unless a float32 > 0 within the rule's bounds
  // After an update: sets the scale to what is asked for, as far as overflows allow (halfstep/scaling.h); NaN asks for
  // nothing. Returns the record, float64 [kRequestColumns], live.
  at::Tensor request_scale(double requested);

  double get_scale() const;  // waits for the device
  at::Tensor found() const;  // of all checks since the last update
  // The live state, not a copy, once something was scaled: before that it waits on the CPU.
  at::Tensor counters();  // int64 [8], see halfstep::Counter
  at::Tensor history();   // float64 [1024, 4], see halfstep::HistoryColumn; likewise
  const ScaleRule& rule() const { return rule_; }

  using Snapshot = std::unordered_map<std::string, at::Tensor>;
  Snapshot snapshot() const;  // CPU copies of rule and state; waits for the device
  static c10::intrusive_ptr<GradScalerState> restore(const Snapshot& snapshot);

 private:
  void ensure_state(at::Device device);
  void wait_for_device();

  ScaleRule rule_;
  bool waiting_ = false;  // the state is on the CPU until the first scaled tensor names the device
  at::Tensor scale_, growth_tracker_, hysteresis_left_, counters_, history_;
  at::Tensor request_;                    // only if request_scale was called
  std::vector<at::Tensor> found_, norm_;  // since the last update
  friend class CapturedOptimizers;
};

// Loss scaling around a torch::optim optimizer, with the protocol of torch.amp.GradScaler:
//
//   halfstep::GradScaler scaler;
//   optimizer.zero_grad();
//   { halfstep::AutocastScope autocast(device); loss = ...; }
//   scaler.scale(loss).backward();
//   scaler.step(optimizer);      // unscales, and skips the step if a gradient is infinite or NaN
//   scaler.update();
//
// Adam, AdamW and SGD (exactly these classes, dense gradients) are stepped by halfstep's own kernels: gradients are
// read twice and not written, and nothing waits for the device. Every other optimizer is stepped by torch after one
// read of a flag on the host, counted in host_syncs(). unscale_(optimizer) before step, once, gives the true gradients.
// step(optimizer, max_norm) clips the L2 norm of the optimizer's unscaled gradients. While halfstep steps an Adam or
// AdamW, the optimizer's own step count runs on over skipped steps; call release(optimizer) before the optimizer is
// saved or stepped without the scaler. Misuse (unscale_ twice, step twice, no gradients, nothing scaled yet, gradients
// resized or replaced by nothing between unscale_ and step) throws c10::Error and changes neither parameters nor
// optimizer nor scaler. Gradients of float16 are refused, as torch.amp does, unless allow_fp16_gradients. An optimizer
// is known by its address: keep it alive from unscale_ to update. Not thread-safe; one per training loop.
struct GradScalerOptions {
  ScaleRule rule{};  // or scale_rule("megatron") and the like
  bool enabled = true;
  bool allow_fp16_gradients = false;
};

// Whether a step was applied. The device knows; asking waits for it.
class StepResult {
 public:
  explicit StepResult(at::Tensor found) : found_(std::move(found)) {}
  explicit operator bool() const { return !found_.defined() || found_.item<float>() == 0.0F; }

 private:
  at::Tensor found_;  // undefined: applied
};

namespace torch_ops {
class ScaleFollower;
class TorchOptimStep;
}  // namespace torch_ops

class HALFSTEP_API GradScaler {
 public:
  explicit GradScaler(const GradScalerOptions& options = {});
  GradScaler(const GradScaler&) = delete;  // two copies would share one scale
  GradScaler& operator=(const GradScaler&) = delete;
  GradScaler(GradScaler&&) noexcept;
  GradScaler& operator=(GradScaler&&) noexcept;
  ~GradScaler();

  at::Tensor scale(const at::Tensor& loss);
  void unscale_(torch::optim::Optimizer& optimizer);
  StepResult step(torch::optim::Optimizer& optimizer, std::optional<double> max_norm = std::nullopt);
  // Gives the optimizer's state back as torch keeps it. Waits for the device.
  void release(torch::optim::Optimizer& optimizer);
  std::int64_t host_syncs() const { return host_syncs_; }  // steps that waited to learn whether to skip
  void update();
  void update(double new_scale);

  // From now on each update() of a step that was applied sets the scale to what policy->get_loss_scale_factor says of
  // the gradients' norm of the last step applied before it, clamped to the rule's bounds. Without such a step, or
  // where the policy says nothing, the rule alone decides. A skipped step backs off as the rule says, and no more than
  // that is granted until the rule's growth has raised the limit. Ranks with the same gradients get the same scales:
  // for that update() waits until the step before has ended, never for its own, so the device has work meanwhile. It
  // throws, before it has changed anything, for an answer that is not a finite float32 above 0. A null pointer ends it.
  // Waits once if steps were taken before. StepGraph asks after each replay.
  void follow(std::shared_ptr<const CustomPrecisionPolicy> policy);

  double get_scale() const;  // 1 when disabled; waits for the device
  bool is_enabled() const { return options_.enabled; }
  const c10::intrusive_ptr<GradScalerState>& state() const { return state_; }

  // Everything a resumed run needs. load throws, and changes nothing, if an entry is missing or out of range.
  void save(torch::serialize::OutputArchive& archive) const;
  void load(torch::serialize::InputArchive& archive);

 private:
  enum class Stage { kReady, kUnscaled, kStepped };
  struct Checked {
    at::Tensor parameter;
    int64_t gradient_elements;  // -1: it had none
  };
  struct PerOptimizer {
    Stage stage = Stage::kReady;
    at::Tensor found;
    std::vector<Checked> checked;
  };

  static void check_unchanged(torch::optim::Optimizer& optimizer, const PerOptimizer& mine);
  std::optional<StepResult> fused_step(torch::optim::Optimizer& optimizer, std::optional<double> max_norm);

  friend class CapturedOptimizers;
  bool capturing_ = false;
  bool updated_ = false;  // in this capture
  std::unique_ptr<torch_ops::ScaleFollower> follower_;
  std::int64_t host_syncs_ = 0;
  std::unordered_map<torch::optim::Optimizer*, std::unique_ptr<torch_ops::TorchOptimStep>> fused_;
  GradScalerOptions options_;
  c10::intrusive_ptr<GradScalerState> state_;
  std::unordered_map<const torch::optim::Optimizer*, PerOptimizer> optimizers_;
};

// What a captured step holds of a scaler and of those of its optimizers that the scaler has stepped: tables of their
// own. For StepGraph (halfstep/torch/step_graph.h), which a program uses instead.
class HALFSTEP_API CapturedOptimizers {
 public:
  // After a step, before the capture.
  CapturedOptimizers(GradScaler& scaler, const std::vector<torch::optim::Optimizer*>& optimizers);
  CapturedOptimizers(const CapturedOptimizers&) = delete;
  CapturedOptimizers& operator=(const CapturedOptimizers&) = delete;
  ~CapturedOptimizers();

  // Whether checks of gradients or steps wait for the scaler's update().
  static bool awaits_update(const GradScaler& scaler);
  // How many steps of this optimizer halfstep's kernels have taken for the scaler; -1 if it never came to that. While
  // entered: in the capture.
  static std::int64_t steps(const GradScaler& scaler, torch::optim::Optimizer& optimizer);

  void enter();           // the scaler's next steps are captured
  void leave(bool keep);  // as before; without `keep` nothing of what the scaler has noted since enter() remains
  // "" or what is another than the captured one: the scaler's state or rule, an optimizer's parameters, states, groups.
  std::string outdated() const;
  void follow();    // before a replay: hyperparameters of now, and one step more on the host
  void replayed();  // after it: what update() leaves to the host

 private:
  GradScaler& scaler_;
  std::unordered_map<torch::optim::Optimizer*, std::unique_ptr<torch_ops::TorchOptimStep>> steps_;
  c10::intrusive_ptr<GradScalerState> state_;
  ScaleRule rule_;
  std::unordered_map<const torch::optim::Optimizer*, GradScaler::PerOptimizer> optimizers_;
  std::vector<at::Tensor> found_, norm_;
  bool updates_ = false;
};

}  // namespace halfstep
