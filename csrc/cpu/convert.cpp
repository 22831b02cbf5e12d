// Conversions of runs on the CPU. Contract: convert.h. float16 goes through the processor's own instructions where it
// has them (F16C, with every AVX2): they take a fifth of the time of the integer arithmetic, and give the same values.
#include "convert.h"

#include <cstring>

#include "clones.h"
#include "halfstep/status.h"

#if defined(__x86_64__) && defined(__gnu_linux__)
#define HS_F16C
#include <immintrin.h>
#endif

namespace halfstep::cpu {
namespace {

// One plain function per storage, because clones cannot be templates.
#define HS_CONVERT_FUNCTIONS(prefix, Storage)                                                                    \
  HS_CLONES void prefix##_widen(const Storage* __restrict data, std::int64_t count, float* __restrict out) {     \
    for (std::int64_t i = 0; i < count; ++i) out[i] = widen(data[i]);                                            \
  }                                                                                                              \
  HS_CLONES void prefix##_narrow(const float* __restrict values, std::int64_t count, Storage* __restrict data) { \
    for (std::int64_t i = 0; i < count; ++i) data[i] = narrow<Storage>(values[i]);                               \
  }
HS_CONVERT_FUNCTIONS(float16, Half)
HS_CONVERT_FUNCTIONS(bfloat16, BFloat16)
#undef HS_CONVERT_FUNCTIONS

#ifdef HS_F16C
[[gnu::target("avx,f16c")]] void f16c_widen(const Half* data, std::int64_t count, float* out) {
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data + i))));
  for (; i < count; ++i) out[i] = widen(data[i]);
}
[[gnu::target("avx,f16c")]] void f16c_narrow(const float* values, std::int64_t count, Half* data) {
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data + i), halves);
  }
  for (; i < count; ++i) data[i] = narrow<Half>(values[i]);
}
const bool has_f16c = __builtin_cpu_supports("f16c");
#endif

void widen_halves(const Half* data, std::int64_t count, float* out) {
#ifdef HS_F16C
  if (has_f16c) return f16c_widen(data, count, out);
#endif
  float16_widen(data, count, out);
}

void narrow_halves(const float* values, std::int64_t count, Half* data) {
#ifdef HS_F16C
  if (has_f16c) return f16c_narrow(values, count, data);
#endif
  float16_narrow(values, count, data);
}

std::size_t bytes(std::int64_t count) {
  return static_cast<std::size_t>(count) * sizeof(float);
}

}  // namespace

void widen_run(DType dtype, const void* data, std::int64_t begin, std::int64_t count, float* out) {
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(out, static_cast<const float*>(data) + begin, bytes(count));
      return;
    case DType::kFloat16:
      return widen_halves(static_cast<const Half*>(data) + begin, count, out);
    case DType::kBFloat16:
      return bfloat16_widen(static_cast<const BFloat16*>(data) + begin, count, out);
    case DType::kFloat64:
      break;
  }
  HS_UNREACHABLE("dtype ", static_cast<int>(dtype));
}

void narrow_run(DType dtype, const float* values, std::int64_t count, void* data, std::int64_t begin) {
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(static_cast<float*>(data) + begin, values, bytes(count));
      return;
    case DType::kFloat16:
      return narrow_halves(values, count, static_cast<Half*>(data) + begin);
    case DType::kBFloat16:
      return bfloat16_narrow(values, count, static_cast<BFloat16*>(data) + begin);
    case DType::kFloat64:
      break;
  }
  HS_UNREACHABLE("dtype ", static_cast<int>(dtype));
}

}  // namespace halfstep::cpu
