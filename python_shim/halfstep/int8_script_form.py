"""The float form of a TorchScript model: its products as layers that can be hooked, and scripts in which they are int8.

The graph is rewritten in C++ (torch_ops/int8_script_form.cpp). For calibration and ranking the script calls out to
layers of torch.nn, so that whoever watches layers sees them as those of any model.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from halfstep._library import load_library
from halfstep.calibration_data import Batch, naming
from halfstep.half_model import cast_floats, float_dtype, name_of
from halfstep.int8_batches import floating_tensors_of
from halfstep.int8_calibration import seeing_inputs
from halfstep.int8_form import Arguments, Region, call_with
from halfstep.int8_layers import Int8Embedding
from halfstep.int8_model import Candidate, not_selected
from halfstep.int8_report import Report
from halfstep.int8_speed import Timing, time_on_device
from halfstep.int8_uses import uses_of
from halfstep.signatures import signature_of

load_library()

_PROBED = 32  # samples by which the form is compared with the model
_ROUNDING = 1e-6  # the share of its power by which an output may differ when attention is computed in parts
_SCRIPT = "<script>"  # no submodule of a script has such a name
_DIMS = {"conv1d": 3, "conv2d": 4}

_running = threading.local()


def _wrapped(module: Any) -> torch.jit.ScriptModule:
    return torch.jit._recursive.wrap_cpp_module(module)


@functools.cache
def _implementation() -> torch.library.Library:
    """Implement the op by which a script calls the layers of the ScriptModel that runs it."""
    library = torch.library.Library("halfstep", "IMPL")

    def script_layer(input: torch.Tensor, name: str) -> torch.Tensor:
        models = getattr(_running, "models", None)
        if not models:
            raise RuntimeError(f"script_layer: {name!r} is called outside of a ScriptModel")
        return models[-1].get_submodule(name)(input)

    library.impl("script_layer", script_layer, "CompositeImplicitAutograd")
    return library


class ScriptModel(nn.Module):
    """A script whose products are submodules, by the names of its layers."""

    def __init__(self, script: torch.jit.ScriptModule, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        _implementation()
        self.add_module(_SCRIPT, script)
        for name, layer in layers.items():
            owner: nn.Module = self
            *outer, last = name.split(".")
            for part in outer:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            layer._modules.update(owner._modules[last]._modules if last in owner._modules else {})
            owner.add_module(last, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the script, as it stands: its executor would take calls apart that hooks and gradients look at."""
        with self._runs(), torch.jit.optimized_execution(False):
            return self._modules[_SCRIPT](*args, **kwargs)

    @contextlib.contextmanager
    def _runs(self) -> Iterator[None]:
        models = _running.__dict__.setdefault("models", [])
        models.append(self)
        try:
            yield
        finally:
            models.pop()


def _layer(kind: str, weight: torch.Tensor, bias: torch.Tensor | None, geometry: list[list[int]]) -> nn.Module:
    """Make the layer of torch.nn that the product is."""
    with torch.device("meta"):
        if kind == "linear":
            layer = nn.Linear(1, 1)
        elif kind == "embedding":
            layer = nn.Embedding(1, 1)
        else:
            stride, padding, dilation, (groups,) = geometry
            dims = slice(1, 2) if kind == "conv1d" else slice(0, 2)
            if kind == "conv1d":
                weight = weight.squeeze(2)
            make = nn.Conv1d if kind == "conv1d" else nn.Conv2d
            channels = weight.shape[1] * groups, weight.shape[0]
            sizes = [tuple(each[dims]) for each in (weight.shape[2:], stride, padding, dilation)]
            layer = make(*channels, tuple(weight.shape[2:]), *sizes[1:], groups)
    if kind == "linear":
        layer.out_features, layer.in_features = weight.shape
    elif kind == "embedding":
        layer.num_embeddings, layer.embedding_dim = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if kind != "embedding":
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer.eval()


