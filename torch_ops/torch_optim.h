// The fused step of torch::optim's Adam, AdamW and SGD on their own parameters, states and param groups.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "halfstep/torch/optimizer.h"

namespace torch::optim {
class Optimizer;
}

namespace halfstep::torch_ops {

// torch::optim counts steps on the host. Here the applied steps are counted on the device; the host's count goes along
// as if every step were applied, until write_back() corrects it.
class TorchOptimStep {
 public:
  // Whether this is exactly one of the three classes.
  static bool supports(const torch::optim::Optimizer& optimizer);

  // Finds the gradients of now. "" or why torch must take this step; nothing has changed then.
  std::string collect(torch::optim::Optimizer& optimizer, bool allow_float16);
  bool has_gradients() const;
  std::int64_t steps() const { return steps_; }  // taken by this object, skipped and captured ones among them

  struct Checked {
    std::vector<at::Tensor> found, norm;  // one per part
  };
  Checked check(const at::Tensor& scale);
  // `found` lies anywhere; a null `scale` means unscaled gradients, a null `norm` no clipping.
  void step(torch::optim::Optimizer& optimizer, const at::Tensor& found, const std::optional<at::Tensor>& scale,
            const std::optional<at::Tensor>& norm, double max_norm);

  // For a CUDA graph: a copy that shares the states and counts of this one and has a table of its own. It is made after
  // a step and before the capture, collects and steps once in it, and then belongs to that graph.
  std::unique_ptr<TorchOptimStep> for_capture(const torch::optim::Optimizer& optimizer) const;
  // Whether the optimizer's parameters, states or groups are others than the captured ones.
  bool outdated(torch::optim::Optimizer& optimizer) const;
  // Before a replay: gives the captured step the hyperparameters of now, and counts the step on the host.
  void follow(torch::optim::Optimizer& optimizer);

  // The host's counts, and no momentum buffer that no step has written. Waits for the device.
  void write_back(torch::optim::Optimizer& optimizer);

 private:
  struct Part;
  // What a part was made of, to know when that has changed.
  struct Seen {
    at::Tensor param;  // held, so that no other can have its address
    const void* state;
    at::Tensor first;
    std::int64_t step;
    std::size_t states;
    std::int64_t group;

    bool operator==(const Seen& other) const {
      return param.is_same(other.param) && state == other.state && first.is_same(other.first) && step == other.step &&
             states == other.states && group == other.group;
    }
  };

  std::string collect_parts(bool allow_float16);
  void rebuild(torch::optim::Optimizer& optimizer);

  void count_on_host(torch::optim::Optimizer& optimizer);

  bool for_capture_ = false;
  std::int64_t steps_ = 0;
  std::vector<std::shared_ptr<Part>> parts_;
  std::shared_ptr<std::vector<Seen>> seen_ = std::make_shared<std::vector<Seen>>();  // one for all copies
};

}  // namespace halfstep::torch_ops
