// Uses an op by its name alone: no symbol of halfstep is referenced here.
#include <cstdio>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

int main() {
  const at::Tensor grad = at::full({3}, 4.0);
  const at::Tensor scale = at::full({}, 8.0);
  const at::Tensor found = at::zeros({});
  const at::Tensor norm = at::zeros({});
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("halfstep::unscale_", "");
  torch::jit::Stack stack{c10::List<at::Tensor>({grad}), scale, found, norm, c10::IValue(), false};
  op.callBoxed(stack);
  std::printf("halfstep says %.1f %.1f\n", grad[0].item<double>(), grad.sum().item<double>());
  return 0;
}
