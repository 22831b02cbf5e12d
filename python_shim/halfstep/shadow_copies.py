"""The copies of a model on which a sample runs, and how they are kept apart from it."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.calls import copy_of

_COLLECTIVE = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")


class CannotSample(RuntimeError):
    """Why this model is not sampled."""


@contextlib.contextmanager
def sampled_copy(model: nn.Module, *, shared: bool = True) -> Iterator[nn.Module]:
    """Give a copy without hooks. Its memory is free afterwards: what stands in `forward` makes cycles."""
    twin = copy_of(model, hooks=False, shared=shared)
    own = list(twin.buffers()) + ([] if shared else list(twin.parameters()))
    try:
        yield twin
    finally:
        for module in twin.modules():
            vars(module).pop("forward", None)
        for tensor in own:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def shared_functions(model: nn.Module) -> str:
    """Return "" or which `forward` a copy would share with the model."""
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        while forward is not None:
            if isinstance(forward, types.FunctionType):
                return f"the forward of {name or 'the model'} was replaced by a function, which a copy would share"
            forward = getattr(forward, "inner", None)
    return ""


class _Collectives(TorchDispatchMode):
    """Notes whether ranks talk to each other."""

    found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _COLLECTIVE:
            self.found = str(func)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def traceless_copy(model: nn.Module) -> Iterator[nn.Module]:
    """Give a copy with parameters of its own, and raise CannotSample if a run of it shows what would leave traces.

    Ranks that train together reach their first sample together, so collectives are found before they would hang.
    """
    held = [*model.parameters(), *model.buffers()]
    versions = [tensor._version for tensor in held if not tensor.is_inference()]
    buffers = [buffer.detach().clone() for buffer in model.buffers()]
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    watching = _Collectives() if distributed and torch.distributed.get_world_size() > 1 else None
    with sampled_copy(model, shared=False) as twin:
        try:
            with watching or contextlib.nullcontext():
                yield twin
        finally:
            touched = versions != [tensor._version for tensor in held if not tensor.is_inference()]
            if touched:
                with torch.no_grad():
                    for buffer, kept in zip(model.buffers(), buffers, strict=True):
                        buffer.copy_(kept)
        if touched:
            raise CannotSample("a copy of the model writes to the model: a function that it keeps refers to it")
        for (name, parameter), copied in zip(model.named_parameters(), twin.parameters(), strict=True):
            if not torch.equal(parameter, copied):
                raise CannotSample(f"forward writes to the parameter {name}, or it holds NaN")
    if watching is not None and watching.found:
        raise CannotSample(f"the model's ranks talk to each other ({watching.found}), and a sample would do so too")
