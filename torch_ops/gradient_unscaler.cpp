// torch.classes.halfstep.GradientUnscaler: the loss scale of one backward pass, undone at the leaves by C++ hooks.
//
//   begin(Tensor[] roots, Tensor?[] gradients, Tensor? scale, bool scale_roots) -> (Tensor[], int)
//       Call before backward(roots, <the result>). Finds the leaves that the roots depend on, and, with a scale, hooks
//       them so that what arrives is divided by it before it is added to `.grad`, and before DistributedDataParallel
//       reduces it. Returns what to pass as gradients: ones, or `gradients`, with `scale_roots` times the scale, which
//       is float32 with one element, read on the device. Passes may nest, as those of reentrant checkpoints do: an
//       inner one goes without scale_roots, since its gradients carry the scale of the outer one, and may come from
//       another thread. The number is the pass's.
//   end(int pass)                       takes its hooks away, whether it came to its end or not
//   reached(Tensor[] tensors) -> bool   whether a gradient has come to one of these since forget()
//   forget()
//
// The hooks are pre-hooks of AccumulateGrad nodes. A hook on the tensor itself would be thrown away by Python's
// `register_hook`, which owns that list; the one slot for hooks after accumulation belongs to others as well; and what
// torch.autograd.grad returns does not pass these nodes, so it is what it is without a scale. Nodes are held from
// begin() to end() alone, so that nothing is left behind and nothing of a model is kept alive.
#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/ones_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/custom_class.h>

#include "conversions.h"
#include "registration.h"

namespace halfstep::torch_ops {
namespace {

using torch::autograd::AccumulateGrad;
using torch::autograd::FunctionPreHook;
using torch::autograd::Node;

// What the hooks of a pass share.
struct Pass {
  std::mutex mutex;
  std::vector<at::Tensor> scales;                // by device; the first is the one that was given
  std::unordered_set<const void*> reached_ours;  // leaves, by their implementation

  at::Tensor unscaled(const at::Tensor& gradient, const void* leaf) {
    if (!gradient.defined()) return gradient;
    const std::lock_guard lock(mutex);
    reached_ours.insert(leaf);
    if (scales.empty()) return gradient;
    const auto known = std::find_if(scales.begin(), scales.end(),
                                    [&](const at::Tensor& scale) { return scale.device() == gradient.device(); });
    if (known != scales.end()) return quotient(gradient, *known);
    scales.push_back(scales.front().to(gradient.device(), /*non_blocking=*/!gradient.is_cpu()));
    return quotient(gradient, scales.back());
  }

  // In the gradient's dtype. That of a half parameter is divided in float32: half may not hold the scale.
  static at::Tensor quotient(const at::Tensor& gradient, const at::Tensor& scale) {
    const bool half = at::isReducedFloatingType(gradient.scalar_type());
    return half ? gradient.to(at::kFloat).div(scale).to(gradient.scalar_type()) : gradient.div(scale);
  }
};

// A class of its own: compiled autograd refuses plain lambdas.
struct LeafHook final : FunctionPreHook {
  LeafHook(std::shared_ptr<Pass> the_pass, const void* the_leaf) : pass(std::move(the_pass)), leaf(the_leaf) {}

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& gradients) override {
    return {pass->unscaled(gradients.front(), leaf)};
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const auto apply = [shared = pass, own = leaf](const at::TensorBase& gradient) -> at::TensorBase {
      return shared->unscaled(at::Tensor(gradient), own);
    };
    args.add_cpp_single_tensor_pre_hook(apply, 0);
  }

