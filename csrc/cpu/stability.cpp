// The merge of a tensor's statistics into a layer's row. Contract: halfstep/stability.h.
#include "stability_merge.h"

namespace halfstep::cpu {

void merge_statistics(const float* stats, double* row, double place, double half_limit) {
  detail::merge_statistics(stats, row, place, half_limit);
}

}  // namespace halfstep::cpu
