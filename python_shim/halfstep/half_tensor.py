"""The tensor that stands for a float32 parameter while a module's forward computes on half copies.

Operations get its half copy. Whoever needs the parameter itself gets that: operations where autocast is off, and all
that writes. Which parameters these are is told to the owner, so that they have no half copy from the next step on.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

AUTOCAST_OFF = "forward uses it where autocast is off"
WRITTEN = "forward writes to it, or could (in place, out=, .data, detach())"

# What hands out the parameter's memory, or its gradient, for a use that is not seen.
_HANDLES = {"data", "grad", "detach", "register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
_ASSIGNMENTS = {"__setitem__", "__set__", "__delete__"} | {
    f"__i{name}__"
    for name in ("add", "and", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor")
}


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
            reason = WRITTEN if _writes(func, kwargs) else ""
            args = tuple([_resolved(value, reason) for value in args])
            return func(*args, **{key: _resolved(value, reason) for key, value in kwargs.items()})


def _resolved(value: Any, reason: str) -> Any:
    """Return an argument as the operation gets it; with a reason, or where autocast is off, in float32."""
    kind = type(value)
    if kind is list or kind is tuple:
        return kind([_resolved(item, reason) for item in value])
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
    if torch._guards.TracingContext.try_get() is not None:  # a compiler looks at what the compiled code will get
        if reason == AUTOCAST_OFF:
            owner.noted.setdefault(parameter, reason)
        return half
    if _in_compiled_code():
        return half
    owner.noted.setdefault(parameter, reason)
    return parameter


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


class _Region(BaseException):
    """Leaves a compiled module before it enters a region without autocast. No handler of users' is meant to see it."""


@contextlib.contextmanager
def regions_without_autocast(owner: Owner) -> Iterator[list[bool]]:
    """Stop the block where it would leave the owner's kind of autocast; then the list yielded is not empty.

    For calls of compiled modules: while a compiler traces, it enters the contexts of the traced code for real.
    """
    kind, found = owner.device.type, []
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    _watching.append((threading.get_ident(), owner, found))
    torch.autocast.__enter__ = _enter
    try:
        yield found
    except BaseException:  # a compiler may have made another exception of it
        if not found:
            raise
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    finally:
        _watching.pop()
        if not _watching:
            torch.autocast.__enter__ = _enter_of_torch


def _enter(context: torch.autocast) -> Any:
    """Stand in for torch.autocast.__enter__. One function for good, since compiled code is made for it."""
    if not torch.compiler.is_compiling():
        thread, owner, found = _watching[-1]
        applies = context._enabled and context.fast_dtype is owner.dtype
        if context.device == owner.device.type and not applies and thread == threading.get_ident():
            found.append(True)
            raise _Region
    return _enter_of_torch(context)


_enter_of_torch = torch.autocast.__enter__
_watching: list[tuple[int, Owner, list[bool]]] = []
