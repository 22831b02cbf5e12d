// Partial sums of a run of elements: a fixed number of them, whatever the vector width, hence the same bits everywhere.
#pragma once

namespace halfstep::cpu {

inline constexpr int kLanes = 32;

// In float64, by halves: one after the other, the lanes of a short row would take as long as its elements.
[[gnu::always_inline]] inline double add_lanes(const float (&lanes)[kLanes]) {
  double sums[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] = static_cast<double>(lanes[lane]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

}  // namespace halfstep::cpu
