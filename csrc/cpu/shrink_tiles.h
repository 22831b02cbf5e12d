// The tiles of shrink() for one instruction set; included once for each, with
//
//   HS_VECTOR_BYTES  the size of its registers
//
// in a namespace of its own. The compiler's vectors are used as they are good only in the size of a register.
//
// Four rows at a time: a lane's statistics are loaded and stored once for four elements. Nothing branches on data but
// for a new worst error, which is rare.

template <class T>
using Vector [[gnu::vector_size(HS_VECTOR_BYTES)]] = T;
using Doubles = Vector<double>;
using Floats [[gnu::vector_size(HS_VECTOR_BYTES / 2)]] = float;
using Words = Vector<std::int64_t>;

// The first `count` elements of a vector; of a whole one where `count` is a constant.
template <class V, class T>
[[gnu::always_inline]] inline void load(V& value, const T* from, int count) {
  std::memcpy(&value, from, static_cast<std::size_t>(count) * sizeof(T));
}
template <class V, class T>
[[gnu::always_inline]] inline void store(const V& value, T* to, int count) {
  std::memcpy(to, &value, static_cast<std::size_t>(count) * sizeof(T));
}

// Four rows at a time are four streams, each too short for the processor to see where it goes. Measured distances: an
// EPYC with AVX2 and a Xeon with AVX-512.
[[gnu::always_inline]] inline void prefetch(const void* at) {
  __builtin_prefetch(static_cast<const std::byte*>(at) + (HS_VECTOR_BYTES == 64 ? 8192 : 4096));
}

[[gnu::always_inline]] inline void absolute(const Doubles& value, Doubles& result) {
  result = reinterpret_cast<Doubles>(reinterpret_cast<Words>(value) & std::int64_t{0x7fffffffffffffff});
}

[[gnu::always_inline]] inline void widen(const Floats& value, Doubles& result) {
#if HS_VECTOR_BYTES == 32  // the compiler goes through memory
  result = _mm256_cvtps_pd(value);
#else
  result = __builtin_convertvector(value, Doubles);
#endif
}

#if HS_VECTOR_BYTES == 32
// Around the caches, to an address that is a multiple of 16. The other sets stream whole lines from a buffer, which
// with AVX-512 is faster: such a line is one store.
[[gnu::always_inline]] inline void stream(const Floats& value, float* to) {
  _mm_stream_ps(to, value);
}
#endif

[[gnu::always_inline]] inline void truncate(const Doubles& value, Doubles& result) {
#if HS_VECTOR_BYTES == 64
  result = _mm512_maskz_roundscale_pd(0xff, value, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#elif HS_VECTOR_BYTES == 32
  result = _mm256_round_pd(value, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#else
  for (std::size_t i = 0; i < sizeof(Doubles) / sizeof(double); ++i) result[i] = std::trunc(value[i]);
#endif
}

[[gnu::always_inline]] inline bool any(const Words& mask) {
#if HS_VECTOR_BYTES == 64
  return _mm512_test_epi64_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif HS_VECTOR_BYTES == 32
  return _mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask)) == 0;
#else
  return (mask[0] | mask[1]) != 0;
#endif
}

template <int rows, Writes writes>
[[gnu::always_inline]] inline void float_block(const double* x, std::int64_t ld, float* out, std::int64_t out_ld,
                                               const FloatLanes& lanes, std::int64_t i, int count) {
  Doubles low{}, high{}, error{};
  Words fractional{};
  load(low, lanes.minimum + i, count);
  load(high, lanes.maximum + i, count);
  load(error, lanes.error + i, count);
  load(fractional, lanes.fractional + i, count);
  const Doubles allowed = error * kSlack;
  Words worse{};
#pragma GCC unroll 4
  for (int row = 0; row < rows; ++row) {
    Doubles value{};
    prefetch(x + row * ld + i);
    load(value, x + row * ld + i, count);
    const auto narrow = __builtin_convertvector(value, Floats);
    if constexpr (writes == kStore) store(narrow, out + row * out_ld + i, count);
#if HS_VECTOR_BYTES == 32
    if constexpr (writes == kStream) stream(narrow, out + row * out_ld + i);
#endif
    Doubles size, lost, wide;
    widen(narrow, wide);
    absolute(value, size);
    absolute(value - wide, lost);
    worse |= lost > allowed * size;  // false for NaN and infinities: their difference to themselves is NaN
    // NaN, all bits set, where the value is not finite or becomes infinite; the comparisons then keep what they have.
    value = reinterpret_cast<Doubles>(reinterpret_cast<Words>(value) | ~(lost <= size));
    low = value < low ? value : low;
    high = value > high ? value : high;
    Doubles integral;
    truncate(value, integral);
    fractional |= reinterpret_cast<Words>(integral) ^ reinterpret_cast<Words>(value);
  }
  store(low, lanes.minimum + i, count);
  store(high, lanes.maximum + i, count);
  store(fractional, lanes.fractional + i, count);
  if (any(worse)) [[unlikely]] {  // as often as a random sequence has a new maximum
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      Doubles value{};
      load(value, x + row * ld + i, count);
      Doubles size, lost, wide;
      widen(__builtin_convertvector(value, Floats), wide);
      absolute(value, size);
      absolute(value - wide, lost);
      const Doubles ratio = lost / size;  // NaN for 0, NaN and infinities
      error = ratio > error ? ratio : error;
    }
    store(error, lanes.error + i, count);
  }
}

