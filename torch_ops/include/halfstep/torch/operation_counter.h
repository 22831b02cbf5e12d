// How many operations computed in which floating-point type, and what the casts between them moved.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <torch/custom_class.h>

#include "halfstep/export.h"

namespace halfstep {

struct OperationCount {
  std::string operation;  // "aten::addmm"; in-place and out= variants count as the operation
  std::string dtype;      // "float16", "bfloat16", "float32", "float64" or "mixed"
  std::int64_t count;
};

struct CastCount {
  std::string from;
  std::string to;
  std::int64_t count;
  std::int64_t bytes;  // read and written, by all of them
};

// Counts the floating-point operations that a thread calls, and those of the backward passes that it starts, also on
// autograd's threads. It is torch.classes.halfstep.OperationCounter in Python and TorchScript.
//
//   halfstep::OperationCounter counter;
//   counter.start();
//   loss_function(model->forward(x), y).backward();
//   counter.stop();
//   for (const auto& [operation, dtype, count] : counter.counts()) ...
//
// What counts is a list (torch_ops/operation_list.cpp): products, convolutions, attention, recurrent layers, norms,
// softmax, losses, activations, elementwise arithmetic, reductions, pooling, interpolation, embeddings, their backward
// operations, and halfstep's own norms and cross entropy. Not in it: views, copies, fills, comparisons, indexing,
// random numbers, integer and complex arithmetic, optimizer updates (in Python all that runs inside an optimizer's
// step, a closure too; torch::optim of C++ calls plain arithmetic, which is counted: stop before).
//
//   Once   An operation may call others of the list: a linear layer under autocast is `linear` in float32, `linear` in
//          half and `addmm`. Counted is the innermost, `addmm` here. So names are those of torch's kernels, and may
//          differ by device: a mean on the CPU is `sum` and `div`. One that ends by an exception is not counted.
//   dtype  That of its floating-point tensors, those in lists included, `out=` excluded; of several types, "mixed".
//          Python numbers have none, and tensors without dimensions count only if all are, as in type promotion.
//   Casts  `_to_copy` and `copy_` between two of the four types; counted apart from the operations. What a kernel does
//          as it reads and writes (halfstep's norms, a `dtype=` that is not a copy) is no cast.
//
// Compiled code is seen as far as it calls operations: a fused kernel of Inductor counts nothing, nor does a replayed
// CUDA graph. Nothing is counted while a program is traced, and on meta tensors. Counting never waits for a device.
//
// All members may be called from any thread.
class HALFSTEP_API OperationCounter : public torch::CustomClassHolder {
 public:
  OperationCounter();
  ~OperationCounter() override;  // stops
  OperationCounter(const OperationCounter&) = delete;
  OperationCounter& operator=(const OperationCounter&) = delete;

  // Counts, from here on, what the calling thread does, on top of what was counted before. False, and nothing has
  // changed, if a counter of the process runs already, this one or another.
  bool start();

  // Nothing is counted from here on. Without start() it does nothing. torch's callback is then gone from the calling
  // thread; called on another thread than start() was, it goes with the next operation of that one.
  void stop();

  // Sets all counts to 0; a counter that runs goes on.
  void reset();

  // Sorted by name and type; none that is 0.
  std::vector<OperationCount> counts() const;
  std::vector<CastCount> casts() const;

 private:
  struct Tally;
  friend struct OperationCallbacks;
  std::shared_ptr<Tally> tally_;
};

}  // namespace halfstep
