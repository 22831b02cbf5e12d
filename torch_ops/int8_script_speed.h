// quantize(): whether int8 is worth its while. Functions are timed in turns, so that a busy machine slows all of them
// alike.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "int8_script_graph.h"

namespace halfstep::torch_ops {

using Seconds = std::vector<double>;  // of one call, in each round

// Times the calls round by round, each once a round, after a warm-up. What is short is repeated until a round lasts a
// millisecond; all together take 20 seconds at most, or three rounds.
std::vector<Seconds> time_in_turns(const std::vector<std::function<void()>>& calls, at::Device device);

double median(Seconds values);

// The median of one's share of the other's time, round by round.
double share_of(const Seconds& mine, const Seconds& rival);

// The layers of a region one after the other, in float and in int8, each on what these arguments give it in the first
// of its calls. Layers behind the first one get int8, as they do in the region. None where no layer multiplies.
struct RegionTimes {
  Seconds in_float, in_int8;
};
std::optional<RegionTimes> time_region(const ScriptForm& form, const ScriptRegion& region,
                                       const std::map<std::size_t, ScriptSettings>& settings,
                                       const std::vector<c10::IValue>& arguments);

}  // namespace halfstep::torch_ops
