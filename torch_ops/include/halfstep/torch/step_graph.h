// A whole training step as one CUDA graph, for LibTorch programs with CUDA. Not part of halfstep/torch.h: it needs the
// CUDA headers and libtorch_cuda, which the program then links (torch's own CMake target does).
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/optim/optimizer.h>

#include "halfstep/torch/scaling.h"
#include "halfstep/torch/step_watch.h"

namespace halfstep {

struct StepGraphOptions {
  int warmup = 3;              // calls with inputs of one shape before they are captured, at least 1
  std::size_t max_graphs = 8;  // further shapes run as they are
  bool copy_outputs = true;    // false: the graph's own outputs, which the next call overwrites
  std::vector<std::shared_ptr<torch::nn::Module>> modules{};  // that the step runs, to be watched: {model.ptr()}
};

// Captures a training step once per shape of its inputs and replays it:
//
//   halfstep::StepGraph step(scaler, {&optimizer}, [&](const std::vector<at::Tensor>& inputs) {
//     optimizer.zero_grad();
//     at::Tensor loss;
//     {
//       halfstep::AutocastScope autocast(torch::kCUDA);
//       loss = loss_function(model->forward(inputs[0]), inputs[1]);
//     }
//     scaler.scale(loss).backward();
//     scaler.step(optimizer);
//     scaler.update();
//     return std::vector<at::Tensor>{loss.detach()};
//   });
//   for (...) loss = step({x, y})[0];
//
// The first calls with inputs of one shape run the step as it is; the next one captures it, and that call and all later
// ones replay the capture. Each call trains one step, to the same bits either way, with dropout drawn anew. Learning
// rates and all other options of the optimizers are read before each replay. What cannot be captured runs as it is:
// inputs or parameters on the CPU, an optimizer that torch steps (any, if the scaler is disabled), a step that waits
// for the device, changes learning rates or leaves update() to others. Code in the step that is not on the device runs
// only while it is captured: a scheduler's step() belongs after the call. explain() says what is captured, what not and
// why.
//
// A replay reads and writes memory where it lay when it was captured. Looked at before each call, and a reason to drop
// all captures and warm up anew:
//   - another state or rule of the scaler, and checks of gradients outside the step that wait for its update();
//   - parameters, their groups and states: replaced, moved, frozen, unfrozen;
//   - gradients set or dropped between the calls. A step that only runs backward accumulates over calls, if
//     zero_grad(/*set_to_none=*/false) keeps them;
//   - of the options' modules also parameters that no optimizer has, buffers, submodules, and train() and eval().
// Nothing else is seen: modules that are not given, other tensors that the step reads (write them in place), a member
// of a module that is assigned another tensor, variables of the program. After such a change call reset().
//
// Inputs are copied into the graph's own; outputs are detached copies. Calls use the current stream and wait for
// nothing but the capture itself (and before it once, if there is an optimizer that the step does not step). Scaler and
// optimizers must outlive the object. Not thread-safe. Layers compute on the weights as autocast casts them: a C++
// module's forward cannot be given half copies.
class StepGraph {
 public:
  using Tensors = std::vector<at::Tensor>;
  using Step = std::function<Tensors(const Tensors&)>;

  StepGraph(GradScaler& scaler, std::vector<torch::optim::Optimizer*> optimizers, Step step,
            const StepGraphOptions& options = {})
      : scaler_(scaler), optimizers_(std::move(optimizers)), step_(std::move(step)), options_(options) {
    TORCH_CHECK_VALUE(options_.warmup >= 1, "StepGraph: warmup is ", options_.warmup, ", expected at least 1");
    TORCH_CHECK_VALUE(!optimizers_.empty(), "StepGraph: got no optimizer");
    for (const auto& module : options_.modules) TORCH_CHECK_VALUE(module, "StepGraph: a module is null");
    start();
  }
  StepGraph(const StepGraph&) = delete;
  StepGraph& operator=(const StepGraph&) = delete;

