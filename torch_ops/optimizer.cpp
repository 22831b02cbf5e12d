// adam_step_, sgd_step_ and the class FusedOptimizer. Contract: halfstep/torch/optimizer.h.
#include "halfstep/torch/optimizer.h"

#include <numeric>
#include <utility>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>

#include "conversions.h"
#include "registration.h"
#ifdef HALFSTEP_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace halfstep {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using torch_ops::check_argument;
using torch_ops::check_gradient_views;
using torch_ops::data_or_null;
using torch_ops::to_dtype;

bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && (a.strides() == b.strides() || (a.is_contiguous() && b.is_contiguous()));
}

// Tensor::grad() without its warning for tensors that are no leaves, which costs a virtual call a parameter.
const at::Tensor& gradient_of(const at::Tensor& param) {
  return std::as_const(*param.unsafeGetTensorImpl()).grad();
}

bool is_half(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16;
}

// -1 for inference tensors, which have none.
std::int64_t version_of(const at::Tensor& tensor) {
  const c10::VariableVersion& version = tensor.unsafeGetTensorImpl()->version_counter();
  return version.enabled() ? static_cast<std::int64_t>(version.current_version()) : -1;
}

const void* address_of(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->data();
}

// "" or what keeps the fused step from this parameter's gradient.
std::string obstacle(const at::Tensor& param, const at::Tensor& grad) {
  const auto text = [](const auto&... parts) { return c10::str(parts...); };
  if (grad.layout() != at::kStrided) return text("its gradient has layout ", grad.layout());
  if (grad.device() != param.device()) return text("its gradient is on ", grad.device());
  if (grad.sizes() != param.sizes()) return text("its gradient has another shape");
  if (grad.scalar_type() != param.scalar_type() && !(param.scalar_type() == at::kFloat && is_half(grad.scalar_type())))
    return text("it is ", param.scalar_type(), " and its gradient ", grad.scalar_type());
  return "";
}

void check_parameter(const at::Tensor& param, const char* op, std::size_t i) {
  TORCH_CHECK_VALUE(param.defined() && param.layout() == at::kStrided && param.is_non_overlapping_and_dense(), op,
                    ": params[", i, "] is not a dense strided tensor");
  TORCH_CHECK_TYPE(to_dtype(param.scalar_type()).has_value(), op, ": params[", i, "] has dtype ", param.scalar_type(),
                   ", expected Float, Double, Half or BFloat16");
}

void check_state(const at::Tensor& state, const at::Tensor& param, const char* op, std::size_t i) {
  TORCH_CHECK_VALUE(state.defined() && state.device() == param.device() && state.scalar_type() == param.scalar_type() &&
                        same_layout(state, param),
                    op, ": a state of params[", i, "] is ", state.toString(), " of sizes ", state.sizes(),
                    " and strides ", state.strides(), " on ", state.device(),
                    ", expected the parameter's: ", param.toString(), ", ", param.sizes(), ", ", param.strides(), ", ",
                    param.device());
}

StepControl make_control(const OptionalTensor& found, const OptionalTensor& scale, const OptionalTensor& norm,
                         double max_norm) {
  const auto read = [](const OptionalTensor& tensor) {
    return tensor && tensor->defined() ? tensor->const_data_ptr<float>() : nullptr;
  };
  return {read(found), read(scale), read(norm), static_cast<float>(max_norm)};
}

void check_control(const char* op, at::Device device, const OptionalTensor& found, const OptionalTensor& scale,
                   const OptionalTensor& norm) {
  if (found) check_argument(*found, op, "found", at::kFloat, device);
  if (scale) check_argument(*scale, op, "scale", at::kFloat, device);
  if (norm) check_argument(*norm, op, "norm", at::kFloat, device);
}

}  // namespace

