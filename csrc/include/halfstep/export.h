// Symbol visibility. Everything is hidden unless it carries HALFSTEP_API.
#pragma once

#define HALFSTEP_API __attribute__((visibility("default")))

#ifdef __CUDACC__
#define HALFSTEP_HOST_DEVICE __host__ __device__
#else
#define HALFSTEP_HOST_DEVICE
#endif
