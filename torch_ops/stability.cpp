// Statistics of layers: the kernels' calls and the hooks. Contract: halfstep/torch/stability.h.
#include "halfstep/torch/stability.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "conversions.h"
#include "halfstep/gradients.h"
#include "halfstep/status.h"
#ifdef HALFSTEP_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace halfstep {
namespace torch_ops {

// What the hooks share with the object that made them.
struct StatisticsTable {
  struct OfDevice {
    at::Device device;
    at::Tensor rows;   // float64 [layers, kObserved, kLayerStatistics]
    at::Tensor scale;  // float32 1
    at::Tensor found, norm;
  };

  std::int64_t layers;
  double half_limit;
  std::atomic<std::int64_t> place{0};
  std::mutex mutex;
  std::vector<OfDevice> devices;

  OfDevice& on(at::Device device) {
    for (OfDevice& known : devices)
      if (known.device == device) return known;
    const auto options = at::TensorOptions().device(device);
    devices.push_back({device, at::zeros({layers, kObserved, kLayerStatistics}, options.dtype(at::kDouble)),
                       at::ones({}, options.dtype(at::kFloat)), at::zeros({}, options.dtype(at::kFloat)),
                       at::zeros({}, options.dtype(at::kFloat))});
    return devices.back();
  }
};

namespace {

bool can_be_observed(const at::Tensor& tensor) {
  return tensor.defined() && to_dtype(tensor.scalar_type()) && tensor.layout() == at::kStrided && tensor.numel() > 0 &&
         (tensor.is_cpu() || tensor.is_cuda()) && !at::isTensorSubclassLike(tensor) && !tensor.is_neg();
}

void observe(StatisticsTable& table, std::int64_t layer, Observed kind, const at::Tensor& tensor) {
  if (!can_be_observed(tensor)) return;
  const at::NoGradGuard no_grad;
  const at::Tensor value = tensor.detach();
  const auto place = static_cast<double>(++table.place);
  const GradientViews views(value, /*written=*/false);
  const std::lock_guard lock(table.mutex);
  const StatisticsTable::OfDevice& own = table.on(value.device());
  // Of its own, since layers on several streams would share it. The flag and the norm nobody reads.
  const at::Tensor stats = at::empty({kGradientStats}, own.scale.options());
  check_gradient_views(views.views(), value.device(), own.scale, own.found, own.norm, stats);
  double* const row = own.rows.data_ptr<double>() + (layer * kObserved + kind) * kLayerStatistics;
  if (value.is_cpu()) {
    cpu::merge_statistics(stats.const_data_ptr<float>(), row, place, table.half_limit);
    return;
  }
#ifdef HALFSTEP_CUDA
  const c10::cuda::CUDAGuard guard(value.device());
  cuda::merge_statistics(stats.const_data_ptr<float>(), row, place, table.half_limit,
                         CudaStream{c10::cuda::getCurrentCUDAStream().stream()});
#endif
}

// Sees the gradient of one tensor and leaves it as it is. A class of its own: compiled autograd refuses plain lambdas.
struct GradientWatch final : torch::autograd::FunctionPreHook {
  GradientWatch(std::shared_ptr<StatisticsTable> the_table, std::int64_t the_layer, Observed the_kind,
                std::size_t the_index)
      : table(std::move(the_table)), layer(the_layer), kind(the_kind), index(the_index) {}

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& gradients) override {
    observe(*table, layer, kind, gradients[index]);
    return gradients;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const auto watch = [table_ = table, layer_ = layer, kind_ = kind](const at::TensorBase& gradient) {
      observe(*table_, layer_, kind_, at::Tensor(gradient));
      return gradient;
    };
    args.add_cpp_single_tensor_pre_hook(watch, index);
  }

  std::shared_ptr<StatisticsTable> table;
  std::int64_t layer;
  Observed kind;
  std::size_t index;
};

// Only of a result of autograd: a leaf's hooks would outlive the graph.
void watch_gradient(const std::shared_ptr<StatisticsTable>& table, std::int64_t layer, Observed kind,
                    const at::Tensor& tensor) {
  if (!at::GradMode::is_enabled() || !tensor.requires_grad() || tensor.is_leaf()) return;
  tensor.grad_fn()->add_tensor_pre_hook(
      std::make_unique<GradientWatch>(table, layer, kind, static_cast<std::size_t>(tensor.output_nr())));
}

}  // namespace
}  // namespace torch_ops

using torch_ops::StatisticsTable;

LayerStatistics::LayerStatistics(std::int64_t layers, Precision half) : half_(half) {
  HS_CHECK(layers >= 1, "LayerStatistics: layers is ", layers, ", expected at least 1");
  table_ = std::make_shared<StatisticsTable>();
  table_->layers = layers;
  table_->half_limit = half_limit_of(half);
}

void LayerStatistics::begin_step() {
  table_->place = 0;
}

void LayerStatistics::watch_output(std::int64_t layer, const at::Tensor& output, bool gradient) const {
  HS_CHECK(layer >= 0 && layer < table_->layers, "watch_output: layer is ", layer, ", expected 0 to ",
           table_->layers - 1);
  torch_ops::observe(*table_, layer, kOutput, output);
  if (gradient && torch_ops::can_be_observed(output)) torch_ops::watch_gradient(table_, layer, kOutputGradient, output);
}

at::Tensor LayerStatistics::watch_input(std::int64_t layer, const at::Tensor& input) const {
  HS_CHECK(layer >= 0 && layer < table_->layers, "watch_input: layer is ", layer, ", expected 0 to ",
           table_->layers - 1);
  if (!torch_ops::can_be_observed(input) || !input.requires_grad() || !at::GradMode::is_enabled()) return input;
  const at::Tensor view = input.view_as(input);
  torch_ops::watch_gradient(table_, layer, kInputGradient, view);
  return view;
}

at::Tensor LayerStatistics::rows() const {
  const at::NoGradGuard no_grad;
  const std::lock_guard lock(table_->mutex);
  const at::Tensor all = at::zeros({table_->layers, kObserved, kLayerStatistics}, at::kDouble);
  double* const sums = all.data_ptr<double>();
  for (const auto& own : table_->devices) {
    const at::Tensor rows = own.rows.cpu();
    const double* const values = rows.const_data_ptr<double>();
    for (std::int64_t i = 0; i < all.numel(); ++i) {
      const auto column = i % kLayerStatistics;
      const bool largest = column == kEarliest || column == kEarliestBeyond || column == kSeenMaximum;
      sums[i] = largest ? std::max(sums[i], values[i]) : sums[i] + values[i];
    }
  }
  return all;
}

std::vector<double> LayerStatistics::summary() const {
  const at::Tensor all = rows();
  return summarize({all.const_data_ptr<double>(), static_cast<std::size_t>(all.numel())}, half_);
}

void LayerStatistics::reset() {
  const at::NoGradGuard no_grad;
  const std::lock_guard lock(table_->mutex);
  for (const auto& own : table_->devices) own.rows.zero_();
}

}  // namespace halfstep
