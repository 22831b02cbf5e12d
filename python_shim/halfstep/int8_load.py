"""Reads files of optimized models. Nothing in them is run.

The code of the model is not in the file: load_int8() takes a model of the same code, does with it what was done before
(attention, trace, batch norms, int8 layers, fusion), compares the outcome with the plan, and fills in the weights.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from halfstep.half_layers import cast_layers, type_by
from halfstep.half_model import CastModel, float_dtype, name_of
from halfstep.int8_attention import replace_attention
from halfstep.int8_chains import fuse
from halfstep.int8_device import checked_device, compared
from halfstep.int8_digest import digest_of, settings_of
from halfstep.int8_files import DIGEST, DTYPES, FORMAT, PARTS, PLAN, checksum, digest, float_tensors, join, package
from halfstep.int8_folding import fold_batch_norms
from halfstep.int8_form import call_with
from halfstep.int8_graph import trace
from halfstep.int8_layers import packed_from
from halfstep.int8_model import Candidate, Int8Settings, find_candidates, replace_layers, share
from halfstep.int8_plan import LayerPlan, Plan, RecurrentPlan, RegionPlan, decode, residuals
from halfstep.int8_recurrent import recurrent_from, take_recurrent, weights_of
from halfstep.int8_runs import Shapes, shapes_of
from halfstep.int8_wrappers import inner_of, without_wrappers
from halfstep.whole_files import check_readable

_SHOWN = 4  # entries of a list in an error; shapes and settings are no longer
_OTHER_SETTINGS = "it is of other code than the model's: the settings of torch's layers differ"
_NO_GEOMETRY = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


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
    halfstep's, of another version, or of other code than the model's, as far as that can be told: of a model that is
    not traced, layers, settings of torch's layers, and the names and shapes of tensors are compared, not what code does
    between them. Checksums are
    compared before anything is made of the file, sizes before anything is copied. FileNotFoundError if there is none.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model is {type(model).__name__}, expected the torch.nn.Module that was optimized")
    device = checked_device(device)
    path, model = Path(path), without_wrappers(share(inner_of(model)))[0]
    with _opened(path) as file, _named(path):
        plan = _plan_of(file)
        _check_bytes(file, plan)
        inner = _structure(model, plan, device)
        candidates, recurrent = _candidates(inner, plan)
        made_int8 = [*(candidate.module for candidate in candidates.values()), *recurrent.values()]
        floats = float_tensors(inner, made_int8)
        _check_tensors(file, plan, floats, recurrent)
        _fill(file, plan, floats)
        if not plan.layers and plan.settings not in (None, settings_of(inner)):
            raise ValueError(_OTHER_SETTINGS)
        layers = {layer.name: _layer(file, layer, candidates[layer.name], plan, device) for layer in plan.layers}
        result = _fused(inner, layers, plan, device)
        stored = {name: _recurrent(file, name, module, device) for name, module in recurrent.items()}
        result = replace_layers(result, stored) if stored else result
    if plan.carrier != plan.outside:
        result = CastModel(result, getattr(torch, plan.carrier), getattr(torch, plan.outside))
    if plan.layers and (said := compared(path, plan, model, result, device, retime)):
        warnings.warn(said, UserWarning, stacklevel=2)
    return result.eval()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    safetensors = package("safetensors")
    check_readable(path)
    damaged = f"{path} is not a safetensors file, or a damaged one"
    try:
        file = safetensors.safe_open(str(path), framework="pt", device="cpu")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{damaged}: {error}") from error
    except OSError as error:  # some of /sys and /proc
        raise OSError(f"{path} cannot be mapped to memory: {error}") from error
    try:
        with file as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise ValueError(f"{damaged}: {error}") from error


# ------------------------------------------------------------------------------------------------------------ the file


def _plan_of(file: Any) -> Plan:
    metadata = file.metadata() or {}
    if PLAN not in metadata:
        raise ValueError("it has no plan of halfstep's; it was not written by InferencePrecisionOptimizer.save()")
    if metadata.get(DIGEST) != digest(metadata[PLAN]):
        raise ValueError("its plan is damaged: the digest is of another one")
    if metadata.keys() != {FORMAT, PLAN, DIGEST} or metadata[FORMAT] != "pt":
        raise ValueError(f"its metadata is damaged: it has {sorted(metadata)}, of the format {metadata.get(FORMAT)!r}")
    return Plan.from_text(metadata[PLAN])


def _check_bytes(file: Any, plan: Plan) -> None:
    """Compare the bytes of all tensors with the plan's checksums. Reads what is mapped, and keeps none of it."""
    there = set(file.keys())
    if there != plan.checksums.keys():
        missing, foreign = sorted(plan.checksums.keys() - there), sorted(there - plan.checksums.keys())
        raise ValueError(f"it lacks tensors {missing[:5]} that were saved, and has {foreign[:5]}, which were not")
    for name, expected in plan.checksums.items():
        view = file.get_slice(name)
        if view.get_dtype() not in DTYPES:
            kind, shape = view.get_dtype(), list(view.get_shape())
            raise ValueError(f"{name} is {kind} {shape}, expected one of {', '.join(DTYPES)}")
        if (found := checksum(file.get_tensor(name))) != expected:
            raise ValueError(f"{name} is damaged: its CRC-32 is {found:08x}, and was {expected:08x}")


