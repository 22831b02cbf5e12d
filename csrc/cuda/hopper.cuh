// What Hopper (sm_90a) has beyond Ampere's instructions: barriers in shared memory that count bytes, copies of whole
// tiles by the tensor memory accelerator (TMA), clusters of blocks, and products of warpgroups (wgmma) that read their
// factors from shared memory. Only code for sm_90a may call these.
//
// Source: NVIDIA, "Parallel Thread Execution ISA", the sections on mbarrier, cp.async.bulk.tensor and wgmma.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "int8_mma.cuh"

namespace halfstep::cuda {

constexpr int kWarpgroup = 128;  // threads

// ----------------------------------------------------------------------------------------------------------- barriers

__device__ inline void barrier_init(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to copies and to the other blocks of the cluster.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and lets the barrier wait for this many bytes of copies too.
__device__ inline void barrier_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives at this block's barrier, or at the one that lies there in block `rank` of the cluster. Without a scope: one
// of the cluster costs a fence of the whole GPU, and what a consumer has read, wgmma's wait says.
__device__ inline void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_arrive(std::uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Arrives when all copies (cp.async) that this thread has asked for are there.
__device__ inline void barrier_arrive_after_copies(std::uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Between writes to shared memory by threads, cp.async included, that this thread knows of, and products that read
// them.
__device__ inline void products_see_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Waits for the end of the phase of this parity.
__device__ inline void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ------------------------------------------------------------------------------------------------------------ clusters

__device__ inline int cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// All threads of all blocks of the cluster.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// -------------------------------------------------------------------------------------------------------------- copies

__device__ inline void prefetch_l2(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}
__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<std::uint64_t>(map)) : "memory");
}
// The box at (term, row) of a map of two dimensions; its bytes are counted by the barrier.
__device__ inline void copy_box(std::uint32_t to, const CUtensorMap* map, int term, int row, std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(reinterpret_cast<std::uint64_t>(map)), "r"(term), "r"(row), "r"(barrier)
      : "memory");
}
// The box at (term, 0, 0, 0, group) of a map of five dimensions; and the same to this place in all blocks of the mask,
// whose barriers there count its bytes.
__device__ inline void copy_groups(std::uint32_t to, const CUtensorMap* map, int term, int group,
                                   std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %3, %3, %4}], [%5];" ::"r"(to),
      "l"(reinterpret_cast<std::uint64_t>(map)), "r"(term), "r"(0), "r"(group), "r"(barrier)
      : "memory");
}
__device__ inline void copy_groups_to_all(std::uint32_t to, const CUtensorMap* map, int term, int group,
                                          std::uint32_t barrier, int mask) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3, %3, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(reinterpret_cast<std::uint64_t>(map)), "r"(term), "r"(0), "r"(group), "r"(barrier),
      "h"(static_cast<std::uint16_t>(mask))
      : "memory");
}

// ------------------------------------------------------------------------------------------------------------ products

template <int kRegisters>
__device__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Rows of 128 bytes from a multiple of 1024 on, in which chunk c of 16 bytes lies at c ^ row % 8: what a copy with
// CU_TENSOR_MAP_SWIZZLE_128B leaves. The next 32 bytes of the rows are at + 2.
__device__ inline std::uint64_t matrix_descriptor(std::uint32_t address) {
  constexpr std::uint64_t kEightRows = std::uint64_t{1024 >> 4} << 32;
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  return kSwizzle128 | kEightRows | std::uint64_t{1} << 16 | ((address & 0x3FFFF) >> 4);
}