  std::shared_ptr<Pass> pass;
  const void* leaf;
};

std::vector<std::shared_ptr<Node>> leaves_of(at::TensorList roots) {
  std::vector<std::shared_ptr<Node>> leaves, open;
  std::unordered_set<const Node*> seen;
  const auto visit = [&](const std::shared_ptr<Node>& node) {
    if (node && seen.insert(node.get()).second) open.push_back(node);
  };
  for (const at::Tensor& root : roots)
    if (root.requires_grad()) visit(torch::autograd::impl::gradient_edge(root).function);
  while (!open.empty()) {
    const std::shared_ptr<Node> node = std::move(open.back());
    open.pop_back();
    if (dynamic_cast<const AccumulateGrad*>(node.get()) != nullptr) leaves.push_back(node);
    for (const torch::autograd::Edge& edge : node->next_edges()) visit(edge.function);
  }
  return leaves;
}

class UnscalerClass : public torch::CustomClassHolder {
 public:
  std::tuple<std::vector<at::Tensor>, std::int64_t> begin(const std::vector<at::Tensor>& roots,
                                                          const std::vector<std::optional<at::Tensor>>& gradients,
                                                          const std::optional<at::Tensor>& scale, bool scale_roots) {
    TORCH_CHECK_VALUE(roots.size() == gradients.size(), "GradientUnscaler.begin: got ", roots.size(), " roots and ",
                      gradients.size(), " gradients, expected as many of each");
    auto pass = std::make_shared<Pass>();
    if (scale) {
      check_argument(*scale, "GradientUnscaler.begin", "scale", at::kFloat, scale->device());
      pass->scales.push_back(scale->reshape(at::IntArrayRef()));
    }
    std::vector<at::Tensor> scaled;
    for (std::size_t i = 0; i < roots.size(); ++i) {
      const at::Tensor gradient = gradients[i] ? *gradients[i] : at::ones_like(roots[i]);
      scaled.push_back(scale && scale_roots ? gradient.mul(scale->reshape(at::IntArrayRef()).to(gradient.device()))
                                            : gradient);
    }
    const std::lock_guard lock(mutex_);
    Hooked hooked{pass, {}};
    for (std::shared_ptr<Node>& node : leaves_of(roots)) {
      if (!hooked_.insert(node.get()).second) continue;  // an outer pass unscales what comes here
      const void* const leaf = static_cast<AccumulateGrad*>(node.get())->variable.unsafeGetTensorImpl();
      auto hook = std::make_unique<LeafHook>(pass, leaf);
      hooked.nodes.emplace_back(node, hook.get());
      node->add_pre_hook(std::move(hook));
    }
    passes_.emplace(++number_, std::move(hooked));
    return {std::move(scaled), number_};
  }

  void end(std::int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto entry = passes_.extract(number);
    TORCH_CHECK_VALUE(!entry.empty(), "GradientUnscaler.end: there is no pass ", number);
    const Hooked& hooked = entry.mapped();
    for (const auto& [node, own] : hooked.nodes) {
      auto& hooks = node->pre_hooks();
      std::erase_if(hooks, [&, mine = own](const auto& hook) { return hook.get() == mine; });
      hooked_.erase(node.get());
    }
    const std::lock_guard of_pass(hooked.pass->mutex);
    reached_.insert(hooked.pass->reached_ours.begin(), hooked.pass->reached_ours.end());
  }

  bool reached(const std::vector<at::Tensor>& tensors) {
    const std::lock_guard lock(mutex_);
    for (const at::Tensor& tensor : tensors)
      if (reached_.contains(tensor.unsafeGetTensorImpl())) return true;
    return false;
  }

  void forget() {
    const std::lock_guard lock(mutex_);
    reached_.clear();
  }

 private:
  struct Hooked {
    std::shared_ptr<Pass> pass;
    std::vector<std::pair<std::shared_ptr<Node>, const FunctionPreHook*>> nodes;
  };
  std::mutex mutex_;
  std::int64_t number_ = 0;
  std::unordered_map<std::int64_t, Hooked> passes_;
  std::unordered_set<const Node*> hooked_;
  std::unordered_set<const void*> reached_;
};

}  // namespace

void define_gradient_unscaler(torch::Library& library) {
  library.class_<UnscalerClass>("GradientUnscaler")
      .def(torch::init<>())
      .def("begin", &UnscalerClass::begin)
      .def("end", &UnscalerClass::end)
      .def("reached", &UnscalerClass::reached)
      .def("forget", &UnscalerClass::forget);
}

}  // namespace halfstep::torch_ops
