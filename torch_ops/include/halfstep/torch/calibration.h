// An observer of activations, from whose statistics int8 parameters are computed. For C++ programs, and as
// torch.classes.halfstep.Observer. What the statistics and estimators are: halfstep/calibration.h.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "halfstep/calibration.h"
#include "halfstep/export.h"

namespace halfstep {

namespace torch_ops {
struct ObservedTensors;
}

// A handle: copies observe into the same statistics.
//
//   Observer observer;
//   for (...) observer.observe(x);
//   const Int8Parameters parameters = observer.parameters(RangeMethod::kMse);
//
// All functions may be called from several threads. On CUDA observe() enqueues on the current stream of the tensor's
// device and waits once, for the range of the batch; the counts stay on the device until they are asked for. It cannot
// be captured in a CUDA graph.
class HALFSTEP_API Observer {
 public:
  // channels_dim: the dimension along which channels() are told apart, negative from the end; none: no channels.
  explicit Observer(std::optional<std::int64_t> channels_dim = std::nullopt);

  // float32, float16 or bfloat16, any shape and strides, on the CPU or CUDA; an empty tensor is passed over. Throws
  // TypeError for another dtype, ValueError for a layout that is not strided, a dimension that channels_dim does not
  // have or another number of channels than before, and NotImplementedError for another device.
  void observe(const at::Tensor& tensor) const;
  // What `other` has seen, as if it had been observed here. ValueError if channels_dim or the number of channels
  // differs.
  void merge(const Observer& other) const;

  // Copies, for which counts on a device are read: these wait for it.
  RangeHistogram histogram() const;
  ChannelStatistics channels() const;  // empty without channels_dim or before anything was seen
  // InvalidArgument before a finite value was seen, or for options out of range.
  Int8Parameters parameters(RangeMethod method, const RangeOptions& options = {}) const;

  void reset() const;  // to nothing seen
  std::optional<std::int64_t> channels_dim() const;

  // Everything, as CPU tensors: int64 [RangeHistogram::kStateCounts], float64 [kStateNumbers], and with channels
  // float32 maxima, float64 sums and int64 counts. restored() throws InvalidArgument for tensors that no observer can
  // have.
  struct State {
    std::optional<std::int64_t> channels_dim;
    at::Tensor counts, numbers;
    std::vector<at::Tensor> channels;  // none or 3
  };
  State state() const;
  static Observer restored(const State& state);

 private:
  std::shared_ptr<torch_ops::ObservedTensors> observed_;
};

}  // namespace halfstep