  Tensors operator()(const Tensors& inputs) {
    std::string changed = watch_->changed();
    Entry* entry = changed.empty() ? &find(inputs) : nullptr;
    if (entry && entry->graph) changed = outdated(*entry->graph);
    if (!changed.empty()) {
      reset(changed);
      entry = &find(inputs);
    }
    if (!entry->graph && entry->reason.empty() && entry->warm >= options_.warmup) capture(*entry, inputs);
    if (!entry->graph) return run(*entry, inputs);
    ++replays_;
    ++entry->replays;
    return replay(*entry->graph, inputs);
  }

  std::int64_t captures() const { return captures_; }
  std::int64_t replays() const { return replays_; }
  // Drops all captures and starts anew. Nothing that was trained is lost.
  void reset(const std::string& reason = "reset() was called") {
    restarts_.push_back(reason);
    if (restarts_.size() > 5) restarts_.pop_front();
    entries_.clear();
    pool_.reset();
    start();
  }
  // Bytes of device memory that the captures hold: activations, gradients, outputs.
  std::size_t memory() const {
    std::size_t bytes = 0;
    if (!pool_) return bytes;
    for (const auto& segment : c10::cuda::CUDACachingAllocator::snapshot().segments)
      if (segment.owner_private_pool_id == *pool_) bytes += segment.total_size;
    return bytes;
  }
  // One line per shape of inputs: whether it is captured, and if not why. Then why captures were last dropped.
  std::string explain() const {
    std::string text = c10::str(captures_, " captures, ", replays_, " replays, ", size(memory()), "\n");
    for (const auto& [key, entry] : entries_)
      text += c10::str("  ", entry.shapes, ": ",
                       entry.graph            ? c10::str("captured, ", entry.replays, " replays, ", size(entry.bytes))
                       : entry.reason.empty() ? c10::str("warming up, ", entry.warm, " of ", options_.warmup)
                                              : "runs as it is: " + entry.reason,
                       "\n");
    for (const std::string& reason : restarts_) text += "  started anew: " + reason + "\n";
    return text;
  }

 private:
  using Properties = std::array<int, 6>;
  using Key = std::vector<std::tuple<std::vector<std::int64_t>, std::vector<std::int64_t>, Properties>>;
  static constexpr const char* kAwaitsUpdate = "checks of gradients outside the step wait for the scaler's update()";

  struct Gradient {
    at::Tensor before, after;  // the step
  };
  struct Graph {
    Graph(GradScaler& scaler, const std::vector<torch::optim::Optimizer*>& all) : optimizers(scaler, all) {}
    CapturedOptimizers optimizers;
    at::cuda::CUDAGraph graph;
    Tensors inputs, outputs;
    std::vector<Gradient> gradients;  // of the watched parameters, in their order
    Tensors written;                  // of all that is watched
  };
  struct Entry {
    std::string shapes, reason;
    int warm = 0;
    std::int64_t replays = 0;
    std::size_t bytes = 0;
    std::unique_ptr<Graph> graph;
  };
  void start() {
    watch_.emplace(optimizers_, options_.modules);
    const at::Device device = watch_->parameters() > 0 ? watch_->tensor(0).device() : at::Device(at::kCPU);
    if (device != device_) stream_.reset();
    device_ = device;
  }

  Entry& find(const Tensors& inputs) {
    Key key;
    for (const at::Tensor& input : inputs) {
      if (!input.defined()) {
        key.emplace_back();
        continue;
      }
      key.emplace_back(input.sizes().vec(),
                       input.layout() == at::kStrided ? input.strides().vec() : std::vector<std::int64_t>(),
                       Properties{1, static_cast<int>(input.scalar_type()), static_cast<int>(input.layout()),
                                  static_cast<int>(input.device().type()), input.device().index(),
                                  static_cast<int>(input.requires_grad())});
    }
    const auto [place, made] = entries_.try_emplace(std::move(key));
    if (made) {
      for (const at::Tensor& input : inputs)
        place->second.shapes += c10::str(place->second.shapes.empty() ? "" : ", ", input.toString(),
                                         input.defined() ? c10::str(input.sizes()) : "");
      place->second.reason = obstacle(inputs);
    }
    return place->second;
  }

