// Per-layer statistics of a running model, on its device, and the monitor that decides by them which layers must leave
// half precision. For C++ programs, and as torch.classes.halfstep.StabilityMonitor.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>

#include "halfstep/export.h"
#include "halfstep/stability.h"

namespace halfstep {

namespace torch_ops {
struct StatisticsTable;
}

// Rows of statistics (halfstep/stability.h) for `layers` layers.
//
//   statistics.begin_step();
//   x = statistics.watch_input(i, x);      // x as the layer shall see it
//   y = layer->forward(x);
//   statistics.watch_output(i, y);         // ... and so on; backward() is seen through hooks
//   ... every so many steps:
//   const std::vector<double> summary = statistics.summary();  // waits for the device
//   statistics.reset();
//
// Watching enqueues on the current stream of the tensor's device and waits for nothing; it can be captured in a CUDA
// graph. Tensors that are not floating point, or not strided and dense in memory of their own (sparse ones, subclasses,
// meta tensors), are passed over. Gradients are seen by C++ hooks on the watched tensors, which live and die with the
// autograd graph, keep the rows alive and nothing of the model, and work under compiled autograd. Watched tensors keep
// their values; watch_input returns a view where a gradient will come, so that a tensor that several layers are given
// shows what each of them sends on. Rows of one layer must not be written from two streams at a time. The calls of one
// object may come from several threads.
class HALFSTEP_API LayerStatistics {
 public:
  // half: kFloat16 or kBFloat16, for what counts as beyond it. InvalidArgument for another one or layers < 1.
  LayerStatistics(std::int64_t layers, Precision half);

  void begin_step();  // tensors watched from now on come in an order of their own
  void watch_output(std::int64_t layer, const at::Tensor& output, bool gradient = true) const;
  at::Tensor watch_input(std::int64_t layer, const at::Tensor& input) const;

  // float64 [layers, kObserved, kLayerStatistics] on the CPU, of all devices together. Waits for them.
  at::Tensor rows() const;
  // What StabilityMonitor decides by: summarize() of rows(). Waits.
  std::vector<double> summary() const;
  void reset();  // to nothing seen, enqueued

 private:
  std::shared_ptr<torch_ops::StatisticsTable> table_;
  Precision half_;
};

}  // namespace halfstep
