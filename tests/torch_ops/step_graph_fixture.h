// A network that a StepGraph trains, and its twin that is trained by calling the same step without one.
#pragma once

#include "halfstep/torch/step_graph.h"

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "device_fixture.h"
#include "halfstep/torch.h"

namespace halfstep::test {

using Tensors = std::vector<at::Tensor>;

inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (!a.defined() || !b.defined()) return a.defined() == b.defined();
  const auto bytes = [](const at::Tensor& t) { return t.detach().cpu().contiguous().reshape(-1).view(at::kByte); };
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && torch::equal(bytes(a), bytes(b));
}

struct Trainee;
using Body = std::function<Tensors(Trainee&, const Tensors&)>;

struct TraineeOptions {
  StepGraphOptions graph{};
  bool split = false;         // Adam for the first half of the parameters and SGD for the others
  bool watch_modules = true;  // give the module to the StepGraph
  bool cpu_inputs = false;
  std::shared_ptr<GradScaler> scaler{};  // one that another run has too
};

inline std::shared_ptr<GradScaler> new_scaler() {
  return std::make_shared<GradScaler>(GradScalerOptions{.rule = {.init_scale = 1024.0}});
}

struct Trainee {
  Trainee(at::DeviceType where, Body step, const TraineeOptions& options, bool captured)
      : device(where == at::kCUDA ? at::Device(where, 0) : at::Device(where)),
        body(std::move(step)),
        scaler(options.scaler ? options.scaler : new_scaler()),
        weight(torch::ones({}, device)) {
    torch::manual_seed(1);
    model = torch::nn::Sequential(torch::nn::Linear(8, 32), torch::nn::BatchNorm1d(32), torch::nn::ReLU(),
                                  torch::nn::Dropout(0.2), torch::nn::Linear(32, 4));
    model->to(device);
    Tensors params = model->parameters(), others;
    if (options.split) {
      others.assign(params.begin() + 3, params.end());
      params.resize(3);
    }
    optimizers.push_back(std::make_shared<torch::optim::Adam>(params, torch::optim::AdamOptions(1e-2)));
    if (options.split)
      optimizers.push_back(std::make_shared<torch::optim::SGD>(others, torch::optim::SGDOptions(0.1).momentum(0.9)));
    torch::manual_seed(3);
    for (int i = 0; i < 24; ++i) {
      const at::Device place = options.cpu_inputs ? at::Device(at::kCPU) : device;
      x.push_back(torch::randn({16, 8}).to(place));
      y.push_back(torch::randint(4, {16}, torch::kLong).to(place));
    }
    if (!captured) return;
    StepGraphOptions settings = options.graph;
    if (options.watch_modules) settings.modules = {model.ptr()};
    graph.emplace(*scaler, pointers(), [this](const Tensors& in) { return body(*this, in); }, settings);
  }

  std::vector<torch::optim::Optimizer*> pointers() const {
    std::vector<torch::optim::Optimizer*> all;
    for (const auto& optimizer : optimizers) all.push_back(optimizer.get());
    return all;
  }
  torch::optim::Adam& adam() { return static_cast<torch::optim::Adam&>(*optimizers[0]); }
  torch::optim::AdamOptions& options() {
    return static_cast<torch::optim::AdamOptions&>(adam().param_groups()[0].options());
  }
  at::Tensor& parameter(std::size_t i) { return adam().param_groups()[0].params()[i]; }
  torch::nn::BatchNorm1dImpl& norm() { return *model->ptr(1)->as<torch::nn::BatchNorm1dImpl>(); }

  at::Tensor loss(const Tensors& in) {
    const AutocastScope autocast(device.type(), device.is_cuda() ? at::kHalf : at::kBFloat16);
    return torch::nn::functional::cross_entropy(model->forward(in[0].to(device)).to(at::kFloat), in[1].to(device)) *
           weight;
  }

