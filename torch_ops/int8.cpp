// quantize_int8, quantize_int8_rows, dequantize_int8, quantize_int8_weight, dequantize_weight and int8_embedding:
// schemas, checks and the way to the core. Contract: halfstep/torch/int8.h.
#include "halfstep/torch/int8.h"

#include <cmath>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "conversions.h"
#include "differentiable.h"
#include "errors.h"
#include "int8_checks.h"
#include "registration.h"
#ifdef HALFSTEP_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace halfstep {
namespace torch_ops {

Int8Parameters checked_parameters(double scale, std::int64_t zero_point, std::string_view op,
                                  std::string_view argument) {
  TORCH_CHECK_VALUE(std::isfinite(scale) && scale >= 0x1p-126 && scale <= 0x1.fffffep+127, op, ": ", argument, " is ",
                    scale, ", expected a positive, finite and normal float32");
  TORCH_CHECK_VALUE(zero_point >= -128 && zero_point <= 127, op, ": the zero point that belongs to ", argument, " is ",
                    zero_point, ", expected -128 to 127");
  return {static_cast<float>(scale), static_cast<std::int32_t>(zero_point)};
}

at::Tensor dense_in_place(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
}

namespace {

void check_float(const at::Tensor& input, std::string_view op) {
  check_floating(input, op, "input", input.device());
}
void check_int8(const at::Tensor& input, std::string_view op) {
  TORCH_CHECK_TYPE(input.scalar_type() == at::kChar, op, ": input has dtype ", input.scalar_type(), ", expected Char");
}
void check_out_dtype(at::ScalarType dtype, std::string_view op) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op, ": out_dtype is ", dtype,
                   ", expected Float, Half or BFloat16");
}

struct Cpu {
  static void quantize(const at::Tensor& input, const Int8Parameters& parameters, const at::Tensor& out) {
    cpu::quantize(view_of(input), {}, parameters, out.data_ptr<std::int8_t>(), TorchExecutor());
  }
  static void quantize_rows(const at::Tensor& input, std::int64_t rows, const at::Tensor& out,
                            const at::Tensor& scales) {
    cpu::quantize_rows(view_of(input), {}, rows, out.data_ptr<std::int8_t>(), scales.data_ptr<float>(),
                       TorchExecutor());
  }
  static void dequantize(const at::Tensor& input, const Int8Parameters& parameters, const at::Tensor& out) {
    cpu::dequantize(input.const_data_ptr<std::int8_t>(), parameters, view_of(out), TorchExecutor());
  }
  static void embed(const Int8Embedding& call, const at::Tensor&) {
    as_value_error([&] { cpu::int8_embedding(call, TorchExecutor()); });
  }
};

#ifdef HALFSTEP_CUDA
struct Cuda {
  static CudaStream stream() { return {c10::cuda::getCurrentCUDAStream().stream()}; }

  static void quantize(const at::Tensor& input, const Int8Parameters& parameters, const at::Tensor& out) {
    const c10::cuda::CUDAGuard guard(input.device());
    cuda::quantize(view_of(input), {}, parameters, out.data_ptr<std::int8_t>(), stream());
  }
  static void quantize_rows(const at::Tensor& input, std::int64_t rows, const at::Tensor& out,
                            const at::Tensor& scales) {
    const c10::cuda::CUDAGuard guard(input.device());
    cuda::quantize_rows(view_of(input), {}, rows, out.data_ptr<std::int8_t>(), scales.data_ptr<float>(), stream());
  }
  static void dequantize(const at::Tensor& input, const Int8Parameters& parameters, const at::Tensor& out) {
    const c10::cuda::CUDAGuard guard(input.device());
    cuda::dequantize(input.const_data_ptr<std::int8_t>(), parameters, view_of(out), stream());
  }
  static void embed(const Int8Embedding& call, const at::Tensor& indices) {
    const c10::cuda::CUDAGuard guard(indices.device());
    cuda::int8_embedding(call, stream());
  }
};
#endif

struct Meta {};

template <class Backend>
at::Tensor quantize_int8(const at::Tensor& input, double scale, std::int64_t zero_point) {
  constexpr std::string_view op = "quantize_int8";
  check_float(input, op);
  const Int8Parameters parameters = checked_parameters(scale, zero_point, op, "scale");
  const at::Tensor x = dense_in_place(input);
  at::Tensor out = at::empty_like(x, x.options().dtype(at::kChar));
  if constexpr (!std::is_same_v<Backend, Meta>) {
    if (x.numel() > 0) Backend::quantize(x, parameters, out);
  }
  return out;
}

