// Registers all ops when the library is loaded, by tf.load_op_library or by a linker.
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