// The device's table and what it holds. On the CPU there is none: rows are read where they are.
struct FusedOptimizer::Table {
  // Takes rows and gradients where they are others than in the step before, and leaves those of then in their place.
  void step(OptimizerKind kind, at::Device device, std::vector<OptimizerTensor>& rows,
            std::vector<const void*>& gradients, const std::vector<OptimizerGroup>& groups,
            const StepControl& control) {
    if (device.is_cpu()) {
      cpu::optimizer_step(kind, rows, gradients, groups, control, torch_ops::TorchExecutor());
      return;
    }
#ifdef HALFSTEP_CUDA
    TORCH_CHECK(!captured_, "FusedOptimizer: it was stepped in a captured CUDA graph and can only be replayed with it");
    const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
    const bool capturing = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
    if (rows.size() != rows_.size() || groups.size() != groups_.size() || !table_) {
      if (capturing) {
        TORCH_CHECK(rows.size() <= reserved_rows_ && groups.size() <= reserved_groups_,
                    "FusedOptimizer: call reserve() before a capture");
      } else if (rows.size() > reserved_rows_ || groups.size() > reserved_groups_) {
        reserve(device, rows.size(), groups.size());
      }
      table_.emplace(memory_.data_ptr(), rows.size(), groups.size());
      rows_.clear();
      gradients_.clear();
      groups_.clear();
    }
    // Captured, the copies would be made again by each replay; and the groups must stay free to change.
    auto copy_stream = stream;
    while (capturing && copy_stream == stream) copy_stream = c10::cuda::getStreamFromPool(false, device.index());
    const CudaStream copies{copy_stream.stream()};
    // Each is forgotten before it is set, so that a failure leaves nothing that looks set.
    if (rows != rows_) {
      rows_.clear();
      table_->set_tensors(kind, rows, copies);
      rows_.swap(rows);
    }
    if (gradients != gradients_) {
      gradients_.clear();
      table_->set_gradients(gradients, copies);
      gradients_.swap(gradients);
    }
    set_groups(groups, copies);
    cuda::optimizer_step(kind, *table_, control, {stream.stream()});
    captured_ = capturing;
    if (!capturing) c10::cuda::CUDACachingAllocator::recordStream(memory_.storage().data_ptr(), stream);
#else
    TORCH_CHECK(false, "FusedOptimizer: this build of halfstep has no CUDA kernels");
#endif
  }

#ifdef HALFSTEP_CUDA
  void reserve(at::Device device, std::size_t rows, std::size_t groups) {
    const auto bytes = static_cast<std::int64_t>(cuda::OptimizerTable::bytes(rows, groups));
    memory_ = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
    table_.reset();
    reserved_rows_ = rows;
    reserved_groups_ = groups;
  }

  void set_groups(const std::vector<OptimizerGroup>& groups, CudaStream stream) {
    if (groups == groups_ || !table_) return;
    groups_.clear();
    table_->set_groups(groups, stream);
    groups_ = groups;
  }

 private:
  at::Tensor memory_;
  std::size_t reserved_rows_ = 0, reserved_groups_ = 0;
  bool captured_ = false;
  std::optional<cuda::OptimizerTable> table_;
  std::vector<OptimizerTensor> rows_;
  std::vector<const void*> gradients_;
  std::vector<OptimizerGroup> groups_;
#endif
};

FusedOptimizer::FusedOptimizer(OptimizerKind kind, std::vector<at::Tensor> params,
                               std::vector<std::vector<at::Tensor>> states, std::vector<at::Tensor> steps,
                               std::vector<std::int64_t> groups, std::vector<at::Tensor> idle)
    : kind_(kind),
      params_(std::move(params)),
      steps_(std::move(steps)),
      idle_(std::move(idle)),
      states_(std::move(states)),
      groups_(std::move(groups)),
      table_(std::make_shared<Table>()) {
  const char* const op = "FusedOptimizer";
  TORCH_CHECK_VALUE(states_.size() == 3, op, ": got ", states_.size(), " lists of states, expected 3");
  TORCH_CHECK_VALUE(steps_.size() == params_.size() && groups_.size() == params_.size(), op, ": got ", params_.size(),
                    " parameters, ", steps_.size(), " steps and ", groups_.size(), " groups, expected as many of each");
  for (const auto& list : states_)
    TORCH_CHECK_VALUE(list.empty() || list.size() == params_.size(), op, ": got ", list.size(), " states of ",
                      params_.size(), " parameters");
  for (std::size_t i = 0; i < params_.size(); ++i) {
    check_parameter(params_[i], op, i);
    TORCH_CHECK(params_[i].device() == params_[0].device(), op, ": params[", i, "] is on ", params_[i].device(),
                ", expected ", params_[0].device());
    check_argument(steps_[i], op, "step", at::kFloat, params_[0].device());
    for (const auto& list : states_)
      if (!list.empty()) check_state(list[i], params_[i], op, i);
  }
}

