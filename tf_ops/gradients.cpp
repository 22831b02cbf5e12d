// The check of the gradients as TensorFlow ops. Contract of the arithmetic: halfstep/gradients.h.
//
//   HalfstepCheckAndUnscale(grads: T, scale: float, threads: int = 0) -> (unscaled: T, found: float, norm: float)
//     u = g * float32(1 / float64(scale)) for each g, in its own dtype; found: 1 if any u is infinite or NaN, else 0;
//     norm: the L2 norm of all u. In the memory of the gradients where nobody else reads them.
//   HalfstepGradientStatistics(grads: T, scale: float, threads: int = 0) -> (statistics: float [N, 6])
//     a row per gradient: non-finite elements, largest finite |u|, sum of squares, zeros, elements below 2^-14,
//     elements.
//
// T is any list of half, bfloat16, float and double, of any shapes, and may be empty. threads: at most so many, 0 for
// as many as the process may run on. scale is a scalar.
#include "halfstep/gradients.h"

#include "halfstep/threads.h"
#include "kernel.h"

namespace halfstep::tf {
namespace {

constexpr const char* kTypes = "T: list({half, bfloat16, float, double}) >= 0";
constexpr const char* kThreads = "threads: int >= 0 = 0";

void shapes_of_check(TF_ShapeInferenceContext* context, TF_Status* status) {
  const Shapes shapes(context, status);
  const int grads = shapes.inputs() - 1;
  if (!shapes.input_has_rank(grads, 0)) return;
  for (int i = 0; i < grads; ++i) shapes.same_as_input(i, i);
  shapes.scalar(grads);
  shapes.scalar(grads + 1);
}

void shapes_of_statistics(TF_ShapeInferenceContext* context, TF_Status* status) {
  const Shapes shapes(context, status);
  const int grads = shapes.inputs() - 1;
  if (shapes.input_has_rank(grads, 0)) shapes.matrix(0, grads, kGradientStats);
}

class GradientKernel {
 public:
  explicit GradientKernel(TF_OpKernelConstruction* construction) {
    const Status status;
    TF_OpKernelConstruction_GetAttrInt32(construction, "threads", &threads_, status);
    status.check();
  }

 protected:
  struct Arguments {
    std::vector<TensorView> grads;
    Tensor scale;
    ThreadedExecutor executor;
  };

  Arguments arguments(TF_OpKernelContext* context) const {
    const int count = TF_NumInputs(context) - 1;
    std::vector<TensorView> grads = input_views(context, 0, count);
    Tensor scale = scalar_input(context, count, "scale");
    std::int64_t elements = 0;
    for (const TensorView& grad : grads) elements += grad.numel;
    return {std::move(grads), std::move(scale), ThreadedExecutor(threads_for(elements, threads_))};
  }

 private:
  std::int32_t threads_ = 0;
};

class CheckAndUnscale : GradientKernel {
 public:
  using GradientKernel::GradientKernel;

  void compute(TF_OpKernelContext* context) const {
    const Arguments in = arguments(context);
    const int count = static_cast<int>(in.grads.size());
    const std::vector<TensorView> unscaled = output_views(context, 0, in.grads);
    const Tensor found = output(context, count, TF_FLOAT, {});
    const Tensor norm = output(context, count + 1, TF_FLOAT, {});
    *data_of<float>(found) = 0.0F;
    cpu::unscale_into(in.grads, unscaled, {data_of<float>(in.scale)},
                      {data_of<float>(found), data_of<float>(norm), nullptr}, in.executor);
  }
};

class GradientStatistics : GradientKernel {
 public:
  using GradientKernel::GradientKernel;

  void compute(TF_OpKernelContext* context) const {
    const Arguments in = arguments(context);
    const Tensor statistics =
        output(context, 0, TF_FLOAT, {static_cast<std::int64_t>(in.grads.size()), kGradientStats});
    float found = 0.0F;
    cpu::check_gradients(in.grads, {data_of<float>(in.scale)}, {&found, nullptr, data_of<float>(statistics)},
                         in.executor);
  }
};

}  // namespace

void register_gradients() {
  register_op({"HalfstepCheckAndUnscale",
               {"grads: T", "scale: float"},
               {"unscaled: T", "found: float", "norm: float"},
               {kTypes, kThreads},
               shapes_of_check});
  register_op({"HalfstepGradientStatistics",
               {"grads: T", "scale: float"},
               {"statistics: float"},
               {kTypes, kThreads},
               shapes_of_statistics});
  register_kernel<CheckAndUnscale>("HalfstepCheckAndUnscale");
  register_kernel<GradientStatistics>("HalfstepGradientStatistics");
}

}  // namespace halfstep::tf
