// torch.classes.halfstep.PackedInt8. Contract: halfstep/torch/int8.h.
#include <cstring>
#include <limits>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros_like.h>

#include "halfstep/int8.h"
#include "halfstep/torch/int8.h"
#include "registration.h"
#ifdef HALFSTEP_CUDA
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace halfstep {
namespace {

void check_vector(const at::Tensor& tensor, const char* argument, const at::Tensor& weight, std::int64_t dim = 0) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, "PackedInt8: ", argument, " has dtype ", tensor.scalar_type(),
                   ", expected Float");
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == weight.size(dim), "PackedInt8: ", argument, " has shape ",
                    tensor.sizes(), ", expected [", weight.size(dim), "], one for each ", dim == 0 ? "output" : "input",
                    " channel");
  TORCH_CHECK_VALUE(tensor.device() == weight.device(), "PackedInt8: ", argument, " is on ", tensor.device(),
                    ", expected ", weight.device(), ", the weight's device");
}

void check_pair(const std::array<std::int64_t, 2>& pair, const char* argument, std::int64_t least) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();  // sizes made of it fit an int64
  TORCH_CHECK_VALUE(pair[0] >= least && pair[1] >= least && pair[0] <= kMost && pair[1] <= kMost,
                    "PackedInt8: ", argument, " is [", pair[0], ", ", pair[1], "], expected ", least, " .. ", kMost);
}

// Channels last in memory for a convolution: the order of the terms in every kernel.
at::Tensor dense(const at::Tensor& weight) {
  return weight.contiguous(weight.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

// All that have an id. Never destroyed: the last ones may die with the process.
struct Ids {
  std::shared_mutex mutex;
  std::int64_t last = 0;
  std::unordered_map<std::int64_t, c10::weak_intrusive_ptr<PackedInt8>> known;
};
Ids& ids() {
  static auto* const ids = new Ids;
  return *ids;
}

std::optional<at::Tensor> moved(const std::optional<at::Tensor>& tensor, at::Device device) {
  return tensor ? std::optional(tensor->to(device)) : std::nullopt;
}

}  // namespace

PackedInt8::PackedInt8(const at::Tensor& weight, const at::Tensor& scales, const std::optional<at::Tensor>& bias,
                       const Geometry& geometry, const std::optional<at::Tensor>& input_factors)
    : geometry_(geometry) {
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kChar, "PackedInt8: weight has dtype ", weight.scalar_type(),
                   ", expected Char");
  TORCH_CHECK_VALUE(weight.layout() == at::kStrided && (weight.dim() == 2 || weight.dim() == 4),
                    "PackedInt8: weight has shape ", weight.sizes(),
                    ", expected a strided [out, in] or [out, in / groups, height, width]");
  check_vector(scales, "scales", weight);
  if (bias) check_vector(*bias, "bias", weight);
  check_pair(geometry.stride, "stride", 1);
  check_pair(geometry.padding, "padding", 0);
  check_pair(geometry.dilation, "dilation", 1);
  TORCH_CHECK_VALUE(geometry.groups >= 1 && weight.size(0) % geometry.groups == 0, "PackedInt8: groups is ",
                    geometry.groups, ", expected a divisor of the ", weight.size(0), " output channels");
  TORCH_CHECK_VALUE(weight.dim() == 4 || geometry.groups == 1, "PackedInt8: groups is ", geometry.groups,
                    ", expected 1 for a weight of two dimensions");
  if (input_factors) {
    check_vector(*input_factors, "input_factors", weight, 1);
    TORCH_CHECK_VALUE(geometry.groups == 1, "PackedInt8: groups is ", geometry.groups,
                      ", expected 1 with input_factors");
    input_factors_ = input_factors->detach().contiguous();
  }
  weight_ = dense(weight.detach());
  scales_ = scales.detach().contiguous();
  if (bias) bias_ = bias->detach().contiguous();
  if (!weight.is_meta()) {
    TORCH_CHECK_VALUE(scales_.isfinite().logical_and(scales_.gt(0)).all().item<bool>(),
                      "PackedInt8: scales has elements that are not positive and finite");
  }
}

c10::intrusive_ptr<PackedInt8> PackedInt8::to(at::Device device) const {
  return c10::make_intrusive<PackedInt8>(weight_.to(device), scales_.to(device), moved(bias_, device), geometry_,
                                         moved(input_factors_, device));
}

