// Autocast scopes. Contract: halfstep/torch/scopes.h.
#include "halfstep/torch/scopes.h"

#include <ATen/autocast_mode.h>
#include <c10/util/Exception.h>

namespace halfstep {

AutocastScope::AutocastScope(at::DeviceType device, at::ScalarType dtype, bool enabled, bool cache_enabled)
    : device_(device),
      previous_dtype_(at::autocast::get_autocast_dtype(device)),
      previous_enabled_(at::autocast::is_autocast_enabled(device)),
      previous_cache_enabled_(at::autocast::is_autocast_cache_enabled()) {
  TORCH_CHECK_VALUE(dtype == at::kHalf || dtype == at::kBFloat16, "AutocastScope: dtype is ", dtype,
                    ", expected Half or BFloat16");
  at::autocast::set_autocast_enabled(device_, enabled);
  at::autocast::set_autocast_dtype(device_, dtype);
  at::autocast::increment_nesting();
  at::autocast::set_autocast_cache_enabled(cache_enabled);
}

AutocastScope::~AutocastScope() {
  at::autocast::decrement_nesting();
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(device_, previous_enabled_);
  at::autocast::set_autocast_dtype(device_, previous_dtype_);
  at::autocast::set_autocast_cache_enabled(previous_cache_enabled_);
}

}  // namespace halfstep
