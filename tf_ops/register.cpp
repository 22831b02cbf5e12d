// Registers all ops when the library is loaded, by tf.load_op_library or by a linker, and says what it is.
#include "halfstep/export.h"

namespace halfstep::tf {

void register_gradients();
void register_scaling();

namespace {

struct Registration {
  Registration() {
    register_gradients();
    register_scaling();
  }
} registration;

}  // namespace
}  // namespace halfstep::tf

extern "C" HALFSTEP_API const char* halfstep_tf_version() {
  return HALFSTEP_VERSION;
}
