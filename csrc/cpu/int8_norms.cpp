// Norms that write int8 on the CPU. Contract: halfstep/int8_norms.h.
#include "halfstep/int8_norms.h"

#include <algorithm>
#include <limits>

#include "convert.h"
#include "halfstep/status.h"
#include "int8_runs.h"
#include "norm_rows.h"

namespace halfstep::cpu {
namespace {

void check(const Int8Norm& call) {
  constexpr const char* name = "normalize_int8";
  const NormShape& shape = call.norm.shape;
  HS_CHECK(shape.spatial == 1 && shape.groups == 1, name, ": got ", shape.spatial, " elements of a channel and ",
           shape.groups, " groups, expected 1 of each");
  const Int8Parameters& parameters = call.parameters;
  HS_CHECK(parameters.zero_point >= -128 && parameters.zero_point <= 127, name, ": zero_point is ",
           parameters.zero_point, "; expected -128 .. 127");
  HS_CHECK(parameters.scale > 0.0F && parameters.scale <= std::numeric_limits<float>::max(), name, ": scale is ",
           parameters.scale, "; expected a positive finite number");
}

// Rounds x to the output's dtype, and writes it where the output is wanted.
void round_block(const TensorView& out, std::int64_t at, std::int64_t count, float* x) {
  if (out.data) narrow_run(out.dtype, x, count, out.data, at);
  if (out.dtype == DType::kFloat32) return;
  Half scratch[kNormBlock];  // room for bfloat16 too
  if (!out.data) narrow_run(out.dtype, x, count, scratch, 0);
  widen_run(out.dtype, out.data ? out.data : scratch, out.data ? at : 0, count, x);
}

}  // namespace

void normalize_int8(const Int8Norm& call, const Executor& executor) {
  check(call);
  const NormRows rows(call.norm);
  const std::int64_t cols = call.norm.shape.cols();
  const bool whole = cols <= kNormBlock;  // the buffer keeps the row
  rows.for_each(executor, [&](std::int64_t row) {
    float x[kNormBlock];
    const RowStatistics of_row = rows.statistics(row, x);
    const auto compute = [&](std::int64_t begin, std::int64_t count) {
      rows.results(of_row, row, begin, count, /*loaded=*/whole, x);
      round_block(call.norm.out, row * cols + begin, count, x);
    };
    Int8Parameters parameters = call.parameters;
    if (call.row_scales) {
      std::uint32_t magnitude = 0;
      for_norm_blocks(cols, [&](std::int64_t begin, std::int64_t count) {
        compute(begin, count);
        magnitude = std::max(magnitude, largest_magnitude_bits(x, count));
      });
      parameters = {call.row_scales[row] = row_scale(magnitude), 0};
    }
    for_norm_blocks(cols, [&](std::int64_t begin, std::int64_t count) {
      if (!call.row_scales || !whole) compute(begin, count);
      quantize_run(x, count, 1.0F / parameters.scale, parameters.zero_point, call.quantized + row * cols + begin);
    });
  });
}

}  // namespace halfstep::cpu
