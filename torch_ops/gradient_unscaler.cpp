// torch.classes.halfstep.GradientUnscaler: the loss scale of one backward pass, undone at the leaves by C++ hooks.
//
//   leaves(Tensor[] roots) -> Tensor[]   the leaves that the roots depend on
//   begin(Tensor[] roots, Tensor?[] gradients, Tensor[] leaves, Tensor? scale, bool scale_roots) -> (Tensor[], int)
//       Call before backward(roots, <the result>). With a scale, float32 with one element and read on the device, hooks
//       these leaves so that what arrives is divided by it before it is added to `.grad`, before
//       DistributedDataParallel reduces it, and before other hooks of the leaf see it. Returns what to pass as
//       gradients: ones, or `gradients`, with `scale_roots` times the scale. Where a root is float16, which may not
//       hold the scale, that is 2^15 at most. Passes may nest, as those of reentrant checkpoints do: an inner one goes
//       without scale_roots, since its gradients carry the scale of the outer one, and may come from another thread. Of
//       its leaves those must be left out that it only cuts the graph at. The number is the pass's.
//   end(int pass) -> Tensor[]   takes its hooks away, whether it came to its end or not; the leaves that got a gradient
//
// The hooks stand first among the leaf's own, for the time of the pass: `register_hook` in Python throws away whatever
// others have put there, so nothing may stay. The one slot for hooks after accumulation belongs to others as well.
// What torch.autograd.grad returns outside of a pass has no scale.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
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
  std::vector<at::Tensor> scales;           // by device; the first is the one that was given
  float limit = 0.0F;                       // of the scale, 0 for none
  std::unordered_set<const void*> reached;  // leaves, by their implementation

  at::Tensor unscaled(const at::Tensor& gradient, const void* leaf) {
    if (!gradient.defined()) return gradient;
    const std::lock_guard lock(mutex);
    reached.insert(leaf);
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

using NodePointer = decltype(torch::autograd::Edge::function);  // a std::shared_ptr, an intrusive_ptr since torch 2.15

std::vector<at::Tensor> leaves_of(const std::vector<at::Tensor>& roots) {
  std::vector<at::Tensor> leaves;
  std::vector<NodePointer> open;
  std::unordered_set<const Node*> seen;
  const auto visit = [&](const NodePointer& node) {
    if (node && seen.insert(node.get()).second) open.push_back(node);
  };
  for (const at::Tensor& root : roots)
    if (root.requires_grad()) visit(torch::autograd::impl::gradient_edge(root).function);
  while (!open.empty()) {
    const NodePointer node = std::move(open.back());
    open.pop_back();
    if (const auto* const leaf = dynamic_cast<const AccumulateGrad*>(node.get())) leaves.push_back(leaf->variable);
    for (const torch::autograd::Edge& edge : node->next_edges()) visit(edge.function);
  }
  return leaves;
}

constexpr float kMostInHalf = 32768.0F;

class UnscalerClass : public torch::CustomClassHolder {
 public:
  ~UnscalerClass() override {
    while (!passes_.empty()) end(passes_.begin()->first);
  }

  std::tuple<std::vector<at::Tensor>, std::int64_t> begin(const std::vector<at::Tensor>& roots,
                                                          const std::vector<std::optional<at::Tensor>>& gradients,
                                                          const std::vector<at::Tensor>& leaves,
                                                          const std::optional<at::Tensor>& scale, bool scale_roots) {
    TORCH_CHECK_VALUE(roots.size() == gradients.size(), "GradientUnscaler.begin: got ", roots.size(), " roots and ",
                      gradients.size(), " gradients, expected as many of each");
    auto pass = std::make_shared<Pass>();
    const std::lock_guard lock(mutex_);
    if (scale) {
      check_argument(*scale, "GradientUnscaler.begin", "scale", at::kFloat, scale->device());
      const bool half = std::any_of(roots.begin(), roots.end(),
                                    [](const at::Tensor& root) { return root.scalar_type() == at::kHalf; });
      // An inner pass has half gradients of the outer one's scale.
      pass->limit = scale_roots ? (half ? kMostInHalf : 0.0F) : passes_.empty() ? 0.0F : outermost().limit;
      const at::Tensor one = scale->reshape(at::IntArrayRef());
      pass->scales.push_back(pass->limit > 0.0F ? one.clamp_max(pass->limit) : one);
    }
    std::vector<at::Tensor> scaled;
    for (std::size_t i = 0; i < roots.size(); ++i) {
      const at::Tensor gradient = gradients[i] ? *gradients[i] : at::ones_like(roots[i]);
      scaled.push_back(scale && scale_roots ? gradient.mul(pass->scales.front().to(gradient.device())) : gradient);
    }
    Hooked hooked{pass, {}};
    for (const at::Tensor& leaf : leaves) {
      TORCH_CHECK_VALUE(leaf.is_leaf() && leaf.requires_grad(),
                        "GradientUnscaler.begin: got a tensor that is no leaf with a gradient");
      const void* const address = leaf.unsafeGetTensorImpl();
      if (!hooked_.insert(address).second) continue;  // an outer pass unscales what comes here
      auto hook = std::make_unique<LeafHook>(pass, address);
      hooked.leaves.emplace_back(leaf, hook.get());
      auto& hooks = torch::autograd::impl::hooks(leaf);
      hooks.insert(hooks.begin(), std::move(hook));
    }
    passes_.emplace(++number_, std::move(hooked));
    return {std::move(scaled), number_};
  }

  std::vector<at::Tensor> end(std::int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto entry = passes_.extract(number);
    TORCH_CHECK_VALUE(!entry.empty(), "GradientUnscaler.end: there is no pass ", number);
    const Hooked& hooked = entry.mapped();
    std::vector<at::Tensor> reached;
    const std::lock_guard of_pass(hooked.pass->mutex);
    for (const auto& [leaf, own] : hooked.leaves) {
      auto& hooks = torch::autograd::impl::hooks(leaf);
      std::erase_if(hooks, [&, mine = own](const auto& hook) { return hook.get() == mine; });
      hooked_.erase(leaf.unsafeGetTensorImpl());
      if (hooked.pass->reached.contains(leaf.unsafeGetTensorImpl())) reached.push_back(leaf);
    }
    return reached;
  }

 private:
  struct Hooked {
    std::shared_ptr<Pass> pass;
    std::vector<std::pair<at::Tensor, const FunctionPreHook*>> leaves;
  };
  const Pass& outermost() const { return *passes_.begin()->second.pass; }

  std::mutex mutex_;
  std::int64_t number_ = 0;
  std::map<std::int64_t, Hooked> passes_;
  std::unordered_set<const void*> hooked_;
};

}  // namespace

void define_gradient_unscaler(torch::Library& library) {
  library.class_<UnscalerClass>("GradientUnscaler")
      .def(torch::init<>())
      .def("begin", &UnscalerClass::begin)
      .def("end", &UnscalerClass::end)
      .def("leaves", [](const c10::intrusive_ptr<UnscalerClass>&, const std::vector<at::Tensor>& roots) {
        return leaves_of(roots);
      });
}

}  // namespace halfstep::torch_ops