  std::string obstacle(const Tensors& inputs) const {
    for (std::size_t i = 0; i < watch_->size(); ++i)
      if (const at::Tensor& tensor = watch_->tensor(i); !tensor.is_cuda() || tensor.device() != device_)
        return c10::str(i < watch_->parameters() ? "a parameter is on " : "a buffer is on ", tensor.device());
    if (!device_.is_cuda()) return "there are no parameters";
    if (!scaler_.is_enabled()) return "the scaler is disabled: torch steps the optimizers";
    for (const at::Tensor& input : inputs) {
      if (!input.defined()) return "an input is undefined";
      if (input.device() != device_) return c10::str("an input is on ", input.device());
      if (input.layout() != at::kStrided) return c10::str("an input is ", input.layout());
      if (input.requires_grad()) return "an input requires a gradient";
    }
    return full();
  }

  std::string full() const {
    std::size_t graphs = 0;
    for (const auto& [key, entry] : entries_) graphs += entry.graph != nullptr;
    return graphs < options_.max_graphs ? "" : c10::str("there are max_graphs = ", graphs, " captures already");
  }

  static Tensors detached(const Tensors& outputs) {
    Tensors all;
    for (const at::Tensor& output : outputs) all.push_back(output.defined() ? output.detach() : output);
    return all;
  }

  Tensors run(Entry& entry, const Tensors& inputs) {
    if (!entry.reason.empty()) return detached(step_(inputs));
    const auto outer = c10::cuda::getCurrentCUDAStream(device_.index());
    at::cuda::CUDAEvent begin, end;
    begin.record(outer);
    begin.block(stream());
    const auto join = [&] {
      end.record(stream());
      end.block(outer);
    };
    Tensors outputs;
    try {
      const c10::cuda::CUDAStreamGuard guard(stream());
      const StepTrace trace(scaler_, optimizers_, /*sums=*/entry.warm + 1 == options_.warmup);
      outputs = detached(step_(inputs));
      entry.reason = trace.unfit();
    } catch (...) {
      join();
      throw;
    }
    join();
    ++entry.warm;
    return outputs;
  }

  void capture(Entry& entry, const Tensors& inputs) {
    entry.reason = CapturedOptimizers::awaits_update(scaler_) ? kAwaitsUpdate : full();
    if (!entry.reason.empty()) return;
    const c10::cuda::CUDAGuard device(device_);
    auto made = std::make_unique<Graph>(scaler_, optimizers_);
    for (const at::Tensor& input : inputs) made->inputs.push_back(input.detach().clone());
    std::vector<std::int64_t> versions;
    for (std::size_t i = 0; i < watch_->size(); ++i) versions.push_back(watch_->tensor(i)._version());
    for (std::size_t i = 0; i < watch_->parameters(); ++i) made->gradients.push_back({watch_->tensor(i).grad(), {}});
    if (!pool_) pool_ = at::cuda::graph_pool_handle();
    c10::cuda::device_synchronize();
    c10::cuda::CUDACachingAllocator::emptyCache();  // the memory of the steps before, for the graph
    const std::size_t bytes = memory();
    bool begun = false;
    made->optimizers.enter();
    try {
      const c10::cuda::CUDAStreamGuard guard(stream());
      const StepTrace trace(scaler_, optimizers_, /*sums=*/false);
      made->graph.capture_begin(*pool_, cudaStreamCaptureModeThreadLocal);
      begun = true;
      for (const at::Tensor& output : step_(made->inputs)) {
        if (output.device() != device_) entry.reason = c10::str("the step returns a tensor on ", output.device());
        made->outputs.push_back(output.detach());
      }
      if (entry.reason.empty()) entry.reason = trace.unfit();
      if (entry.reason.empty()) made->graph.capture_end();
    } catch (const std::exception& error) {
      entry.reason = "capturing threw " + std::string(error.what()).substr(0, std::string(error.what()).find('\n'));
    }
    made->optimizers.leave(/*keep=*/entry.reason.empty());
    if (!entry.reason.empty()) {
      for (std::size_t i = 0; i < watch_->parameters(); ++i) set_gradient(watch_->tensor(i), made->gradients[i].before);
      abandon(*made, begun);
      return;
    }
    for (std::size_t i = 0; i < watch_->parameters(); ++i) made->gradients[i].after = watch_->tensor(i).grad();
    for (std::size_t i = 0; i < watch_->size(); ++i)
      if (watch_->tensor(i)._version() != versions[i]) made->written.push_back(watch_->tensor(i));
    c10::cuda::device_synchronize();  // the tables were filled on another stream
    entry.graph = std::move(made);
    entry.bytes = memory() - bytes;
    ++captures_;
  }

