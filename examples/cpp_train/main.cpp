// Trains a small network in float16 (bfloat16 on a CPU) from C++: halfstep::AutocastScope around the forward pass, a
// plan that keeps the output layer in float32, halfstep::GradScaler around the optimizer. Two interleaved spirals, on
// the GPU if there is one.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include <halfstep/torch.h>
#include <torch/torch.h>

namespace {

struct Spirals {
  torch::Tensor points;  // [n, 2]
  torch::Tensor labels;  // [n]
};

Spirals make_spirals(int64_t n) {
  const torch::Tensor t = torch::rand({n}).sqrt() * (3.0 * M_PI);
  const torch::Tensor labels = torch::arange(n).remainder(2);
  const torch::Tensor angle = t + labels * M_PI;
  const torch::Tensor points = torch::stack({t * angle.cos(), t * angle.sin()}, 1) / (3.0 * M_PI);
  return {points + 0.01 * torch::randn({n, 2}), labels};
}

const halfstep::PolicyRule kLogits{
    .name = "logits", .precision = halfstep::Precision::kFloat32, .reason = "what the loss reads"};

struct Net : torch::nn::Module {
  explicit Net(halfstep::Precision half)
      : plan(halfstep::plan(*this, halfstep::PrecisionPolicy("spirals", half, {kLogits}))) {}

  torch::Tensor forward(const torch::Tensor& x) { return plan.run("logits", logits, body->forward(x)); }

  torch::nn::Sequential body =
      register_module("body", torch::nn::Sequential(torch::nn::Linear(2, 128), torch::nn::Tanh(),
                                                    torch::nn::Linear(128, 128), torch::nn::Tanh()));
  torch::nn::Linear logits = register_module("logits", torch::nn::Linear(128, 2));
  halfstep::PrecisionPlan plan;
};

}  // namespace

int main() {
  torch::manual_seed(7);
  const torch::Device device(torch::cuda::is_available() ? torch::kCUDA : torch::kCPU);

  const auto model =
      std::make_shared<Net>(device.is_cuda() ? halfstep::Precision::kFloat16 : halfstep::Precision::kBFloat16);
  model->to(device);
  std::printf("%s", model->plan.explain().c_str());
  torch::optim::Adam optimizer(model->parameters(), torch::optim::AdamOptions(3e-3));
  halfstep::GradScaler scaler({.rule = {.init_scale = 32768.0, .growth_interval = 200}});

  const Spirals data = make_spirals(1024);
  const torch::Tensor x = data.points.to(device);
  const torch::Tensor y = data.labels.to(device);

  float loss_value = NAN;
  for (int step = 1; step <= 400; ++step) {
    optimizer.zero_grad();
    torch::Tensor loss;
    {
      const halfstep::AutocastScope autocast(device.type(), device.is_cuda() ? torch::kHalf : torch::kBFloat16);
      loss = torch::nn::functional::cross_entropy(model->forward(x), y);
    }
    scaler.scale(loss).backward();
    scaler.step(optimizer, /*max_norm=*/1.0);  // nothing here waits for the device
    scaler.update();
    if (step % 100 == 0) {
      loss_value = loss.item<float>();
      const auto skipped = scaler.state()->counters()[halfstep::kSkipped].item<int64_t>();
      std::printf("step %3d  loss %.4f  scale %.0f  skipped %d\n", step, loss_value, scaler.get_scale(),
                  static_cast<int>(skipped));
    }
  }

  const torch::NoGradGuard no_grad;
  const double accuracy = model->forward(x).argmax(1).eq(y).to(torch::kFloat).mean().item<double>();
  std::printf("accuracy %.1f %%\n", 100.0 * accuracy);
  return accuracy > 0.95 ? EXIT_SUCCESS : EXIT_FAILURE;
}
