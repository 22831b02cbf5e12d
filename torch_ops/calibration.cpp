// The observer of activations: what is read of a tensor, on which device, and torch.classes.halfstep.Observer.
// Contract: halfstep/torch/calibration.h.
#include "halfstep/torch/calibration.h"

#include <mutex>
#include <tuple>
#include <utility>

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Event.h>
#include <torch/custom_class.h>

#include "conversions.h"
#include "errors.h"
#include "registration.h"
#ifdef HALFSTEP_CUDA
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace halfstep {
namespace torch_ops {

// Counts of a GPU that the histogram does not have yet. Work on them is one chain, whatever streams it comes from.
struct PendingCounts {
  at::Tensor counts;  // int64 [kRangeBins]
  int exponent;
  c10::Event last_use;
};

struct ObservedTensors {
  std::optional<std::int64_t> channels_dim;
  std::mutex mutex;
  RangeHistogram histogram;
  ChannelStatistics channels;
  std::vector<PendingCounts> pending;  // one for each device

  // With the lock held: brings the counts of all devices home.
  void settle() {
    for (PendingCounts& own : pending) {
      own.last_use.synchronize();
      add(own);
    }
    pending.clear();
  }
  void add(const PendingCounts& own) {
    const at::Tensor counts = own.counts.cpu();
    const auto* const values = reinterpret_cast<const std::uint64_t*>(counts.const_data_ptr<std::int64_t>());
    histogram.add_counts({values, kRangeBins}, own.exponent);
  }
};

namespace {

// A batch in dense memory, and how its channels lie there.
struct Batch {
  at::Tensor dense;
  std::optional<ChannelShape> shape;

  TensorView view() const { return view_of(dense); }
};

void check_observed(const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.defined(), "Observer.observe: tensor is undefined, expected a tensor");
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16,
      "Observer.observe: tensor has dtype ", tensor.scalar_type(), ", expected Float, Half or BFloat16",
      tensor.scalar_type() == at::kDouble ? " (int8 models compute in those: convert it first)" : "");
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, "Observer.observe: tensor has layout ", tensor.layout(),
                    ", expected a strided tensor");
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.is_cpu() || tensor.is_cuda(), "Observer.observe: tensor is on ", tensor.device(),
                              ", expected a CPU or CUDA tensor");
  // After the device: meta tensors count as such, too.
  TORCH_CHECK_TYPE(!at::isTensorSubclassLike(tensor) && !tensor._is_zerotensor(),
                   "Observer.observe: tensor is a fake or wrapped tensor without values of its own (traced or exported "
                   "code, functorch), expected a plain one: calibrate the model before it is traced");
#ifndef HALFSTEP_CUDA
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.is_cpu(),
                              "Observer.observe: got a CUDA tensor, but this halfstep was built without CUDA");
#endif
}

// Any dense order will do for the histogram. Channels of a tensor in channels-last order lie innermost; of one in
// another order a contiguous copy is read.
Batch batch_of(const at::Tensor& tensor, std::optional<std::int64_t> channels_dim) {
  if (!channels_dim) return {tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous(), std::nullopt};
  const std::int64_t dims = tensor.dim();
  const std::int64_t dim = *channels_dim < 0 ? *channels_dim + dims : *channels_dim;
  TORCH_CHECK_VALUE(dim >= 0 && dim < dims, "Observer.observe: tensor has ", dims, " dimensions, so none of index ",
                    *channels_dim, ", which is this observer's channels_dim");
  at::Tensor dense = tensor;
  std::int64_t channels_at = dim;
  if (!tensor.is_contiguous()) {
    const at::Tensor last = tensor.movedim(dim, -1);
    if (last.is_contiguous()) {
      dense = last;
      channels_at = dims - 1;
    } else {
      dense = tensor.contiguous();
    }
  }
  ChannelShape shape{1, dense.size(channels_at), 1};
  for (std::int64_t d = 0; d < channels_at; ++d) shape.outer *= dense.size(d);
  for (std::int64_t d = channels_at + 1; d < dims; ++d) shape.inner *= dense.size(d);
  return {std::move(dense), shape};
}

void observe_cpu(ObservedTensors& observed, const Batch& batch) {
  const TorchExecutor executor;
  ChannelStatistics channels;
  if (batch.shape) channels = cpu::channel_statistics(batch.view(), *batch.shape, executor);
  const RangeKeys keys = cpu::range_keys(batch.view(), executor);
  const int exponent = RangeHistogram().exponent_with(keys);
  std::vector<std::uint64_t> counts(kRangeBins);
  cpu::add_to_counts(batch.view(), exponent, counts.data(), executor);
  const std::lock_guard lock(observed.mutex);  // no longer than the sums take
  observed.channels.merge(channels);           // may refuse
  observed.histogram.add_batch(keys, batch.dense.numel());
  observed.histogram.add_counts(counts, exponent);
}