def _finite_part(reference: torch.jit.ScriptModule, batches: list[Batch]) -> tuple[Batch, list[torch.Tensor]]:
    """Return some samples and the model's outputs: of the first batch with finite ones, or else of the first."""
    parts = []
    for batch in batches:
        part = batch.part(0, _PROBED)
        with torch.no_grad(), naming(batch, reference):
            parts.append((part, floating_tensors_of(part(reference))))
        if all(bool(output.isfinite().all()) for output in parts[-1][1]):
            return parts[-1]
    return parts[0]


class ScriptForm:
    """What Form is for a model of TorchScript. `model` is a ScriptModel; build() gives scripts.

    ValueError for a script whose forward cannot be taken apart: halfstep/torch/int8_script.h says which.
    """

    def __init__(self, reference: torch.jit.ScriptModule, batches: list[Batch], fold: bool, report: Report) -> None:
        self.attention: list[str] = []
        self.norms: list[tuple[str, str]] = []
        self._form = torch.classes.halfstep.ScriptForm(reference._c, fold)
        self._own = float_dtype(reference)
        self._kinds: dict[str, str] = {}
        layers: dict[str, nn.Module] = {}
        for name, kind, weight, bias, geometry in self._form.layers():
            self._kinds[name] = kind
            layers[name] = _layer(kind, weight, bias, geometry)
        self.model = ScriptModel(_wrapped(self._form.calling()), layers)
        self.norms = [(convolution, norm) for norm, convolution in self._form.folded()]
        report.graph = "TorchScript: products are taken one by one out of its graph"
        report.folded = [f"{norm} into {convolution}" for convolution, norm in self.norms]
        probe, wanted = _finite_part(reference, batches)
        self._obstacle = self._disagreement(wanted, probe)
        self._probe(reference, probe)

    def _disagreement(self, wanted: list[torch.Tensor], batch: Batch) -> str:
        """Return "" if the form gives the model's outputs on the batch, `wanted`, but for rounding."""
        with torch.no_grad():
            pairs = zip(wanted, floating_tensors_of(batch(self.model)), strict=True)
            noise = max((max(torch.ops.halfstep.output_noise(*pair).tolist()) for pair in pairs), default=0.0)
        if noise <= _ROUNDING or self._own != torch.float32:  # in half precision rounding alone is more than that
            return ""
        return f"the script computes something else when its calls are inlined: outputs differ by {noise:.2g}"

    def _probe(self, reference: torch.jit.ScriptModule, probe: Batch) -> None:
        """Let the form learn which tensors are added that have one shape, whatever the size of the batch."""
        for part in (probe, probe.part(0, max(1, probe.size - 1))):
            args, kwargs = part.arguments()
            bound = signature_of(reference).bind(*args, **kwargs)
            bound.apply_defaults()
            if not bound.kwargs:
                # A model that does not take fewer samples is left to what the first size tells.
                with contextlib.nullcontext() if part is probe else contextlib.suppress(RuntimeError):
                    self._form.probe(bound.args)

    def candidates(
        self, batches: list[Batch], include: tuple[str, ...], exclude: tuple[str, ...]
    ) -> tuple[dict[str, Candidate], dict[str, str]]:
        """Return the layers that can be int8, and of each other one with weights why it stays float; see Form."""
        left = dict(self._form.left())
        names = [name for name, _ in self.model.named_modules()]
        names += [".".join(name.split(".")[:end]) for name in left for end in range(1, name.count(".") + 2)]
        for argument, globs in (("include", include), ("exclude", exclude)):
            for glob in globs:
                if not fnmatch.filter(names, glob):
                    raise ValueError(f"{argument} has {glob!r}, which names no layer of the model")
        for name in self._kinds:
            if reason := self._obstacle or not_selected(name, include, exclude):
                left[name] = reason
        found = {
            name: Candidate(name, kind, self.model.get_submodule(name))
            for name, kind in self._kinds.items()
            if name not in left
        }

        def see(name: str, value: Any) -> None:
            if value.dim() != _DIMS[found[name].kind]:
                left[name] = "it is called without a batch dimension"

        watched = {name: each.module for name, each in found.items() if each.kind in _DIMS}
        with seeing_inputs(watched, see):
            uses = uses_of(self.model, {name: candidate.module for name, candidate in found.items()}, batches)
        left.update((name, use.obstacle) for name, use in uses.items() if use.obstacle)
        return {name: candidate for name, candidate in found.items() if name not in left}, left

    def build(self, inner: nn.Module, layers: dict[str, nn.Module], dtype: torch.dtype) -> torch.jit.ScriptModule:
        """Return the script in `dtype` with these layers int8; `inner` is `model` in `dtype`, of which it is made."""
        return self._build(layers, dtype)[0]

    def regions(self, inner: nn.Module, layers: dict[str, nn.Module], dtype: torch.dtype) -> list[Region]:
        """Return the regions that these layers make."""
        return self._build(layers, dtype)[1]

    def _build(self, layers: dict[str, nn.Module], dtype: torch.dtype) -> tuple[torch.jit.ScriptModule, list[Region]]:
        module, regions = self._form.build(
            list(layers),
            [layer.packed for layer in layers.values()],
            [getattr(layer, "input_scale", None) or 0.0 for layer in layers.values()],
            [getattr(layer, "input_zero_point", 0) for layer in layers.values()],
            dtype,
        )
        script = _wrapped(module)
        script = script if dtype == self._own else script.to(dtype)
        return script.eval(), [Region(names, fused) for names, fused in regions]

    def time_region(
        self,
        region: Region,
        inners: Mapping[torch.dtype, nn.Module],
        layers: dict[str, nn.Module],
        batch: Batch,
        carrier: torch.dtype,
    ) -> dict[str, Timing]:
        """Time the layers of a region one after the other, each on what the batch gives it.

        The int8 layers behind the first one get int8, from it or with it from a norm. Empty where Form's is.
        """
        names = [name for name in region.layers if not isinstance(layers[name], Int8Embedding)]
        arguments = batch.arguments()
        calls: dict[str, Callable[[], Any]] = {}
        device = torch.device("cpu")
        for dtype, inner in inners.items():
            taken = _taken(inner, names, cast_floats(arguments, dtype))
            if not taken:
                return {}
            calls[name_of(dtype)] = partial(_run, [(inner.get_submodule(name), value) for name, value in taken.items()])
            device = next(iter(taken.values())).device
            if dtype == carrier:
                calls["int8"] = partial(_run, _int8_calls(taken, layers))
        return dict(zip(calls, time_on_device(list(calls.values()), device), strict=True))