void PackedInt8::Form::take(const PackedInt8& plain, at::Device device) {
  weight = dense(plain.weight_.to(device));
  scales = plain.scales_.to(device);
  bias = moved(plain.bias_, device);
  input_factors = moved(plain.input_factors_, device);
}

c10::intrusive_ptr<PackedInt8> PackedInt8::corrected(at::TensorList shifts) const {
  TORCH_CHECK_VALUE(!shifts.empty(), "PackedInt8.corrected: got no shifts, expected at least one");
  at::Tensor sum = at::zeros_like(scales_, scales_.options().dtype(at::kDouble));
  for (const at::Tensor& shift : shifts) sum += shift.to(sum.device());
  sum /= static_cast<double>(shifts.size());
  if (bias_) sum += *bias_;
  return c10::make_intrusive<PackedInt8>(weight_, scales_, sum.to(at::kFloat), geometry_, input_factors_);
}

std::int64_t PackedInt8::id(const c10::intrusive_ptr<PackedInt8>& packed) {
  const std::unique_lock lock(ids().mutex);
  if (packed->id_ == 0) {
    packed->id_ = ++ids().last;
    ids().known.emplace(packed->id_, packed);
  }
  return packed->id_;
}

c10::intrusive_ptr<PackedInt8> PackedInt8::with_id(std::int64_t id) {
  c10::intrusive_ptr<PackedInt8> found;
  {
    const std::shared_lock lock(ids().mutex);
    const auto place = ids().known.find(id);
    if (place != ids().known.end()) found = place->second.lock();
  }
  TORCH_CHECK_VALUE(found, "PackedInt8: no object of this process has the id ", id);
  return found;
}

// Called where there are weak owners, as an id is; the object is deleted behind it.
void PackedInt8::release_resources() {
  c10::weak_intrusive_ptr<PackedInt8> gone{c10::intrusive_ptr<PackedInt8>()};  // dies when the lock is free
  const std::unique_lock lock(ids().mutex);
  const auto place = ids().known.find(id_);
  if (place == ids().known.end()) return;
  gone = std::move(place->second);
  ids().known.erase(place);
}

std::shared_ptr<const PackedInt8::Form> PackedInt8::form(at::Device device) const {
  const std::lock_guard lock(mutex_);
  auto& form = forms_[{device.type(), device.index()}];
  if (!form) form = make_form(device);
  return form;
}

std::shared_ptr<const PackedInt8::Form> PackedInt8::make_form(at::Device device) const {
  auto form = std::make_shared<Form>();
  const Int8WeightShape shape{weight_.size(0), weight_.size(0) > 0 ? weight_.numel() / weight_.size(0) : 0,
                              geometry_.groups};
  if (device.is_cpu()) {
    form->take(*this, device);
    // The packed form starts at a 64-byte boundary, as torch's CPU allocator gives it.
    form->packed = at::empty({static_cast<std::int64_t>(cpu::int8_packed_bytes(shape))}, at::kByte);
    cpu::int8_pack(shape, form->weight.const_data_ptr<std::int8_t>(), form->packed.data_ptr());
    return form;
  }
#ifdef HALFSTEP_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    TORCH_CHECK(c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None,
                "PackedInt8: the weights are not prepared for ", device,
                " yet, which cannot be done while a CUDA graph is captured. Call the model once before the capture.");
    form->take(*this, device);
    form->packed = at::empty({shape.channels}, form->weight.options().dtype(at::kInt));
    const auto stream = c10::cuda::getCurrentCUDAStream();
    cuda::int8_weight_sums(shape, form->weight.const_data_ptr<std::int8_t>(), form->packed.data_ptr<std::int32_t>(),
                           {stream.stream()});
    stream.synchronize();  // calls on other streams may come next
    return form;
  }
#endif
  TORCH_CHECK_NOT_IMPLEMENTED(false, "PackedInt8: the device is ", device, ", expected cpu or cuda",
                              device.is_cuda() ? "; this halfstep was built without CUDA" : "");
}