template <Writes writes>
void float_tile(const void* data, std::int64_t ld, std::int64_t rows, std::int64_t width, void* out_data,
                std::int64_t out_ld, Lanes& all) {
  constexpr int lanes_of_vector = HS_VECTOR_BYTES / sizeof(double);
  const FloatLanes lanes(all);
  const auto* x = static_cast<const double*>(data);
  auto* out = static_cast<float*>(out_data);
  const std::int64_t whole = width - width % lanes_of_vector;
  const int rest = static_cast<int>(width - whole);
  const auto visit = [&]<int count>(std::int64_t row) __attribute__((always_inline)) {
    const double* from = x + row * ld;
    float* to = writes == kNothing ? nullptr : out + row * out_ld;
    for (std::int64_t i = 0; i < whole; i += lanes_of_vector)
      float_block<count, writes>(from, ld, to, out_ld, lanes, i, lanes_of_vector);
    if (rest > 0) float_block<count, writes == kStream ? kStore : writes>(from, ld, to, out_ld, lanes, whole, rest);
  };
  std::int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) visit.template operator()<kRows>(row);
  for (; row < rows; ++row) visit.template operator()<1>(row);
}

template <class In, int rows>
[[gnu::always_inline]] inline void integer_block(const In* x, std::int64_t ld, In* lows, In* highs, std::int64_t i,
                                                 int count) {
  Vector<In> low{}, high{};
  load(low, lows + i, count);
  load(high, highs + i, count);
#pragma GCC unroll 4
  for (int row = 0; row < rows; ++row) {
    Vector<In> value{};
    prefetch(x + row * ld + i);
    load(value, x + row * ld + i, count);
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  store(low, lows + i, count);
  store(high, highs + i, count);
}

template <class In, class Out, bool write>
void integer_tile(const void* data, std::int64_t ld, std::int64_t rows, std::int64_t width, void* out_data,
                  std::int64_t out_ld, Lanes& lanes) {
  constexpr int lanes_of_vector = HS_VECTOR_BYTES / sizeof(In);
  In* lows = lanes.array<In>(0);
  In* highs = lanes.array<In>(1);
  const auto* x = static_cast<const In*>(data);
  const std::int64_t whole = width - width % lanes_of_vector;
  const int rest = static_cast<int>(width - whole);
  const auto visit = [&]<int count>(std::int64_t row) __attribute__((always_inline)) {
    for (std::int64_t i = 0; i < whole; i += lanes_of_vector)
      integer_block<In, count>(x + row * ld, ld, lows, highs, i, lanes_of_vector);
    if (rest > 0) integer_block<In, count>(x + row * ld, ld, lows, highs, whole, rest);
  };
  std::int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) visit.template operator()<kRows>(row);
  for (; row < rows; ++row) visit.template operator()<1>(row);
  if constexpr (write) {  // from the first cache; a plain loop, since compilers narrow registers better in those
    auto* out = static_cast<Out*>(out_data);
    if (ld == width && out_ld == width) {
      width *= rows;
      rows = 1;
    }
    for (row = 0; row < rows; ++row) {
      const In* __restrict from = x + row * ld;
      Out* __restrict to = out + row * out_ld;
      for (std::int64_t i = 0; i < width; ++i) to[i] = static_cast<Out>(from[i]);
    }
  }
}

#if HS_VECTOR_BYTES == 32
constexpr Tile kStreamTile = float_tile<kStream>;
#else
constexpr Tile kStreamTile = nullptr;
#endif

// Its tiles by pair of types; `to` == `from` only scans.
constexpr TileOfPair kTiles[] = {
    {kFloat64, kFloat64, float_tile<kNothing>, nullptr},
    {kFloat64, kFloat32, float_tile<kStore>, kStreamTile},
    {kInt8, kInt8, integer_tile<std::int8_t, std::int8_t, false>, nullptr},
    {kInt16, kInt16, integer_tile<std::int16_t, std::int16_t, false>, nullptr},
    {kInt16, kInt8, integer_tile<std::int16_t, std::int8_t, true>, nullptr},
    {kInt32, kInt32, integer_tile<std::int32_t, std::int32_t, false>, nullptr},
    {kInt32, kInt8, integer_tile<std::int32_t, std::int8_t, true>, nullptr},
    {kInt32, kInt16, integer_tile<std::int32_t, std::int16_t, true>, nullptr},
    {kInt64, kInt64, integer_tile<std::int64_t, std::int64_t, false>, nullptr},
    {kInt64, kInt8, integer_tile<std::int64_t, std::int8_t, true>, nullptr},
    {kInt64, kInt16, integer_tile<std::int64_t, std::int16_t, true>, nullptr},
    {kInt64, kInt32, integer_tile<std::int64_t, std::int32_t, true>, nullptr},
    {kUInt8, kUInt8, integer_tile<std::uint8_t, std::uint8_t, false>, nullptr},
    {kUInt16, kUInt16, integer_tile<std::uint16_t, std::uint16_t, false>, nullptr},
    {kUInt16, kUInt8, integer_tile<std::uint16_t, std::uint8_t, true>, nullptr},
    {kUInt32, kUInt32, integer_tile<std::uint32_t, std::uint32_t, false>, nullptr},
    {kUInt32, kUInt8, integer_tile<std::uint32_t, std::uint8_t, true>, nullptr},
    {kUInt32, kUInt16, integer_tile<std::uint32_t, std::uint16_t, true>, nullptr},
    {kUInt64, kUInt64, integer_tile<std::uint64_t, std::uint64_t, false>, nullptr},
    {kUInt64, kUInt8, integer_tile<std::uint64_t, std::uint8_t, true>, nullptr},
    {kUInt64, kUInt16, integer_tile<std::uint64_t, std::uint16_t, true>, nullptr},
    {kUInt64, kUInt32, integer_tile<std::uint64_t, std::uint32_t, true>, nullptr},
};