// Before the first product that reads registers or sums which other instructions wrote.
__device__ inline void product_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending commits are not yet done.
template <int kPending>
__device__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// sums[64 x kColumns] (+)= a[64 x 32] * b[32 x kColumns] over the warpgroup, of int8; `add` 0 starts at 0. Warp w of
// the four holds rows 16w + g and 16w + g + 8 with g = lane / 4, and of every 8 columns j two, 8j + 2t with
// t = lane % 4: sums[4j], sums[4j + 1] of the first row, sums[4j + 2], sums[4j + 3] of the second.
// clang-format off
__device__ inline void warpgroup_product(std::int32_t (&s)[32], std::uint64_t a, std::uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, p;\n}"
      : "+r"(s[0]), "+r"(s[1]), "+r"(s[2]), "+r"(s[3]), "+r"(s[4]), "+r"(s[5]), "+r"(s[6]), "+r"(s[7]), 
        "+r"(s[8]), "+r"(s[9]), "+r"(s[10]), "+r"(s[11]), "+r"(s[12]), "+r"(s[13]), "+r"(s[14]), "+r"(s[15]), 
        "+r"(s[16]), "+r"(s[17]), "+r"(s[18]), "+r"(s[19]), "+r"(s[20]), "+r"(s[21]), "+r"(s[22]), "+r"(s[23]), 
        "+r"(s[24]), "+r"(s[25]), "+r"(s[26]), "+r"(s[27]), "+r"(s[28]), "+r"(s[29]), "+r"(s[30]), "+r"(s[31])
      : "l"(a), "l"(b), "r"(add)
      : "memory");
}
__device__ inline void warpgroup_product(std::int32_t (&s)[64], std::uint64_t a, std::uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
      "%59, %60, %61, %62, %63"
      "}, %64, %65, p;\n}"
      : "+r"(s[0]), "+r"(s[1]), "+r"(s[2]), "+r"(s[3]), "+r"(s[4]), "+r"(s[5]), "+r"(s[6]), "+r"(s[7]), 
        "+r"(s[8]), "+r"(s[9]), "+r"(s[10]), "+r"(s[11]), "+r"(s[12]), "+r"(s[13]), "+r"(s[14]), "+r"(s[15]), 
        "+r"(s[16]), "+r"(s[17]), "+r"(s[18]), "+r"(s[19]), "+r"(s[20]), "+r"(s[21]), "+r"(s[22]), "+r"(s[23]), 
        "+r"(s[24]), "+r"(s[25]), "+r"(s[26]), "+r"(s[27]), "+r"(s[28]), "+r"(s[29]), "+r"(s[30]), "+r"(s[31]), 
        "+r"(s[32]), "+r"(s[33]), "+r"(s[34]), "+r"(s[35]), "+r"(s[36]), "+r"(s[37]), "+r"(s[38]), "+r"(s[39]), 
        "+r"(s[40]), "+r"(s[41]), "+r"(s[42]), "+r"(s[43]), "+r"(s[44]), "+r"(s[45]), "+r"(s[46]), "+r"(s[47]), 
        "+r"(s[48]), "+r"(s[49]), "+r"(s[50]), "+r"(s[51]), "+r"(s[52]), "+r"(s[53]), "+r"(s[54]), "+r"(s[55]), 
        "+r"(s[56]), "+r"(s[57]), "+r"(s[58]), "+r"(s[59]), "+r"(s[60]), "+r"(s[61]), "+r"(s[62]), "+r"(s[63])
      : "l"(a), "l"(b), "r"(add)
      : "memory");
}
__device__ inline void warpgroup_product(std::int32_t (&s)[128], std::uint64_t a, std::uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "
      "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "
      "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, "
      "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, "
      "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, p;\n}"
      : "+r"(s[0]), "+r"(s[1]), "+r"(s[2]), "+r"(s[3]), "+r"(s[4]), "+r"(s[5]), "+r"(s[6]), "+r"(s[7]), 
        "+r"(s[8]), "+r"(s[9]), "+r"(s[10]), "+r"(s[11]), "+r"(s[12]), "+r"(s[13]), "+r"(s[14]), "+r"(s[15]), 
        "+r"(s[16]), "+r"(s[17]), "+r"(s[18]), "+r"(s[19]), "+r"(s[20]), "+r"(s[21]), "+r"(s[22]), "+r"(s[23]), 
        "+r"(s[24]), "+r"(s[25]), "+r"(s[26]), "+r"(s[27]), "+r"(s[28]), "+r"(s[29]), "+r"(s[30]), "+r"(s[31]), 
        "+r"(s[32]), "+r"(s[33]), "+r"(s[34]), "+r"(s[35]), "+r"(s[36]), "+r"(s[37]), "+r"(s[38]), "+r"(s[39]), 
        "+r"(s[40]), "+r"(s[41]), "+r"(s[42]), "+r"(s[43]), "+r"(s[44]), "+r"(s[45]), "+r"(s[46]), "+r"(s[47]), 
        "+r"(s[48]), "+r"(s[49]), "+r"(s[50]), "+r"(s[51]), "+r"(s[52]), "+r"(s[53]), "+r"(s[54]), "+r"(s[55]), 
        "+r"(s[56]), "+r"(s[57]), "+r"(s[58]), "+r"(s[59]), "+r"(s[60]), "+r"(s[61]), "+r"(s[62]), "+r"(s[63]), 
        "+r"(s[64]), "+r"(s[65]), "+r"(s[66]), "+r"(s[67]), "+r"(s[68]), "+r"(s[69]), "+r"(s[70]), "+r"(s[71]), 
        "+r"(s[72]), "+r"(s[73]), "+r"(s[74]), "+r"(s[75]), "+r"(s[76]), "+r"(s[77]), "+r"(s[78]), "+r"(s[79]), 
        "+r"(s[80]), "+r"(s[81]), "+r"(s[82]), "+r"(s[83]), "+r"(s[84]), "+r"(s[85]), "+r"(s[86]), "+r"(s[87]), 
        "+r"(s[88]), "+r"(s[89]), "+r"(s[90]), "+r"(s[91]), "+r"(s[92]), "+r"(s[93]), "+r"(s[94]), "+r"(s[95]), 
        "+r"(s[96]), "+r"(s[97]), "+r"(s[98]), "+r"(s[99]), "+r"(s[100]), "+r"(s[101]), "+r"(s[102]), 
        "+r"(s[103]), "+r"(s[104]), "+r"(s[105]), "+r"(s[106]), "+r"(s[107]), "+r"(s[108]), "+r"(s[109]), 
        "+r"(s[110]), "+r"(s[111]), "+r"(s[112]), "+r"(s[113]), "+r"(s[114]), "+r"(s[115]), "+r"(s[116]), 
        "+r"(s[117]), "+r"(s[118]), "+r"(s[119]), "+r"(s[120]), "+r"(s[121]), "+r"(s[122]), "+r"(s[123]), 
        "+r"(s[124]), "+r"(s[125]), "+r"(s[126]), "+r"(s[127])
      : "l"(a), "l"(b), "r"(add)
      : "memory");
}
// clang-format on

}  // namespace halfstep::cuda
