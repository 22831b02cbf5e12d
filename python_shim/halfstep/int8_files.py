"""Files of optimized models: weights as safetensors, and a plan of how they were optimized. Nothing in them is run.

The code of the model is not in the file: load_int8() takes a model of the same code, does with it what was done before
(attention, trace, batch norms, int8 layers, fusion), compares the outcome with the plan, and fills in the weights.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import inspect
import os
import platform
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from halfstep._version import __version__
from halfstep.half_model import CastModel, float_dtype, half_model, name_of
from halfstep.int8_attention import replace_attention
from halfstep.int8_chains import fuse
from halfstep.int8_folding import fold_batch_norms
from halfstep.int8_form import Arguments, Form, call_with
from halfstep.int8_graph import trace
from halfstep.int8_layers import packed_from, state_of
from halfstep.int8_model import Candidate, Int8Settings, find_candidates, replace_layers
from halfstep.int8_nodes import INT8_LAYERS
from halfstep.int8_plan import DevicePlan, LayerPlan, Plan, RegionPlan, decode, encode, residuals
from halfstep.int8_recurrent import Int8Recurrent
from halfstep.int8_report import Report
from halfstep.int8_runs import Shapes, shapes_of
from halfstep.int8_speed import loses, time_in_turns
from halfstep.shadow import unwrapped

_PLAN, _DIGEST = "halfstep_plan", "halfstep_plan_sha256"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PARTS = ("weight", "scales", "bias", "input_factors")
_BORDERS = ("out_dtype", "out_scale", "out_zero_point")  # what depends on where int8 passes between layers


@dataclass(frozen=True)
class SavedResult:
    """The last result of an optimizer, and what a file needs to know of it beside the model."""

    model: nn.Module
    outside: torch.dtype
    device: torch.device
    report: Report
    example: Arguments
    form: tuple[bool, list[str], list[tuple[str, str]]] = (False, [], [])  # traced, attention, folded

    @classmethod
    def of(
        cls, model: nn.Module, reference: nn.Module, report: Report, example: Arguments, form: Form | None
    ) -> SavedResult:
        """Describe a result; `form` is the one in which its layers became int8."""
        device = torch.device(report.device)
        own = float_dtype(reference)
        if form is None or report.result != "int8":
            return cls(model, own, device, report, example)
        done = (isinstance(form.model, GraphModule), form.attention, form.norms)
        return cls(model, own, device, report, example, done)

    @property
    def inner(self) -> nn.Module:
        """The model inside of the one that casts."""
        return self.model.module if self.carrier != self.outside else self.model

    @property
    def carrier(self) -> torch.dtype:
        """The dtype of what is not int8."""
        return getattr(torch, self.report.carrier if self.report.result == "int8" else self.report.result)

    def plan(self, orders: dict[str, list[int]]) -> Plan:
        """Return the plan; ValueError if the arguments of a traced model cannot be written down."""
        traced, attention, folded = self.form
        try:
            example = encode(self.example)
            decode(example, lambda shape, dtype: None)
        except ValueError:
            if traced:
                raise
            example = None
        added = residuals(self.inner)
        regions = [RegionPlan(each.layers, each.fused) for each in self.report.regions if each.state == "int8"]
        return Plan(
            halfstep=__version__,
            torch=torch.__version__,
            model=_class_of(self.inner),
            outside=name_of(self.outside),
            carrier=name_of(self.carrier),
            traced=traced,
            attention=attention,
            folded=[list(pair) for pair in folded],
            layers=[LayerPlan.of(name, layer, name in added) for name, layer in _int8_layers(self.inner).items()],
            regions=regions,
            example=example,
            orders=orders,
            device=DevicePlan(
                self.device.type,
                device_name(self.device),
                torch.ops.halfstep.int8_kernel(self.device) if regions else "",
                dict(self.report.milliseconds),
            ),
        )


# ----------------------------------------------------------------------------------------------------------- writing


def save_result(path: str | os.PathLike[str], saved: SavedResult) -> None:
    """Write the file. What was there is replaced when all is written. ValueError for what it cannot hold."""
    if isinstance(saved.inner, torch.jit.ScriptModule):
        raise ValueError(
            "the model is TorchScript, whose code a file of weights and a plan does not hold: use save_torchscript()"
        )
    safetensors = _package("safetensors.torch")
    if recurrent := [name for name, module in saved.inner.named_modules() if isinstance(module, Int8Recurrent)]:
        raise ValueError(
            f"{recurrent[0]} is a recurrent layer with int8 weights, of which the plan knows nothing: use "
            "save_torchscript(), or optimize without recurrent_weights"
        )
    tensors = _float_tensors(saved.inner, _int8_layers(saved.inner).values())
    orders = {name: order for name, tensor in tensors.items() if (order := _order(tensor))}
    for name, layer in _int8_layers(saved.inner).items():
        state = state_of(layer.packed)
        tensors.update({_join(name, part): state[part] for part in _PARTS if part in state})
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values() or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}: a file cannot hold it")
    text = saved.plan(orders).to_text()
    metadata = {"format": "pt", _PLAN: text, _DIGEST: _digest(text)}
    with replacing(path) as part:
        # Each in memory of its own: a file holds no two tensors in the same bytes.
        plain = {name: _plain(tensor) for name, tensor in tensors.items()}
        safetensors.save_file(plain, str(part), metadata=metadata)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the name of a file beside `path`, which takes its place if nothing is raised."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory, expected the name of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no directory, expected the one that the file goes to")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    result = tensor.detach().to("cpu").contiguous()
    shared = result.untyped_storage().nbytes() != result.numel() * result.element_size()
    return result.clone() if shared else result


def _order(tensor: torch.Tensor) -> list[int] | None:
    """Return the dimensions from the outermost in memory to the innermost; None for a contiguous tensor."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))


