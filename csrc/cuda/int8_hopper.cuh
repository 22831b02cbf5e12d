// The kernel of the int8 product of rows on Hopper. Contract: int8_hopper.h; the arithmetic of the epilogue is
// int8_math.h's, as everywhere.
//
// A block has a warpgroup that copies and one or two that multiply 64 rows each, through kStages slices of 128 terms in
// shared memory. Blocks stay and walk over tiles, so that the slices of the next tile come in while the results of this
// one are written. The blocks of a cluster take neighbouring rows and the same channels: each copies its share of the
// weights to all of them. (Warpgroups that take turns, one multiplying its tile while the other writes, gained at most
// 7 % where a tile has 6 slices, and lost elsewhere.)
//
// Of the weights the rows of a tile are dealt out by the copy itself: row 32q + 8j + 2k + e of shared memory is channel
// 32q + 8k + 2j + e, so that a thread ends up with 8 neighbouring channels of a row and writes them as one. That is a
// map of five dimensions over the weights, [q, k, j, e, term], read in the order q, j, k, e.
//
// Limit: the tensor cores, 4096 multiplications a cycle and processor; or the bytes from the L2 cache, (1 / rows of a
// cluster + 1 / channels of a tile) a multiplication.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hopper.cuh"
#include "int8_epilogue.cuh"
#include "reduce.cuh"

namespace halfstep::cuda {

constexpr int kHopperSlice = 128;  // terms

template <int rows, int channels, int cluster>
struct HopperTile {
  static constexpr int kRows = rows;  // of a block, 64 for each warpgroup that multiplies
  static constexpr int kChannels = channels;
  static constexpr int kCluster = cluster;  // blocks
  static constexpr int kConsumers = rows / 64;
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kInputBytes = rows * kHopperSlice;
  static constexpr int kStageBytes = (rows + channels) * kHopperSlice;
  static constexpr int kStages = 200 * 1024 / kStageBytes < 8 ? 200 * 1024 / kStageBytes : 8;
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes;  // the slices start at a multiple of 1024
  static_assert((rows == 64 || rows == 128) && channels % (32 * cluster) == 0);
};

// What the epilogue reads of a tile's channels; two of them, so that one is filled while the other is read.
template <int kChannels>
struct alignas(16) HopperTerms {
  float scales[kChannels];  // times the scale of the input, if that is one for all rows
  float biases[kChannels];
  std::int32_t shifts[kChannels];  // zero point * sum of the weights
};

struct HopperCall {
  std::int64_t rows;
  std::int64_t channels;
  int slices;
  int row_tiles;  // of a cluster's rows
  int channel_tiles;
  Int8Finish finish;
};

// What is done with 8 results. None, relu and relu6 are one, a clamp; the ones that are rare share a switch.
struct ClampActivation {
  float low, high;
  bool none;
  __device__ void operator()(float (&values)[8]) const {
    if (none) return;
#pragma unroll
    for (float& value : values) value = clamp_between(value, low, high);
  }
};
struct GeluActivation {
  __device__ void operator()(float (&values)[8]) const {
#pragma unroll
    for (float& value : values) value = activate(Activation::kGelu, value);
  }
};
struct OtherActivation {
  Activation activation;
  __device__ void operator()(float (&values)[8]) const { activate_all(activation, values); }
};

// Tiles in the order in which clusters take them: panels of rows, in which neighbours share rows or channels.
struct HopperPlace {
  static constexpr int kPanel = 8;
  int row, channel;

