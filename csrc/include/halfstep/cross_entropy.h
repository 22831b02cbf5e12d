// Cross entropy over class indices that reads half precision and computes in float32: no float32 copy of the logits.
//
// With a row x of `classes` logits, its target t, the weights w (1 if absent), e the label smoothing and
// lse = log(sum of exp(x_c)), a row that is not ignored has the loss
//
//   (1 - e) * w_t * (lse - x_t) + e / classes * sum over c of w_c * (lse - x_c)
//
// and a row whose target is `ignore_index` has 0. The result is that per row (kNone), its sum (kSum), or its sum over
// the sum of the w_t of the rows that are not ignored (kMean: NaN without such a row): torch.nn.functional's
// cross_entropy. Backward writes, with s the row's factor (grad_loss, over the sum of weights for kMean),
//
//   grad_x_c = s * ((1 - e) * w_t * (p_c - [c = t]) + e / classes * (p_c * sum of w - w_c)),  p_c = exp(x_c - lse)
//
// and 0 for ignored rows. Forward reads the logits once, keeping a running maximum and the sum of exponentials about it
// (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018), and saves lse alone. Backward reads them
// once more and writes once. Rows that are ignored are not read, and their lse is 0. Logits of -inf (masked classes)
// have p = 0; NaN and +inf give NaN, as in torch.
//
// logits and grad_logits are float32, float16 or bfloat16 and of one dtype; everything else is float32, targets are
// int64. No limit on elements (64-bit sizes). Sums go in a fixed order and without atomics: the same input gives the
// same bits in every run, on the CPU whatever the number of threads and the instruction set.
//
// A target that is neither a class nor ignore_index: the CPU throws InvalidArgument before anything is written; the GPU
// stops with a device assertion, as torch does.
//
// The functions of the namespaces cpu and cuda are the core's own; programs that link libhalfstep_torch call the ops in
// halfstep/torch/.
#pragma once

#include <cstddef>
#include <cstdint>

#include "halfstep/stream.h"
#include "halfstep/tensor_list.h"

namespace halfstep {

// As torch codes it.
enum class LossReduction : std::int32_t { kNone, kMean, kSum };

struct CrossEntropy {
  std::int64_t rows;
  std::int64_t classes;
  TensorView logits;            // [rows, classes]
  const std::int64_t* targets;  // [rows]
  const float* weight;          // [classes], may be null
  LossReduction reduction;
  std::int64_t ignore_index;
  double label_smoothing;  // 0 to 1
};

// Two sums that backward needs: of the w_t of the rows that are not ignored, and of all w.
inline constexpr int kLossTotals = 2;

struct CrossEntropyOutputs {
  float* loss;    // [rows] for kNone, else one element
  float* lse;     // [rows]
  float* totals;  // [kLossTotals]
};

struct CrossEntropyGradient {
  const float* grad_loss;  // [rows] for kNone, else one element
  const float* lse;        // [rows], from forward
  const float* totals;     // [kLossTotals], from forward
  void* grad_logits;       // [rows, classes], in the logits' dtype
};

namespace cpu {
void cross_entropy(const CrossEntropy& call, const CrossEntropyOutputs& out, const Executor& executor);
void cross_entropy_backward(const CrossEntropy& call, const CrossEntropyGradient& gradient, const Executor& executor);
}  // namespace cpu

// The same on device memory. Enqueues on `stream` only: no synchronisation, no host read, capturable in a CUDA graph.
// `workspace` is device memory for [rows] float32, free again when the stream has passed the call.
namespace cuda {
void cross_entropy(const CrossEntropy& call, const CrossEntropyOutputs& out, float* workspace, CudaStream stream);
void cross_entropy_backward(const CrossEntropy& call, const CrossEntropyGradient& gradient, CudaStream stream);
}  // namespace cuda

}  // namespace halfstep
