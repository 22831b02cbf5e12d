// How rows are divided among threads: kThreads work on a row, which is a warp (and four rows make a block) or a block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "reduce.cuh"

namespace halfstep::cuda {

template <int kThreads>
constexpr int kRowsPerBlock = kThreads == kWarp ? 4 : 1;
template <int kThreads>
constexpr int kRowBlock = kThreads * kRowsPerBlock<kThreads>;

inline unsigned blocks_for(std::int64_t rows, int rows_per_block) {
  constexpr std::int64_t kMaxBlocks = (std::int64_t{1} << 31) - 1;  // for_rows loops over the rest
  return static_cast<unsigned>(std::min((rows + rows_per_block - 1) / rows_per_block, kMaxBlocks));
}

// Calls visit(row) for the rows of this warp or block.
template <int kThreads, class Visit>
__device__ void for_rows(std::int64_t rows, const Visit& visit) {
  constexpr std::int64_t kPerBlock = kRowsPerBlock<kThreads>;
  for (std::int64_t row = blockIdx.x * kPerBlock + threadIdx.x / kThreads; row < rows; row += gridDim.x * kPerBlock)
    visit(row);
}

}  // namespace halfstep::cuda
