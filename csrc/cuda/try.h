// HS_CUDA_TRY(call): throws CudaError, with the call, the runtime's own words and the place, unless it succeeds.
#pragma once

#include <cuda_runtime_api.h>

#include "halfstep/status.h"

#define HS_CUDA_TRY(call)                                                                                            \
  do {                                                                                                               \
    const cudaError_t hs_cuda_status = (call);                                                                       \
    if (hs_cuda_status != cudaSuccess) [[unlikely]] {                                                                \
      (void)cudaGetLastError(); /* the error is reported here; leave a clean state where it is not sticky */         \
      throw ::halfstep::CudaError(::halfstep::detail::concatenate(                                                   \
          "CUDA error: ", cudaGetErrorString(hs_cuda_status), " from ", #call, " (", __FILE__, ":", __LINE__, ")")); \
    }                                                                                                                \
  } while (false)