void FusedOptimizer::forget() {
  positions_.clear();
  gradients_.clear();
  views_.clear();
  copies_.clear();
  reordered_.clear();
}

void FusedOptimizer::take(std::size_t position, const at::Tensor& grad) {
  if (!same_layout(grad, params_[position])) reordered_.push_back(views_.size());
  positions_.push_back(static_cast<std::int64_t>(position));
  gradients_.push_back(grad.unsafeGetTensorImpl());
  views_.push_back({grad.unsafeGetTensorImpl()->mutable_data(), grad.numel(), *to_dtype(grad.scalar_type())});
}

// Gradients in another memory order than their parameter's are copied into it.
void FusedOptimizer::reorder(const std::function<const at::Tensor&(std::size_t)>& gradient) {
  const at::NoGradGuard no_grad;
  for (const std::size_t k : std::exchange(reordered_, {})) {
    const auto position = static_cast<std::size_t>(positions_[k]);
    const at::Tensor& grad = gradient(position);
    copies_.push_back(at::empty_like(params_[position], grad.options()).copy_(grad));
    views_[k].data = copies_.back().data_ptr();
  }
}

std::string FusedOptimizer::collect(bool allow_float16) {
  forget();
  from_parameters_ = true;
  for (const at::Tensor& param : idle_)
    if (gradient_of(param).defined()) return kNoLongerIdle;
  for (std::size_t i = 0; i < params_.size(); ++i) {
    const at::Tensor& grad = gradient_of(owner(i));
    if (!grad.defined()) continue;
    // Torch's own step knows what to do with a subclass, such as a sharded gradient.
    const bool subclass = grad.key_set().has(c10::DispatchKey::Python);
    std::string reason = subclass ? "its gradient is a tensor subclass" : misfit(i);
    if (reason.empty()) reason = obstacle(params_[i], grad);
    // A float16 gradient of a float32 parameter was asked for, by the parameter's grad_dtype.
    const bool float16 = grad.scalar_type() == at::kHalf && params_[i].scalar_type() == at::kHalf;
    if (reason.empty() && !allow_float16 && float16) reason = "its gradient is Half";
    if (!reason.empty()) {
      forget();
      return reason == kNoLongerHalf ? reason : c10::str("parameter ", i, ": ", reason);
    }
    take(i, grad);
  }
  reorder([this](std::size_t position) -> const at::Tensor& { return gradient_of(owner(position)); });
  return "";
}

// `param.data = other` can change what was checked when this was made.
std::string FusedOptimizer::misfit(std::size_t i) const {
  const at::Tensor& param = params_[i];
  if (is_master(i) && !is_half(owner(i).scalar_type())) return kNoLongerHalf;
  if (is_master(i) && !same_layout(owner(i), param)) return "its layout is not its master's";
  for (const auto& list : states_)
    if (!list.empty() && (list[i].scalar_type() != param.scalar_type() || list[i].numel() != param.numel()))
      return c10::str("it is ", param.scalar_type(), param.sizes(), " and its state ", list[i].scalar_type(),
                      list[i].sizes());
  return "";
}

void FusedOptimizer::set_gradients(at::TensorList grads) {
  forget();
  from_parameters_ = false;
  for (std::size_t i = 0; i < grads.size(); ++i) take(i, grads[i]);
  reorder([grads](std::size_t position) -> const at::Tensor& { return grads[position]; });
}

