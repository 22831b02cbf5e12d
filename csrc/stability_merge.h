// How the statistics of one tensor are added to a row, for the CPU and the CUDA build. Contract: halfstep/stability.h.
#pragma once

#include "halfstep/dtype.h"
#include "halfstep/gradients.h"
#include "halfstep/stability.h"

namespace halfstep::detail {

HALFSTEP_HOST_DEVICE inline void merge_statistics(const float* stats, double* row, double place, double half_limit) {
  const bool non_finite = stats[kNonFinite] > 0.0F;
  const double maximum = stats[kMaxMagnitude];
  row[kSeen] += 1.0;
  row[kSeenElements] += stats[kElements];
  row[kSeenNonFinite] += stats[kNonFinite];
  if (non_finite && 1.0 / place > row[kEarliest]) row[kEarliest] = 1.0 / place;
  if (maximum > row[kSeenMaximum]) row[kSeenMaximum] = maximum;
  if (maximum >= half_limit && 1.0 / place > row[kEarliestBeyond]) row[kEarliestBeyond] = 1.0 / place;
  if (non_finite) return;  // its squares are no number, and its zeros belong to them
  row[kSeenSquares] += stats[kSumOfSquares];
  row[kSeenZeros] += stats[kZeros];
  row[kSeenBelowHalf] += stats[kBelowHalf];
}

}  // namespace halfstep::detail
