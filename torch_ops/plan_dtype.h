// The dtype in which a plan's precision computes.
#pragma once

#include <optional>

#include <c10/core/ScalarType.h>

#include "halfstep/policy.h"

namespace halfstep::torch_ops {

// None for those that no layer runs in yet, kTFloat32 and kInt8.
inline std::optional<at::ScalarType> dtype_of(Precision precision) {
  switch (precision) {
    case Precision::kFloat32:
      return at::kFloat;
    case Precision::kFloat16:
      return at::kHalf;
    case Precision::kBFloat16:
      return at::kBFloat16;
    case Precision::kTFloat32:
    case Precision::kInt8:
      break;
  }
  return std::nullopt;
}

}  // namespace halfstep::torch_ops
