// Plans for TorchScript: a scripted or traced module, rewritten for inference in the precisions that a plan decides.
//
//   const halfstep::PrecisionPlan plan = halfstep::PrecisionPlan::from_json(text);
//   torch::jit::Module model = torch::jit::load("model.pt");
//   model.eval();
//   halfstep::lower(model, plan).save("lowered.pt");
//
// The result needs no autocast and no halfstep where it runs: casts are ops of its graph, all of them ATen's, and
// parameters are stored in the type that their uses want.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/jit/api/module.h>

#include "halfstep/export.h"
#include "halfstep/policy.h"

namespace halfstep {

// What a plan covers of a scripted or traced module, in its order: the modules without children and those with
// parameters of their own, as of the model that it was made from. TorchScript keeps no module under two names: of such
// a pair each is a layer of its own here, and no layer is the same as another.
HALFSTEP_API std::vector<Layer> layers_of(const torch::jit::Module& module);

// Decides, or asks, once per layer of the module. `half`: see PrecisionPlan. Throws InvalidArgument. A layer that is
// never called, such as attention's out_proj, is decided as others are; lower() computes it as what reads it.
HALFSTEP_API PrecisionPlan plan(const torch::jit::Module& module, const PrecisionPolicy& policy);
HALFSTEP_API PrecisionPlan plan(const torch::jit::Module& module, const CustomPrecisionPolicy& policy,
                                Precision half = Precision::kFloat16);

// Returns a copy of `module` that computes as it would with the plan's layer scopes under autocast, for inference. The
// original is not changed, and shares no memory with the copy.
//
// Within a layer that is planned kFloat16 or kBFloat16 each op runs as autocast's lists say with that type; a layer
// that is planned kFloat32 gets its floating inputs cast to float32 and runs as it stands; half layers within it hand
// float32 back to it. Inputs are cast also within tuples, named tuples, lists, dictionaries and optionals; objects of
// other classes are handed on as they are. Code outside of the plan's layers, and layers that the plan does not have,
// run with `autocast_dtype` (kHalf, kBFloat16); left out it is the plan's half precision. A plan that is float32
// everywhere needs none: then all is float32.
//
// The copy has `forward`, with everything that it calls inlined, and all attributes. Other methods are left out.
// Attributes that are True, False or None and that forward does not assign are decided: setting them later does
// nothing. Parameters and buffers whose uses all want one half type are stored in it; the others stay, and are cast at
// their uses. None requires gradients.
// Tensors that show parts of one memory do so in the copy, if they are stored in no other type. What forward writes
// stays in its type, and is cast where it is used.
//
// torch's TransformerEncoder, TransformerEncoderLayer and MultiheadAttention have a fused path of inference that reads
// the parameters of their layers and calls none. Scripts do not take it where layers inside are planned otherwise than
// the module; traces that have taken it are refused then. Attention's out_proj is never called and computes as
// attention does, whatever its plan.
//
// A trace has another value where eager code writes to an input of a layer in place: the tracer gives what is written a
// name of its own. Of a layer whose inputs are cast it is the cast that is written, and what stands around the layer
// does not see it in eager code, but does in a trace.
//
// With `half_reductions` norms, softmax and embeddings in half regions read and write half too, where autocast runs
// them in float32: torch's kernels compute in float32 inside. That is what `.half()` does, at its speed, and gives
// other bits than autocast. Log-softmax, losses and sums stay float32.
//
// `device` is where the module will run, since autocast has other lists for other devices: kCPU or kCUDA; left out
// it is that of the module's parameters and buffers.
//
// Throws c10::Error (a ValueError in Python):
// - The module or one of its submodules is in training mode, has no forward, or has forward hooks of its own.
// - The plan has a layer that the module has not, or one of another type; or plans kTFloat32 or kInt8.
// - A fused op of attention was traced above layers that are planned otherwise.
// - A layer is never called, and forward reads its tensors in code of another precision than its own; or no layer of
//   the plan is called, though some are planned otherwise than the module: it was lowered or optimized before. Layers
//   that the plan says are never called, and those of which nothing is used, are no error.
// - The plan has both half types, and autocast_dtype is left out; or it is another type.
// - `device` is another one; or is left out, and the module has no tensors or has them on several kinds of devices.
// - Something in forward cannot be inlined or followed: an interface's method, a method of a module that is chosen at
//   run time, fork, a Python function, autocast regions; binary_cross_entropy within half precision on CUDA.
HALFSTEP_API torch::jit::Module lower(const torch::jit::Module& module, const PrecisionPlan& plan,
                                      std::optional<at::ScalarType> autocast_dtype = std::nullopt,
                                      std::optional<at::DeviceType> device = std::nullopt,
                                      bool half_reductions = false);

}  // namespace halfstep
