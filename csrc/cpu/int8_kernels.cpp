// The portable kernel, and the choice among all. Contract: int8_kernels.h.
#include "int8_kernels.h"

#include <algorithm>
#include <array>
#include <cstdlib>

#include "clones.h"
#include "copy_few.h"
#include "halfstep/status.h"

#if defined(HS_INT8_X86)
#include <cpuid.h>
#endif

namespace halfstep::cpu {
namespace {

HS_CLONES void add_products(const std::int8_t* __restrict row, const std::int8_t* __restrict weights,
                            std::int64_t quads, std::uint32_t* __restrict sums) {
  for (std::int64_t quad = 0; quad < quads; ++quad) {
    const std::int8_t* const x = row + quad * kInt8Quad;
    const std::int8_t* const w = weights + quad * kInt8Block * kInt8Quad;
    for (int channel = 0; channel < kInt8Block; ++channel) {
      const std::int8_t* const of_channel = w + channel * kInt8Quad;
      sums[channel] += static_cast<std::uint32_t>(x[0] * of_channel[0] + x[1] * of_channel[1] + x[2] * of_channel[2] +
                                                  x[3] * of_channel[3]);
    }
  }
}

void multiply_portable(const Int8Tile& tile) {
  const std::int64_t pitch = tile.blocks * kInt8Block;
  for (std::int64_t block = 0; block < tile.blocks; ++block) {
    for (std::int64_t row = 0; row < tile.rows; ++row) {
      std::int32_t* const sums = tile.sums + row * pitch + block * kInt8Block;
      std::uint32_t total[kInt8Block] = {};
      add_products(static_cast<const std::int8_t*>(tile.prepared) + row * kInt8Chunk,
                   tile.weights + block * tile.block_bytes, tile.quads, total);
      for (int i = 0; i < kInt8Block; ++i)
        sums[i] = static_cast<std::int32_t>(total[i] + (tile.add ? static_cast<std::uint32_t>(sums[i]) : 0U));
    }
  }
}

constexpr Int8Kernel kPortableKernel{1, 0, int8_prepare_plain, multiply_portable};

#if defined(HS_INT8_X86)
// Compilers of this age know the name of the feature, but not all of them ask the processor for it.
bool has_avx_vnni() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & 0x10U) != 0;
}
#endif

constexpr std::array kIsas = {Int8Isa::kAmx, Int8Isa::kAvx512Vnni, Int8Isa::kAvxVnni, Int8Isa::kAvx2,
                              Int8Isa::kPortable};

// The user's, else the last word of processors.
Int8Isa most_allowed() {
  const char* const wanted = std::getenv("HALFSTEP_MAX_INT8_ISA");
  if (wanted == nullptr || *wanted == '\0') return kIsas.front();
  const auto* const isa =
      std::find_if(kIsas.begin(), kIsas.end(), [&](Int8Isa each) { return name_of(each) == wanted; });
  HS_CHECK(isa != kIsas.end(), "HALFSTEP_MAX_INT8_ISA is ", wanted,
           "; expected portable, AVX2, AVX-VNNI, AVX512-VNNI or AMX");
  return *isa;
}

}  // namespace

void int8_prepare_plain(const std::int8_t* terms, std::int64_t count, void* prepared) {
  auto* const out = static_cast<std::int8_t*>(prepared);
  copy_few(terms, count, out);
  std::fill(out + count, out + int8_quads(count) * kInt8Quad, std::int8_t{0});
}

bool has_int8_isa(Int8Isa isa) {
  switch (isa) {
    case Int8Isa::kPortable:
      return true;
#if defined(HS_INT8_X86)
    case Int8Isa::kAvx2:
      return __builtin_cpu_supports("avx2");
    case Int8Isa::kAvxVnni: {
      static const bool has = has_avx_vnni();
      return has;
    }
    case Int8Isa::kAvx512Vnni:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni");
#endif
#if defined(HS_INT8_AMX)
    case Int8Isa::kAmx: {
      static const bool allowed = int8_amx_is_allowed();
      return allowed;
    }
#endif
    default:
      return false;
  }
}

std::string_view name_of(Int8Isa isa) {
  switch (isa) {
    case Int8Isa::kPortable:
      return "portable";
    case Int8Isa::kAvx2:
      return "AVX2";
    case Int8Isa::kAvxVnni:
      return "AVX-VNNI";
    case Int8Isa::kAvx512Vnni:
      return "AVX512-VNNI";
    case Int8Isa::kAmx:
      return "AMX";
  }
  return "unknown";
}

Int8Isa best_int8_isa() {
  static const Int8Isa most = most_allowed();
  return *std::find_if(kIsas.begin(), kIsas.end(), [](Int8Isa isa) { return isa <= most && has_int8_isa(isa); });
}

const Int8Kernel& int8_kernel(Int8Isa isa) {
  HS_CHECK(has_int8_isa(isa), "int8: isa is ", name_of(isa), ", which this processor has not got");
#if defined(HS_INT8_X86)
  if (isa == Int8Isa::kAvx2) return kInt8Avx2;
  if (isa == Int8Isa::kAvxVnni) return kInt8AvxVnni;
  if (isa == Int8Isa::kAvx512Vnni) return kInt8Avx512Vnni;
#endif
#if defined(HS_INT8_AMX)
  if (isa == Int8Isa::kAmx) return kInt8Amx;
#endif
  return kPortableKernel;
}

}  // namespace halfstep::cpu