  __device__ HopperPlace(const HopperCall& call, int tile) {
    const int panel = tile / (kPanel * call.channel_tiles);
    const int inside = tile - panel * kPanel * call.channel_tiles;
    const int high = min(kPanel, call.row_tiles - panel * kPanel);
    row = panel * kPanel + inside % high;
    channel = inside / high;
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <class Tile>
struct HopperStages {
  std::uint32_t slices;
  std::uint32_t barriers;  // full, then empty
  int stage = 0;
  std::uint32_t phase = 0;

  __device__ std::uint32_t input() const { return slices + stage * Tile::kStageBytes; }
  __device__ std::uint32_t weight() const { return input() + Tile::kInputBytes; }
  __device__ std::uint32_t full() const { return barriers + stage * 8; }
  __device__ std::uint32_t empty() const { return barriers + (Tile::kStages + stage) * 8; }
  __device__ void next() {
    if (++stage == Tile::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

template <class Tile>
__device__ void copy_tiles(HopperStages<Tile> stages, const CUtensorMap* input, const CUtensorMap* weight,
                           const HopperCall& call, int rank) {
  constexpr int kChannels = Tile::kChannels / Tile::kCluster;  // whose weights this block copies
  const int tiles = call.row_tiles * call.channel_tiles;
  const int clusters = static_cast<int>(gridDim.x) / Tile::kCluster;
  for (int tile = static_cast<int>(blockIdx.x) / Tile::kCluster; tile < tiles; tile += clusters) {
    const HopperPlace place(call, tile);
    const int row = (place.row * Tile::kCluster + rank) * Tile::kRows;
    const int group = (place.channel * Tile::kChannels + rank * kChannels) / 32;
    for (int slice = 0; slice < call.slices; ++slice) {
      barrier_wait(stages.empty(), stages.phase ^ 1);  // of all blocks that this one copies to
      barrier_expect(stages.full(), Tile::kStageBytes);
      copy_box(stages.input(), input, slice * kHopperSlice, row, stages.full());
      const std::uint32_t to = stages.weight() + rank * kChannels * kHopperSlice;
      if constexpr (Tile::kCluster > 1) {
        copy_groups_to_all(to, weight, slice * kHopperSlice, group, stages.full(), (1 << Tile::kCluster) - 1);
      } else {
        copy_groups(to, weight, slice * kHopperSlice, group, stages.full());
      }
      stages.next();
    }
  }
}

template <class Tile>
__device__ void load_terms(HopperTerms<Tile::kChannels>& terms, const Int8Finish& finish, std::int64_t start,
                           std::int64_t channels, int thread) {
  const Int8Epilogue& epilogue = finish.epilogue;
  const bool sums_only = epilogue.out.kind == Int8OutKind::kSums;
  for (int i = thread; i < Tile::kChannels; i += Tile::kConsumers * kWarpgroup) {
    if (start + i >= channels) break;
    const float input_scale = epilogue.row_scales ? 1.0F : epilogue.input.scale;
    terms.scales[i] = sums_only ? 0.0F : rounded_product(input_scale, epilogue.weight_scales[start + i]);
    terms.biases[i] = !sums_only && epilogue.bias ? epilogue.bias[start + i] : 0.0F;
    terms.shifts[i] = epilogue.input.zero_point ? epilogue.input.zero_point * finish.weight_sums[start + i] : 0;
  }
}

template <class Type>
__device__ void load_eight(Type (&to)[8], const Type* shared) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const uint4 words = *reinterpret_cast<const uint4*>(shared + i);
    std::memcpy(to + i, &words, 16);
  }
}

// quantize_value of four neighbours, as they lie in memory: conversions to integers saturate and make 0 of NaN, and so
// does their packing.
__device__ inline std::uint32_t quantize_four(const float* values, float inverse_scale, std::int32_t zero_point) {
  std::int32_t rounded[4];
#pragma unroll
  for (int e = 0; e < 4; ++e)
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(rounded[e]) : "f"(rounded_product(values[e], inverse_scale)));
  if (zero_point != 0) {
#pragma unroll
    for (std::int32_t& value : rounded) value = min(max(value, -1024), 1024) + zero_point;
  }
  std::uint32_t upper;
  std::uint32_t packed;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(upper) : "r"(rounded[3]), "r"(rounded[2]));
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(packed) : "r"(rounded[1]), "r"(rounded[0]), "r"(upper));
  return packed;
}

// 8 halves as they lie in memory.
template <class Storage>
__device__ void widen_eight(const uint4& halves, float (&values)[8]) {
  Storage elements[8];
  std::memcpy(elements, &halves, 16);
#pragma unroll
  for (int e = 0; e < 8; ++e) values[e] = widen_device(elements[e]);
}

// Writes 8 neighbouring channels of one row. `at` is their first element of the output, on a pack's boundary;
// `halves` what is added to them, if that is of 16 bits.
template <class Out, bool kPlain, class Activate>
__device__ void finish_eight(const Int8Finish& finish, std::int64_t at, const std::int32_t (&sums)[8],
                             const float (&scales)[8], const float (&biases)[8], float row_scale, const uint4& halves,
                             const Activate& activate_values) {
  const Int8Epilogue& epilogue = finish.epilogue;
  void* const out = epilogue.out.data;
  if constexpr (std::is_same_v<Out, std::int32_t>) {
    store_pack<Out, 8>(out, at, sums);
  } else {
    float residual[8] = {};
    if (!kPlain && epilogue.residual) {
      if (epilogue.residual_dtype == DType::kFloat16) {
        widen_eight<Half>(halves, residual);
      } else if (epilogue.residual_dtype == DType::kBFloat16) {
        widen_eight<BFloat16>(halves, residual);
      } else {
        load_widened<float>(epilogue.residual, at, true, 8, residual);
      }
    }
    float values[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float scale = kPlain ? scales[e] : rounded_product(row_scale, scales[e]);
      values[e] = rounded_sum(rounded_product(static_cast<float>(sums[e]), scale), biases[e]);
      if constexpr (!kPlain) values[e] = rounded_sum(values[e], residual[e]);
    }
    activate_values(values);
    if constexpr (std::is_same_v<Out, std::int8_t>) {
      const std::int32_t zero_point = epilogue.out.parameters.zero_point;
      const uint2 eight = {quantize_four(values, finish.inverse_out_scale, zero_point),
                           quantize_four(values + 4, finish.inverse_out_scale, zero_point)};
      store_moved(reinterpret_cast<uint2*>(static_cast<std::int8_t*>(out) + at), eight);
    } else {
      store_pack<Out, 8>(out, at, values);
    }
  }
}

// A warpgroup's 64 rows of the tile, of which this thread has row and row + 8. It is compiled once for each type of the
// output, and once more without what few calls have, because all of it is unrolled: what is jumped over in there would
// fill the cache of instructions, and with few terms the epilogue takes as long as the products.
template <class Tile, class Out, bool kPlain, class Activate>
__device__ void finish_tile(const HopperCall& call, const HopperTerms<Tile::kChannels>& terms,
                            const std::int32_t (&sums)[Tile::kChannels / 2], std::int64_t row, std::int64_t start,
                            const Activate& activate_values) {
  const int place = static_cast<int>(threadIdx.x) % 4 * 8;
  const float* const row_scales = call.finish.epilogue.row_scales;
  const bool valid[2] = {row < call.rows, row + 8 < call.rows};
  float row_scale[2] = {1.0F, 1.0F};
#pragma unroll
  for (int below = 0; below < 2; ++below)
    if (!kPlain && row_scales && valid[below])
      row_scale[below] = row_scales[(row + below * 8) / call.finish.rows_per_scale];
  const std::int64_t at[2] = {row * call.channels + start + place, (row + 8) * call.channels + start + place};
  const int groups = static_cast<int>(min(call.channels - start, std::int64_t{Tile::kChannels})) / 32;
  // A residual of 16 bits is loaded for some groups of channels at once: one by one each would wait for the memory.
  constexpr int kAhead = kPlain ? 1 : Tile::kChannels / 32 < 4 ? Tile::kChannels / 32 : 4;
  const auto* const residual = static_cast<const std::uint8_t*>(call.finish.epilogue.residual);
  const bool is_half = !kPlain && residual && call.finish.epilogue.residual_dtype != DType::kFloat32;
  uint4 halves[kAhead][2] = {};
#pragma unroll
  for (int q = 0; q < Tile::kChannels / 32; ++q) {
    if (q >= groups) break;
    if (is_half && q % kAhead == 0) {
#pragma unroll
      for (int i = 0; i < 2 * kAhead; ++i)
        if (q + i / 2 < groups && valid[i % 2])
          halves[i / 2][i % 2] = *reinterpret_cast<const uint4*>(residual + 2 * (at[i % 2] + (q + i / 2) * 32));
    }
    float scales[8];
    float biases[8];
    std::int32_t shifts[8] = {};
    load_eight(scales, terms.scales + q * 32 + place);
    load_eight(biases, terms.biases + q * 32 + place);
    if constexpr (!kPlain) load_eight(shifts, terms.shifts + q * 32 + place);
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      std::int32_t own[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) own[e] = sums[(q * 4 + e / 2) * 4 + below * 2 + e % 2] - shifts[e];
      if (valid[below])
        finish_eight<Out, kPlain>(call.finish, at[below] + q * 32, own, scales, biases, row_scale[below],
                                  halves[q % kAhead][below], activate_values);
    }
  }
}

