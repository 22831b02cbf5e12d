// The update of the loss scale as a TensorFlow op. Contract of the rule: halfstep/scaling.h.
//
//   HalfstepUpdateScale(scale: float, growth_tracker: int64, hysteresis_left: int32, counters: int64 [8],
//                       found: float, norm: float, factors: double [4];
//                       growth_interval: int, hysteresis: int, refill: string, growth_delay: int)
//     -> the first four, after the step
//
// growth_tracker is an int64 because that is what Keras keeps its counter in; its value must be within int32.
// found and norm: a flag and a norm for each replica, of any shape, at most 64 of each. factors: growth_factor,
// backoff_factor, min_scale, max_scale; an input, since attributes of TensorFlow have no float64. The attributes are
// those of the torch door. Bad values of either are InvalidArgument.
#include "halfstep/scaling.h"

#include <algorithm>
#include <array>
#include <string>

#include "kernel.h"

namespace halfstep::tf {
namespace {

enum Input : int { kScaleIn, kTrackerIn, kHysteresisIn, kCountersIn, kFoundIn, kNormIn, kFactorsIn };

void shapes_of_update(TF_ShapeInferenceContext* context, TF_Status* status) {
  const Shapes shapes(context, status);
  for (const auto& [index, rank] :
       {std::pair{kScaleIn, 0}, {kTrackerIn, 0}, {kHysteresisIn, 0}, {kCountersIn, 1}, {kFactorsIn, 1}}) {
    if (!shapes.input_has_rank(index, rank)) return;
  }
  for (const int index : {kScaleIn, kTrackerIn, kHysteresisIn, kCountersIn}) shapes.same_as_input(index, index);
}

std::int64_t integer(TF_OpKernelConstruction* construction, const char* name) {
  const Status status;
  std::int64_t value = 0;
  TF_OpKernelConstruction_GetAttrInt64(construction, name, &value, status);
  status.check();
  return value;
}

std::string text(TF_OpKernelConstruction* construction, const char* name) {
  const Status status;
  std::int32_t list_size = 0;
  std::int32_t size = 0;
  TF_OpKernelConstruction_GetAttrSize(construction, name, &list_size, &size, status);
  status.check();
  std::string value(static_cast<std::size_t>(size), '\0');
  TF_OpKernelConstruction_GetAttrString(construction, name, value.data(), value.size(), status);
  status.check();
  return value;
}

void expect_elements(const Tensor& tensor, const char* name, std::int64_t expected) {
  const std::int64_t count = TF_TensorElementCount(tensor.get());
  HS_CHECK(count == expected, name, " has ", count, " elements, expected ", expected);
}

std::vector<const float*> pointers(const Tensor& tensor) {
  std::vector<const float*> result(static_cast<std::size_t>(TF_TensorElementCount(tensor.get())));
  for (std::size_t i = 0; i < result.size(); ++i) result[i] = data_of<const float>(tensor) + i;
  return result;
}

class UpdateScale {
 public:
  explicit UpdateScale(TF_OpKernelConstruction* construction) {
    rule_.growth_interval = integer(construction, "growth_interval");
    rule_.hysteresis = integer(construction, "hysteresis");
    rule_.growth_delay = integer(construction, "growth_delay");
    rule_.refill = refill_from_name(text(construction, "refill"));
    validate_update(rule_);
  }

  void compute(TF_OpKernelContext* context) const {
    const Tensor factors = input(context, kFactorsIn);
    expect_elements(factors, "factors", 4);
    ScaleRule rule = rule_;
    const double* const factor = data_of<const double>(factors);
    rule.growth_factor = factor[0];
    rule.backoff_factor = factor[1];
    rule.min_scale = factor[2];
    rule.max_scale = factor[3];
    validate_update(rule);

    const Tensor counters_in = input(context, kCountersIn);
    expect_elements(counters_in, "counters", kCounters);
    const Tensor found = input(context, kFoundIn);
    const Tensor norm = input(context, kNormIn);
    const std::vector<const float*> flags = pointers(found);
    const std::vector<const float*> norms = pointers(norm);

    const Tensor scale_in = scalar_input(context, kScaleIn, "scale");
    const Tensor tracker_in = scalar_input(context, kTrackerIn, "growth_tracker");
    const Tensor hysteresis_in = scalar_input(context, kHysteresisIn, "hysteresis_left");

    const Tensor scale = output(context, kScaleIn, TF_FLOAT, {});
    const Tensor tracker = output(context, kTrackerIn, TF_INT64, {});
    const Tensor hysteresis = output(context, kHysteresisIn, TF_INT32, {});
    const Tensor counters = output(context, kCountersIn, TF_INT64, {kCounters});
    *data_of<float>(scale) = *data_of<const float>(scale_in);
    const std::int64_t before = *data_of<const std::int64_t>(tracker_in);
    std::int32_t step = static_cast<std::int32_t>(before);
    HS_CHECK(step == before, "growth_tracker is ", before, ", expected an int32");
    *data_of<std::int32_t>(hysteresis) = *data_of<const std::int32_t>(hysteresis_in);
    std::copy_n(data_of<const std::int64_t>(counters_in), static_cast<int>(kCounters), data_of<std::int64_t>(counters));

    cpu::update_scale(
        {data_of<float>(scale), &step, data_of<std::int32_t>(hysteresis), data_of<std::int64_t>(counters), nullptr},
        rule, {flags, norms});
    *data_of<std::int64_t>(tracker) = step;
  }

 private:
  ScaleRule rule_;
};

}  // namespace

void register_scaling() {
  register_op(
      {"HalfstepUpdateScale",
       {"scale: float", "growth_tracker: int64", "hysteresis_left: int32", "counters: int64", "found: float",
        "norm: float", "factors: double"},
       {"new_scale: float", "new_growth_tracker: int64", "new_hysteresis_left: int32", "new_counters: int64"},
       {"growth_interval: int", "hysteresis: int = 1", "refill: string = 'on_clean_step'", "growth_delay: int = 0"},
       shapes_of_update});
  register_kernel<UpdateScale>("HalfstepUpdateScale");
}

}  // namespace halfstep::tf
