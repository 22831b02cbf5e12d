"""Which layers of a model can be int8 and why others cannot, and copies of the model in which some are."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from halfstep.calls import HOOKS, computes_weights
from halfstep.int8_layers import Int8Conv1d, Int8Conv2d, Int8Embedding, Int8Layer, Int8Linear

MOST_TERMS = 65793  # whose sum fits int32 with any zero point: halfstep/int8.h
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
# What is worth a word when it stays float; norms and other small things always do.
_PRODUCTS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
    *_RECURRENT,
)


@dataclass(frozen=True)
class Candidate:
    """A layer that can be int8."""

    name: str
    kind: str  # "linear", "conv1d", "conv2d", "embedding"
    module: nn.Module

    @property
    def weight(self) -> torch.Tensor:
        """The weight as [out, in] or [out, in / groups, height, width]."""
        weight = self.module.weight.detach()
        if self.kind == "conv1d":
            return weight.unsqueeze(2)
        return weight.t() if _is_transformers_conv1d(self.module) else weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias [out], if the layer has one."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def geometry(self) -> dict[str, Any]:
        """stride, padding, dilation (height and width) and groups, as `pack` takes them."""
        if self.kind in ("linear", "embedding"):
            return {}
        layer = self.module
        padding = _symmetric_padding(layer)
        pairs = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation}
        if self.kind == "conv1d":
            pairs = {name: (0 if name == "padding" else 1, *pair) for name, pair in pairs.items()}
        return {**pairs, "groups": layer.groups}

    @property
    def can_be_smoothed(self) -> bool:
        """Whether each input channel has weights of its own in every output channel, as SmoothQuant's factors need."""
        return self.kind == "linear" or (self.kind in ("conv1d", "conv2d") and self.module.groups == 1)

    @property
    def channel_dim(self) -> int:
        """The dimension of input and output that has the channels, from the end: a batch may be missing."""
        return {"conv1d": -2, "conv2d": -3}.get(self.kind, -1)


@dataclass(frozen=True)
class Int8Settings:
    """What makes a candidate an int8 layer."""

    packed: torch.ScriptObject
    input_scale: float | None = None  # None: per row
    input_zero_point: int = 0

    def layer(self, candidate: Candidate, dtype: torch.dtype) -> nn.Module:
        """Make the layer that stands for the candidate in a model of `dtype`."""
        if candidate.kind == "embedding":
            return Int8Embedding(self.packed, dtype).eval()
        kind = {"linear": Int8Linear, "conv1d": Int8Conv1d, "conv2d": Int8Conv2d}[candidate.kind]
        return kind(self.packed, input_scale=self.input_scale, input_zero_point=self.input_zero_point).eval()


def _is_transformers_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _symmetric_padding(layer: nn.Module) -> tuple[int, ...] | None:
    """Return the padding of each side, None if the sides differ."""
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)
    return tuple(layer.padding)


def _kind(module: nn.Module) -> str:
    kinds = {
        nn.Linear: "linear",
        nn.modules.linear.NonDynamicallyQuantizableLinear: "linear",
        nn.Conv1d: "conv1d",
        nn.Conv2d: "conv2d",
        nn.Embedding: "embedding",
    }
    if _is_transformers_conv1d(module):
        return "linear"
    return kinds.get(type(module), "")


def altered(module: nn.Module) -> str:
    """Return "" or why a call of this layer is not what its class alone would do."""
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if any(computes_weights(hook) for hook in module._forward_pre_hooks.values()):
        return "it is parametrized (torch.nn.utils)"
    if any(getattr(module, hooks, None) for hooks in HOOKS):
        return "it has hooks"
    return "its forward has been replaced" if "forward" in module.__dict__ else ""


def _obstacle(module: nn.Module, kind: str) -> str:
    """Return "" or why this layer cannot be int8."""
    if not kind:
        if isinstance(module, _RECURRENT):
            return "a recurrent layer: int8 weights make it smaller, not faster (recurrent_weights=True)"
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)):
            return f"its class {type(module).__name__} may compute something else than its base does"
        return f"no int8 kernel for {type(module).__name__}"
    if reason := altered(module):
        return reason
    weight = module.weight
    if not weight.is_floating_point() or weight.dtype == torch.float64 or weight.layout != torch.strided:
        return f"its weight is {weight.dtype} and {weight.layout}"
    if weight.numel() == 0:
        return "its weight is empty"
    if kind in ("conv1d", "conv2d"):
        if module.padding_mode != "zeros":
            return f"its padding_mode is {module.padding_mode}"
        if _symmetric_padding(module) is None:
            return "its padding differs from side to side"
    if kind == "embedding" and module.max_norm is not None:
        return "it renormalizes its entries (max_norm)"
    terms = weight.shape[0] if _is_transformers_conv1d(module) else weight[0].numel()
    if kind != "embedding" and terms > MOST_TERMS:
        return f"{terms} products in a sum, more than the {MOST_TERMS} whose sum is sure to fit 32 bits"
    return ""


def check_globs(globs: Iterable[str] | str | None, argument: str, target: str = "int8") -> tuple[str, ...]:
    """Return the globs of include or exclude as a tuple, empty for None; a string is one glob.

    TypeError for anything but strings; ValueError for an empty one, and for an `include` of none, which would be all.
    """
    if globs is None:
        return ()
    if not isinstance(globs, Iterable):
        raise TypeError(f"{argument} is {type(globs).__name__}, expected a name or glob of layers, or several")
    globs = (globs,) if isinstance(globs, str) else tuple(globs)
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(f"{argument} has {glob!r}, expected names or globs of layers")
        if not glob:
            raise ValueError(f"{argument} has '', expected names or globs of layers, such as 'encoder.*' or '*'")
    if not globs and argument == "include":
        raise ValueError(
            f"include is empty, so no layer would be {target}: expected names or globs, or None for all layers"
        )
    return globs


