"""Per-layer precision inside a model: layers that deviate from autocast's dtype run in a scope of their own."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from halfstep.policy import PrecisionPlan, class_of, named_modules, parent_of
from halfstep.watched import Standing, beside_watched, take_out

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOATS = tuple(DTYPES.values())
# Autocast's dtype while a float32 layer has turned autocast off around layers that are planned in half. They act there,
# and do nothing where the user has turned it off. It is part of autocast's state, which checkpoints restore on other
# threads and compilers know; no autocast computes in it.
_HELD_OFF = torch.float64
# The fused inference of torch's encoders reads the weights of its layers and calls none of them.
_FAST_PATHS = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor"))
_FAST_PATH_BEFORE = "_halfstep_fast_path"


class LayerScope(Standing):
    """The `forward` of one layer, in the precision that a plan gives it.

    It acts while autocast is on for the device of the layer's inputs, and not where that computes in `dtype` anyway:
    torch.float32 turns autocast off around the layer, another half type runs under an autocast of its own, without the
    cache of casts, whose key has no dtype. Floating inputs of the other of these types are cast to `dtype`, also inside
    of tuples, named tuples, lists and dicts; other objects are handed on as they are. Where the user has turned
    autocast off nothing is changed.

    holds: the layer is float32 and has layers inside that are planned in half. These act all the same, also where the
    forward around them turns autocast off itself, and return float32 there: what stands around them computes without
    autocast, which would mend a mixture of dtypes.

    It holds the module, and what its `forward` was; so copies and pickles are of the copy. Backward passes, checkpoints
    that compute it again and torch.compile see casts and autocast regions as if they stood in the layer's forward.
    """

    what, remedy = "the layer scopes of halfstep", "remove_plan(model)"

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, inner: Callable[..., Any] | None, *, holds: bool = False
    ) -> None:
        super().__init__(module, inner)
        self.dtype = dtype
        self.holds = holds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns."""
        first = args[0] if args else None
        if type(first) is torch.Tensor and first.dtype in _FLOATS:  # nearly always
            device = first.device.type
        else:
            device = _device_of((args, kwargs)) or _device_of(list(self.module._parameters.values()))
        if device not in ("cpu", "cuda"):
            return self._forward(*args, **kwargs)
        on, current = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        held = not on and current is _HELD_OFF
        if not (on or held) or (on and current is self.dtype):
            return self._forward(*args, **kwargs)
        if len(args) == 1 and not kwargs:
            args = (cast(first, self.dtype),)
        else:
            args, kwargs = cast((args, kwargs), self.dtype)
        half = self.dtype is not torch.float32
        dtype = self.dtype if half else _HELD_OFF if self.holds else current
        if torch.compiler.is_compiling():  # knows the context, but not the functions that it calls
            with torch.autocast(device, enabled=half, dtype=dtype, cache_enabled=False):
                result = self._forward(*args, **kwargs)
        else:
            result = self._switched(device, on, half, current, dtype, args, kwargs)
        return cast(result, torch.float32) if held else result

    def _switched(
        self,
        device: str,
        on: bool,
        half: bool,
        current: torch.dtype,
        dtype: torch.dtype,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the layer with autocast's switches as they are to be inside; sets none that is so already."""
        cached = dtype is not current and torch.is_autocast_cache_enabled()
        if half is not on:
            torch.set_autocast_enabled(device, half)
        if dtype is not current:
            torch.set_autocast_dtype(device, dtype)
        if cached:
            torch.set_autocast_cache_enabled(False)
        try:
            return self._forward(*args, **kwargs)
        finally:
            if half is not on:
                torch.set_autocast_enabled(device, on)
            if dtype is not current:
                torch.set_autocast_dtype(device, current)
            if cached:
                torch.set_autocast_cache_enabled(True)


def apply_plan(model: nn.Module, plan: PrecisionPlan, autocast_dtype: torch.dtype | None = None) -> None:
    """Let each layer of `model` run in the precision that `plan` gives it, under an autocast of the loop's own.

    plan: made for this model, with float32, float16 and bfloat16 alone; in place of one that was applied before.
    autocast_dtype: what the loop's autocast computes in. Layers that are planned so then need no scope, and cost
    nothing, unless they stand inside of a layer that is planned otherwise; without it every layer has one. Layers that
    the plan says inherit have none in either case.
    While a plan is applied torch's TransformerEncoder and TransformerEncoderLayer do not take the fused path of
    inference, which calls none of the layers.
    Raises ValueError, and changes nothing, where the model has not the plan's layers or a precision is another one.
    Parameters, buffers, classes and state_dict stay as they are.
    """
    dtypes = planned_dtypes(model, plan)
    if autocast_dtype not in (None, *_FLOATS):
        raise ValueError(f"autocast_dtype is {autocast_dtype!r}, expected one of {[None, *_FLOATS]}")
    nested, holding = _nesting(plan, dict(named_modules(model)), dtypes)
    remove_plan(model)
    for module, dtype in dtypes.items():
        if dtype is autocast_dtype and module not in nested:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            _ = module.forward  # its class has none; this puts the compiled method where others have theirs
        module.forward = LayerScope(module, dtype, module.__dict__.get("forward"), holds=module in holding)
    _leave_fast_paths(model)


def planned_dtypes(model: nn.Module, plan: PrecisionPlan) -> dict[nn.Module, torch.dtype]:
    """Return the dtype of each module that the plan names; ValueError as apply_plan() raises it."""
    if not isinstance(plan, PrecisionPlan):
        raise TypeError(f"plan is {type(plan).__name__}, expected PrecisionPlan")
    modules = dict(named_modules(model))
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise ValueError(
            "the model has a DataParallel, whose replicas would share layer scopes: use DistributedDataParallel"
        )
    dtypes: dict[nn.Module, torch.dtype] = {}
    for layer in plan.layers():
        module = modules.get(layer.name)
        if module is None or class_of(module) != layer.type:
            found = "there is none" if module is None else f"it is a {class_of(module)}"
            raise ValueError(f"the plan has a {layer.type} {layer.name!r}, but in the model {found}")
        if layer.precision not in DTYPES:
            raise ValueError(f"layer {layer.name!r} is planned as {layer.precision}, expected one of {list(DTYPES)}")
        if not layer.inherits:
            dtypes.setdefault(module, DTYPES[layer.precision])
    return dtypes


def remove_plan(model: nn.Module) -> None:
    """Undo apply_plan(): no trace of it stays in `model`."""
    for module in model.modules():
        take_out(module, LayerScope)
        for kind, attribute in _FAST_PATHS:
            if isinstance(module, kind) and _FAST_PATH_BEFORE in module.__dict__:
                setattr(module, attribute, module.__dict__.pop(_FAST_PATH_BEFORE))


def _nesting(
    plan: PrecisionPlan, modules: dict[str, nn.Module], dtypes: dict[nn.Module, torch.dtype]
) -> tuple[set[nn.Module], set[nn.Module]]:
    """Return the layers inside of one of another dtype, and the float32 layers with others inside."""
    nested, holding = set(), set()
    for name in plan:
        module = modules[name]
        dtype = dtypes.get(module)
        if dtype is None:
            continue
        outer = parent_of(name, plan)
        if outer is not None and dtypes.get(modules[outer], dtype) is not dtype:
            nested.add(module)
        while outer is not None and dtype is not torch.float32:
            if dtypes.get(modules[outer]) is torch.float32:
                holding.add(modules[outer])
            outer = parent_of(outer, plan)
    return nested, holding


def _leave_fast_paths(model: nn.Module) -> None:
    """Let the encoders of `model` call the layers that have scopes."""
    for module in model.modules():
        for kind, attribute in _FAST_PATHS:
            if not isinstance(module, kind) or not getattr(module, attribute, False):
                continue
            if any(isinstance(beside_watched(inner), LayerScope) for inner in module.modules()):
                module.__dict__[_FAST_PATH_BEFORE] = getattr(module, attribute)
                setattr(module, attribute, False)


def _device_of(value: Any) -> str | None:
    """Return the type of the device of the first floating tensor in `value`."""
    if isinstance(value, torch.Tensor):
        return value.device.type if value.is_floating_point() else None
    if isinstance(value, (tuple, list)):
        items = value
    elif isinstance(value, dict):
        items = value.values()
    else:
        return None
    return next((device for device in map(_device_of, items) if device is not None), None)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return `value` with its float32, float16 and bfloat16 tensors in `dtype`; one tensor in two places stays one."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.dtype in _FLOATS and value.dtype is not dtype else value
    return _cast_items(value, dtype, [])


def _cast_items(value: Any, dtype: torch.dtype, done: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    if isinstance(value, torch.Tensor):
        for known, result in done:
            if known is value:  # attention asks whether query, key and value are the same
                return result
        done.append((value, cast(value, dtype)))
        return done[-1][1]
    if type(value) in (tuple, list):
        return type(value)([_cast_items(item, dtype, done) for item in value])
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple, such as a PackedSequence
        return type(value)(*[_cast_items(item, dtype, done) for item in value])
    if type(value) is dict:
        return {key: _cast_items(item, dtype, done) for key, item in value.items()}
    if type(value) is collections.OrderedDict:
        return collections.OrderedDict([(key, _cast_items(item, dtype, done)) for key, item in value.items()])
    return value
