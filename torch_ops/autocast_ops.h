// What the running torch's autocast does with each op.
#pragma once

#include <ATen/core/operator_name.h>
#include <c10/core/DeviceType.h>

namespace halfstep::torch_ops {

enum class AutocastClass {
  kNone,                // nothing: the op, or the ops it is made of, take what they are given
  kLowerPrecision,      // floating-point inputs are cast to the autocast dtype
  kFloat32,             // half inputs are cast to float32
  kFloat32SetDtype,     // the argument `dtype` becomes float32, if the first tensor is half and none is given
  kFloat32AppendDtype,  // the overload with a dtype is called instead, with float32 if the first tensor is half
  kPromote,             // inputs are cast to the widest of them and the autocast dtype
  kBanned,              // an error
};

// The class of an op of ATen under CPU or CUDA autocast; ValueError for another device. kNone if torch has no autocast
// kernel for it, and for ops of other libraries: their kernels, if any, cast as they like. What torch runs as float32
// through the parts of an op that has no kernel of its own is kNone too, but for aten::cross_entropy_loss on CUDA,
// where halfstep has one: kFloat32.
AutocastClass autocast_class(const c10::OperatorName& op, c10::DeviceType device);

}  // namespace halfstep::torch_ops
