// The instructions of int8 products: copies into shared memory that run beside the arithmetic, fragments from there to
// registers, and the product of a warp. All of them are Ampere's; later chips have them too.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace halfstep::cuda {

__device__ inline std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// kBytes (4 or 16) from global to shared memory, both on that boundary. Through the L1 cache or past it: worth it where
// the block, or its neighbour on the same processor, reads the same bytes soon.
template <int kBytes, bool kThroughL1>
__device__ void copy_async(std::uint32_t to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 16);
  if constexpr (kBytes == 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
  } else if constexpr (kThroughL1) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
  }
}
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's commits are not yet there.
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ inline void wait_for_all_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ inline void store_shared(std::uint32_t to, std::uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}
__device__ inline void store_shared(std::uint32_t to, uint4 words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

// Four matrices of 8 rows of 16 bytes. Lane l gives the address of row l % 8 of matrix l / 8, and receives from each
// matrix bytes l % 4 * 4 .. + 3 of row l / 4.
__device__ inline void load_matrices(std::uint32_t from, std::uint32_t& first, std::uint32_t& second,
                                     std::uint32_t& third, std::uint32_t& fourth) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(first), "=r"(second), "=r"(third), "=r"(fourth)
               : "r"(from)
               : "memory");
}

// sums[16 x 8] += a[16 x 32] * b[32 x 8] over the warp. With g = lane / 4 and t = lane % 4 a thread holds
//   a[0] row g, terms 4t .. 4t + 3      a[1] row g + 8         a[2], a[3] the same 16 terms on
//   b[0] column g, terms 4t .. 4t + 3   b[1] 16 terms on
//   sums[0], sums[1] row g, columns 2t and 2t + 1              sums[2], sums[3] row g + 8
// Integer sums wrap; the limits on terms keep them from it.
__device__ inline void multiply_add(std::int32_t (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace halfstep::cuda