void FusedOptimizer::add_half_copies(const std::vector<std::int64_t>& positions, at::TensorList copies) {
  const char* const op = "FusedOptimizer";
  TORCH_CHECK_VALUE(positions.size() == copies.size(), op, ": got ", positions.size(), " positions and ", copies.size(),
                    " half copies");
  for (std::size_t k = 0; k < positions.size(); ++k) {
    TORCH_CHECK_INDEX(positions[k] >= 0 && positions[k] < static_cast<std::int64_t>(params_.size()), op, ": position ",
                      positions[k], " of ", params_.size(), " parameters");
    const at::Tensor& param = params_[static_cast<std::size_t>(positions[k])];
    TORCH_CHECK_VALUE(param.scalar_type() == at::kFloat && is_half(copies[k].scalar_type()) &&
                          copies[k].device() == param.device() && same_layout(copies[k], param),
                      op, ": the half copy of params[", positions[k], "] is ", copies[k].toString(), " of sizes ",
                      copies[k].sizes(), " and strides ", copies[k].strides(),
                      ", expected Half or BFloat16 of a Float's ", param.sizes(), ", ", param.strides());
  }
  half_copies_.resize(positions.empty() ? half_copies_.size() : params_.size());
  for (std::size_t k = 0; k < positions.size(); ++k) half_copies_[static_cast<std::size_t>(positions[k])] = copies[k];
}

void FusedOptimizer::set_half_copies(const std::vector<std::int64_t>& positions, at::TensorList copies) {
  half_copies_.clear();
  masters_.clear();
  add_half_copies(positions, copies);
}

void FusedOptimizer::set_masters(const std::vector<std::int64_t>& positions, at::TensorList parameters) {
  add_half_copies(positions, parameters);
  masters_.assign(positions.empty() ? 0 : params_.size(), {});
  for (const std::int64_t position : positions) masters_[static_cast<std::size_t>(position)].is = true;
}

// By elements, whatever has changed: of a loaded checkpoint both halves come one after the other, and where they belong
// together the master keeps what the parameter cannot hold.
void FusedOptimizer::refresh_master(std::size_t i) {
  const at::Tensor& half = half_copies_[i];
  const auto& [is, version, address] = masters_[i];
  if (version >= 0 && version == version_of(half) && address == address_of(half)) return;
  const at::NoGradGuard no_grad;
  params_[i].copy_(at::where(at::eq(params_[i].to(half.scalar_type()), half), params_[i], half));
}

void FusedOptimizer::note_equal(std::size_t i) {
  masters_[i].version = version_of(half_copies_[i]);
  masters_[i].address = address_of(half_copies_[i]);
}

void FusedOptimizer::refresh_masters(bool replay) {
  for (std::size_t i = 0; i < masters_.size(); ++i) {
    if (!masters_[i].is) continue;
    refresh_master(i);
    note_equal(i);
    if (replay && masters_[i].version >= 0) ++masters_[i].version;
  }
}

void FusedOptimizer::reserve(std::int64_t groups) {
#ifdef HALFSTEP_CUDA
  if (device().is_cuda()) table_->reserve(device(), params_.size(), static_cast<std::size_t>(groups));
#else
  (void)groups;
#endif
}

void FusedOptimizer::set_groups(const std::vector<OptimizerGroup>& groups) {
#ifdef HALFSTEP_CUDA
  if (!device().is_cuda()) return;
  const c10::cuda::CUDAGuard guard(device());
  table_->set_groups(groups, {c10::cuda::getCurrentCUDAStream().stream()});
#else
  (void)groups;
#endif
}

void FusedOptimizer::check(const at::Tensor& scale, const at::Tensor& found, const at::Tensor& norm,
                           const OptionalTensor& stats) {
  check_gradient_views(views_, device(), scale, found, norm, stats);
}

