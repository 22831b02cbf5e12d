// Rows of a norm in float32, block by block, for all that follows from them (norms.cpp). Contract: halfstep/norms.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "halfstep/norms.h"
#include "halfstep/stream.h"

namespace halfstep::cpu {

// A row passes through a buffer of this many float32 elements, which holds most rows whole.
inline constexpr std::int64_t kNormBlock = 4096;

// Calls visit(begin, count) for a row's blocks.
template <class Visit>
void for_norm_blocks(std::int64_t cols, const Visit& visit) {
  for (std::int64_t begin = 0; begin < cols; begin += kNormBlock) visit(begin, std::min(kNormBlock, cols - begin));
}

// A weight or bias in float32, and its values for the elements of a block.
class NormParameters {
 public:
  NormParameters(const TensorView& view, const NormShape& shape);

  // Null if there is none. `scratch` has room for kNormBlock elements.
  const float* block(std::int64_t row, std::int64_t begin, std::int64_t count, float* scratch) const;

 private:
  NormShape shape_;
  std::vector<float> values_;
};

struct RowStatistics {
  float mean;
  float rstd;
};

// The rows of a forward pass. Reads `call` and what it views as long as it lives.
class NormRows {
 public:
  explicit NormRows(const NormForward& call);

  // The statistics of a row, written to the call's mean and rstd too. Afterwards x, of kNormBlock elements, holds the
  // row if it has no more of them.
  RowStatistics statistics(std::int64_t row, float* x) const;
  // x = the results of a block before they are rounded; `loaded`: x holds its input already.
  void results(const RowStatistics& of_row, std::int64_t row, std::int64_t begin, std::int64_t count, bool loaded,
               float* x) const;
  // visit(row) for all rows, on the executor's threads if they are worth waking.
  void for_each(const Executor& executor, const std::function<void(std::int64_t)>& visit) const;

 private:
  const NormForward& call_;
  NormParameters weight_;
  NormParameters bias_;
};

}  // namespace halfstep::cpu
