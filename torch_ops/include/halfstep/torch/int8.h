// int8 inference on tensors. The functions are torch.ops.halfstep.int8_linear and so on, called through the dispatcher,
// and PackedInt8 is torch.classes.halfstep.PackedInt8. What they compute: halfstep/int8.h.
//
// They run on the input's current stream and never wait for it, but for the first call of a PackedInt8 on a GPU, which
// prepares its weights there; a CUDA graph can be captured after that. CPU calls use torch's threads. Nothing is
// differentiable. Errors are c10::Error, ValueError or TypeError in Python.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include "halfstep/export.h"

namespace halfstep {

// The int8 weights of one layer, with scales and bias; immutable, and shared between threads. What kernels want beside
// the plain weights is made at the first use on a device and kept, so a module that is moved needs no more than a call.
// Pickles, deepcopies and files hold the plain tensors alone.
class HALFSTEP_API PackedInt8 : public torch::CustomClassHolder {
 public:
  struct Geometry {  // of a convolution: height, width
    std::array<std::int64_t, 2> stride{1, 1};
    std::array<std::int64_t, 2> padding{0, 0};
    std::array<std::int64_t, 2> dilation{1, 1};
    std::int64_t groups = 1;
  };
  // weight    int8, [out, in] of a linear layer or embedding, [out, in / groups, height, width] of a convolution
  // scales    float32 [out], positive and finite
  // bias      float32 [out]
  // input_factors  float32 [in], with which a floating-point input is multiplied before it is quantized: SmoothQuant's,
  //           whose inverse is in the weight
  PackedInt8(const at::Tensor& weight, const at::Tensor& scales, const std::optional<at::Tensor>& bias,
             const Geometry& geometry, const std::optional<at::Tensor>& input_factors = std::nullopt);

  const at::Tensor& weight() const { return weight_; }
  const at::Tensor& scales() const { return scales_; }
  const std::optional<at::Tensor>& bias() const { return bias_; }
  const std::optional<at::Tensor>& input_factors() const { return input_factors_; }
  const Geometry& geometry() const { return geometry_; }
  bool is_convolution() const { return weight_.dim() == 4; }

  // The same weights on another device.
  c10::intrusive_ptr<PackedInt8> to(at::Device device) const;

  // The same weights with the mean of `shifts`, each float32 [out], added to the bias.
  c10::intrusive_ptr<PackedInt8> corrected(at::TensorList shifts) const;

  // What the kernels of a device read. Waits for the device when it is made.
  struct Form {
    void take(const PackedInt8& plain, at::Device device);

    at::Tensor weight;  // dense, the channels of a convolution last
    at::Tensor scales;
    std::optional<at::Tensor> bias;
    std::optional<at::Tensor> input_factors;
    at::Tensor packed;  // CPU: the packed form; CUDA: int32 [out], the sum of each channel's weights
  };
  std::shared_ptr<const Form> form(at::Device device) const;

  // A number of this process that names `packed` as long as it lives, for callers to whom an object is dear to hand
  // over: Python takes some 8 us for one. ValueError for a number that names nothing.
  static std::int64_t id(const c10::intrusive_ptr<PackedInt8>& packed);
  static c10::intrusive_ptr<PackedInt8> with_id(std::int64_t id);
  void release_resources() override;  // torch's: the last owner is gone

 private:
  std::shared_ptr<const Form> make_form(at::Device device) const;

