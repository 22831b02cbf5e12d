// The core's errors as those that torch turns into Python's.
#pragma once

#include <c10/util/Exception.h>

#include "halfstep/status.h"

namespace halfstep::torch_ops {

// run(), whose InvalidArgument becomes a ValueError.
template <class Run>
auto as_value_error(const Run& run) -> decltype(run()) {
  try {
    return run();
  } catch (const InvalidArgument& error) {
    C10_THROW_ERROR(ValueError, error.what());
  }
}

}  // namespace halfstep::torch_ops
