// The merge of a tensor's statistics into a layer's row on the GPU. Contract: halfstep/stability.h.
#include "stability_merge.h"
#include "try.h"

namespace halfstep::cuda {
namespace {

__global__ void merge_statistics_kernel(const float* stats, double* row, double place, double half_limit) {
  detail::merge_statistics(stats, row, place, half_limit);
}

}  // namespace

void merge_statistics(const float* stats, double* row, double place, double half_limit, CudaStream stream) {
  merge_statistics_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream.handle)>>>(stats, row, place, half_limit);
  HS_CUDA_TRY(cudaGetLastError());
}

}  // namespace halfstep::cuda