  Tensors call(const Tensors& in) { return graph ? (*graph)(in) : body(*this, in); }
  // Trains on batch i, or on its first rows; an infinite weight of the loss is an overflow.
  Tensors go(int i, std::int64_t rows = 16, double loss_weight = 1.0) {
    weight.fill_(loss_weight);
    torch::manual_seed(100 + i);
    const auto at = static_cast<std::size_t>(i);
    return call({x[at].narrow(0, 0, rows), y[at].narrow(0, 0, rows)});
  }

  // All that a step changes.
  Tensors state() {
    Tensors all = model->buffers();
    for (const auto& optimizer : optimizers)
      for (const auto& group : optimizer->param_groups())
        for (const at::Tensor& parameter : group.params()) {
          all.push_back(parameter);
          all.push_back(parameter.grad());
          const auto found = optimizer->state().find(parameter.unsafeGetTensorImpl());
          if (found == optimizer->state().end()) continue;
          if (auto* const of_adam = dynamic_cast<torch::optim::AdamParamState*>(found->second.get())) {
            all.push_back(of_adam->exp_avg());
            all.push_back(of_adam->exp_avg_sq());
          } else if (auto* const of_sgd = dynamic_cast<torch::optim::SGDParamState*>(found->second.get())) {
            all.push_back(of_sgd->momentum_buffer());
          }
        }
    if (!scaler->is_enabled()) return all;
    all.push_back(torch::tensor(scaler->get_scale(), at::kDouble));
    all.push_back(scaler->state()->counters());
    all.push_back(scaler->state()->history());
    return all;
  }

  at::Device device;
  Body body;
  torch::nn::Sequential model{nullptr};
  std::vector<std::shared_ptr<torch::optim::Optimizer>> optimizers;
  std::shared_ptr<GradScaler> scaler;
  at::Tensor weight;
  Tensors x, y;
  std::optional<StepGraph> graph;
};

// The usual step.
inline Tensors train(Trainee& run, const Tensors& in) {
  for (const auto& optimizer : run.optimizers) optimizer->zero_grad();
  const at::Tensor loss = run.loss(in);
  run.scaler->scale(loss).backward();
  for (const auto& optimizer : run.optimizers) run.scaler->step(*optimizer, 1.0);
  run.scaler->update();
  return {loss.detach()};
}

struct Twins {
  Twins(at::DeviceType where, const Body& body = train, const TraineeOptions& options = {})
      : captured(where, body, options, true), plain(where, body, options, false), cuda(where == at::kCUDA) {}

  void each(const std::function<void(Trainee&)>& change) {
    change(captured);
    change(plain);
  }
  // The same call of both; its results and all that it changed have the same bits.
  void go(int i, std::int64_t rows = 16, double loss_weight = 1.0) {
    const Tensors ours = captured.go(i, rows, loss_weight), theirs = plain.go(i, rows, loss_weight);
    ASSERT_EQ(ours.size(), theirs.size());
    for (std::size_t k = 0; k < ours.size(); ++k) EXPECT_TRUE(same_bits(ours[k], theirs[k])) << i << " result " << k;
    expect_same(i);
  }
  void go_to(int begin, int end) {
    for (int i = begin; i < end; ++i) go(i);
  }
  void expect_same(int i) {
    const Tensors ours = captured.state(), theirs = plain.state();
    ASSERT_EQ(ours.size(), theirs.size()) << i;
    for (std::size_t k = 0; k < ours.size(); ++k) EXPECT_TRUE(same_bits(ours[k], theirs[k])) << i << " state " << k;
  }
  StepGraph& graph() { return *captured.graph; }
  void expect_captures(int captures, int replays) {
    EXPECT_EQ(graph().captures(), cuda ? captures : 0) << graph().explain();
    EXPECT_EQ(graph().replays(), cuda ? replays : 0) << graph().explain();
  }
  void expect_explained(const std::string& reason) {
    EXPECT_NE(graph().explain().find(reason), std::string::npos) << graph().explain();
  }
  // What only a GPU has to explain: on the CPU nothing is captured at all.
  void expect_explained_on_cuda(const std::string& reason) {
    expect_explained(cuda ? reason : "runs as it is: a parameter is on cpu");
  }

  Trainee captured, plain;
  bool cuda;
};

}  // namespace halfstep::test