template <class Backend>
std::tuple<at::Tensor, at::Tensor> quantize_int8_rows(const at::Tensor& input) {
  constexpr std::string_view op = "quantize_int8_rows";
  check_float(input, op);
  TORCH_CHECK_VALUE(input.dim() >= 1, op, ": input has no dimension, expected rows along the last one");
  at::Tensor out = at::empty_symint(input.sym_sizes(), input.options().dtype(at::kChar));
  at::Tensor scales = at::empty_symint(input.sym_sizes().slice(0, input.dim() - 1), input.options().dtype(at::kFloat));
  if constexpr (!std::is_same_v<Backend, Meta>) {
    if (scales.numel() > 0) Backend::quantize_rows(input.contiguous(), scales.numel(), out, scales);
  }
  return {out, scales};
}

template <class Backend>
at::Tensor dequantize_int8(const at::Tensor& input, double scale, std::int64_t zero_point, at::ScalarType out_dtype) {
  constexpr std::string_view op = "dequantize_int8";
  check_int8(input, op);
  check_out_dtype(out_dtype, op);
  const Int8Parameters parameters = checked_parameters(scale, zero_point, op, "scale");
  const at::Tensor q = dense_in_place(input);
  at::Tensor out = at::empty_like(q, q.options().dtype(out_dtype));
  if constexpr (!std::is_same_v<Backend, Meta>) {
    if (q.numel() > 0) Backend::dequantize(q, parameters, out);
  }
  return out;
}

// Once for each layer, so on the CPU wherever the weight is.
std::tuple<at::Tensor, at::Tensor> quantize_int8_weight(const at::Tensor& weight, std::int64_t bits, bool search) {
  constexpr std::string_view op = "quantize_int8_weight";
  check_floating(weight, op, "weight", weight.device());
  TORCH_CHECK_VALUE(weight.dim() >= 2, op, ": weight has shape ", weight.sizes(),
                    ", expected output channels and at least one more dimension");
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, op, ": bits is ", bits, ", expected 2 to 8");
  const at::Tensor w = weight.cpu().contiguous();
  at::Tensor out = at::empty(w.sizes(), w.options().dtype(at::kChar));
  at::Tensor scales = at::empty({w.size(0)}, w.options().dtype(at::kFloat));
  as_value_error([&] {
    cpu::quantize_weight(view_of(w), w.size(0), static_cast<int>(bits), search, out.data_ptr<std::int8_t>(),
                         scales.data_ptr<float>(), TorchExecutor());
  });
  return {out.to(weight.device()), scales.to(weight.device())};
}

template <class Backend>
at::Tensor int8_embedding(const at::Tensor& indices, const c10::intrusive_ptr<PackedInt8>& weight,
                          at::ScalarType out_dtype) {
  constexpr std::string_view op = "int8_embedding";
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt, op, ": indices has dtype ",
                   indices.scalar_type(), ", expected Long or Int");
  TORCH_CHECK_VALUE(weight->weight().dim() == 2, op, ": weight has shape ", weight->weight().sizes(),
                    ", expected entries and width");
  check_out_dtype(out_dtype, op);
  const std::int64_t width = weight->weight().size(1);
  c10::SymDimVector sizes(indices.sym_sizes().begin(), indices.sym_sizes().end());
  sizes.emplace_back(width);
  at::Tensor out = at::empty_symint(sizes, indices.options().dtype(out_dtype));
  if (out.numel() == 0) return out;
  // A table is read as it is stored: a form() on its own device would only hold it once more, packed for products.
  const bool here = weight->weight().device() == indices.device();
  const auto form = here ? nullptr : weight->form(indices.device());
  const at::Tensor& table = here ? weight->weight() : form->weight;
  const at::Tensor& scales = here ? weight->scales() : form->scales;
  const at::Tensor dense_indices = indices.contiguous();
  Backend::embed(
      {table.template const_data_ptr<std::int8_t>(), scales.template const_data_ptr<float>(), table.size(0), width,
       dense_indices.const_data_ptr(), indices.scalar_type() == at::kLong, dense_indices.numel(), view_of(out)},
      indices);
  return out;
}

