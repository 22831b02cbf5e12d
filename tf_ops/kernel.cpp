// Contract: kernel.h.
#include "kernel.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>

namespace halfstep::tf {
namespace {

// A thread takes some ten microseconds to start; this many elements take that long to read.
constexpr std::int64_t kElementsPerThread = 131072;

DType dtype_of(TF_DataType type) {
  switch (type) {
    case TF_FLOAT:
      return DType::kFloat32;
    case TF_DOUBLE:
      return DType::kFloat64;
    case TF_HALF:
      return DType::kFloat16;
    case TF_BFLOAT16:
      return DType::kBFloat16;
    default:
      HS_UNREACHABLE("TensorFlow type ", static_cast<int>(type));
  }
}

int processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

void or_end(const Status& status, const char* what) {
  if (TF_GetCode(status) == TF_OK) return;
  std::fprintf(stderr, "halfstep: cannot register %s with TensorFlow: %s\n", what, TF_Message(status));
  std::abort();
}

void describe_exception(TF_Status* status) {
  try {
    throw;
  } catch (const InvalidArgument& error) {
    TF_SetStatus(status, TF_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    TF_SetStatus(status, TF_INTERNAL, error.what());
  } catch (...) {
    TF_SetStatus(status, TF_INTERNAL, "halfstep: an unknown exception");
  }
}

struct ShapeHandle {
  TF_ShapeHandle* handle = TF_NewShapeHandle();
  ShapeHandle() = default;
  explicit ShapeHandle(TF_ShapeHandle* taken) : handle(taken) {}
  ShapeHandle(const ShapeHandle&) = delete;
  ShapeHandle& operator=(const ShapeHandle&) = delete;
  ~ShapeHandle() { TF_DeleteShapeHandle(handle); }
};

}  // namespace

void Status::check() const {
  if (TF_GetCode(*this) == TF_OK) return;
  if (TF_GetCode(*this) == TF_INVALID_ARGUMENT) throw InvalidArgument(TF_Message(*this));
  throw std::runtime_error(TF_Message(*this));
}

Tensor input(TF_OpKernelContext* context, int index) {
  const Status status;
  TF_Tensor* tensor = nullptr;
  TF_GetInput(context, index, &tensor, status);
  status.check();
  return {tensor, TF_DeleteTensor};
}

Tensor scalar_input(TF_OpKernelContext* context, int index, const char* name) {
  Tensor tensor = input(context, index);
  HS_CHECK(TF_NumDims(tensor.get()) == 0, name, " has ", TF_NumDims(tensor.get()), " dimensions, expected a scalar");
  return tensor;
}

Tensor output(TF_OpKernelContext* context, int index, TF_DataType type, const std::vector<std::int64_t>& shape) {
  const Status status;
  std::size_t bytes = TF_DataTypeSize(type);
  for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
  TF_Tensor* const tensor =
      TF_AllocateOutput(context, index, type, shape.data(), static_cast<int>(shape.size()), bytes, status);
  status.check();
  return {tensor, TF_DeleteTensor};
}

std::vector<TensorView> input_views(TF_OpKernelContext* context, int first, int count) {
  std::vector<TensorView> views;
  views.reserve(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) {
    // The tensor object goes at once: while it lives, TensorFlow counts a reader more and forwards no memory.
    const Tensor tensor = input(context, first + i);
    views.push_back(
        {TF_TensorData(tensor.get()), TF_TensorElementCount(tensor.get()), dtype_of(TF_TensorType(tensor.get()))});
  }
  return views;
}

std::vector<TensorView> output_views(TF_OpKernelContext* context, int first_input,
                                     const std::vector<TensorView>& inputs) {
  std::vector<TensorView> views;
  views.reserve(inputs.size());
  std::vector<std::int64_t> shape;
  const Status status;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const int from = first_input + static_cast<int>(i);
    {
      const Tensor tensor = input(context, from);
      shape.resize(static_cast<std::size_t>(TF_NumDims(tensor.get())));
      for (std::size_t axis = 0; axis < shape.size(); ++axis)
        shape[axis] = TF_Dim(tensor.get(), static_cast<int>(axis));
    }
    int forwarded = -1;
    const Tensor tensor(TF_ForwardInputOrAllocateOutput(context, &from, 1, static_cast<int>(i), shape.data(),
                                                        static_cast<int>(shape.size()), &forwarded, status),
                        TF_DeleteTensor);
    status.check();
    views.push_back({TF_TensorData(tensor.get()), inputs[i].numel, inputs[i].dtype});
  }
  return views;
}

int threads_for(std::int64_t elements, int wanted) {
  if (elements < 2 * kElementsPerThread) return 1;
  const std::int64_t most = wanted > 0 ? wanted : processors();
  return static_cast<int>(std::clamp<std::int64_t>(elements / kElementsPerThread, 1, most));
}

void register_op(const OpDefinition& definition) {
  TF_OpDefinitionBuilder* const builder = TF_NewOpDefinitionBuilder(definition.name);
  for (const char* const spec : definition.attributes) TF_OpDefinitionBuilderAddAttr(builder, spec);
  for (const char* const spec : definition.inputs) TF_OpDefinitionBuilderAddInput(builder, spec);
  for (const char* const spec : definition.outputs) TF_OpDefinitionBuilderAddOutput(builder, spec);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(builder, definition.shapes);
  const Status status;
  TF_RegisterOpDefinition(builder, status);  // takes the builder
  or_end(status, definition.name);
}

void register_kernel(const char* op, void* (*create)(TF_OpKernelConstruction*),
                     void (*compute)(void*, TF_OpKernelContext*), void (*destroy)(void*)) {
  TF_KernelBuilder* const builder = TF_NewKernelBuilder(op, "CPU", create, compute, destroy);
  const Status status;
  TF_RegisterKernelBuilder(op, builder, status);  // takes the builder
  or_end(status, op);
}

void fail(TF_OpKernelConstruction* construction) {
  const Status status;
  describe_exception(status);
  TF_OpKernelConstruction_Failure(construction, status);
}

void fail(TF_OpKernelContext* context) {
  const Status status;
  describe_exception(status);
  TF_OpKernelContext_Failure(context, status);
}

bool Shapes::input_has_rank(int index, std::int64_t rank) const {
  const ShapeHandle shape;
  TF_ShapeInferenceContextGetInput(context_, index, shape.handle, status_);
  if (TF_GetCode(status_) == TF_OK)
    TF_ShapeInferenceContextWithRank(context_, shape.handle, rank, shape.handle, status_);
  return TF_GetCode(status_) == TF_OK;
}

void Shapes::same_as_input(int output, int input) const {
  if (TF_GetCode(status_) != TF_OK) return;
  const ShapeHandle shape;
  TF_ShapeInferenceContextGetInput(context_, input, shape.handle, status_);
  if (TF_GetCode(status_) == TF_OK) TF_ShapeInferenceContextSetOutput(context_, output, shape.handle, status_);
}

void Shapes::scalar(int output) const {
  if (TF_GetCode(status_) != TF_OK) return;
  const ShapeHandle shape(TF_ShapeInferenceContextScalar(context_));
  TF_ShapeInferenceContextSetOutput(context_, output, shape.handle, status_);
}

void Shapes::matrix(int output, std::int64_t rows, std::int64_t columns) const {
  if (TF_GetCode(status_) != TF_OK) return;
  const ShapeHandle height(TF_ShapeInferenceContextVectorFromSize(context_, static_cast<std::size_t>(rows)));
  const ShapeHandle width(TF_ShapeInferenceContextVectorFromSize(context_, static_cast<std::size_t>(columns)));
  const ShapeHandle shape;
  TF_ShapeInferenceContextConcatenateShapes(context_, height.handle, width.handle, shape.handle, status_);
  if (TF_GetCode(status_) == TF_OK) TF_ShapeInferenceContextSetOutput(context_, output, shape.handle, status_);
}

}  // namespace halfstep::tf