#ifdef HALFSTEP_CUDA
// What the kernels leave and the host reads in one copy: the keys, and sums, counts and maxima of the channels.
struct CudaResults {
  CudaResults(std::int64_t the_channels, at::Device device)
      : channels(the_channels),
        bytes(at::empty({static_cast<std::int64_t>(sizeof(RangeKeys)) + channels * 20},
                        at::TensorOptions().device(device).dtype(at::kByte))) {}

  template <class T>
  static T* at_byte(const at::Tensor& of, std::int64_t offset) {
    return reinterpret_cast<T*>(of.data_ptr<std::uint8_t>() + offset);
  }
  RangeKeys* keys(const at::Tensor& of) const { return at_byte<RangeKeys>(of, 0); }
  double* sums(const at::Tensor& of) const { return at_byte<double>(of, sizeof(RangeKeys)); }
  std::uint64_t* counts(const at::Tensor& of) const {
    return at_byte<std::uint64_t>(of, static_cast<std::int64_t>(sizeof(RangeKeys)) + channels * 8);
  }
  float* maxima(const at::Tensor& of) const {
    return at_byte<float>(of, static_cast<std::int64_t>(sizeof(RangeKeys)) + channels * 16);
  }

  std::int64_t channels;
  at::Tensor bytes;
};

PendingCounts& pending_on(ObservedTensors& observed, at::Device device, int exponent) {
  for (PendingCounts& own : observed.pending)
    if (own.counts.device() == device) return own;
  const auto options = at::TensorOptions().device(device).dtype(at::kLong);
  observed.pending.push_back({at::zeros({kRangeBins}, options), exponent, c10::Event(c10::DeviceType::CUDA)});
  return observed.pending.back();
}

void observe_cuda(ObservedTensors& observed, const Batch& batch) {
  const at::Device device = batch.dense.device();
  const c10::cuda::CUDAGuard guard(device);
  TORCH_CHECK(c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None,
              "Observer.observe: a CUDA graph is being captured, and the range of a batch must be read by the host; "
              "calibrate before the capture");
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const CudaStream core_stream{stream.stream()};
  const TensorView view = batch.view();

  const CudaResults results(batch.shape ? batch.shape->channels : 0, device);
  cuda::range_keys(view, results.keys(results.bytes), core_stream);
  if (batch.shape) {
    const at::Tensor workspace =
        at::empty({static_cast<std::int64_t>(cuda::channel_workspace_bytes(*batch.shape))}, results.bytes.options());
    cuda::channel_statistics(view, *batch.shape, results.maxima(results.bytes), results.sums(results.bytes),
                             results.counts(results.bytes), workspace.data_ptr(), core_stream);
  }
  const at::Tensor read = results.bytes.cpu();  // waits
  const RangeKeys keys = *results.keys(read);
  const auto size = static_cast<std::size_t>(results.channels);
  const float* const maxima = results.maxima(read);
  const double* const sums = results.sums(read);
  const std::uint64_t* const counts = results.counts(read);
  const ChannelStatistics channels{{maxima, maxima + size}, {sums, sums + size}, {counts, counts + size}};

  const std::lock_guard lock(observed.mutex);
  if (batch.shape) observed.channels.merge(channels);  // may refuse
  const int exponent = observed.histogram.exponent_with(keys);
  PendingCounts& own = pending_on(observed, device, exponent);
  own.last_use.block(stream);
  if (exponent > own.exponent) {
    observed.add(own);
    own.counts.zero_();
    own.exponent = exponent;
  }
  auto* const device_counts = reinterpret_cast<std::uint64_t*>(own.counts.data_ptr<std::int64_t>());
  cuda::add_to_counts(view, own.exponent, device_counts, core_stream);
  own.counts.record_stream(stream);
  own.last_use.record(stream);
  observed.histogram.add_batch(keys, view.numel);
}
#endif

template <class T>
at::Tensor tensor_of(const std::vector<T>& values, at::ScalarType dtype) {
  at::Tensor tensor = at::empty({static_cast<std::int64_t>(values.size())}, dtype);
  std::copy(values.begin(), values.end(), static_cast<T*>(tensor.data_ptr()));
  return tensor;
}

template <class T>
std::span<const T> values_of(const at::Tensor& tensor, const char* name, at::ScalarType dtype) {
  HS_CHECK(tensor.defined() && tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.scalar_type() == dtype &&
               tensor.dim() == 1 && tensor.is_contiguous(),
           "Observer: the state's ", name, " are ", tensor.toString(), " of ", tensor.dim(),
           " dimensions, expected a contiguous CPU vector of ", c10::toString(dtype));
  return {static_cast<const T*>(tensor.const_data_ptr()), static_cast<std::size_t>(tensor.numel())};
}

}  // namespace
}  // namespace torch_ops

