// Several neighbouring elements as loads and stores of at most 16 bytes, and the switch from a DType to its storage.
//
// Stores are written in PTX: left to itself the compiler splits one of 16 bytes into 32-bit or even 16-bit ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "convert.cuh"
#include "halfstep/dtype.h"

namespace halfstep::cuda {

template <class Storage, int kWidth>
struct alignas(sizeof(Storage) * kWidth < 16 ? sizeof(Storage) * kWidth : 16) Pack {
  Storage elements[kWidth];
};

// What kBytes neighbouring bytes are moved as, kCount times.
template <std::size_t kBytes>
struct Move {
  using Type = std::conditional_t<
      kBytes % 16 == 0, uint4,
      std::conditional_t<kBytes == 8, uint2,
                         std::conditional_t<kBytes == 4, std::uint32_t,
                                            std::conditional_t<kBytes % 2 == 0, std::uint16_t, std::uint8_t>>>>;
  static constexpr int kCount = kBytes / sizeof(Type);
  static_assert(kCount * sizeof(Type) == kBytes);
};

// Elements first .. first + kWidth - 1 of `data`, which lie on the pack's boundary.
template <class Storage, int kWidth>
__device__ Pack<Storage, kWidth> load_pack(const void* data, std::int64_t first) {
  using Moved = Move<sizeof(Storage) * kWidth>;
  const auto* const from = reinterpret_cast<const typename Moved::Type*>(static_cast<const Storage*>(data) + first);
  typename Moved::Type moved[Moved::kCount];
#pragma unroll
  for (int i = 0; i < Moved::kCount; ++i) moved[i] = from[i];
  Pack<Storage, kWidth> pack;
  std::memcpy(&pack, moved, sizeof(pack));
  return pack;
}

template <class Type>
__device__ void store_moved(Type* to, Type value) {
  *to = value;
}
__device__ inline void store_moved(uint2* to, uint2 value) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x), "r"(value.y)
               : "memory");
}
__device__ inline void store_moved(uint4* to, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// Global memory, on the pack's boundary too.
template <class Storage, int kWidth, class Compute>
__device__ void store_pack(void* data, std::int64_t first, const Compute (&values)[kWidth]) {
  using Moved = Move<sizeof(Storage) * kWidth>;
  auto* const to = reinterpret_cast<typename Moved::Type*>(static_cast<Storage*>(data) + first);
  typename Moved::Type moved[Moved::kCount];
  if constexpr (sizeof(Storage) == 2 && kWidth > 1) {
    std::uint32_t pairs[kWidth / 2];
#pragma unroll
    for (int k = 0; k < kWidth / 2; ++k) pairs[k] = narrow_pair<Storage>(values[2 * k], values[2 * k + 1]);
    std::memcpy(moved, pairs, sizeof(moved));
  } else {
    Storage elements[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) elements[k] = narrow_device<Storage>(values[k]);
    std::memcpy(moved, elements, sizeof(moved));
  }
#pragma unroll
  for (int i = 0; i < Moved::kCount; ++i) store_moved(to + i, moved[i]);
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