void FusedOptimizer::step(const std::vector<OptimizerGroup>& groups, const OptionalTensor& found,
                          const OptionalTensor& scale, const OptionalTensor& norm, double max_norm) {
  if (positions_.empty()) return;
  check_control("FusedOptimizer", device(), found, scale, norm);
#ifdef HALFSTEP_CUDA
  const c10::cuda::OptionalCUDAGuard guard(device().is_cuda() ? std::optional(device()) : std::nullopt);
#endif
  rows_.clear();
  addresses_.clear();
  for (std::size_t k = 0; k < positions_.size(); ++k) {
    const auto i = static_cast<std::size_t>(positions_[k]);
    TORCH_CHECK(!from_parameters_ || gradient_of(owner(i)).unsafeGetTensorImpl() == gradients_[k],
                "FusedOptimizer: the gradient of parameter ", i, " was replaced between collect() and step()");
    if (is_master(i)) refresh_master(i);
    // Addresses are looked up in each step: `param.data = other` moves them.
    const auto address = [](const at::Tensor& tensor) { return tensor.unsafeGetTensorImpl()->mutable_data(); };
    OptimizerTensor& row = rows_.emplace_back();
    row.values = address(params_[i]);
    for (std::size_t s = 0; s < 3; ++s)
      if (!states_[s].empty()) row.state[s] = address(states_[s][i]);
    if (!half_copies_.empty() && half_copies_[i].defined()) {
      row.half_copy = address(half_copies_[i]);
      row.copy_dtype = *to_dtype(half_copies_[i].scalar_type());
    }
    row.step = static_cast<float*>(address(steps_[i]));
    row.numel = views_[k].numel;
    row.group = static_cast<std::int32_t>(groups_[i]);
    row.dtype = *to_dtype(params_[i].scalar_type());
    row.gradient_dtype = views_[k].dtype;
    addresses_.push_back(views_[k].data);
  }
  table_->step(kind_, device(), rows_, addresses_, groups, make_control(found, scale, norm, max_norm));
  // States need no new version: nothing that requires a gradient is computed from them.
  for (const std::int64_t position : positions_) {
    const auto i = static_cast<std::size_t>(position);
    torch_ops::bump_version(params_[i]);
    // A backward pass that comes after the step must fail, not go on with the new weights.
    if (!half_copies_.empty() && half_copies_[i].defined()) torch_ops::bump_version(half_copies_[i]);
    if (is_master(i)) note_equal(i);
  }
  forget();
}