def _check_tensors(file: Any, plan: Plan, floats: dict[str, torch.Tensor], recurrent: dict[str, nn.RNNBase]) -> None:
    """Compare names, dtypes and shapes in the file's header with the model's, and the plan's orders with both."""
    expected = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in floats.items()}
    packed = {layer.name: (layer.weight, layer.bias, layer.input_factors) for layer in plan.layers}
    for name, module in recurrent.items():
        for number, (weight, bias) in enumerate(weights_of(module)):
            packed[_weight_name(name, number)] = list(weight.shape), bias is not None, False
    for name, (weight, bias, input_factors) in packed.items():
        out, width = weight[:2]
        parts = {"weight": (torch.int8, weight), "scales": (torch.float32, [out])}
        if bias:
            parts["bias"] = (torch.float32, [out])
        if input_factors:
            parts["input_factors"] = (torch.float32, [width])
        expected.update({join(name, part): value for part, value in parts.items()})
    there = set(file.keys())
    if there != expected.keys():
        missing, foreign = sorted(expected.keys() - there), sorted(there - expected.keys())
        raise _other_code(
            f"it lacks tensors {missing[:_SHOWN]} of the model, and has {foreign[:_SHOWN]}, which the model has not"
        )
    for name, (dtype, shape) in expected.items():
        view = file.get_slice(name)
        kind = view.get_dtype()
        if DTYPES.get(kind) != dtype or list(view.get_shape()) != shape:
            raise _other_code(f"{name} is {kind} {list(view.get_shape())}, expected {name_of(dtype)} {shape}")
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
    geometry = {key: getattr(layer, key) for key in _NO_GEOMETRY}
    packed = _packed(file, layer.name, geometry, device)
    settings = Int8Settings(packed, layer.input_scale, layer.input_zero_point)
    return settings.layer(candidate, getattr(torch, plan.carrier))


def _recurrent(file: Any, name: str, module: nn.RNNBase, device: torch.device) -> nn.Module:
    numbers = range(len(weights_of(module)))
    return recurrent_from(module, [_packed(file, _weight_name(name, n), _NO_GEOMETRY, device) for n in numbers])


def _packed(file: Any, name: str, geometry: dict[str, Any], device: torch.device) -> torch.ScriptObject:
    names = {part: join(name, part) for part in PARTS}
    there = set(file.keys())
    # Copies: what is mapped changes with the file.
    tensors = {part: file.get_tensor(each).clone() for part, each in names.items() if each in there}
    try:
        return packed_from({**tensors, **geometry}).to(device)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {str(error).splitlines()[0]}") from error


def _weight_name(name: str, number: int) -> str:
    return join(name, f"weights.{number}")  # where Int8Recurrent has it


# ------------------------------------------------------------------------------------------------------------ the code


def _structure(model: nn.Module, plan: Plan, device: torch.device) -> nn.Module:
    """Return a copy of the float model, made over as the plan says, in the carrier's dtype, with weights of its own."""
    own = float_dtype(model)
    if name_of(own) != plan.outside:
        raise ValueError(f"it is of a model in {plan.outside}, but this model is {name_of(own)}")
    made = copy.deepcopy(model).eval()
    if any(tensor.is_meta for tensor in (*made.parameters(), *made.buffers())):
        made = made.to_empty(device=device)
    made = made.to(device).requires_grad_(False)
    if plan.layers or plan.attention:
        made, attention, _ = replace_attention(made)
        _same("attention that is taken apart", plan.attention, attention)
    if plan.graph is not None:
        made = _traced(made, plan)
    if plan.casts:
        types = {name: getattr(torch, dtype) for name, dtype in plan.casts.items()}
        found = cast_layers(made, type_by(types, getattr(torch, plan.carrier)), own)
        _same("layers in another type than what calls them", types, found)
        return made
    return made if plan.carrier == plan.outside else made.to(getattr(torch, plan.carrier))


