"""Models in two floating-point types: which layers are in which, and casts where one calls the other.

A layer in another type than what calls it has hooks that cast what it is given and what it returns. They leave it its
class, its name and its attributes, which the code around it may ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfstep.half_model import cast_floats, name_of
from halfstep.int8_attention import ATTENTION
from halfstep.int8_model import refuse_made

TypeOf = Callable[[str], torch.dtype]  # the type of a module, by the first of its names


@dataclass(frozen=True)
class CastInputs:
    """A hook before a layer that gives it in its own type what its caller has in `outside`; others stay as they are."""

    dtype: torch.dtype
    outside: torch.dtype

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments that the layer gets."""
        return cast_floats((args, kwargs), self.dtype, self.outside)


@dataclass(frozen=True)
class CastResult:
    """A hook behind a layer that returns in the type of what calls it what the layer has in its own, `inside`."""

    dtype: torch.dtype
    inside: torch.dtype

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], result: Any) -> Any:
        """Return what the caller gets."""
        return cast_floats(result, self.dtype, self.inside)


@dataclass(frozen=True)
class _Call:
    """A layer and the module whose forward calls it, by their first names; `caller` stands around it."""

    name: str
    module: nn.Module
    caller: str
    around: nn.Module


def casts_of(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the layers that cast_layers() has left in another type than what calls them, and their types."""
    return {
        name: hook.dtype
        for name, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, CastInputs)
    }


def refuse_casts(model: nn.Module) -> None:
    """Raise ValueError for a model of which some layers have been cast already."""
    refuse_made(list(casts_of(model)), "cast")


def type_by(casts: Mapping[str, torch.dtype], outermost: torch.dtype) -> TypeOf:
    """Return the types of a model that is `outermost` but for these layers, each with what is inside of it."""

    def type_of(name: str) -> torch.dtype:
        while name and name not in casts:
            name = name.rpartition(".")[0]
        return casts.get(name, outermost)

    return type_of


def differs_in_attention(model: nn.Module, type_of: TypeOf) -> bool:
    """Return whether one of torch's attention modules, which read the weights of their layers, is in two types."""
    return any(
        len({type_of(f"{name}.{inner}".strip(".")) for inner, _ in module.named_modules()}) > 1
        for name, module in model.named_modules()
        if isinstance(module, ATTENTION)
    )


def cast_layers(model: nn.Module, type_of: TypeOf, own: torch.dtype) -> dict[str, torch.dtype]:
    """Cast modules to their types, in place, with casts in between; those in `own`, the model's type, stay as they are.

    Returns the layers in another type than what calls them, and their types. ValueError for a layer that cannot be in
    another one. Parameters stay shared by what is in one type.
    """
    outside = _types_around(model, type_of)
    casts = {name: type_of(name) for name, around in outside.items() if type_of(name) != around}
    _untie(model, type_of, own)
    layers = {name: model.get_submodule(name) for name in casts}
    inside = {id(layer) for layer in layers.values()}
    places = [
        (module, key, child)
        for module in model.modules()
        for key, child in module._modules.items()
        if id(child) in inside
    ]
    for module, key, _ in places:  # each part is cast by itself
        module._modules[key] = None
    for name, part in {"": model, **layers}.items():
        if type_of(name) != own:
            part.to(type_of(name))
    for module, key, child in places:
        module._modules[key] = child
    for name, layer in layers.items():
        layer.register_forward_pre_hook(CastInputs(casts[name], outside[name]), prepend=True, with_kwargs=True)
        layer.register_forward_hook(CastResult(outside[name], casts[name]))
    return casts


def _types_around(model: nn.Module, type_of: TypeOf) -> dict[str, torch.dtype]:
    """Return for each module with a forward the type of what calls it; ValueError where no cast can be in between."""
    found: dict[str, tuple[str, torch.dtype]] = {}
    for call in _calls(model):
        inner, outer = type_of(call.name), type_of(call.caller)
        which = (
            f"layer {call.name!r} is in {name_of(inner)}, but {call.caller or 'the model itself'} in {name_of(outer)}"
        )
        expected = "expected include and exclude to name both or neither"
        if not _has_forward(call.module):
            if inner != outer and any(True for _ in call.module.parameters(recurse=False)):
                raise ValueError(f"{which}, and a {type(call.module).__name__} has no call to cast in: {expected}")
            continue
        if inner != outer and any(isinstance(each, torch.jit.ScriptModule) for each in (call.module, call.around)):
            raise ValueError(f"{which}, and a script can have no casts before and behind it or within: {expected}")
        if inner != outer and isinstance(call.around, ATTENTION):
            kind = type(call.around).__name__
            raise ValueError(f"{which}, a {kind} that may read weights in place of calling layers: {expected}")
        caller, known = found.setdefault(call.name, (call.caller, outer))
        if known != outer:
            raise ValueError(
                f"layer {call.name!r} is called by {caller or 'the model itself'} in {name_of(known)} and by "
                f"{call.caller or 'the model itself'} in {name_of(outer)}: {expected} of them"
            )
    return {name: outer for name, (_, outer) in found.items()}


def _calls(model: nn.Module) -> Iterator[_Call]:
    """Yield each place of a module; what stands in a list or mapping of modules is called by what these stand in."""
    firsts = {id(module): name for name, module in model.named_modules()}
    callers: dict[str, nn.Module] = {"": model}  # by each name: what calls the modules directly inside
    for name, module in model.named_modules(remove_duplicate=False):
        around = callers[name.rpartition(".")[0]]
        callers[name] = module if _has_forward(module) else around
        if name:
            yield _Call(firsts[id(module)], module, firsts[id(around)], around)


def _has_forward(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__


def _untie(model: nn.Module, type_of: TypeOf, own: torch.dtype) -> None:
    """Give what is going to be cast parameters of its own where it shares them with what stays as it is."""
    kept: set[int] = set()
    cast: list[nn.Module] = []
    for name, module in model.named_modules():
        if type_of(name) == own:
            kept.update(map(id, module.parameters(recurse=False)))
        else:
            cast.append(module)
    copies: dict[int, nn.Parameter] = {}
    for module in cast:
        for key, tied in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(tied) in kept:
                copies.setdefault(id(tied), nn.Parameter(tied.detach().clone(), tied.requires_grad))
                setattr(module, key, copies[id(tied)])