  // torch leaves the allocator and the random generator in their capturing state when a capture fails; a capture that
  // succeeds brings the generator back.
  void abandon(Graph& failed, bool begun) {
    const c10::cuda::CUDAStreamGuard guard(stream());
    bool ended = !begun;
    if (begun) {
      try {
        failed.graph.capture_end();
        ended = true;
      } catch (const std::exception&) {
        c10::cuda::CUDACachingAllocator::endAllocateToPool(device_.index(), *pool_);
        c10::cuda::CUDACachingAllocator::releasePool(device_.index(), *pool_);
      }
    }
    if (!begun || !ended) {
      at::cuda::CUDAGraph spare;
      spare.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
      at::zeros({}, at::TensorOptions().device(device_));
      spare.capture_end();
    }
    bool alive = false;
    for (const auto& [key, entry] : entries_) alive |= entry.graph != nullptr;
    if (!alive) pool_.reset();  // torch frees a pool with its last capture
  }

  static void set_gradient(const at::Tensor& parameter, const at::Tensor& gradient) {
    if (!parameter.grad().is_same(gradient)) parameter.mutable_grad() = gradient;
  }

  // "" or what has changed that is part of the capture.
  std::string outdated(const Graph& graph) const {
    if (CapturedOptimizers::awaits_update(scaler_)) return kAwaitsUpdate;
    for (std::size_t i = 0; i < graph.gradients.size(); ++i) {
      // A gradient that was there and is another tensor now was dropped within the step, whatever it was.
      const auto& [before, after] = graph.gradients[i];
      const bool needed = !before.defined() || before.is_same(after);
      if (needed && !watch_->tensor(i).grad().is_same(before))
        return "the gradient of " + watch_->name(i) + " was set or dropped between the calls";
    }
    return graph.optimizers.outdated();
  }

  Tensors replay(Graph& graph, const Tensors& inputs) {
    const at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < inputs.size(); ++i) graph.inputs[i].copy_(inputs[i], /*non_blocking=*/true);
    graph.optimizers.follow();
    graph.graph.replay();
    graph.optimizers.replayed();
    for (const at::Tensor& tensor : graph.written) tensor.unsafeGetTensorImpl()->bump_version();
    for (std::size_t i = 0; i < graph.gradients.size(); ++i) set_gradient(watch_->tensor(i), graph.gradients[i].after);
    if (!options_.copy_outputs) return graph.outputs;
    Tensors outputs;
    for (const at::Tensor& output : graph.outputs) outputs.push_back(output.clone());
    return outputs;
  }

  c10::cuda::CUDAStream stream() {
    if (!stream_) stream_ = c10::cuda::getStreamFromPool(false, device_.index());
    return *stream_;
  }

  static std::string size(std::size_t bytes) {
    return c10::str(bytes >> 20, ".", (bytes >> 10) % 1024 * 10 / 1024, " MiB");
  }

  GradScaler& scaler_;
  std::vector<torch::optim::Optimizer*> optimizers_;
  Step step_;
  StepGraphOptions options_;
  at::Device device_{at::kCPU};
  std::optional<StepWatch> watch_;
  std::optional<c10::cuda::CUDAStream> stream_;
  std::optional<at::cuda::MempoolId_t> pool_;
  std::map<Key, Entry> entries_;
  std::deque<std::string> restarts_;
  std::int64_t captures_ = 0, replays_ = 0;
};

}  // namespace halfstep
