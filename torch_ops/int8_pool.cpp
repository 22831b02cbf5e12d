// int8_max_pool2d: schema, checks and the way to the core. Contract: halfstep/torch/int8.h, halfstep/int8_pool.h.
#include "halfstep/int8_pool.h"

#include <algorithm>
#include <array>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include "conversions.h"
#include "errors.h"
#include "halfstep/torch/int8.h"
#include "registration.h"
#ifdef HALFSTEP_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace halfstep {
namespace torch_ops {
namespace {

constexpr std::string_view kOp = "int8_max_pool2d";

struct Cpu {
  static void run(const Int8PoolShape& shape, const at::Tensor& input, at::Tensor& out) {
    cpu::int8_max_pool2d(shape, input.const_data_ptr<std::int8_t>(), out.data_ptr<std::int8_t>(), TorchExecutor());
  }
};

#ifdef HALFSTEP_CUDA
struct Cuda {
  static void run(const Int8PoolShape& shape, const at::Tensor& input, at::Tensor& out) {
    const c10::cuda::CUDAGuard guard(input.device());
    cuda::int8_max_pool2d(shape, input.const_data_ptr<std::int8_t>(), out.data_ptr<std::int8_t>(),
                          {c10::cuda::getCurrentCUDAStream().stream()});
  }
};
#endif

struct Meta {};

using Pair = std::array<std::int64_t, 2>;

// {height, width}; one number is both.
Pair checked_pair(at::IntArrayRef given, std::string_view argument, std::int64_t least) {
  constexpr std::int64_t kMost = std::int64_t{1} << 28;  // as Int8PoolShape has it
  const bool fits = (given.size() == 1 || given.size() == 2) &&
                    std::ranges::all_of(given, [&](auto n) { return n >= least && n <= kMost; });
  TORCH_CHECK_VALUE(fits, kOp, ": ", argument, " is ", given, ", expected one or two numbers of ", least, " .. ",
                    kMost);
  return {given.front(), given.back()};
}

template <class Backend>
at::Tensor max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  TORCH_CHECK_TYPE(input.scalar_type() == at::kChar, kOp, ": input is ", input.scalar_type(), ", expected Char (int8)");
  TORCH_CHECK_VALUE(input.dim() == 3 || input.dim() == 4, kOp, ": input has shape ", input.sym_sizes(),
                    ", expected [batch, channels, height, width] or [channels, height, width]");
  if (input.dim() == 3)
    return max_pool2d<Backend>(input.unsqueeze(0), kernel_size, stride, padding, dilation, ceil_mode).squeeze(0);
  const Pair kernel = checked_pair(kernel_size, "kernel_size", 1);
  const Pair step = stride.empty() ? kernel : checked_pair(stride, "stride", 1);
  const Pair pad = checked_pair(padding, "padding", 0);
  const Pair apart = checked_pair(dilation, "dilation", 1);
  for (std::int64_t i = 1; i < 4; ++i)
    TORCH_CHECK_VALUE(input.sym_size(i) > 0, kOp, ": input has shape ", input.sym_sizes(),
                      ", expected sizes of at least 1 but for the batch");
  const auto out_size = [&](std::size_t i) {
    TORCH_CHECK_VALUE(pad[i] <= kernel[i] / 2, kOp, ": padding is ", padding, ", expected at most half of kernel_size ",
                      kernel_size);
    const c10::SymInt padded = input.sym_size(2 + static_cast<std::int64_t>(i)) + 2 * pad[i];
    const std::int64_t reach = apart[i] * (kernel[i] - 1) + 1;
    const std::int64_t beyond = ceil_mode ? step[i] - 1 : 0;  // how far a window may reach out of the padded input
    TORCH_CHECK_VALUE(padded + beyond >= reach, kOp, ": the padded input is ", padded, i == 0 ? " high" : " wide",
                      ", expected at least ", reach - beyond);
    const c10::SymInt size = (padded - reach + beyond) / step[i] + 1;
    // The last window starts inside of the image, or of the padding before it.
    return ceil_mode && (size - 1) * step[i] >= padded - pad[i] ? size - 1 : size;
  };
  const c10::SymDimVector sizes{input.sym_size(0), input.sym_size(1), out_size(0), out_size(1)};
  constexpr auto channels_last = at::MemoryFormat::ChannelsLast;
  at::Tensor out = at::empty_symint(sizes, input.options().memory_format(channels_last), std::nullopt);
  if constexpr (!std::is_same_v<Backend, Meta>) {
    const Int8PoolShape shape{.batch = input.size(0),
                              .channels = input.size(1),
                              .in = {input.size(2), input.size(3)},
                              .out = {out.size(2), out.size(3)},
                              .kernel = {kernel[0], kernel[1]},
                              .stride = {step[0], step[1]},
                              .pad = {pad[0], pad[1]},
                              .dilation = {apart[0], apart[1]}};
    as_value_error([&] { Backend::run(shape, input.contiguous(channels_last), out); });
  }
  return out;
}

}  // namespace

void define_int8_pool(torch::Library& library) {
  library.def(
      "int8_max_pool2d(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, "
      "bool ceil_mode=False) -> Tensor");
}

void implement_int8_pool_cpu(torch::Library& library) {
  library.impl("int8_max_pool2d", &max_pool2d<Cpu>);
}
void implement_int8_pool_meta(torch::Library& library) {
  library.impl("int8_max_pool2d", &max_pool2d<Meta>);
}
void implement_int8_pool_cuda(torch::Library& library) {
#ifdef HALFSTEP_CUDA
  library.impl("int8_max_pool2d", &max_pool2d<Cuda>);
#else
  library.impl("int8_max_pool2d", torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
#endif
}

}  // namespace torch_ops

at::Tensor int8_max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::int8_max_pool2d", "")
                             .typed<decltype(torch_ops::max_pool2d<torch_ops::Cpu>)>();
  return op.call(input, kernel_size, stride, padding, dilation, ceil_mode);
}

}  // namespace halfstep
