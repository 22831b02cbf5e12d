// A whole training step as one CUDA graph, for LibTorch programs with CUDA. Not part of halfstep/torch.h: it needs the
// CUDA headers and libtorch_cuda, which the program then links (torch's own CMake target does).
#pragma once

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

namespace halfstep {

struct StepGraphOptions {
  int warmup = 3;              // calls with inputs of one shape before they are captured, at least 1
  std::size_t max_graphs = 8;  // further shapes run as they are
  bool copy_outputs = true;    // false: the graph's own outputs, which the next call overwrites
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
// rates and all other options of the optimizers are read before each replay. Another rule of the scaler, replaced
// parameters or states, freezing, and gradients set or dropped between calls lead to a new capture. What cannot be
// captured (inputs or parameters on the CPU, an optimizer that torch steps, a step that waits for the device) runs as
// it is; explain() says why. Code in the step that is not on the device runs only while it is captured.
//
// Inputs are copied into the graph's own; outputs are copies. Calls use the current stream and wait for nothing but
// the capture itself. Scaler and optimizers must outlive the object. Not thread-safe. Layers compute on the weights as
// autocast casts them: a C++ module's forward cannot be given half copies.
class StepGraph {
 public:
  using Tensors = std::vector<at::Tensor>;
  using Step = std::function<Tensors(const Tensors&)>;

  StepGraph(GradScaler& scaler, std::vector<torch::optim::Optimizer*> optimizers, Step step,
            const StepGraphOptions& options = {})
      : scaler_(scaler), optimizers_(std::move(optimizers)), step_(std::move(step)), options_(options) {
    TORCH_CHECK_VALUE(options_.warmup >= 1, "StepGraph: warmup is ", options_.warmup, ", expected at least 1");
    TORCH_CHECK_VALUE(!optimizers_.empty(), "StepGraph: got no optimizer");
    for (const at::Tensor& parameter : parameters()) device_ = parameter.device();
  }
  StepGraph(const StepGraph&) = delete;
  StepGraph& operator=(const StepGraph&) = delete;

  Tensors operator()(const Tensors& inputs) {
    Entry* entry = &find(inputs);
    if (entry->graph && outdated(*entry->graph)) {
      reset();
      entry = &find(inputs);
    }
    if (!entry->graph && entry->reason.empty() && entry->warm >= options_.warmup) capture(*entry, inputs);
    if (!entry->graph) return run(*entry, inputs);
    ++replays_;
    return replay(*entry->graph, inputs);
  }

  std::int64_t captures() const { return captures_; }
  std::int64_t replays() const { return replays_; }
  // Drops all captures. Nothing that was trained is lost.
  void reset() {
    entries_.clear();
    pool_.reset();
  }
  // One line per shape of inputs: whether it is captured, and if not why.
  std::string explain() const {
    std::string text = c10::str(captures_, " captures, ", replays_, " replays\n");
    for (const auto& [key, entry] : entries_)
      text += c10::str("  ", entry.shapes, ": ",
                       entry.graph            ? "captured"
                       : entry.reason.empty() ? c10::str("warming up, ", entry.warm, " of ", options_.warmup)
                                              : "runs as it is: " + entry.reason,
                       "\n");
    return text;
  }

 private:
  using Key = std::vector<std::tuple<std::vector<std::int64_t>, std::vector<std::int64_t>, int, std::string>>;

  struct Parameter {
    at::Tensor tensor;
    const void* data;
    bool requires_grad;
    at::Tensor before, after;  // gradients around the step
  };
  struct Graph {
    explicit Graph(GradScaler& scaler) : optimizers(scaler) {}
    CapturedOptimizers optimizers;
    at::cuda::CUDAGraph graph;
    Tensors inputs, outputs;
    std::vector<Parameter> parameters;
  };
  struct Entry {
    std::string shapes, reason;
    int warm = 0;
    std::unique_ptr<Graph> graph;
  };

  Tensors parameters() const {
    Tensors all;
    for (torch::optim::Optimizer* const optimizer : optimizers_)
      for (const auto& group : optimizer->param_groups())
        all.insert(all.end(), group.params().begin(), group.params().end());
    return all;
  }

  Entry& find(const Tensors& inputs) {
    Key key;
    for (const at::Tensor& input : inputs)
      key.emplace_back(input.sizes().vec(), input.strides().vec(), static_cast<int>(input.scalar_type()),
                       input.device().str());
    const auto [place, made] = entries_.try_emplace(std::move(key));
    if (made) {
      for (const at::Tensor& input : inputs)
        place->second.shapes += c10::str(place->second.shapes.empty() ? "" : ", ", input.toString(), input.sizes());
      place->second.reason = obstacle(inputs);
    }
    return place->second;
  }