def _float_tensors(model: nn.Module, int8: Collection[nn.Module]) -> dict[str, torch.Tensor]:
    """Return parameters and buffers but for those of `int8`, each under the first of its names."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    left_out = {id(module) for module in int8}
    for prefix, module in model.named_modules():
        if id(module) not in left_out:
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in own:
                found.setdefault(id(tensor), (_join(prefix, name), tensor))
    return dict(found.values())


def _int8_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, INT8_LAYERS)}


# ----------------------------------------------------------------------------------------------------------- reading


def load_int8(
    path: str | os.PathLike[str],
    model: nn.Module,
    device: str | torch.device = "cpu",
    *,
    retime: bool | None = None,
) -> nn.Module:
    """Return the model that InferencePrecisionOptimizer.save() wrote, on `device` and in eval mode.

    path: the file; it is mapped to memory, and copied from there.
    model: a model of the code that was optimized. Its weights are ignored and may be on the meta device; it is not
        changed.
    retime: run int8 against the float model on random inputs of the shapes that were optimized for, and warn if int8
        is slower. None: if the device's name is not the one that int8 was timed on; that is a warning in any case.

    The result computes the saved model's bits on the same device. ValueError for a file that is damaged, none of
    halfstep's, of a newer version, or of other code than the model's; nothing of the file is read before its sizes are
    known to be the model's. FileNotFoundError if there is none.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model is {type(model).__name__}, expected the torch.nn.Module that was optimized")
    device = checked_device(device)
    path, model = Path(path), unwrapped(model)[1]
    with _opened(path) as file, _named(path):
        plan = _plan_of(file)
        inner = _structure(model, plan, device)
        candidates = _candidates(inner, plan)
        floats = _float_tensors(inner, [candidate.module for candidate in candidates.values()])
        _check_tensors(file, plan, floats)
        _fill(file, plan, floats)
        layers = {layer.name: _layer(file, layer, candidates[layer.name], plan, device) for layer in plan.layers}
        result = _fused(inner, layers, plan, device)
    if plan.carrier != plan.outside:
        result = CastModel(result, getattr(torch, plan.carrier), getattr(torch, plan.outside))
    if plan.layers:
        _compare_devices(path, plan, model, result, device, retime)
    return result.eval()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    safetensors = _package("safetensors")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        file = safetensors.safe_open(str(path), framework="pt", device="cpu")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or a damaged one: {error}") from error
    with file as opened:
        yield opened


def _plan_of(file: Any) -> Plan:
    metadata = file.metadata() or {}
    if _PLAN not in metadata:
        raise ValueError("it has no plan of halfstep's; it was not written by InferencePrecisionOptimizer.save()")
    if metadata.get(_DIGEST) != _digest(metadata[_PLAN]):
        raise ValueError("its plan is damaged: the digest is of another one")
    return Plan.from_text(metadata[_PLAN])


def _structure(model: nn.Module, plan: Plan, device: torch.device) -> nn.Module:
    """Return a copy of the float model, made over as the plan says, in the carrier's dtype, with weights of its own."""
    own = float_dtype(model)
    if name_of(own) != plan.outside:
        raise ValueError(f"it is of a model in {plan.outside}, but this model is {name_of(own)}")
    reference = copy.deepcopy(model).eval()
    if any(tensor.is_meta for tensor in (*reference.parameters(), *reference.buffers())):
        reference = reference.to_empty(device=device)
    reference = reference.to(device).requires_grad_(False)
    if not plan.layers:
        return reference.to(getattr(torch, plan.carrier))
    made, attention, _ = replace_attention(reference)
    _same("attention that is taken apart", plan.attention, attention)
    if plan.traced:
        made = _traced(made, plan)
    return made if plan.carrier == plan.outside else made.to(getattr(torch, plan.carrier))