using torch_ops::ObservedTensors;

Observer::Observer(std::optional<std::int64_t> channels_dim) : observed_(std::make_shared<ObservedTensors>()) {
  observed_->channels_dim = channels_dim;
}

void Observer::observe(const at::Tensor& tensor) const {
  torch_ops::check_observed(tensor);
  if (tensor.numel() == 0) return;
  const at::NoGradGuard no_grad;
  const torch_ops::Batch batch = torch_ops::batch_of(tensor.detach().resolve_neg(), observed_->channels_dim);
#ifdef HALFSTEP_CUDA
  if (tensor.is_cuda()) return torch_ops::observe_cuda(*observed_, batch);
#endif
  torch_ops::observe_cpu(*observed_, batch);
}

void Observer::merge(const Observer& other) const {
  HS_CHECK(channels_dim() == other.channels_dim(),
           "Observer.merge: the other observer's channels_dim is not this one's");
  // One lock at a time: two threads may merge two observers into each other, or one into itself.
  RangeHistogram histogram;
  ChannelStatistics channels;
  {
    const std::lock_guard lock(other.observed_->mutex);
    other.observed_->settle();
    histogram = other.observed_->histogram;
    channels = other.observed_->channels;
  }
  const std::lock_guard lock(observed_->mutex);
  observed_->settle();
  observed_->channels.merge(channels);  // may refuse
  observed_->histogram.merge(histogram);
}

RangeHistogram Observer::histogram() const {
  const std::lock_guard lock(observed_->mutex);
  observed_->settle();
  return observed_->histogram;
}

ChannelStatistics Observer::channels() const {
  const std::lock_guard lock(observed_->mutex);
  return observed_->channels;
}

Int8Parameters Observer::parameters(RangeMethod method, const RangeOptions& options) const {
  return histogram().parameters(method, options);
}

void Observer::reset() const {
  const std::lock_guard lock(observed_->mutex);
  observed_->histogram = {};
  observed_->channels = {};
  observed_->pending.clear();
}

std::optional<std::int64_t> Observer::channels_dim() const {
  return observed_->channels_dim;
}

Observer::State Observer::state() const {
  const std::lock_guard lock(observed_->mutex);
  observed_->settle();
  const RangeHistogram& histogram = observed_->histogram;
  const ChannelStatistics& channels = observed_->channels;
  State state{channels_dim(),
              torch_ops::tensor_of(histogram.state_counts(), at::kLong),
              torch_ops::tensor_of(histogram.state_numbers(), at::kDouble),
              {}};
  if (!channels.max.empty()) {
    const std::vector<std::int64_t> counts(channels.count.begin(), channels.count.end());
    state.channels = {torch_ops::tensor_of(channels.max, at::kFloat), torch_ops::tensor_of(channels.sum, at::kDouble),
                      torch_ops::tensor_of(counts, at::kLong)};
  }
  return state;
}

Observer Observer::restored(const State& state) {
  using torch_ops::values_of;
  const Observer result(state.channels_dim);
  ObservedTensors& observed = *result.observed_;
  observed.histogram = RangeHistogram::restored(values_of<std::int64_t>(state.counts, "counts", at::kLong),
                                                values_of<double>(state.numbers, "numbers", at::kDouble));
  const bool expected = state.channels_dim.has_value() && observed.histogram.batches() > 0;
  HS_CHECK(state.channels.size() == (expected ? 3U : 0U), "Observer: the state has ", state.channels.size(),
           " tensors of channels, expected ", expected ? 3 : 0);
  if (!expected) return result;
  const auto maxima = values_of<float>(state.channels[0], "maxima of channels", at::kFloat);
  const auto sums = values_of<double>(state.channels[1], "sums of channels", at::kDouble);
  const auto counts = values_of<std::int64_t>(state.channels[2], "counts of channels", at::kLong);
  std::uint64_t total = 0;
  for (const std::int64_t count : counts) {
    HS_CHECK(count >= 0, "Observer: the state counts ", count, " values in a channel");
    total += static_cast<std::uint64_t>(count);
  }
  observed.channels = {{maxima.begin(), maxima.end()}, {sums.begin(), sums.end()}, {counts.begin(), counts.end()}};
  observed.channels.check();
  HS_CHECK(total == observed.histogram.count() && !counts.empty(), "Observer: the state has ", total, " values in ",
           counts.size(), " channels, but ", observed.histogram.count(), " in all");
  return result;
}

// --------------------------------------------------------------------------------------------------------- the class

