// What the optimizers of both devices refuse. Contract: halfstep/optimizer.h.
#include "halfstep/optimizer.h"

#include "halfstep/status.h"
#include "optimizer_math.h"

namespace halfstep {

void check_optimizer_tensors(OptimizerKind kind, std::span<const OptimizerTensor> tensors, std::size_t groups) {
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const OptimizerTensor& tensor = tensors[i];
    HS_CHECK(tensor.step, "optimizer_step: tensors[", i, "].step must not be null");
    HS_CHECK(tensor.group >= 0 && static_cast<std::size_t>(tensor.group) < groups, "optimizer_step: tensors[", i,
             "].group is ", tensor.group, ", expected 0 to ", groups, " - 1");
    const bool half_gradient = tensor.gradient_dtype == DType::kFloat16 || tensor.gradient_dtype == DType::kBFloat16;
    HS_CHECK(tensor.gradient_dtype == tensor.dtype || (tensor.dtype == DType::kFloat32 && half_gradient),
             "optimizer_step: tensors[", i, "] has dtype ", name_of(tensor.dtype), " and a gradient of dtype ",
             name_of(tensor.gradient_dtype), ", expected the same, or float32 with a float16 or bfloat16 gradient");
    HS_CHECK(!tensor.half_copy || (tensor.dtype == DType::kFloat32 &&
                                   (tensor.copy_dtype == DType::kFloat16 || tensor.copy_dtype == DType::kBFloat16)),
             "optimizer_step: tensors[", i, "] has dtype ", name_of(tensor.dtype), " and a copy of dtype ",
             name_of(tensor.copy_dtype), ", expected float32 with a float16 or bfloat16 copy");
    HS_CHECK(kind == OptimizerKind::kSgd || tensor.numel == 0 || (tensor.state[0] && tensor.state[1]),
             "optimizer_step: tensors[", i, "]: Adam needs exp_avg and exp_avg_sq");
  }
}

}  // namespace halfstep
