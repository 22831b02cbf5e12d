"""The tensor that stands for a float32 parameter while a module's forward computes on half copies.

Operations get its half copy. Whoever needs the parameter itself gets that: operations where autocast is off, those
that fail in half, and all that writes. Which parameters these are is told to the owner, so that they have no half copy
from the next step on. Norms get the parameter too: on a GPU some fail in half only in the backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

AUTOCAST_OFF = "forward uses it where autocast is off"
WRITTEN = "forward writes to it, or could (in place, out=, .data, detach())"
NOT_IN_HALF = "forward does something with it that fails in half"
OF_NORM = "weights of norms stay float32"

# What torch raises for a dtype, and more. No Exception of others': checkpoints leave a forward by one.
ERRORS = (RuntimeError, TypeError, ValueError)

# What hands out the parameter's memory, or its gradient, for a use that is not seen.
_HANDLES = {"data", "grad", "detach", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
_ASSIGNMENTS = {"__setitem__", "__set__", "__delete__"} | {
    f"__i{name}__"
    for name in ("add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor")
}

_NORMS = {"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"}


class Owner(Protocol):
    """Whose half copies they are: HalfWeights."""

    dtype: torch.dtype
    device: torch.device
    noted: dict[nn.Parameter, str]
    held: dict[nn.Parameter, list[torch.Tensor]]

    def applies(self) -> bool:
        """Return whether autocast computes in the copies' dtype here."""


class HalfTensor(torch.Tensor):
    """A half copy that knows its parameter. Results of operations are plain tensors."""

    _source: tuple[Owner, nn.Parameter, torch.Tensor]
    _is_param = True  # isinstance(self.weight, nn.Parameter) is true within forward

    @classmethod
    def of(cls, owner: Owner, parameter: nn.Parameter, half: torch.Tensor) -> HalfTensor:
        """Return what stands for the parameter."""
        tensor = half.as_subclass(cls)
        tensor._source = (owner, parameter, half)
        return tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call func on half copies or on parameters."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling():  # a compiled function that was given it
                return func(*args, **kwargs)
            reason = WRITTEN if _writes(func, kwargs) else OF_NORM if _is_norm(func) else ""
            try:
                return func(*_resolved(args, reason), **_resolved(kwargs, reason))
            except ERRORS as error:
                result = [] if reason else _in_float32(func, args, kwargs, error)
                if not result:
                    raise
                return result[0]


def _is_norm(func: Any) -> bool:
    return getattr(func, "__name__", "") in _NORMS  # of torch.nn.functional and of torch


def attempted(call: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """Return what the call returns, in a list that is empty if it raises."""
    try:
        return [call(*args, **kwargs)]
    except Exception:
        return []


def _in_float32(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> list[Any]:
    """Call func on the parameters, since it has failed on half copies; note them if that works."""
    sources: list[tuple[Owner, nn.Parameter]] = []
    args, kwargs = _parameters((args, kwargs), sources)
    if not sources or isinstance(error, torch.OutOfMemoryError) or _is_traced() or _in_compiled_code():
        return []
    result = attempted(func, *args, **kwargs)
    if result:
        for owner, parameter in sources:
            owner.noted.setdefault(parameter, NOT_IN_HALF)
    return result


def _parameters(value: Any, sources: list[tuple[Owner, nn.Parameter]]) -> Any:
    """Return an argument with parameters instead of half copies, and append these parameters with their owners."""
    if type(value) in (list, tuple):
        return type(value)([_parameters(item, sources) for item in value])
    if type(value) is dict:
        return {key: _parameters(item, sources) for key, item in value.items()}
    source = value.__dict__.get("_source") if type(value) is HalfTensor else None
    if source is None:
        return value
    sources.append(source[:2])
    return source[1]


def _resolved(value: Any, reason: str) -> Any:
    """Return an argument as the operation gets it; with a reason, or where autocast is off, in float32."""
    kind = type(value)
    if kind is list or kind is tuple:
        return kind([_resolved(item, reason) for item in value])
    if kind is dict:
        return {key: _resolved(item, reason) for key, item in value.items()}
    if kind is not HalfTensor:
        return value
    source = value.__dict__.get("_source")
    if source is None:
        return value
    owner, parameter, half = source
    if not owner.applies():
        reason = AUTOCAST_OFF
    if not reason and parameter not in owner.noted:
        return half
    if _is_traced():
        if reason == AUTOCAST_OFF:
            owner.noted.setdefault(parameter, reason)
        return half
    if _in_compiled_code():
        return half
    owner.noted.setdefault(parameter, reason)
    return parameter


def _is_traced() -> bool:
    """Return whether a compiler looks at what the compiled code will get."""
    return torch._guards.TracingContext.try_get() is not None


def _in_compiled_code() -> bool:
    """Return whether code that a compiler made of a function calls. It runs without autocast, on what it was made for.

    Asked for seldom, and costs a walk up the stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(("torch._functorch._aot_autograd", "torch._inductor")):
            return True
        frame = frame.f_back
    return False


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "").partition(".")[0]
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") in _HANDLES
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _HANDLES or name in _ASSIGNMENTS or kwargs.get("out") is not None


class HalfOf(torch.autograd.Function):
    """The half copy of a parameter. The gradient goes on to .grad as it is, without a cast; else it is float32."""

    @staticmethod
    def forward(ctx: Any, parameter: nn.Parameter, copy: torch.Tensor, owner: Owner) -> torch.Tensor:
        """Return the copy."""
        ctx.owner, ctx.parameter = owner, parameter
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient, half where it is for the fused step.

        Autograd sums in place into a gradient that nobody else holds: a float32 one, of a penalty, would be rounded
        to half. So it is held until it has arrived; the sum of half and float32 is then a new tensor, in float32.
        """
        differentiated = torch.is_grad_enabled()
        if differentiated or not _is_summed(ctx.parameter):
            return grad.float(), None, None
        ctx.owner.held.setdefault(ctx.parameter, []).append(grad)
        return grad, None, None


def _is_summed(parameter: nn.Parameter) -> bool:
    """Return whether the backward pass of now adds to .grad, and is none of torch.autograd.grad."""
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)
    except RuntimeError:  # torch's answer for parameters whose gradients are returned
        return False
