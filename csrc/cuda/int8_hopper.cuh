// The kernel of the int8 product of rows on Hopper. Contract: int8_hopper.h; the arithmetic of the epilogue is
// int8_math.h's, as everywhere.
//
// A block has a warpgroup that copies and one or two that multiply 64 rows each, through kStages slices of 128 terms in
// shared memory. Blocks stay and walk over tiles, so that the slices of the next tile come in while the results of this
// one are written. The blocks of a cluster take neighbouring rows and the same channels: each copies its share of the
// weights to all of them. (Warpgroups that take turns, one multiplying its tile while the other writes, gained at most
// 10 % where a tile has 6 slices, and lost up to 20 % elsewhere; two blocks on a processor lack registers.)
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
  static constexpr int kCluster = cluster;  // blocks that share weights
  static constexpr int kConsumers = rows / 64;
  static constexpr int kConsumerThreads = kConsumers * kWarpgroup;
  static constexpr int kThreads = kConsumerThreads + kWarpgroup;
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
  static constexpr bool kShort = true;
  float low, high;
  bool none;
  __device__ void operator()(float (&values)[8]) const {
    if (none) return;
#pragma unroll
    for (float& value : values) value = clamp_between(value, low, high);
  }
};
struct GeluActivation {
  static constexpr bool kShort = false;
  __device__ void operator()(float (&values)[8]) const {
#pragma unroll
    for (float& value : values) value = activate(Activation::kGelu, value);
  }
};
struct OtherActivation {
  static constexpr bool kShort = false;
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
  for (int i = thread; i < Tile::kChannels; i += Tile::kConsumerThreads) {
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

// How much an epilogue has to do: scales and biases alone; the input's zero point as well; everything.
enum class Finish : std::uint8_t { kPlain, kShifted, kAll };

// Writes 8 neighbouring channels of one row. `at` is their first element of the output, on a pack's boundary;
// `halves` what is added to them, if that is of 16 bits.
template <class Out, Finish kFinish, class Activate>
__device__ void finish_eight(const Int8Finish& finish, std::int64_t at, const std::int32_t (&sums)[8],
                             const float (&scales)[8], const float (&biases)[8], float row_scale, const uint4& halves,
                             const Activate& activate_values) {
  const Int8Epilogue& epilogue = finish.epilogue;
  void* const out = epilogue.out.data;
  if constexpr (std::is_same_v<Out, std::int32_t>) {
    store_pack<Out, 8>(out, at, sums);
  } else {
    float values[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float scale = kFinish == Finish::kAll ? rounded_product(row_scale, scales[e]) : scales[e];
      values[e] = rounded_sum(rounded_product(static_cast<float>(sums[e]), scale), biases[e]);
    }
    if (kFinish == Finish::kAll && epilogue.residual) {
      float residual[8];
      if (epilogue.residual_dtype == DType::kFloat16) {
        widen_eight<Half>(halves, residual);
      } else if (epilogue.residual_dtype == DType::kBFloat16) {
        widen_eight<BFloat16>(halves, residual);
      } else {
        load_widened<float>(epilogue.residual, at, true, 8, residual);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] = rounded_sum(values[e], residual[e]);
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

// The epilogue's step: so many groups of 32 channels, of which a thread has 8 in each of its two rows. Two where there
// are registers for them.
template <class Tile>
constexpr int kTogether = Tile::kChannels < 256 ? 2 : 1;

// own = the sums of the groups from `group` on, less what `own` was. A search, because registers have no index.
template <int kGroups, int kFirst, int kSteps, int kCount>
__device__ void take_groups(int group, const std::int32_t (&sums)[kCount], std::int32_t (&own)[kGroups][2][8]) {
  if constexpr (kSteps == 1) {
    asm volatile("");  // or both ways would be taken, and one chosen for each sum
#pragma unroll
    for (int q = 0; q < kGroups; ++q)
#pragma unroll
      for (int below = 0; below < 2; ++below)
#pragma unroll
        for (int e = 0; e < 8; ++e)
          own[q][below][e] = sums[((kFirst + q) * 4 + e / 2) * 4 + below * 2 + e % 2] - own[q][below][e];
  } else {
    constexpr int kMiddle = kFirst + kSteps / 2 * kGroups;
    if (group < kMiddle) {
      take_groups<kGroups, kFirst, kSteps / 2>(group, sums, own);
    } else {
      take_groups<kGroups, kMiddle, kSteps / 2>(group, sums, own);
    }
  }
}

// What a thread writes of a tile. And a residual of 16 bits, from memory that answers late: what the first step adds is
// loaded before the products, and each step loads that of the next. The rest of a tile is at least called into the L2
// cache before the products.
template <class Tile>
struct HopperPart {
  static constexpr int kGroups = kTogether<Tile>;
  const std::uint8_t* residual;  // null without one of 16 bits
  std::int64_t first;            // of the elements of the output, this thread's in the upper row
  std::int64_t below;            // elements between its rows
  int groups;                    // of the tile's channels that exist
  bool valid[2];                 // its rows that exist
  uint4 ahead[kGroups][2] = {};

  __device__ HopperPart(const HopperCall& call, std::int64_t row, std::int64_t start) {
    const Int8Epilogue& epilogue = call.finish.epilogue;
    const int place = static_cast<int>(threadIdx.x) % 4;
    residual =
        epilogue.residual_dtype == DType::kFloat32 ? nullptr : static_cast<const std::uint8_t*>(epilogue.residual);
    first = row * call.channels + start + place * 8;
    below = 8 * call.channels;
    groups = static_cast<int>(min(call.channels - start, std::int64_t{Tile::kChannels})) / 32;
    valid[0] = row < call.rows;
    valid[1] = row + 8 < call.rows;
    if (!residual) return;
    load(0);
    constexpr int kOfLine = 64;  // elements of a line of the cache
    if (place * kOfLine < groups * 32) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (valid[i]) prefetch_l2(residual + 2 * (row * call.channels + start + i * below + place * kOfLine));
    }
  }
  __device__ void load(int group) {
    if (!residual) return;
#pragma unroll
    for (int q = 0; q < kGroups; ++q)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (valid[i] && group + q < groups)
          ahead[q][i] = *reinterpret_cast<const uint4*>(residual + 2 * (first + i * below + (group + q) * 32));
  }
};

// A warpgroup's 64 rows of the tile, of which this thread has row and row + 8. It is compiled once for each type of the
// output, and a loop: all of a tile one after the other would not fit the cache of instructions, and with few terms the
// epilogue takes as long as the products. What counts is the number of instructions, some 33 an element with gelu.
template <class Tile, class Out, Finish kFinish, class Activate>
__device__ void finish_tile(const HopperCall& call, const HopperTerms<Tile::kChannels>& terms,
                            const std::int32_t (&sums)[Tile::kChannels / 2], std::int64_t row, HopperPart<Tile> part,
                            const Activate& activate_values) {
  constexpr int kGroups = kTogether<Tile>;
  const int place = static_cast<int>(threadIdx.x) % 4 * 8;
  const float* const row_scales = call.finish.epilogue.row_scales;
  float row_scale[2] = {1.0F, 1.0F};
#pragma unroll
  for (int below = 0; below < 2; ++below)
    if (kFinish == Finish::kAll && row_scales && part.valid[below])
      row_scale[below] = row_scales[(row + below * 8) / call.finish.rows_per_scale];
#pragma unroll 1
  for (int group = 0; group < part.groups; group += kGroups) {
    uint4 halves[kGroups][2];
    if constexpr (kFinish == Finish::kAll) {
      std::memcpy(halves, part.ahead, sizeof halves);
      part.load(group + kGroups);
    }
    std::int32_t own[kGroups][2][8];
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      load_eight(own[q][0], terms.shifts + (group + q) * 32 + place);
#pragma unroll
      for (int e = 0; e < 8; ++e) own[q][1][e] = own[q][0][e];
    }
    take_groups<kGroups, 0, Tile::kChannels / 32 / kGroups>(group, sums, own);
#pragma unroll
    for (int q = 0; q < kGroups; ++q) {
      if (group + q >= part.groups) break;
      float scales[8];
      float biases[8];
      load_eight(scales, terms.scales + (group + q) * 32 + place);
      load_eight(biases, terms.biases + (group + q) * 32 + place);
#pragma unroll
      for (int below = 0; below < 2; ++below)
        if (part.valid[below])
          finish_eight<Out, kFinish>(call.finish, part.first + below * part.below + (group + q) * 32, own[q][below],
                                     scales, biases, row_scale[below], halves[q][below], activate_values);
    }
  }
}

// The same without what few calls have, all of it unrolled: short enough for that.
template <class Tile, class Out, class Activate>
__device__ void finish_plain_tile(const HopperCall& call, const HopperTerms<Tile::kChannels>& terms,
                                  const std::int32_t (&sums)[Tile::kChannels / 2], const HopperPart<Tile>& part,
                                  const Activate& activate_values) {
  const int place = static_cast<int>(threadIdx.x) % 4 * 8;
#pragma unroll
  for (int q = 0; q < Tile::kChannels / 32; ++q) {
    if (q >= part.groups) break;
    float scales[8];
    float biases[8];
    load_eight(scales, terms.scales + q * 32 + place);
    load_eight(biases, terms.biases + q * 32 + place);
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      std::int32_t own[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) own[e] = sums[(q * 4 + e / 2) * 4 + below * 2 + e % 2];
      if (part.valid[below])
        finish_eight<Out, Finish::kPlain>(call.finish, part.first + below * part.below + q * 32, own, scales, biases,
                                          1.0F, {}, activate_values);
    }
  }
}

template <class Tile, class Activate>
__device__ void finish_sums(const HopperCall& call, const HopperTerms<Tile::kChannels>& terms,
                            const std::int32_t (&sums)[Tile::kChannels / 2], std::int64_t row,
                            const HopperPart<Tile>& part, const Activate& activate_values) {
  const Int8Epilogue& epilogue = call.finish.epilogue;
  const bool all = epilogue.residual || epilogue.row_scales;
  const auto finish = [&](auto out) {
    using Out = decltype(out);
    if constexpr (Activate::kShort) {
      if (!all && epilogue.input.zero_point == 0)
        return finish_plain_tile<Tile, Out>(call, terms, sums, part, activate_values);
    }
    if (all) {
      finish_tile<Tile, Out, Finish::kAll>(call, terms, sums, row, part, activate_values);
    } else {
      finish_tile<Tile, Out, Finish::kShifted>(call, terms, sums, row, part, activate_values);
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
  const int consumer = static_cast<int>(threadIdx.x) / kWarpgroup;
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
    load_terms<Tile>(terms[even], call.finish, start, call.channels, static_cast<int>(threadIdx.x));
    const std::int64_t row = (place.row * Tile::kCluster + rank) * std::int64_t{Tile::kRows} + consumer * 64 +
                             thread / kWarp * 16 + thread % kWarp / 4;
    const HopperPart<Tile> part(call, row, start);
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

    // All consumers have written the terms, and none reads those of the tile before any more.
    asm volatile("bar.sync 1, %0;" ::"n"(Tile::kConsumerThreads) : "memory");
    finish_sums<Tile>(call, terms[even], sums, row, part, activate_values);
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
  if (threadIdx.x < Tile::kConsumerThreads) {
    if constexpr (Tile::kConsumers == 2) take_registers<232>();
    multiply_tiles<false>(stages, terms, call, rank, activate_values);
  } else {
    if constexpr (Tile::kConsumers == 2) give_registers_back<40>();
    if (threadIdx.x == Tile::kConsumerThreads) copy_tiles(stages, &input, &weight, call, rank);
  }
  if constexpr (Tile::kCluster > 1) cluster_sync();  // nobody copies into a block, or arrives there, that is gone
#endif
}

}  // namespace halfstep::cuda