def not_selected(name: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> str:
    """Return "" or why the user's globs leave this layer out; they name what is inside of a module with it."""
    parts = name.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]

    def matches(globs: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(part, glob) for part in above for glob in globs)

    if include and not matches(include):
        return "not in include"
    return "in exclude" if matches(exclude) else ""


def check_globs_name_layers(include: tuple[str, ...], exclude: tuple[str, ...], names: Iterable[str]) -> None:
    """Raise ValueError for a glob that is none of the names."""
    names = list(names)
    for argument, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not fnmatch.filter(names, glob):
                raise ValueError(f"{argument} has {glob!r}, which names no layer of the model")


def refuse_parted_names(model: nn.Module, include: tuple[str, ...], exclude: tuple[str, ...]) -> None:
    """Raise ValueError if globs name a module, or what it is in, by one of its names and not by the others."""
    firsts: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first = firsts.setdefault(module, name)
        if not_selected(first, include, exclude) != not_selected(name, include, exclude):
            raise ValueError(
                f"include and exclude name layer {first!r}, which is {name!r} too, by one of its names alone: name "
                "both or neither"
            )


def is_product(module: nn.Module) -> bool:
    """Return whether the layer can be int8, or is worth a word when it stays float: one with large weights."""
    return bool(_kind(module)) or isinstance(module, _PRODUCTS)


def find_candidates(
    model: nn.Module, include: tuple[str, ...], exclude: tuple[str, ...], names: Collection[str] | None = None
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Return the layers that can be int8, by name in the order of the modules, and why others with weights cannot.

    include, exclude: globs of qualified names; without `include` every layer is. ValueError for a glob that names no
    layer of the model, or none of `names`, which are those of the model before it was made over.
    """
    found: dict[str, Candidate] = {}
    left: dict[str, str] = {}
    if names is None:
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    check_globs_name_layers(include, exclude, names)
    for name, module in model.named_modules():
        if not is_product(module):
            continue
        kind = _kind(module)
        if reason := _obstacle(module, kind) or not_selected(name, include, exclude):
            left[name] = reason
        else:
            found[name] = Candidate(name, kind, module)
    return found, left


def refuse_int8(model: nn.Module) -> None:
    """Raise ValueError for a model that has int8 layers already."""
    names = [name or "the model itself" for name, module in model.named_modules() if isinstance(module, Int8Layer)]
    refuse_made(names, "int8")


def refuse_made(names: Sequence[str], what: str) -> None:
    """Raise ValueError if there are layers that an optimization has made `what` already."""
    if names:
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        raise ValueError(f"model has layers that are {what} already ({shown}), expected the float model it was made of")


def refuse_uninitialized(model: nn.Module) -> None:
    """Raise ValueError for a model with lazy layers, as nn.LazyLinear, that have not seen an input yet."""
    for name, module in model.named_modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(map(nn.parameter.is_lazy, own)):
            where = f"layer {name!r}" if name else "model"
            raise ValueError(
                f"{where} is a {type(module).__name__} without weights, which it makes in its first call: call the "
                "model once before"
            )


def kept_results(model: nn.Module) -> dict[int, torch.Tensor]:
    """Return a memo for deepcopy: copies of tensors that it refuses, as weights of torch.nn.utils.weight_norm."""
    kept = (value for module in model.modules() for value in vars(module).values())
    return {
        id(value): value.detach().clone() for value in kept if isinstance(value, torch.Tensor) and not value.is_leaf
    }


def copy_of(model: nn.Module, tensors: Mapping[torch.Tensor, torch.Tensor]) -> nn.Module:
    """Return a copy of the model's modules with these in place of tensors; packed weights are shared with the model."""
    memo: dict[int, Any] = {**kept_results(model), **{id(tensor): instead for tensor, instead in tensors.items()}}
    for module in model.modules():
        memo.update((id(value), value) for value in vars(module).values() if isinstance(value, torch.ScriptObject))
    return copy.deepcopy(model, memo)


def share(model: nn.Module) -> nn.Module:
    """Return a copy of the model's modules that shares all tensors and packed weights with it."""
    return copy_of(model, {tensor: tensor for tensor in (*model.parameters(), *model.buffers())})


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy that shares all tensors, with `layers` in place of the modules of these names, at all places."""
    by_module = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    places = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    result = share(model)
    for name, identity in places:
        if identity not in by_module:
            continue
        if not name:
            return by_module[identity]
        parent, _, attribute = name.rpartition(".")
        setattr(result.get_submodule(parent), attribute, by_module[identity])
    return result


def _constants(script: torch.jit.ScriptModule) -> list[torch.Tensor]:
    """Return the tensors that stand in the code, where torch.jit.freeze and traces put weights."""
    graph = script.inlined_graph  # its nodes live as long as it does
    values = [node.output().toIValue() for node in graph.findAllNodes("prim::Constant")]
    dense = [value for value in values if isinstance(value, torch.Tensor) and value.layout == torch.strided]
    return list({value.data_ptr(): value for value in dense}.values())


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters, buffers, packed weights and a script's constants, each counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    layers = {}
    for module in model.modules():
        packed = getattr(module, "packed", None)
        if isinstance(packed, torch.ScriptObject):
            layers[packed.id()] = packed  # not by id(): a script makes a Python object each time it is asked
    parts = [(each.weight(), each.scales(), each.bias(), each.input_factors()) for each in layers.values()]
    stored = [*tensors.values(), *(part for each in parts for part in each if part is not None)]
    if isinstance(model, torch.jit.ScriptModule):
        stored += _constants(model)
    return sum(tensor.numel() * tensor.element_size() for tensor in stored)
