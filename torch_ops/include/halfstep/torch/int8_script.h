// int8 post-training quantization of TorchScript, in a program without Python:
//
//   torch::jit::Module model = torch::jit::load("model.pt");
//   const halfstep::Quantized result = halfstep::quantize(model, {{batch1}, {batch2}, {batch3}});
//   std::cout << result.report;
//   result.module.save("int8.pt");
//
// The file runs wherever halfstep's library is loaded. What int8 layers compute: halfstep/torch/int8.h.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include <ATen/core/ivalue.h>
#include <torch/csrc/jit/api/module.h>

#include "halfstep/calibration.h"
#include "halfstep/export.h"

namespace halfstep {

struct QuantizeOptions {
  RangeMethod calibrator = RangeMethod::kMinMax;  // how the range of a layer's input is estimated
  int bits = 8;                                   // levels of weights and inputs, 2 .. 8; stored as int8 all the same
  bool dynamic = false;                           // inputs by row of a linear layer and image of a convolution
  bool fold_batch_norm = true;
  bool bias_correction =
      true;  // shift biases by the mean error of their layer, where the outputs have less noise by it
  // Globs (POSIX fnmatch) of layers' names. A glob names what is inside of a module with it.
  std::vector<std::string> include = {};  // empty: all
  std::vector<std::string> exclude = {};
  // The largest accepted share of noise in the power of the outputs: 0.02 are 17 dB, 0.001 are 30 dB.
  double accuracy_threshold = 0.02;
  bool speed_guard = true;  // float where int8 is not faster; without it int8 is kept for its size
};

// A product of the module, by the name of the submodule whose weight it is: "encoder.0"; of another tensor than
// "weight" that follows: "attention.in_proj". A weight that is a constant without a name gives "linear_0".
struct QuantizedLayer {
  std::string name;
  std::string kind;  // "linear", "conv1d", "conv2d", "embedding"; empty for what never was a candidate
  bool int8 = false;
  std::string why;     // why it stayed float
  std::string kernel;  // what the products run on
  std::string fused;   // "fc1 + norm ln2 + relu + int8 out": what it took over; empty for nothing
  double noise = -1;   // share of noise in the module's output with this layer alone in int8; negative: not measured
  // Of the layers between which values stay int8, one after the other, in float and in int8; negative: not measured.
  double milliseconds = -1, int8_milliseconds = -1;
};

struct HALFSTEP_API QuantizeReport {
  std::vector<QuantizedLayer> layers;
  std::vector<std::string> folded;  // "bn into conv"
  // Of the module that came back, on the samples that judge: the mean share of noise in its outputs, what that of all
  // data is at most (mean and two standard errors; of one sample the share itself), and whether this keeps the
  // threshold. 0 if the float module came back.
  double noise = 0, bound = 0;
  double noise_everywhere = 0, bound_everywhere = 0;  // with all candidates in int8
  bool kept = true;
  std::int64_t samples = 0;      // that judged
  std::int64_t evaluations = 0;  // of modules
  // Of the module in float and with the int8 layers that were found faster, on the first batch that calibrated, copies
  // of its arguments included; negative: not measured.
  double milliseconds = -1, int8_milliseconds = -1;
  std::int64_t corrected = 0;  // layers whose biases were shifted
  std::string note;            // what to know beside, such as why the float module came back

  std::int64_t int8_layers() const;
};

HALFSTEP_API std::ostream& operator<<(std::ostream& out, const QuantizeReport& report);

struct Quantized {
  torch::jit::Module module;  // for inference, in eval mode
  QuantizeReport report;
};

// Returns a copy of a scripted or traced module whose products with constant weights are int8: linear, conv1d, conv2d,
// embedding, and the matrix products with constants that old traces have (addmm, matmul, mm), wherever they are in the
// graph, loops and branches included. Activations behind them and additions of tensors that have their shape become
// part of them, batch norms part of the convolutions before; where every reader of a layer's output is int8, so is the
// output. A layer norm over the last dimension writes int8 for the int8 layers that quantize its result alike, and
// float for what else reads it; it is computed as halfstep's layer_norm, which sums a row in another order than
// torch's. Attention is computed by its slow path, whose projections are layers. Layers that stay float are told with
// the reason.
//
// calibration: argument lists of forward, on the module's device; each is called under no_grad. Of three or more every
// third one judges and does not calibrate; of fewer all do both. The first dimension of an output is the samples'.
// If the outputs' share of noise is above the threshold, layers are given back to float in the order of the noise that
// each makes alone, as few as it takes by doubling and bisection; if nothing keeps it, a float copy comes back, and the
// report says so.
//
// Then layers between which values stay int8 are timed in int8 and in float, in the module's own type, and given back
// where int8 is slower; and so is the whole, in which case a float copy comes back. A float32 module that would be
// faster in bfloat16 than in int8 gets a note that says so: cast it, and quantize that. At last the biases of int8
// layers make up for the mean of the error that each makes on the float module's own values, if that lowers the bound.
//
// The module is not changed and shares no memory with the copy, but for constants of its graph. The copy has `forward`
// with all calls inlined and the attributes that it uses; other methods are left out. It may be called from several
// threads at once if the module may.
//
// Throws c10::Error (a ValueError in Python): calibration is empty; options are out of range; a glob names no layer;
// the module has no forward, or has forward hooks of its own; something in forward cannot be inlined (methods
// of interfaces or of modules that are chosen at run time, fork, Python functions, autocast regions); outputs hold no
// floating-point tensors or are not finite. Errors of the module's own code come through.
HALFSTEP_API Quantized quantize(const torch::jit::Module& module,
                                const std::vector<std::vector<c10::IValue>>& calibration,
                                const QuantizeOptions& options = {});

}  // namespace halfstep