template <class Tile, class Activate>
__device__ void finish_sums(const HopperCall& call, const HopperTerms<Tile::kChannels>& terms,
                            const std::int32_t (&sums)[Tile::kChannels / 2], std::int64_t row, std::int64_t start,
                            const Activate& activate_values) {
  const Int8Epilogue& epilogue = call.finish.epilogue;
  const bool plain = !epilogue.residual && !epilogue.row_scales && epilogue.input.zero_point == 0;
  const auto finish = [&](auto out) {
    using Out = decltype(out);
    if (plain) {
      finish_tile<Tile, Out, true>(call, terms, sums, row, start, activate_values);
    } else {
      finish_tile<Tile, Out, false>(call, terms, sums, row, start, activate_values);
    }
  };
  switch (epilogue.out.kind) {
    case Int8OutKind::kFloat:
      return with_storage(epilogue.out.dtype, finish);
    case Int8OutKind::kInt8:
      return finish(std::int8_t{});
    case Int8OutKind::kSums:
      return finish(std::int32_t{});
  }
}

// kGathered: threads have written the input, not the copying engine.
template <bool kGathered, class Tile, class Activate>
__device__ void multiply_tiles(HopperStages<Tile> stages, HopperTerms<Tile::kChannels>* terms, const HopperCall& call,
                               int rank, const Activate& activate_values) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int consumer = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const int tiles = call.row_tiles * call.channel_tiles;
  const int clusters = static_cast<int>(gridDim.x) / Tile::kCluster;
  int even = 0;
  // A thread for each block whose copies wait for this one.
  const auto release = [&](std::uint32_t barrier) {
    if constexpr (Tile::kCluster > 1) {
      if (thread < Tile::kCluster) barrier_arrive(barrier, thread);
    } else {
      if (thread == 0) barrier_arrive(barrier);
    }
  };
  for (int tile = static_cast<int>(blockIdx.x) / Tile::kCluster; tile < tiles; tile += clusters) {
    const HopperPlace place(call, tile);
    const std::int64_t start = place.channel * std::int64_t{Tile::kChannels};
    load_terms<Tile>(terms[even], call.finish, start, call.channels, static_cast<int>(threadIdx.x) - kWarpgroup);
    std::int32_t sums[Tile::kChannels / 2];
    std::uint32_t before = 0;
    for (int slice = 0; slice < call.slices; ++slice) {
      barrier_wait(stages.full(), stages.phase);
      if constexpr (kGathered) products_see_writes();
      const std::uint64_t a = matrix_descriptor(stages.input() + consumer * 64 * kHopperSlice);
      const std::uint64_t b = matrix_descriptor(stages.weight());
      product_fence();
#pragma unroll
      for (int k = 0; k < kHopperSlice / 32; ++k) warpgroup_product(sums, a + 2 * k, b + 2 * k, slice + k);
      product_commit();
      product_wait<1>();
      if (slice > 0) release(before);
      before = stages.empty();
      stages.next();
    }
    product_wait<0>();
    release(before);

    const std::int64_t row = (place.row * Tile::kCluster + rank) * std::int64_t{Tile::kRows} + consumer * 64 +
                             thread / kWarp * 16 + thread % kWarp / 4;
    // All consumers have written the terms, and none reads those of the tile before any more.
    asm volatile("bar.sync 1, %0;" ::"n"(Tile::kConsumers * kWarpgroup) : "memory");
    finish_sums<Tile>(call, terms[even], sums, row, start, activate_values);
    even ^= 1;
  }
}
#endif

