// What the ops on norms check alike.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>

#include "conversions.h"
#include "halfstep/norms.h"

namespace halfstep::torch_ops {

// NormShape before its sizes are known for sure.
struct SymShape {
  c10::SymInt rows;
  c10::SymInt channels;
  c10::SymInt spatial;
  std::int64_t groups;

  NormShape known() const { return {rows.expect_int(), channels.expect_int(), spatial.expect_int(), groups}; }
  c10::SymInt parameters() const { return channels * groups; }
};

// The rows of an input; throws unless it ends in `normalized_shape`.
SymShape last_dimensions(const at::Tensor& input, c10::SymIntArrayRef normalized_shape, std::string_view op);

// Throws unless a weight or bias is absent, or of a float type, on the input's device and of this shape.
void check_affine(const std::optional<at::Tensor>& parameter, std::string_view op, std::string_view argument,
                  const at::Tensor& input, c10::SymIntArrayRef shape);

inline std::optional<at::Tensor> dense(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional<at::Tensor>(tensor->contiguous()) : std::nullopt;
}
inline TensorView view_or_none(const std::optional<at::Tensor>& tensor) {
  return tensor ? view_of(*tensor) : TensorView{};
}

}  // namespace halfstep::torch_ops
