// What the ops share: TensorFlow's C kernel API with errors as exceptions and tensors as the core's views.
//
// Only C functions of TensorFlow are used, so that one library serves several of its minor versions: its C++ symbols
// carry the version of absl in their names. All ops are functional and run on the CPU. For a CUDA device the C API
// gives no stream (TF_GetStream is for devices that are plugged in), so there are no GPU kernels here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "halfstep/tensor_list.h"
#include "tensorflow/c/kernels.h"
#include "tensorflow/c/ops.h"

namespace halfstep::tf {

// Throws what `status` holds, unless it is OK: InvalidArgument or std::runtime_error.
class Status {
 public:
  Status() : status_(TF_NewStatus(), TF_DeleteStatus) {}
  operator TF_Status*() const { return status_.get(); }
  void check() const;

 private:
  std::unique_ptr<TF_Status, decltype(&TF_DeleteStatus)> status_;
};

using Tensor = std::unique_ptr<TF_Tensor, decltype(&TF_DeleteTensor)>;

Tensor input(TF_OpKernelContext* context, int index);
Tensor scalar_input(TF_OpKernelContext* context, int index, const char* name);  // InvalidArgument if it is none
// An output of the given shape in fresh memory. Every output can be written until the kernel returns.
Tensor output(TF_OpKernelContext* context, int index, TF_DataType type, const std::vector<std::int64_t>& shape);

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(TF_TensorData(tensor.get()));
}

// The inputs from `first` on as views of contiguous memory, which the context keeps alive.
std::vector<TensorView> input_views(TF_OpKernelContext* context, int first, int count);
// The outputs of the same shapes, from index 0 on: in the memory of the inputs where nobody else reads these.
std::vector<TensorView> output_views(TF_OpKernelContext* context, int first_input,
                                     const std::vector<TensorView>& inputs);

// A number of threads for work on `elements` elements. wanted: 0 for as many as the process may run on.
int threads_for(std::int64_t elements, int wanted);

// Registers an op: specifications in the order of its inputs, outputs and attributes, and its shape function. Errors
// end the process: they are mistakes of halfstep that its first test sees.
struct OpDefinition {
  const char* name;
  std::vector<const char*> inputs;
  std::vector<const char*> outputs;
  std::vector<const char*> attributes;
  void (*shapes)(TF_ShapeInferenceContext* context, TF_Status* status);
};
void register_op(const OpDefinition& definition);

// Registers a CPU kernel: `Kernel` is made once per node, from the node's attributes, and called from many threads.
void register_kernel(const char* op, void* (*create)(TF_OpKernelConstruction*),
                     void (*compute)(void*, TF_OpKernelContext*), void (*destroy)(void*));

// Turn the exception in flight into the op's error.
void fail(TF_OpKernelConstruction* construction);
void fail(TF_OpKernelContext* context);

template <class Kernel>
void register_kernel(const char* op) {
  register_kernel(
      op,
      [](TF_OpKernelConstruction* construction) -> void* {
        try {
          return new Kernel(construction);
        } catch (...) {
          fail(construction);
          return nullptr;
        }
      },
      [](void* kernel, TF_OpKernelContext* context) {
        try {
          static_cast<const Kernel*>(kernel)->compute(context);
        } catch (...) {
          fail(context);
        }
      },
      [](void* kernel) { delete static_cast<Kernel*>(kernel); });
}

// Shape functions: every output i is shaped as input i, for `count` of them; a scalar; a matrix.
class Shapes {
 public:
  Shapes(TF_ShapeInferenceContext* context, TF_Status* status) : context_(context), status_(status) {}
  int inputs() const { return static_cast<int>(TF_ShapeInferenceContextNumInputs(context_)); }
  bool input_has_rank(int index, std::int64_t rank) const;  // an error of the op if it does not
  void same_as_input(int output, int input) const;
  void scalar(int output) const;
  void matrix(int output, std::int64_t rows, std::int64_t columns) const;

 private:
  TF_ShapeInferenceContext* context_;
  TF_Status* status_;
};

}  // namespace halfstep::tf
