// Several neighbouring elements as one load or store of at most 16 bytes, and the switch from a DType to its storage.
#pragma once

#include <cstdint>

#include "convert.cuh"
#include "halfstep/dtype.h"

namespace halfstep::cuda {

template <class Storage, int kWidth>
struct alignas(sizeof(Storage) * kWidth < 16 ? sizeof(Storage) * kWidth : 16) Pack {
  Storage elements[kWidth];
};

// Elements first .. first + kWidth - 1 of `data`, which lie on the pack's boundary.
template <class Storage, int kWidth>
__device__ Pack<Storage, kWidth> load_pack(const void* data, std::int64_t first) {
  return *reinterpret_cast<const Pack<Storage, kWidth>*>(static_cast<const Storage*>(data) + first);
}

template <class Storage, int kWidth>
__device__ void store_pack(void* data, std::int64_t first, const float (&values)[kWidth]) {
  Pack<Storage, kWidth> pack;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) pack.elements[e] = narrow_device<Storage>(values[e]);
  *reinterpret_cast<Pack<Storage, kWidth>*>(static_cast<Storage*>(data) + first) = pack;
}

// run(Storage{}) for the storage of a dtype that computes in float32; host code has refused float64.
template <class Run>
__device__ void with_storage(DType dtype, const Run& run) {
  if (dtype == DType::kFloat16) {
    run(Half{});
  } else if (dtype == DType::kBFloat16) {
    run(BFloat16{});
  } else {
    run(float{});
  }
}

inline bool starts_on_16_bytes(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

}  // namespace halfstep::cuda
