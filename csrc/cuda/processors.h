// How many processors a device has.
#pragma once

#include "try.h"

namespace halfstep::cuda {

inline int processors_of(int device) {
  int processors = 0;
  HS_CUDA_TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  return processors;
}

// Of the current device.
inline int processors_here() {
  int device = 0;
  HS_CUDA_TRY(cudaGetDevice(&device));
  return processors_of(device);
}

}  // namespace halfstep::cuda