def _run(calls: list[tuple[Callable[[torch.Tensor], Any], torch.Tensor]]) -> None:
    for layer, value in calls:
        layer(value)


def _int8_calls(
    taken: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module]
) -> list[tuple[Callable[[torch.Tensor], Any], torch.Tensor]]:
    calls: list[tuple[Callable[[torch.Tensor], Any], torch.Tensor]] = []
    for place, (name, value) in enumerate(taken.items()):
        layer = layers[name]
        if place == 0:
            calls.append((layer, value))
        elif layer.input_scale is None:  # of a norm that gives each row its scale
            quantized, scales = torch.ops.halfstep.quantize_int8_rows(value)
            calls.append((partial(layer, row_scales=scales), quantized))
        else:
            calls.append((layer, torch.ops.halfstep.quantize_int8(value, layer.input_scale, layer.input_zero_point)))
    return calls


def _taken(model: nn.Module, names: list[str], arguments: Arguments) -> dict[str, torch.Tensor]:
    """Return what each layer is called on in the first of its calls, in the order of the calls."""
    taken: dict[str, torch.Tensor] = {}
    layers = {name: model.get_submodule(name) for name in names}
    with torch.no_grad(), seeing_inputs(layers, taken.setdefault):
        call_with(model, arguments)
    return taken