namespace torch_ops {
namespace {

struct StepLists {
  const char* op;
  OptimizerKind kind;
  at::TensorList params, grads;
  at::TensorList states[3];
  at::TensorList steps;
};

void check(const StepLists& l, const OptionalTensor& found, const OptionalTensor& scale, const OptionalTensor& norm) {
  const auto same_count = [&](const char* name, at::TensorList list, bool optional) {
    TORCH_CHECK_VALUE(list.size() == l.params.size() || (optional && list.empty()), l.op, ": ", name, " has ",
                      list.size(), " tensors, expected ", l.params.size());
  };
  same_count("grads", l.grads, false);
  same_count("steps", l.steps, false);
  const bool adam = l.kind == OptimizerKind::kAdam;
  same_count(adam ? "exp_avgs" : "momentum_buffers", l.states[0], !adam);
  same_count("exp_avg_sqs", l.states[1], !adam);
  same_count("max_exp_avg_sqs", l.states[2], true);
  for (std::size_t i = 0; i < l.params.size(); ++i) {
    check_parameter(l.params[i], l.op, i);
    const at::Device device = l.params[0].device();
    TORCH_CHECK(l.params[i].device() == device, l.op, ": params[", i, "] is on ", l.params[i].device(), ", expected ",
                device);
    const std::string reason = l.grads[i].defined() ? obstacle(l.params[i], l.grads[i]) : "it has no gradient";
    TORCH_CHECK_VALUE(reason.empty(), l.op, ": params[", i, "]: ", reason);
    for (const at::TensorList list : l.states)
      if (!list.empty()) check_state(list[i], l.params[i], l.op, i);
    check_argument(l.steps[i], l.op, "steps", at::kFloat, device);
  }
  if (!l.params.empty()) check_control(l.op, l.params[0].device(), found, scale, norm);
}

void run(const StepLists& l, const OptimizerGroup& group, const OptionalTensor& found, const OptionalTensor& scale,
         const OptionalTensor& norm, double max_norm) {
  check(l, found, scale, norm);
  if (l.params.empty() || l.params[0].is_meta()) return;
  std::vector<std::vector<at::Tensor>> states;
  for (const at::TensorList list : l.states) states.push_back(list.vec());
  FusedOptimizer optimizer(l.kind, l.params.vec(), std::move(states), l.steps.vec(),
                           std::vector<std::int64_t>(l.params.size(), 0));
  optimizer.set_gradients(l.grads);
  optimizer.step({group}, found, scale, norm, max_norm);
  for (const at::TensorList list : l.states)
    for (const at::Tensor& state : list) bump_version(state);
  for (const at::Tensor& step : l.steps) bump_version(step);
}

void adam_op(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
             at::TensorList max_exp_avg_sqs, at::TensorList steps, double lr, double beta1, double beta2, double eps,
             double weight_decay, bool decoupled, bool maximize, const OptionalTensor& found,
             const OptionalTensor& scale, const OptionalTensor& norm, double max_norm) {
  const OptimizerGroup group{.lr = lr,
                             .weight_decay = weight_decay,
                             .beta1 = beta1,
                             .beta2 = beta2,
                             .eps = eps,
                             .decoupled = decoupled,
                             .maximize = maximize};
  run({"adam_step_", OptimizerKind::kAdam, params, grads, {exp_avgs, exp_avg_sqs, max_exp_avg_sqs}, steps}, group,
      found, scale, norm, max_norm);
}

void sgd_op(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, at::TensorList steps,
            double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
            const OptionalTensor& found, const OptionalTensor& scale, const OptionalTensor& norm, double max_norm) {
  TORCH_CHECK_VALUE((momentum != 0) == !momentum_buffers.empty() || params.empty(), "sgd_step_: momentum is ", momentum,
                    " and there are ", momentum_buffers.size(), " momentum_buffers; a momentum needs them, 0 has none");
  const OptimizerGroup group{.lr = lr,
                             .weight_decay = weight_decay,
                             .momentum = momentum,
                             .dampening = dampening,
                             .nesterov = nesterov,
                             .maximize = maximize};
  run({"sgd_step_", OptimizerKind::kSgd, params, grads, {momentum_buffers, {}, {}}, steps}, group, found, scale, norm,
      max_norm);
}

// ------------------------------------------------------------------------------------------------------ the class

using Self = c10::intrusive_ptr<FusedOptimizer>;

// What TorchScript can pass for a group: its numbers in this order, and its lr as a tensor or not.
constexpr std::size_t kGroupNumbers = 10;

std::vector<OptimizerGroup> unpack_groups(const std::vector<double>& numbers,
                                          const std::vector<OptionalTensor>& learning_rates, at::Device device) {
  TORCH_CHECK_VALUE(numbers.size() == learning_rates.size() * kGroupNumbers, "FusedOptimizer: got ", numbers.size(),
                    " numbers for ", learning_rates.size(), " groups, expected ", kGroupNumbers, " a group");
  std::vector<OptimizerGroup> groups;
  for (std::size_t i = 0; i < learning_rates.size(); ++i) {
    const double* const n = numbers.data() + i * kGroupNumbers;
    if (learning_rates[i]) check_argument(*learning_rates[i], "FusedOptimizer", "lr", at::kFloat, device);
    groups.push_back({.lr = n[0],
                      .lr_tensor = data_or_null<float>(learning_rates[i]),
                      .weight_decay = n[1],
                      .beta1 = n[2],
                      .beta2 = n[3],
                      .eps = n[4],
                      .momentum = n[5],
                      .dampening = n[6],
                      .decoupled = n[7] != 0,
                      .nesterov = n[8] != 0,
                      .maximize = n[9] != 0});
  }
  return groups;
}

Self construct(const std::string& kind, std::vector<at::Tensor> params, std::vector<std::vector<at::Tensor>> states,
               std::vector<at::Tensor> steps, std::vector<std::int64_t> groups, std::vector<at::Tensor> idle) {
  TORCH_CHECK_VALUE(kind == "adam" || kind == "sgd", "FusedOptimizer: kind is '", kind, "', expected 'adam' or 'sgd'");
  return c10::make_intrusive<FusedOptimizer>(kind == "adam" ? OptimizerKind::kAdam : OptimizerKind::kSgd,
                                             std::move(params), std::move(states), std::move(steps), std::move(groups),
                                             std::move(idle));
}

}  // namespace

void define_optimizer(torch::Library& library) {
  library.def(
      "adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, *, float lr, float beta1, float beta2, float eps, "
      "float weight_decay=0.0, bool decoupled=False, bool maximize=False, Tensor? found=None, Tensor? scale=None, "
      "Tensor? norm=None, float max_norm=0.0) -> ()");
  library.def(
      "sgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] steps, *, float lr, "
      "float momentum=0.0, float dampening=0.0, float weight_decay=0.0, bool nesterov=False, bool maximize=False, "
      "Tensor? found=None, Tensor? scale=None, Tensor? norm=None, float max_norm=0.0) -> ()");
  library.def("combine_norms(Tensor[] norms) -> Tensor", &halfstep::combine_norms);
  library.class_<FusedOptimizer>("FusedOptimizer")
      .def(torch::init(&construct))
      .def("collect", [](const Self& self, bool allow_float16) { return self->collect(allow_float16); })
      .def("count", [](const Self& self) { return self->count(); })
      .def("collected", [](const Self& self) { return self->collected(); })
      .def("check", [](const Self& self, const at::Tensor& scale, const at::Tensor& found, const at::Tensor& norm,
                       const OptionalTensor& stats) { self->check(scale, found, norm, stats); })
      .def("step",
           [](const Self& self, const std::vector<double>& numbers, const std::vector<OptionalTensor>& learning_rates,
              const OptionalTensor& found, const OptionalTensor& scale, const OptionalTensor& norm, double max_norm) {
             self->step(unpack_groups(numbers, learning_rates, self->device()), found, scale, norm, max_norm);
           })
      .def("set_half_copies", [](const Self& self, const std::vector<std::int64_t>& positions,
                                 const std::vector<at::Tensor>& copies) { self->set_half_copies(positions, copies); })
      .def("set_masters", [](const Self& self, const std::vector<std::int64_t>& positions,
                             const std::vector<at::Tensor>& parameters) { self->set_masters(positions, parameters); })
      .def("refresh_masters", [](const Self& self, bool replay) { self->refresh_masters(replay); })
      .def("reserve", [](const Self& self, std::int64_t groups) { self->reserve(groups); })
      .def("set_groups",
           [](const Self& self, const std::vector<double>& numbers, const std::vector<OptionalTensor>& learning_rates) {
             self->set_groups(unpack_groups(numbers, learning_rates, self->device()));
           });
}

void implement_optimizer_cpu(torch::Library& library) {
  library.impl("adam_step_", &adam_op);
  library.impl("sgd_step_", &sgd_op);
}

void implement_optimizer_meta(torch::Library& library) {
  implement_optimizer_cpu(library);  // returns after the checks
}

void implement_optimizer_cuda(torch::Library& library) {
#ifdef HALFSTEP_CUDA
  implement_optimizer_cpu(library);
#else
  library.impl("adam_step_", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  library.impl("sgd_step_", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
#endif
}

}  // namespace torch_ops

at::Tensor combine_norms(at::TensorList norms) {
  TORCH_CHECK_VALUE(!norms.empty(), "combine_norms: norms is empty, expected at least one");
  std::vector<at::Tensor> near;
  for (const at::Tensor& norm : norms) {
    check_argument(norm, "combine_norms", "norms", at::kFloat, norm.device());
    near.push_back(norm.to(norms[0].device(), /*non_blocking=*/!norms[0].is_cpu()).reshape({}));
  }
  return near.size() == 1 ? near[0].clone()
                          : at::linalg_vector_norm(at::stack(near), 2.0, {}, false, at::kDouble).to(at::kFloat);
}

void adam_step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                at::TensorList max_exp_avg_sqs, at::TensorList steps, double lr, double beta1, double beta2, double eps,
                double weight_decay, bool decoupled, bool maximize, const OptionalTensor& found,
                const OptionalTensor& scale, const OptionalTensor& norm, double max_norm) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("halfstep::adam_step_", "").typed<decltype(torch_ops::adam_op)>();
  op.call(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, decoupled,
          maximize, found, scale, norm, max_norm);
}

void sgd_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, at::TensorList steps,
               double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
               const OptionalTensor& found, const OptionalTensor& scale, const OptionalTensor& norm, double max_norm) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("halfstep::sgd_step_", "").typed<decltype(torch_ops::sgd_op)>();
  op.call(params, grads, momentum_buffers, steps, lr, momentum, dampening, weight_decay, nesterov, maximize, found,
          scale, norm, max_norm);
}

}  // namespace halfstep
