// int8_linear_named_dtype and so on: the int8 ops whose out_dtype is a string, for compiled and exported programs. The
// rest of their contract: halfstep/torch/int8.h.
//
// AOTInductor of torch 2.11 hands an op the number that a ScalarType has in exported files in place of its own: Float
// for Half, Double for Float (pytorch/pytorch issue 169157). Strings arrive as they are, in every version.
#include <array>
#include <utility>

#include "halfstep/torch/int8.h"
#include "registration.h"

namespace halfstep::torch_ops {
namespace {

using Weight = c10::intrusive_ptr<PackedInt8>;
using OptionalTensor = std::optional<at::Tensor>;
using OptionalName = std::optional<std::string_view>;

at::ScalarType dtype_named(std::string_view name, std::string_view op) {
  constexpr std::array<std::pair<std::string_view, at::ScalarType>, 5> names{{{"float32", at::kFloat},
                                                                              {"float16", at::kHalf},
                                                                              {"bfloat16", at::kBFloat16},
                                                                              {"int32", at::kInt},
                                                                              {"int8", at::kChar}}};
  for (const auto& [known, dtype] : names)
    if (known == name) return dtype;
  TORCH_CHECK_VALUE(false, op, ": out_dtype is '", name, "', expected float32, float16, bfloat16, int32 or int8");
}

Int8Call call_of(std::optional<double> input_scale, std::int64_t input_zero_point, const OptionalTensor& residual,
                 std::string_view activation, OptionalName out_dtype, std::optional<double> out_scale,
                 std::int64_t out_zero_point, const OptionalTensor& input_row_scales, std::string_view op) {
  return {input_scale,
          input_zero_point,
          residual,
          std::string(activation),
          out_dtype ? std::optional(dtype_named(*out_dtype, op)) : std::nullopt,
          out_scale,
          out_zero_point,
          input_row_scales};
}

at::Tensor linear(const at::Tensor& input, const Weight& weight, std::optional<double> input_scale,
                  std::int64_t input_zero_point, const OptionalTensor& residual, std::string_view activation,
                  OptionalName out_dtype, std::optional<double> out_scale, std::int64_t out_zero_point,
                  const OptionalTensor& input_row_scales) {
  return int8_linear(input, weight,
                     call_of(input_scale, input_zero_point, residual, activation, out_dtype, out_scale, out_zero_point,
                             input_row_scales, "int8_linear_named_dtype"));
}

at::Tensor conv2d(const at::Tensor& input, const Weight& weight, std::optional<double> input_scale,
                  std::int64_t input_zero_point, const OptionalTensor& residual, std::string_view activation,
                  OptionalName out_dtype, std::optional<double> out_scale, std::int64_t out_zero_point) {
  return int8_conv2d(input, weight,
                     call_of(input_scale, input_zero_point, residual, activation, out_dtype, out_scale, out_zero_point,
                             std::nullopt, "int8_conv2d_named_dtype"));
}

at::Tensor embedding(const at::Tensor& indices, const Weight& weight, std::string_view out_dtype) {
  return int8_embedding(indices, weight, dtype_named(out_dtype, "int8_embedding_named_dtype"));
}

at::Tensor weight_as(const Weight& weight, std::string_view out_dtype) {
  return dequantize_weight(weight, dtype_named(out_dtype, "dequantize_weight_named_dtype"));
}

// Each calls the op of its plain name through the dispatcher, so it is the same for all devices. Meta is left to
// halfstep/int8_fake.py.
void implement(torch::Library& library) {
  constexpr auto everywhere = c10::DispatchKey::CompositeExplicitAutograd;
  library.impl("int8_linear_named_dtype", torch::dispatch(everywhere, TORCH_FN(linear)));
  library.impl("int8_conv2d_named_dtype", torch::dispatch(everywhere, TORCH_FN(conv2d)));
  library.impl("int8_embedding_named_dtype", torch::dispatch(everywhere, TORCH_FN(embedding)));
  library.impl("dequantize_weight_named_dtype", torch::dispatch(everywhere, TORCH_FN(weight_as)));
}

}  // namespace

void define_int8_named_dtype(torch::Library& library) {
  library.def(
      "int8_linear_named_dtype(Tensor input, __torch__.torch.classes.halfstep.PackedInt8 weight, "
      "float? input_scale=None, int input_zero_point=0, Tensor? residual=None, str activation=\"none\", "
      "str? out_dtype=None, float? out_scale=None, int out_zero_point=0, Tensor? input_row_scales=None) -> Tensor");
  library.def(
      "int8_conv2d_named_dtype(Tensor input, __torch__.torch.classes.halfstep.PackedInt8 weight, "
      "float? input_scale=None, int input_zero_point=0, Tensor? residual=None, str activation=\"none\", "
      "str? out_dtype=None, float? out_scale=None, int out_zero_point=0) -> Tensor");
  library.def(
      "int8_embedding_named_dtype(Tensor indices, __torch__.torch.classes.halfstep.PackedInt8 weight, "
      "str out_dtype=\"float32\") -> Tensor");
  library.def(
      "dequantize_weight_named_dtype(__torch__.torch.classes.halfstep.PackedInt8 weight, str out_dtype) -> Tensor");
  implement(library);
}

}  // namespace halfstep::torch_ops