  std::string obstacle(const Tensors& inputs) const {
    for (const at::Tensor& parameter : parameters())
      if (!parameter.is_cuda() || parameter.device() != device_)
        return c10::str("a parameter is on ", parameter.device());
    for (const at::Tensor& input : inputs) {
      if (input.device() != device_) return c10::str("an input is on ", input.device());
      if (input.requires_grad()) return "an input requires a gradient";
    }
    std::size_t graphs = 0;
    for (const auto& [key, entry] : entries_) graphs += entry.graph != nullptr;
    return graphs < options_.max_graphs ? "" : "there are max_graphs captures already";
  }

  Tensors run(Entry& entry, const Tensors& inputs) {
    if (!entry.reason.empty()) return step_(inputs);
    const auto outer = c10::cuda::getCurrentCUDAStream(device_.index());
    const std::int64_t syncs = scaler_.host_syncs();
    at::cuda::CUDAEvent begin, end;
    begin.record(outer);
    begin.block(stream());
    Tensors outputs;
    {
      const c10::cuda::CUDAStreamGuard guard(stream());
      outputs = step_(inputs);
      end.record(stream());
    }
    end.block(outer);
    ++entry.warm;
    if (scaler_.host_syncs() != syncs) entry.reason = "an optimizer is stepped by torch, after a read on the host";
    return outputs;
  }

  void capture(Entry& entry, const Tensors& inputs) {
    auto made = std::make_unique<Graph>(scaler_);
    for (const at::Tensor& input : inputs) made->inputs.push_back(input.detach().clone());
    for (const at::Tensor& parameter : parameters())
      made->parameters.push_back(
          {parameter, parameter.const_data_ptr(), parameter.requires_grad(), parameter.grad(), {}});
    if (!pool_) pool_ = at::cuda::graph_pool_handle();
    c10::cuda::device_synchronize();
    c10::cuda::CUDACachingAllocator::emptyCache();  // the memory of the steps before, for the graph
    bool begun = false;
    made->optimizers.enter();
    try {
      const c10::cuda::CUDAStreamGuard guard(stream());
      made->graph.capture_begin(*pool_, cudaStreamCaptureModeThreadLocal);
      begun = true;
      for (const at::Tensor& output : step_(made->inputs)) made->outputs.push_back(output.detach());
      made->graph.capture_end();
    } catch (const std::exception& error) {
      made->optimizers.leave(/*keep=*/false);
      for (const Parameter& parameter : made->parameters) set_gradient(parameter.tensor, parameter.before);
      entry.reason = "capturing threw " + std::string(error.what()).substr(0, std::string(error.what()).find('\n'));
      abandon(*made, begun);
      return;
    }
    made->optimizers.leave(/*keep=*/true);
    for (Parameter& parameter : made->parameters) parameter.after = parameter.tensor.grad();
    c10::cuda::device_synchronize();  // the tables were filled on another stream
    entry.graph = std::move(made);
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

  bool outdated(const Graph& graph) const {
    const Tensors now = parameters();
    if (now.size() != graph.parameters.size() || graph.optimizers.outdated()) return true;
    for (std::size_t i = 0; i < now.size(); ++i) {
      const Parameter& then = graph.parameters[i];
      if (!now[i].is_same(then.tensor) || now[i].const_data_ptr() != then.data ||
          now[i].requires_grad() != then.requires_grad)
        return true;
      // A gradient that was there and is another tensor now was dropped within the step, whatever it was.
      const bool needed = !then.before.defined() || then.before.is_same(then.after);
      if (needed && !now[i].grad().is_same(then.before)) return true;
    }
    return false;
  }

  Tensors replay(Graph& graph, const Tensors& inputs) {
    const at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < inputs.size(); ++i) graph.inputs[i].copy_(inputs[i], /*non_blocking=*/true);
    graph.optimizers.follow();
    graph.graph.replay();
    for (const Parameter& parameter : graph.parameters) {
      if (parameter.requires_grad) parameter.tensor.unsafeGetTensorImpl()->bump_version();
      set_gradient(parameter.tensor, parameter.after);
    }
    if (!options_.copy_outputs) return graph.outputs;
    Tensors outputs;
    for (const at::Tensor& output : graph.outputs) outputs.push_back(output.clone());
    return outputs;
  }

  c10::cuda::CUDAStream stream() {
    if (!stream_) stream_ = c10::cuda::getStreamFromPool(false, device_.index());
    return *stream_;
  }

  GradScaler& scaler_;
  std::vector<torch::optim::Optimizer*> optimizers_;
  Step step_;
  StepGraphOptions options_;
  at::Device device_{at::kCPU};
  std::optional<c10::cuda::CUDAStream> stream_;
  std::optional<at::cuda::MempoolId_t> pool_;
  std::map<Key, Entry> entries_;
  std::int64_t captures_ = 0, replays_ = 0;
};

}  // namespace halfstep