def _traced(model: nn.Module, plan: Plan) -> GraphModule:
    args, kwargs = decode(plan.example, lambda shape, dtype: None)
    try:
        given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise ValueError(f"the model does not take the arguments that it was optimized with: {error}") from error
    graph, why = trace(model, given=tuple(given))
    if graph is None:
        raise ValueError(f"it is of a model that torch.fx traced, but this model cannot be: {why}")
    folded = fold_batch_norms(graph)[0] if plan.folded else []
    _same("batch norms that are folded", [tuple(pair) for pair in plan.folded], folded)
    return graph


def _candidates(model: nn.Module, plan: Plan) -> dict[str, Candidate]:
    """Return the layers of the model that become int8, each compared with its plan."""
    if not plan.layers:
        return {}
    found, left = find_candidates(model, (), ())
    for layer in plan.layers:
        where = f"layer {layer.name!r}"
        if layer.name not in found:
            raise ValueError(f"{where} cannot be int8 in this model: {left.get(layer.name, 'there is no such layer')}")
        candidate = found[layer.name]
        _same(f"{where}: kind", layer.kind, candidate.kind)
        _same(f"{where}: weight", layer.weight, list(candidate.weight.shape))
        geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, **candidate.geometry}
        for key, value in geometry.items():
            _same(f"{where}: {key}", getattr(layer, key), value if key == "groups" else list(value))
    return {layer.name: found[layer.name] for layer in plan.layers}


def _check_tensors(file: Any, plan: Plan, floats: dict[str, torch.Tensor]) -> None:
    """Compare names, dtypes and shapes in the file's header with the model's, and the plan's orders with both."""
    expected = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in floats.items()}
    for layer in plan.layers:
        out, width = layer.weight[:2]
        parts = {"weight": (torch.int8, layer.weight), "scales": (torch.float32, [out])}
        if layer.bias:
            parts["bias"] = (torch.float32, [out])
        if layer.input_factors:
            parts["input_factors"] = (torch.float32, [width])
        expected.update({_join(layer.name, part): value for part, value in parts.items()})
    there = set(file.keys())
    if there != expected.keys():
        missing, foreign = sorted(expected.keys() - there), sorted(there - expected.keys())
        raise ValueError(f"it lacks tensors {missing[:5]} of the model, and has {foreign[:5]}, which the model has not")
    for name, (dtype, shape) in expected.items():
        view = file.get_slice(name)
        kind = view.get_dtype()
        if _DTYPES.get(kind) != dtype or list(view.get_shape()) != shape:
            raise ValueError(f"{name} is {kind} {list(view.get_shape())}, expected {name_of(dtype)} {shape}")
    for name, order in plan.orders.items():
        if name not in floats or len(order) != floats[name].dim():
            raise ValueError(f"orders has {name!r} with {len(order)} dimensions, which is no such tensor of the model")


@torch.no_grad()
def _fill(file: Any, plan: Plan, floats: dict[str, torch.Tensor]) -> None:
    """Copy the file's tensors over the model's, in the memory's order that the saved ones had."""
    for name, target in floats.items():
        order = plan.orders.get(name, list(range(target.dim())))
        back = [order.index(dim) for dim in range(len(order))]
        sizes = [target.shape[dim] for dim in order]
        if not target.permute(order).is_contiguous():
            target.data = torch.empty(sizes, dtype=target.dtype, device=target.device).permute(back)
        target.copy_(file.get_tensor(name))


def _layer(file: Any, layer: LayerPlan, candidate: Candidate, plan: Plan, device: torch.device) -> nn.Module:
    present = {"weight": True, "scales": True, "bias": layer.bias, "input_factors": layer.input_factors}
    # Copies: what is mapped changes with the file.
    tensors = {part: file.get_tensor(_join(layer.name, part)).clone() for part in _PARTS if present[part]}
    geometry = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups")}
    try:
        packed = packed_from({**tensors, **geometry})
    except ValueError as error:
        raise ValueError(f"layer {layer.name!r}: {str(error).splitlines()[0]}") from error
    settings = Int8Settings(packed.to(device), layer.input_scale, layer.input_zero_point)
    return settings.layer(candidate, getattr(torch, plan.carrier))