namespace torch_ops {
namespace {

struct ObserverClass : torch::CustomClassHolder {
  explicit ObserverClass(Observer the_observer) : observer(std::move(the_observer)) {}
  Observer observer;
};

using Self = c10::intrusive_ptr<ObserverClass>;
using Pickled = std::tuple<std::optional<std::int64_t>, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

Pickled pickled(const Self& self) {
  Observer::State state = self->observer.state();
  return {state.channels_dim, std::move(state.counts), std::move(state.numbers), std::move(state.channels)};
}

Self unpickled(const Pickled& pickle) {
  const auto& [channels_dim, counts, numbers, channels] = pickle;
  return as_value_error([&] {
    return c10::make_intrusive<ObserverClass>(Observer::restored({channels_dim, counts, numbers, channels}));
  });
}

std::tuple<double, std::int64_t> parameters_of_class(const Self& self, const std::string& method, bool symmetric,
                                                     std::int64_t bits, double percentile) {
  return as_value_error([&] {
    HS_CHECK(bits >= 2 && bits <= 8, "Observer.parameters: bits is ", bits, ", expected 2 to 8");
    const RangeOptions options{.symmetric = symmetric, .bits = static_cast<int>(bits), .percentile = percentile};
    const Int8Parameters parameters = self->observer.parameters(range_method(method), options);
    return std::tuple(double{parameters.scale}, std::int64_t{parameters.zero_point});
  });
}

ChannelStatistics checked(const ChannelStatistics& channels, const char* what) {
  TORCH_CHECK_VALUE(!channels.max.empty(), "Observer.", what,
                    ": there are no channels: make the observer with channels_dim, and observe a tensor first");
  return channels;
}

at::Tensor channel_max(const Self& self) {
  return tensor_of(checked(self->observer.channels(), "channel_max").max, at::kFloat);
}

// A channel without a finite value has the mean 0.
at::Tensor channel_mean(const Self& self) {
  const ChannelStatistics channels = checked(self->observer.channels(), "channel_mean");
  std::vector<double> means = channels.sum;
  for (std::size_t c = 0; c < means.size(); ++c)
    if (channels.count[c] > 0) means[c] /= static_cast<double>(channels.count[c]);
  return tensor_of(means, at::kDouble);
}

std::tuple<at::Tensor, double, double> histogram_of(const Self& self) {
  const RangeHistogram histogram = self->observer.histogram();
  const std::vector<std::int64_t> counts(histogram.counts().begin(), histogram.counts().end());
  return {tensor_of(counts, at::kLong), -histogram.high(), histogram.high()};
}

}  // namespace

void define_calibration(torch::Library& library) {
  const RangeOptions defaults;
  library.class_<ObserverClass>("Observer")
      .def(torch::init([](std::optional<std::int64_t> channels_dim) {
             return c10::make_intrusive<ObserverClass>(Observer(channels_dim));
           }),
           "", {torch::arg("channels_dim") = c10::IValue()})
      .def("observe",
           [](const Self& self, const at::Tensor& tensor) { as_value_error([&] { self->observer.observe(tensor); }); },
           "", {torch::arg("tensor")})
      .def("merge",
           [](const Self& self, const Self& other) { as_value_error([&] { self->observer.merge(other->observer); }); },
           "", {torch::arg("other")})
      .def("parameters", &parameters_of_class, "",
           {torch::arg("method"), torch::arg("symmetric") = defaults.symmetric,
            torch::arg("bits") = std::int64_t{defaults.bits}, torch::arg("percentile") = defaults.percentile})
      .def("min",
           [](const Self& self) { return as_value_error([&] { return double{self->observer.histogram().min()}; }); })
      .def("max",
           [](const Self& self) { return as_value_error([&] { return double{self->observer.histogram().max()}; }); })
      .def("count", [](const Self& self) { return static_cast<std::int64_t>(self->observer.histogram().count()); })
      .def("nonfinite",
           [](const Self& self) { return static_cast<std::int64_t>(self->observer.histogram().non_finite()); })
      .def("batches", [](const Self& self) { return static_cast<std::int64_t>(self->observer.histogram().batches()); })
      .def("channels_dim", [](const Self& self) { return self->observer.channels_dim(); })
      .def("channel_max", &channel_max)
      .def("channel_mean", &channel_mean)
      .def("histogram", &histogram_of)
      .def("reset", [](const Self& self) { self->observer.reset(); })
      // What it has seen, as plain tensors for a file, and the way back.
      .def("state", [](const Self& self) { return pickled(self); })
      .def("restore", [](const Self& self, const Pickled& state) { self->observer = unpickled(state)->observer; })
      // What torch.export shows to the fake class of halfstep/int8_fake.py.
      .def("__obj_flatten__",
           [](const Self& self) {
             using Named = std::tuple<std::string, std::optional<std::int64_t>>;
             return std::make_tuple(Named("channels_dim", self->observer.channels_dim()));
           })
      .def_pickle([](const Self& self) { return pickled(self); },
                  [](const Pickled& state) { return unpickled(state); });
}

}  // namespace torch_ops
}  // namespace halfstep