namespace torch_ops {
namespace {

using Self = c10::intrusive_ptr<PackedInt8>;
using Sizes = std::vector<std::int64_t>;
using OptionalTensor = std::optional<at::Tensor>;
// weight, scales, bias, input_factors; and stride, padding, dilation, [groups].
using Pickled = std::tuple<std::vector<OptionalTensor>, std::vector<Sizes>>;

std::array<std::int64_t, 2> pair_of(const Sizes& sizes, const char* argument) {
  TORCH_CHECK_VALUE(sizes.size() == 2, "PackedInt8: ", argument, " has ", sizes.size(), " elements, expected 2");
  return {sizes[0], sizes[1]};
}

Self make(const at::Tensor& weight, const at::Tensor& scales, const std::optional<at::Tensor>& bias,
          const Sizes& stride, const Sizes& padding, const Sizes& dilation, std::int64_t groups,
          const OptionalTensor& input_factors) {
  return c10::make_intrusive<PackedInt8>(weight, scales, bias,
                                         PackedInt8::Geometry{pair_of(stride, "stride"), pair_of(padding, "padding"),
                                                              pair_of(dilation, "dilation"), groups},
                                         input_factors);
}

Sizes list_of(const std::array<std::int64_t, 2>& pair) {
  return {pair[0], pair[1]};
}

Pickled pickled(const Self& self) {
  const auto& g = self->geometry();
  return {{self->weight(), self->scales(), self->bias(), self->input_factors()},
          {list_of(g.stride), list_of(g.padding), list_of(g.dilation), {g.groups}}};
}

Self unpickled(const Pickled& state) {
  const auto& [tensors, lists] = state;
  TORCH_CHECK_VALUE(tensors.size() == 4 && tensors[0] && tensors[1] && lists.size() == 4 && lists[3].size() == 1,
                    "PackedInt8: the pickle has ", tensors.size(), " tensors and ", lists.size(),
                    " lists, expected 4 of each");
  return make(*tensors[0], *tensors[1], tensors[2], lists[0], lists[1], lists[2], lists[3][0], tensors[3]);
}

template <class T>
using Named = std::tuple<std::string, T>;

}  // namespace

void define_packed_int8(torch::Library& library) {
  library.class_<PackedInt8>("PackedInt8")
      .def(
          torch::init(&make), "",
          {torch::arg("weight"), torch::arg("scales"), torch::arg("bias") = c10::IValue(),
           torch::arg("stride") = Sizes{1, 1}, torch::arg("padding") = Sizes{0, 0},
           torch::arg("dilation") = Sizes{1, 1}, torch::arg("groups") = 1, torch::arg("input_factors") = c10::IValue()})
      .def("weight", [](const Self& self) { return self->weight(); })
      .def("scales", [](const Self& self) { return self->scales(); })
      .def("bias", [](const Self& self) { return self->bias(); })
      .def("input_factors", [](const Self& self) { return self->input_factors(); })
      .def("stride", [](const Self& self) { return list_of(self->geometry().stride); })
      .def("padding", [](const Self& self) { return list_of(self->geometry().padding); })
      .def("dilation", [](const Self& self) { return list_of(self->geometry().dilation); })
      .def("groups", [](const Self& self) { return self->geometry().groups; })
      .def("to", [](const Self& self, const at::Device& device) { return self->to(device); })
      .def("corrected", [](const Self& self, const std::vector<at::Tensor>& shifts) { return self->corrected(shifts); })
      .def("id", &PackedInt8::id)
      .def("prepare", [](const Self& self, const at::Device& device) { self->form(device); })
      // What torch.export shows to the fake class of halfstep/int8_fake.py.
      .def("__obj_flatten__",
           [](const Self& self) {
             const auto& g = self->geometry();
             return std::tuple(Named<at::Tensor>("weight", self->weight()), Named<at::Tensor>("scales", self->scales()),
                               Named<OptionalTensor>("bias", self->bias()), Named<Sizes>("stride", list_of(g.stride)),
                               Named<Sizes>("padding", list_of(g.padding)),
                               Named<Sizes>("dilation", list_of(g.dilation)), Named<std::int64_t>("groups", g.groups),
                               Named<OptionalTensor>("input_factors", self->input_factors()));
           })
      .def_pickle([](const Self& self) { return pickled(self); },
                  [](const Pickled& state) { return unpickled(state); });
}

}  // namespace torch_ops
}  // namespace halfstep