def _fused(inner: nn.Module, layers: dict[str, nn.Module], plan: Plan, device: torch.device) -> nn.Module:
    """Put the layers in and let them take over their neighbours; ValueError where the plan says otherwise."""
    if not layers:
        return inner
    built = replace_layers(inner, layers)
    if isinstance(built, GraphModule):
        dtype = getattr(torch, plan.carrier)
        norms = [(conv, norm) for conv, norm in plan.folded]
        found = fuse(built, _shapes(inner, plan, device), dtype, norms)
        regions = [RegionPlan(region.layers, region.fused) for region in found]
    else:
        regions = [RegionPlan([name], []) for name in layers]
    # torch pools int8 on some devices only, so that chains end at other places there. That changes no sums.
    elsewhere = plan.device.type != device.type
    added = residuals(built)
    for layer in plan.layers:
        now = LayerPlan.of(layer.name, layers[layer.name], layer.name in added)
        for key in vars(layer):
            if not (elsewhere and key in _BORDERS):
                _same(f"layer {layer.name!r}: {key}", getattr(layer, key), getattr(now, key))
    if not elsewhere:
        _same("regions", plan.regions, regions)
    return built


def _shapes(inner: GraphModule, plan: Plan, device: torch.device) -> Shapes:
    """Return the shapes of all values on the example: on the meta device, or with zeros where code does not run there.

    The meta device takes neither time nor memory.
    """
    carrier = getattr(torch, plan.carrier)

    def empty(shape: list[int], dtype: torch.dtype, *, on: Any) -> torch.Tensor:
        dtype = carrier if dtype.is_floating_point else dtype
        return torch.zeros(shape, dtype=dtype, device=on)

    memo: dict[int, Any] = {id(t): nn.Parameter(t.to("meta"), False) for t in inner.parameters()}
    memo.update({id(t): t.to("meta") for t in inner.buffers()})
    with contextlib.suppress(Exception):  # the model's own code may raise anything
        return shapes_of(copy.deepcopy(inner, memo), decode(plan.example, partial(empty, on="meta")), call_with)
    try:
        return shapes_of(inner, decode(plan.example, partial(empty, on=device)), call_with)
    except Exception as error:
        raise ValueError(f"the model does not run on zeros of the example's shapes: {error}") from error


def _compare_devices(
    path: Path, plan: Plan, model: nn.Module, result: nn.Module, device: torch.device, retime: bool | None
) -> None:
    here = device_name(device)
    moved = here != plan.device.name
    if not moved and not retime:
        return
    said = [f"{path} was optimized on {plan.device.name}, this is {here}"] if moved else []
    if retime is not False:
        if plan.example is None:
            said.append("its times cannot be taken again: the arguments could not be written down")
        else:
            said += _times(plan, model, result, device, always=moved)
    if said:
        warnings.warn("; ".join(said), UserWarning, stacklevel=3)


def _times(plan: Plan, model: nn.Module, result: nn.Module, device: torch.device, *, always: bool) -> list[str]:
    """Return what to say of the times; nothing if int8 is not slower, but for `always`."""
    reference = copy.deepcopy(model).eval()
    if any(tensor.is_meta for tensor in (*reference.parameters(), *reference.buffers())):
        return ["its times cannot be taken again with a model on the meta device"]
    rival = half_model(reference.to(device), getattr(torch, plan.carrier))

    def random(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point:
            return torch.randn(shape, device=device).to(dtype)
        return torch.zeros(shape, dtype=dtype, device=device)

    args, kwargs = decode(plan.example, random)
    try:
        calls = [partial(each, *args, **kwargs) for each in (rival, result)]
        theirs, mine = time_in_turns(calls, device)
    except Exception as error:  # the model's own code may want other inputs
        return [f"its times cannot be taken again on random inputs: {str(error).splitlines()[:1]}"]
    slower = loses(mine, theirs)
    times = f"int8 takes {mine} here, {plan.carrier} {theirs}"
    if slower:
        return [f"{times}: int8 is slower, optimize the model for this device again"]
    return [times] if always else []


# ----------------------------------------------------------------------------------------------------------- helpers


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor and what torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def checked_device(target_device: str | torch.device, argument: str = "device") -> torch.device:
    """Return the device; ValueError unless it is cpu or cuda, RuntimeError if torch sees no GPU."""
    device = torch.device(target_device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{argument} is {device}, expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"{argument} is {device}, but torch sees no GPU here; pass {argument}='cpu'")
    return device


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise ModuleNotFoundError(
            "files of optimized models need safetensors: pip install safetensors", name="safetensors"
        ) from error


def _same(what: str, saved: Any, here: Any) -> None:
    if saved != here:
        raise ValueError(f"{what}: {saved} in the file, {here} by the model's code")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _class_of(model: nn.Module) -> str:
    return type(model).__name__
