// quantize(): the products of its layers by themselves, as the guards call them.
#include <ATen/ops/conv2d.h>
#include <ATen/ops/linear.h>

#include "int8_script_graph.h"

namespace halfstep::torch_ops {
namespace {

bool is_conv1d(const ScriptLayer& layer) {
  return layer.kind == "conv1d";
}

}  // namespace

at::Tensor float_product(const ScriptLayer& layer, const at::Tensor& input) {
  if (layer.kind == "linear") return at::linear(input, layer.weight, layer.bias);
  const PackedInt8::Geometry& g = layer.geometry;
  const at::Tensor out = at::conv2d(is_conv1d(layer) ? input.unsqueeze(-2) : input, layer.weight, layer.bias, g.stride,
                                    g.padding, g.dilation, g.groups);
  return is_conv1d(layer) ? out.squeeze(-2) : out;
}

at::Tensor int8_product(const ScriptLayer& layer, const ScriptSettings& settings, const at::Tensor& input,
                        std::optional<at::ScalarType> out_dtype, const std::optional<at::Tensor>& row_scales) {
  Int8Call call;
  call.input_scale = settings.input_scale;
  call.input_zero_point = settings.input_zero_point;
  call.out_dtype = out_dtype;
  call.input_row_scales = row_scales;
  if (layer.kind == "linear") return int8_linear(input, settings.packed, call);
  const at::Tensor out = int8_conv2d(is_conv1d(layer) ? input.unsqueeze(-2) : input, settings.packed, call);
  return is_conv1d(layer) ? out.squeeze(-2) : out;
}

}  // namespace halfstep::torch_ops