template <class Tile, class Activate>
__global__ __launch_bounds__(Tile::kThreads, 1) void int8_hopper_kernel(const __grid_constant__ CUtensorMap input,
                                                                        const __grid_constant__ CUtensorMap weight,
                                                                        const __grid_constant__ HopperCall call,
                                                                        const Activate activate_values) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ std::uint8_t shared[];
  __shared__ std::uint64_t barriers[2 * Tile::kStages];
  __shared__ HopperTerms<Tile::kChannels> terms[2];
  HopperStages<Tile> stages{(shared_address(shared) + 1023) / 1024 * 1024, shared_address(barriers)};
  if (threadIdx.x == 0) {
    prefetch_map(&input);
    prefetch_map(&weight);
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_init(stages.barriers + stage * 8, 1);
      barrier_init(stages.barriers + (Tile::kStages + stage) * 8, Tile::kConsumers * Tile::kCluster);
    }
    fence_barrier_init();
  }
  if constexpr (Tile::kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  const int rank = Tile::kCluster > 1 ? cluster_rank() : 0;
  if (threadIdx.x < kWarpgroup) {
    if constexpr (Tile::kConsumers == 2) give_registers_back<40>();
    if (threadIdx.x == 0) copy_tiles(stages, &input, &weight, call, rank);
  } else {
    if constexpr (Tile::kConsumers == 2) take_registers<232>();
    multiply_tiles<false>(stages, terms, call, rank, activate_values);
  }
  if constexpr (Tile::kCluster > 1) cluster_sync();  // nobody copies into a block, or arrives there, that is gone
#endif
}

}  // namespace halfstep::cuda
