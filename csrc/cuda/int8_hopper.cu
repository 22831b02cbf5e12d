// Which tile of the Hopper product takes which size, and the maps that its copies read. Contract: int8_hopper.h.
#include "int8_hopper.h"

#include <algorithm>
#include <limits>
#include <span>

#include "int8_gemm.cuh"
#include "int8_hopper_launch.cuh"

namespace halfstep::cuda {
namespace {

// Microseconds on an H100 SXM (132 processors), fitted by bench/int8_tiles.py to sizes from 33 to 16384 rows: of a
// launch, of a tile whatever its terms are, and of each slice of 128 terms.
struct TileCosts {
  Int8Tile tile;
  int rows, channels, blocks;
  double launch, each, slice;
};
constexpr TileCosts kCosts[] = {
    {Int8Tile::kPair256x256, 256, 256, 2, 1.68, 4.27, 0.594}, {Int8Tile::k128x256, 128, 256, 1, 0.23, 4.13, 0.598},
    {Int8Tile::kPair256x128, 256, 128, 2, 2.21, 2.22, 0.324}, {Int8Tile::k128x128, 128, 128, 1, 0.60, 2.37, 0.331},
    {Int8Tile::k64x64, 64, 64, 1, 1.03, 1.17, 0.173},
};
// Of convolutions, whose slices take as long as the input's gathering: from "halfstep_int8_tiles conv".
constexpr TileCosts kConvCosts[] = {
    {Int8Tile::k128x256, 128, 256, 1, 1.0, 0.4, 1.0},
    {Int8Tile::k128x128, 128, 128, 1, 1.0, 0.5, 0.85},
    {Int8Tile::k64x64, 64, 64, 1, 1.2, 0.8, 0.42},
};
constexpr std::int64_t kFewestConvTerms = 256;  // with fewer, the tiles of other GPUs are as fast

Int8Tile fastest(std::span<const TileCosts> table, const Int8LinearShape& shape, int processors) {
  const auto tiles_of = [](std::int64_t size, std::int64_t tile) { return (size + tile - 1) / tile; };
  const auto slices = static_cast<double>(tiles_of(shape.terms, kHopperSlice));
  Int8Tile best = Int8Tile::kNone;
  double least = std::numeric_limits<double>::infinity();
  for (const TileCosts& costs : table) {
    const std::int64_t tiles = tiles_of(shape.rows, costs.rows) * tiles_of(shape.channels, costs.channels);
    const auto rounds = static_cast<double>(tiles_of(tiles, std::max(1, processors / costs.blocks)));
    const double time = costs.launch + rounds * (costs.each + slices * costs.slice);
    if (time < least) {
      least = time;
      best = costs.tile;
    }
  }
  return best;
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function by way of the runtime: a library that links the driver cannot be loaded where there is none.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    HS_CUDA_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    HS_CHECK(result == cudaDriverEntryPointSuccess, "the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

template <int kDims>
CUtensorMap tensor_map(const std::int8_t* data, const cuuint64_t (&sizes)[kDims],
                       const cuuint64_t (&strides)[kDims - 1], const cuuint32_t (&box)[kDims]) {
  CUtensorMap map;
  cuuint32_t steps[kDims];
  std::fill_n(steps, kDims, 1U);
  const CUresult status =
      encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, kDims, const_cast<std::int8_t*>(data), sizes, strides, box,
                     steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  HS_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with ", static_cast<int>(status));
  return map;
}

}  // namespace

bool can_run_hopper(const Int8LinearShape& shape, const std::int8_t* input, const std::int8_t* weight,
                    const Int8Finish& finish) {
  const std::uint64_t multiples = address_of(input) | address_of(weight) | static_cast<std::uint64_t>(shape.terms);
  if (shape.terms == 0 || multiples % 16 != 0 || shape.channels % 32 != 0 || !finish.packs) return false;
  int device = 0;
  HS_CUDA_TRY(cudaGetDevice(&device));
  return has_int8_wgmma(device);
}

bool has_int8_wgmma(int device) {
#ifdef HALFSTEP_HOPPER
  int major = 0;
  HS_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major == 9;
#else
  static_cast<void>(device);
  return false;
#endif
}

CUtensorMap hopper_input_map(const Int8LinearShape& shape, const std::int8_t* input, int rows) {
  const auto terms = static_cast<cuuint64_t>(shape.terms);
  return tensor_map<2>(input, {terms, static_cast<cuuint64_t>(shape.rows)}, {terms},
                       {kHopperSlice, static_cast<cuuint32_t>(rows)});
}
// [q, k, j, e, term], innermost first and in the order in which shared memory has them.
CUtensorMap hopper_weight_map(const Int8LinearShape& shape, const std::int8_t* weight, int channels) {
  const auto terms = static_cast<cuuint64_t>(shape.terms);
  const auto groups = static_cast<cuuint64_t>(shape.channels / 32);
  return tensor_map<5>(weight, {terms, 2, 4, 4, groups}, {terms, 8 * terms, 2 * terms, 32 * terms},
                       {kHopperSlice, 2, 4, 4, static_cast<cuuint32_t>(channels / 32)});
}

Int8Tile int8_tile_for(const Int8LinearShape& shape, int processors) {
  return fastest(kCosts, shape, processors);
}

Int8Tile int8_conv_tile_for(const Int8LinearShape& shape, int processors) {
  return shape.terms < kFewestConvTerms ? Int8Tile::kNone : fastest(kConvCosts, shape, processors);
}

Int8Tile hopper_tile(const Int8LinearShape& shape, const std::int8_t* input, const std::int8_t* weight,
                     const Int8Finish& finish) {
  return can_run_hopper(shape, input, weight, finish) ? int8_tile_for(shape, processors_here()) : Int8Tile::kNone;
}

void launch_int8_hopper(Int8Tile tile, const Int8LinearShape& shape, const std::int8_t* input,
                        const std::int8_t* weight, const Int8Finish& finish, cudaStream_t stream) {
  switch (finish.epilogue.activation) {
    case Activation::kNone:
    case Activation::kRelu:
    case Activation::kRelu6:
      return launch_hopper_clamp(tile, shape, input, weight, finish, stream);
    case Activation::kGelu:
      return launch_hopper_gelu(tile, shape, input, weight, finish, stream);
    case Activation::kGeluTanh:
    case Activation::kSilu:
    case Activation::kHardswish:
      return launch_hopper_other(tile, shape, input, weight, finish, stream);
  }
}

bool int8_linear_by_tile(Int8Tile tile, const Int8LinearShape& shape, const std::int8_t* input,
                         const std::int8_t* weight, const std::int32_t* weight_sums, const Int8Epilogue& epilogue,
                         CudaStream stream) {
  const Int8Finish finish = int8_finish("int8_linear_by_tile", epilogue, weight_sums, shape.terms, shape.channels, 1);
  if (tile == Int8Tile::kNone || shape.rows == 0 || !can_run_hopper(shape, input, weight, finish)) return false;
  launch_int8_hopper(tile, shape, input, weight, finish, static_cast<cudaStream_t>(stream.handle));
  return true;
}

}  // namespace halfstep::cuda
