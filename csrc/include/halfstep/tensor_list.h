// Non-owning views of dense memory, the only form in which the core sees tensors.
#pragma once

#include <cstdint>
#include <span>

#include "halfstep/dtype.h"

namespace halfstep {

// `numel` elements of `dtype` at `data`, contiguous, aligned to at least their element size. An empty view may have a
// null `data`. Functions say whether they write through it.
struct TensorView {
  void* data;
  std::int64_t numel;
  DType dtype;
};

using TensorList = std::span<const TensorView>;

}  // namespace halfstep