  at::Tensor weight_;
  at::Tensor scales_;
  std::optional<at::Tensor> bias_;
  std::optional<at::Tensor> input_factors_;
  Geometry geometry_;
  mutable std::mutex mutex_;
  mutable std::map<std::pair<at::DeviceType, at::DeviceIndex>, std::shared_ptr<const Form>> forms_;
  std::int64_t id_ = 0;  // 0: none yet; guarded by the mutex of all ids
};

// How an int8 layer takes its input and gives its output.
//   input_scale         the scale of the input; without one, each row (of a convolution: each image) of a
//   floating-point
//                       input is quantized by its own largest magnitude. An int8 input needs it, or input_row_scales
//   residual            added before the activation; float32, float16 or bfloat16, of the output's shape
//   activation          "none", "relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish"
//   out_dtype           Float, Half, BFloat16; Char with out_scale and out_zero_point; Int: the integer sums alone.
//                       Without one: the input's, or Float for an int8 input.
//   input_row_scales    float32 [...], of a linear layer's int8 input [..., in] whose rows have each its own scale
struct Int8Call {
  std::optional<double> input_scale;
  std::int64_t input_zero_point = 0;
  std::optional<at::Tensor> residual;
  std::string activation = "none";
  std::optional<at::ScalarType> out_dtype;
  std::optional<double> out_scale;
  std::int64_t out_zero_point = 0;
  std::optional<at::Tensor> input_row_scales;
};

// input [..., in], any strides -> [..., out]
HALFSTEP_API at::Tensor int8_linear(const at::Tensor& input, const c10::intrusive_ptr<PackedInt8>& weight,
                                    const Int8Call& call = {});
// input [batch, in, height, width], any strides -> [batch, out, height, width], in channels_last memory
HALFSTEP_API at::Tensor int8_conv2d(const at::Tensor& input, const c10::intrusive_ptr<PackedInt8>& weight,
                                    const Int8Call& call = {});
// indices int64 or int32 [...] -> [..., width]; each row of the table has its scale
HALFSTEP_API at::Tensor int8_embedding(const at::Tensor& indices, const c10::intrusive_ptr<PackedInt8>& weight,
                                       at::ScalarType out_dtype = at::kFloat);

// The weight of two dimensions as floating-point, on its own device: each element times the scale of its row, rounded
// once to out_dtype (Float, Half or BFloat16).
HALFSTEP_API at::Tensor dequantize_weight(const c10::intrusive_ptr<PackedInt8>& weight, at::ScalarType out_dtype);

// Layer norm over the last dimensions, rounded to the input's dtype and quantized: quantize_int8(layer_norm(...)) in
// one pass, or without a scale quantize_int8_rows(), of one dimension alone. What was not asked for is empty, [0].
//   quantized  int8, of the input's shape, contiguous
//   scales     float32, of the input's shape but for the last dimension, where no scale was given
//   out        the norm in the input's dtype, if keep_float
struct Int8NormResult {
  at::Tensor quantized, scales, out;
};
HALFSTEP_API Int8NormResult layer_norm_int8(const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                                            const std::optional<at::Tensor>& weight = std::nullopt,
                                            const std::optional<at::Tensor>& bias = std::nullopt, double eps = 1e-5,
                                            std::optional<double> scale = std::nullopt, std::int64_t zero_point = 0,
                                            bool keep_float = false);
// The same of RMS norm, whose eps is float32's epsilon unless it is given.
HALFSTEP_API Int8NormResult rms_norm_int8(const at::Tensor& input, c10::SymIntArrayRef normalized_shape,
                                          const std::optional<at::Tensor>& weight = std::nullopt,
                                          std::optional<double> eps = std::nullopt,
                                          std::optional<double> scale = std::nullopt, std::int64_t zero_point = 0,
                                          bool keep_float = false);

// Maximum pooling of int8, input [batch, channels, height, width] or without a batch, any strides -> the same in
// channels_last memory. Arguments are those of torch's max_pool2d; without a stride it is the kernel's size.
HALFSTEP_API at::Tensor int8_max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size,
                                        at::IntArrayRef stride = {}, at::IntArrayRef padding = 0,
                                        at::IntArrayRef dilation = 1, bool ceil_mode = false);

// int8 of a float32, float16 or bfloat16 tensor, with its strides where it is dense.
HALFSTEP_API at::Tensor quantize_int8(const at::Tensor& input, double scale, std::int64_t zero_point = 0);

}  // namespace halfstep