def _traced(model: nn.Module, plan: Plan) -> GraphModule:
    args, kwargs = decode(plan.example, lambda shape, dtype: None)
    try:
        given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise _other_code(f"the model does not take the arguments that it was optimized with: {error}") from error
    graph, why = trace(model, given=tuple(given))
    if graph is None:
        raise ValueError(f"it is of a model that torch.fx traced, but this model cannot be: {why}")
    folded = fold_batch_norms(graph)[0] if plan.folded else []
    _same("batch norms that are folded", [tuple(pair) for pair in plan.folded], folded)
    return graph


def _candidates(model: nn.Module, plan: Plan) -> tuple[dict[str, Candidate], dict[str, nn.RNNBase]]:
    """Return the layers of the model that become int8, and recurrent ones, each compared with its plan."""
    if not plan.layers and not plan.recurrent:
        return {}, {}
    found, left = find_candidates(model, (), ())
    recurrent = take_recurrent(model, left, (), ()) if plan.recurrent else {}
    for layer in (*plan.layers, *plan.recurrent):
        where, there = f"layer {layer.name!r}", found if isinstance(layer, LayerPlan) else recurrent
        if layer.name not in there:
            raise _other_code(f"{where} cannot be int8 in this model: {left.get(layer.name, 'there is no such layer')}")
    for layer in plan.layers:
        where, candidate = f"layer {layer.name!r}", found[layer.name]
        _same(f"{where}: kind", layer.kind, candidate.kind)
        _same(f"{where}: weight", layer.weight, list(candidate.weight.shape))
        for key, value in {**_NO_GEOMETRY, **candidate.geometry}.items():
            _same(f"{where}: {key}", getattr(layer, key), value if key == "groups" else list(value))
    for layer in plan.recurrent:
        here = RecurrentPlan.of(layer.name, recurrent[layer.name])
        for key, value in vars(layer).items():
            _same(f"layer {layer.name!r}: {key}", value, getattr(here, key))
    return (
        {layer.name: found[layer.name] for layer in plan.layers},
        {layer.name: recurrent[layer.name] for layer in plan.recurrent},
    )


def _fused(inner: nn.Module, layers: dict[str, nn.Module], plan: Plan, device: torch.device) -> nn.Module:
    """Put the layers in and let them take over their neighbours; ValueError where the plan says otherwise."""
    if not layers:
        return inner
    built = replace_layers(inner, layers)
    if plan.graph is not None:
        dtype = getattr(torch, plan.carrier)
        norms = [(conv, norm) for conv, norm in plan.folded]
        found = fuse(built, _shapes(inner, plan, device), dtype, norms)
        regions = [RegionPlan(region.layers, region.fused) for region in found]
    else:
        regions = [RegionPlan([name], []) for name in layers]
    added = residuals(built)
    for layer in plan.layers:
        now = LayerPlan.of(layer.name, layers[layer.name], layer.name in added)
        for key in vars(layer):
            _same(f"layer {layer.name!r}: {key}", getattr(layer, key), getattr(now, key))
    _same("regions", plan.regions, regions)
    if plan.settings != settings_of(inner):  # last: the others say where
        raise ValueError(_OTHER_SETTINGS)
    if plan.graph is not None and plan.graph != digest_of(inner):
        raise ValueError(
            "it is of other code than the model's: the traced operations, their order, their arguments or the settings "
            "of layers differ"
        )
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


def _same(what: str, saved: Any, here: Any) -> None:
    if saved == here:
        return
    if isinstance(saved, list) and max(len(saved), len(here)) > _SHOWN:
        saved, here = _where_they_differ(saved, here)
    raise _other_code(f"{what}: {saved} in the file, {here} by the model's code")


def _where_they_differ(saved: list[Any], here: list[Any]) -> tuple[str, str]:
    """Return the first entries of each that are not at the same place in the other, in words."""
    pairs = enumerate(itertools.zip_longest(saved, here))
    places = [place for place, (one, other) in pairs if one != other]

    def shown(entries: list[Any]) -> str:
        differing = [entries[place] for place in places if place < len(entries)]
        more = len(differing) - _SHOWN
        return f"{differing[:_SHOWN]}" + (f" and {more} more" if more > 0 else "")

    return shown(saved), shown(here)


def _other_code(why: str) -> ValueError:
    return ValueError(f"it is of another model, or of other code than the model's: {why}")
