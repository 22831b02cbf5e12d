// What the int8 ops check alike.
#pragma once

#include <string_view>

#include <ATen/core/Tensor.h>

#include "halfstep/int8.h"

namespace halfstep::torch_ops {

// Throws unless scale is finite, at least the smallest normal float32, and zero_point is an int8.
Int8Parameters checked_parameters(double scale, std::int64_t zero_point, std::string_view op,
                                  std::string_view argument);

// The tensor as it lies, if it is dense in some order of its dimensions, or a contiguous copy.
at::Tensor dense_in_place(const at::Tensor& tensor);

}  // namespace halfstep::torch_ops
