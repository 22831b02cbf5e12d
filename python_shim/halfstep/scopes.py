"""Per-layer precision inside a model: layers that deviate from autocast's dtype run in a scope of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from halfstep.policy import PrecisionPlan

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOATS = tuple(_DTYPES.values())


class LayerScope:
    """The `forward` of one layer, in the precision that a plan gives it.

    It acts while autocast is on for the device of the layer's inputs, and not where that computes in `dtype` anyway:
    torch.float32 turns autocast off around the layer, another half type runs under an autocast of its own, without the
    cache of casts, whose key has no dtype. Floating inputs of the other of these types are cast to `dtype`, also inside
    of tuples, lists and dicts. Where the user has turned autocast off nothing is changed.

    It holds the module, and what its `forward` was; so copies and pickles are of the copy. Backward passes, checkpoints
    that compute it again and torch.compile see casts and autocast regions as if they stood in the layer's forward.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, inner: Callable[..., Any] | None) -> None:
        self.module = module
        self.dtype = dtype
        self.inner = inner  # what stood in the module's attribute `forward` before, if anything did

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns."""
        first = args[0] if args else None
        if type(first) is torch.Tensor and first.dtype in _FLOATS:  # nearly always
            device = first.device.type
        else:
            device = _device_of((args, kwargs)) or _device_of(list(self.module._parameters.values()))
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
            return self._forward(*args, **kwargs)
        if torch.get_autocast_dtype(device) is self.dtype:
            return self._forward(*args, **kwargs)
        if len(args) == 1 and not kwargs:
            args = (_cast(first, self.dtype),)
        else:
            args, kwargs = _cast((args, kwargs), self.dtype)
        if torch.compiler.is_compiling():  # knows the context, but not the functions that it calls
            off = self.dtype is torch.float32
            region = torch.autocast(device, enabled=not off, dtype=None if off else self.dtype, cache_enabled=False)
            with region:
                return self._forward(*args, **kwargs)
        if self.dtype is torch.float32:
            torch.set_autocast_enabled(device, False)
            try:
                return self._forward(*args, **kwargs)
            finally:
                torch.set_autocast_enabled(device, True)
        return self._under_own_autocast(device, args, kwargs)

    def _under_own_autocast(self, device: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()
        torch.set_autocast_dtype(device, self.dtype)
        torch.set_autocast_cache_enabled(False)
        try:
            return self._forward(*args, **kwargs)
        finally:
            torch.set_autocast_dtype(device, before[0])
            torch.set_autocast_cache_enabled(before[1])

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __globals__(self) -> dict[str, Any]:
        """What torch.jit.script asks a forward for first. It compiles source code, and this is an object."""
        raise AttributeError(
            "torch.jit.script cannot compile the layer scopes of halfstep: call remove_plan(model) first "
            "(torch.jit.trace, torch.compile and torch.export need no such call)"
        )


def apply_plan(model: nn.Module, plan: PrecisionPlan, autocast_dtype: torch.dtype | None = None) -> None:
    """Let each layer of `model` run in the precision that `plan` gives it, under an autocast of the loop's own.

    plan: made for this model, with float32, float16 and bfloat16 alone; in place of one that was applied before.
    autocast_dtype: what the loop's autocast computes in. Layers that are planned so then need no scope, and cost
    nothing; without it every layer has one.
    Raises ValueError, and changes nothing, where the model has not the plan's layers or a precision is another one.
    Parameters, buffers, classes and state_dict stay as they are.
    """
    dtypes = planned_dtypes(model, plan)
    remove_plan(model)
    for module, dtype in dtypes.items():
        if dtype is autocast_dtype:
            continue
        module.forward = LayerScope(module, dtype, module.__dict__.get("forward"))


def planned_dtypes(model: nn.Module, plan: PrecisionPlan) -> dict[nn.Module, torch.dtype]:
    """Return the dtype of each module that the plan names; ValueError as apply_plan() raises it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    dtypes: dict[nn.Module, torch.dtype] = {}
    for layer in plan.layers():
        module = modules.get(layer.name)
        if module is None or type(module).__name__ != layer.type:
            found = "there is none" if module is None else f"it is a {type(module).__name__}"
            raise ValueError(f"the plan has a {layer.type} {layer.name!r}, but in the model {found}")
        if layer.precision not in _DTYPES:
            raise ValueError(f"layer {layer.name!r} is planned as {layer.precision}, expected one of {list(_DTYPES)}")
        dtypes.setdefault(module, _DTYPES[layer.precision])
    return dtypes


def remove_plan(model: nn.Module) -> None:
    """Undo apply_plan(): no trace of it stays in `model`."""
    for module in model.modules():
        scope = module.__dict__.get("forward")
        if isinstance(scope, LayerScope):
            del module.forward
            if scope.inner is not None:
                module.forward = scope.inner


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


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.dtype in _FLOATS and value.dtype is not dtype else value
    if type(value) in (tuple, list):
        return type(value)([_cast(item, dtype) for item in value])
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
