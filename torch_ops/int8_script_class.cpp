// torch.classes.halfstep.ScriptForm: the steps of quantize() for Python, which calibrates, chooses and judges itself.
#include <algorithm>

#include <c10/util/Exception.h>

#include "int8_script_graph.h"
#include "registration.h"

namespace halfstep::torch_ops {
namespace {

using Watch = ScriptForm::Watch;

struct ScriptFormClass : torch::CustomClassHolder {
  ScriptFormClass(const torch::jit::Module& module, bool fold_batch_norm) : form(module, fold_batch_norm) {}
  ScriptForm form;
};

using Self = c10::intrusive_ptr<ScriptFormClass>;
using Sizes = std::vector<std::int64_t>;
using Pairs = std::vector<std::tuple<std::string, std::string>>;
// name, kind, weight, bias; stride, padding, dilation, [groups].
using Layer = std::tuple<std::string, std::string, at::Tensor, std::optional<at::Tensor>, std::vector<Sizes>>;
// The names of the layers of a region, and what they took over.
using Region = std::tuple<std::vector<std::string>, std::vector<std::string>>;

Self make(const c10::IValue& module, bool fold_batch_norm) {
  TORCH_CHECK_TYPE(module.isModule(), "ScriptForm: module is a ", module.tagKind(),
                   ", expected a scripted or traced module");
  return c10::make_intrusive<ScriptFormClass>(module.toModule(), fold_batch_norm);
}

std::vector<Layer> layers(const Self& self) {
  std::vector<Layer> all;
  const auto list = [](const std::array<std::int64_t, 2>& pair) { return Sizes{pair[0], pair[1]}; };
  for (const ScriptLayer& layer : self->form.layers()) {
    const PackedInt8::Geometry& g = layer.geometry;
    all.emplace_back(layer.name, layer.kind, layer.weight, layer.bias,
                     std::vector<Sizes>{list(g.stride), list(g.padding), list(g.dilation), {g.groups}});
  }
  return all;
}

template <class Container>
Pairs pairs(const Container& of) {
  return {of.begin(), of.end()};
}

// names: of the layers that become int8, with weights, and scale and zero point of their inputs; a scale of 0: by row.
std::tuple<c10::IValue, std::vector<Region>> build(const Self& self, const std::vector<std::string>& names,
                                                   const std::vector<c10::intrusive_ptr<PackedInt8>>& packed,
                                                   const std::vector<double>& scales, const Sizes& zero_points,
                                                   at::ScalarType out_dtype) {
  TORCH_CHECK_VALUE(
      packed.size() == names.size() && scales.size() == names.size() && zero_points.size() == names.size(),
      "ScriptForm.build: got ", names.size(), " names, ", packed.size(), " weights, ", scales.size(), " scales and ",
      zero_points.size(), " zero points, expected as many of each");
  std::map<std::size_t, ScriptSettings> settings;
  const std::vector<ScriptLayer>& all = self->form.layers();
  for (std::size_t i = 0; i < names.size(); ++i) {
    const auto found = std::ranges::find(all, names[i], &ScriptLayer::name);
    TORCH_CHECK_VALUE(found != all.end(), "ScriptForm.build: names has '", names[i], "', which is no layer");
    TORCH_CHECK_VALUE(packed[i]->weight().sizes() == found->weight.sizes(), "ScriptForm.build: the weight of '",
                      names[i], "' has shape ", packed[i]->weight().sizes(), ", expected ", found->weight.sizes());
    settings[static_cast<std::size_t>(found - all.begin())] = {
        packed[i], scales[i] == 0.0 ? std::nullopt : std::optional(scales[i]), zero_points[i]};
  }
  const ScriptForm::Built built = self->form.build(settings, out_dtype);
  std::vector<Region> regions;
  for (const ScriptRegion& region : built.regions) {
    auto& [layer_names, fused] = regions.emplace_back();
    for (const std::size_t layer : region.layers) layer_names.push_back(all[layer].name);
    for (const auto& [layer, line] : region.fused) fused.push_back(line);
  }
  return {built.module._ivalue(), regions};
}

}  // namespace

void define_int8_script(torch::Library& library) {
  using WatchSelf = c10::intrusive_ptr<Watch>;
  library.class_<Watch>("ScriptWatch")
      .def("see",
           [](const WatchSelf& self, std::int64_t layer, const at::Tensor& input) {
             if (self->see) self->see(static_cast<std::size_t>(layer), input);
           })
      .def("compare", [](const WatchSelf& self, std::int64_t sum, const at::Tensor& one, const at::Tensor& other) {
        if (self->compare) self->compare(static_cast<std::size_t>(sum), one, other);
      });
  // A layer of a form's calling(). Python implements it: halfstep/int8_script_form.py.
  library.def("script_layer(Tensor input, str name) -> Tensor");
  library.class_<ScriptFormClass>("ScriptForm")
      .def(torch::init(&make), "", {torch::arg("module"), torch::arg("fold_batch_norm") = true})
      .def("layers", &layers)
      .def("left", [](const Self& self) { return pairs(self->form.left()); })
      .def("folded", [](const Self& self) { return pairs(self->form.folded()); })
      // arguments: a tuple
      .def("probe", [](const Self& self,
                       const c10::IValue& arguments) { self->form.probe(arguments.toTupleRef().elements().vec()); })
      .def("calling", [](const Self& self) { return c10::IValue(self->form.calling()._ivalue()); })
      .def("build", &build);
}

}  // namespace halfstep::torch_ops
