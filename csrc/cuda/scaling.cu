// The scale rule on the GPU: the state stays on the device, one thread updates it. Contract: halfstep/scaling.h.
#include "scaling_step.h"
#include "try.h"

namespace halfstep::cuda {
namespace {

__global__ void update_scale_kernel(ScaleState state, ScaleRule rule,
                                    const __grid_constant__ detail::ScaleInputTable inputs) {
  detail::scale_step(state, rule, inputs);
}

__global__ void request_scale_kernel(ScaleState state, ScaleRule rule, double requested, double* record) {
  detail::request_step(state, rule, requested, record);
}

__global__ void combine_found_kernel(const __grid_constant__ detail::ScaleInputTable inputs, float* result) {
  *result = detail::any_found(inputs.found, inputs.found_count) ? 1.0F : 0.0F;
}

}  // namespace

void update_scale(const ScaleState& state, const ScaleRule& rule, const ScaleInputs& inputs, CudaStream stream) {
  detail::check_state(state, rule);
  update_scale_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream.handle)>>>(state, rule,
                                                                             detail::make_input_table(inputs));
  HS_CUDA_TRY(cudaGetLastError());
}

void request_scale(const ScaleState& state, const ScaleRule& rule, double requested, double* record,
                   CudaStream stream) {
  detail::check_request(state, record);
  request_scale_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream.handle)>>>(state, rule, requested, record);
  HS_CUDA_TRY(cudaGetLastError());
}

void combine_found(std::span<const float* const> found, float* result, CudaStream stream) {
  const detail::ScaleInputTable inputs = detail::make_input_table({found, {}});
  combine_found_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream.handle)>>>(inputs, result);
  HS_CUDA_TRY(cudaGetLastError());
}

}  // namespace halfstep::cuda