// Where the weight is: there is no other tensor to go by. It reads the plain weight, as an embedding does.
at::Tensor dequantize_weight(const c10::intrusive_ptr<PackedInt8>& weight, at::ScalarType out_dtype) {
  constexpr std::string_view op = "dequantize_weight";
  const at::Tensor& plain = weight->weight();
  TORCH_CHECK_VALUE(plain.dim() == 2, op, ": weight has shape ", plain.sizes(), ", expected rows and columns");
  check_out_dtype(out_dtype, op);
  at::Tensor out = at::empty(plain.sizes(), plain.options().dtype(out_dtype));
  if (out.numel() == 0 || plain.is_meta()) return out;
  const at::Tensor rows = at::arange(plain.size(0), plain.options().dtype(at::kInt));
  const Int8Embedding call{plain.const_data_ptr<std::int8_t>(),
                           weight->scales().const_data_ptr<float>(),
                           plain.size(0),
                           plain.size(1),
                           rows.const_data_ptr(),
                           false,
                           plain.size(0),
                           view_of(out)};
  if (plain.is_cpu()) {
    Cpu::embed(call, rows);
    return out;
  }
#ifdef HALFSTEP_CUDA
  if (plain.is_cuda()) {
    Cuda::embed(call, rows);
    return out;
  }
#endif
  TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": the weight is on ", plain.device(), ", expected cpu or cuda",
                              plain.is_cuda() ? "; this halfstep was built without CUDA" : "");
}

template <class Backend>
void implement(torch::Library& library) {
  library.impl("quantize_int8", &quantize_int8<Backend>);
  library.impl("quantize_int8_rows", &quantize_int8_rows<Backend>);
  library.impl("dequantize_int8", &dequantize_int8<Backend>);
  // What a traced program knows of an op with an object among its arguments is in halfstep/int8_fake.py; torch takes no
  // other Meta kernel beside it.
  if constexpr (!std::is_same_v<Backend, Meta>) library.impl("int8_embedding", &int8_embedding<Backend>);
}

}  // namespace

void define_int8(torch::Library& library) {
  library.def("quantize_int8(Tensor input, float scale, int zero_point=0) -> Tensor");
  library.def("quantize_int8_rows(Tensor input) -> (Tensor, Tensor)");
  library.def("dequantize_int8(Tensor input, float scale, int zero_point=0, ScalarType out_dtype=float) -> Tensor");
  library.def("quantize_int8_weight(Tensor weight, int bits=8, bool search=False) -> (Tensor, Tensor)",
              &quantize_int8_weight);
  library.def(
      "int8_embedding(Tensor indices, __torch__.torch.classes.halfstep.PackedInt8 weight, "
      "ScalarType out_dtype=float) -> Tensor");
  library.def("dequantize_weight(__torch__.torch.classes.halfstep.PackedInt8 weight, ScalarType out_dtype) -> Tensor");
  library.impl("dequantize_weight",
               torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(dequantize_weight)));
}

void implement_int8_cpu(torch::Library& library) {
  implement<Cpu>(library);
}
void implement_int8_meta(torch::Library& library) {
  implement<Meta>(library);
}
void implement_int8_cuda(torch::Library& library) {
#ifdef HALFSTEP_CUDA
  implement<Cuda>(library);
#else
  for (const char* name : {"quantize_int8", "quantize_int8_rows", "dequantize_int8", "int8_embedding"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
#endif
}

}  // namespace torch_ops

at::Tensor int8_embedding(const at::Tensor& indices, const c10::intrusive_ptr<PackedInt8>& weight,
                          at::ScalarType out_dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::int8_embedding", "")
                             .typed<decltype(torch_ops::int8_embedding<torch_ops::Cpu>)>();
  return op.call(indices, weight, out_dtype);
}

at::Tensor dequantize_weight(const c10::intrusive_ptr<PackedInt8>& weight, at::ScalarType out_dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::dequantize_weight", "")
                             .typed<decltype(torch_ops::dequantize_weight)>();
  return op.call(weight, out_dtype);
}

at::Tensor quantize_int8(const at::Tensor& input, double scale, std::int64_t zero_point) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("halfstep::quantize_int8", "")
                             .typed<decltype(torch_ops::quantize_int8<torch_ops::Cpu>)>();
  return op.call(input, scale, zero_point);
}

}  // namespace halfstep
