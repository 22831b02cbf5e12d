"""What stands in a model's attribute `forward` so that a monitor hears of its calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Unscriptable:
    """An object in the place of a `forward`, which torch.jit.script cannot compile: it takes source code."""

    what = ""  # torch.jit.script cannot compile
    remedy = ""  # the call after which it can have the model

    @property
    def __globals__(self) -> dict[str, Any]:
        """What torch.jit.script asks a forward for first."""
        raise AttributeError(
            f"torch.jit.script cannot compile {self.what}: call {self.remedy} first (torch.jit.trace, torch.compile "
            "and torch.export need no such call)"
        )


class Standing(Unscriptable):
    """What stands in a module's attribute `forward`, in front of what was there before."""

    def __init__(self, module: nn.Module, inner: Callable[..., Any] | None) -> None:
        self.module = module
        self.inner = inner  # what stood in the module's attribute `forward` before, if anything did

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns without this."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class Around(Standing):
    """What stands around a model's own `forward`. `inspect.signature` gives that of the forward."""

    what = "a model that halfstep monitors"

    @property
    def __signature__(self) -> inspect.Signature:
        if self.inner is not None:
            return inspect.signature(self.inner)
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> Any:
        """What torch.export asks for: it only names the place by it."""
        return (type(self.module).forward if self.inner is None else self.inner).__code__


class Watched(Around):
    """The `forward` of a model that is monitored: its own one, and the monitor hears of each call before it.

    In code that is compiled or exported it is its forward and nothing else. Copies and pickles are of
    the copied model and have no monitor: they were never set up.
    """

    remedy = "manager.remove_policy(model)"

    def __init__(self, module: nn.Module, inner: Callable[..., Any] | None) -> None:
        super().__init__(module, inner)
        self.monitor: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        if not torch.compiler.is_compiling() and self.monitor is not None:
            self.monitor.before(self.module, args, kwargs)
        return self._forward(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "monitor": None}


def watch(module: nn.Module, watched: Watched | None = None) -> Watched:
    """Put a Watched around what stands in the module's `forward`, the one that was taken out if it is the module's."""
    if watched is None or watched.module is not module:
        watched = Watched(module, None)
    watched.inner = module.__dict__.get("forward")
    module.forward = watched
    return watched


def take_out(module: nn.Module, kind: type) -> Any:
    """Take the outermost object of a class out of what stands in the module's `forward`; return it, or None.

    Around it may be others that keep what they stand before as `inner`: the layer scope of a plan, a Watched.
    """
    outer, link = None, module.__dict__.get("forward")
    while link is not None and not isinstance(link, kind):
        outer, link = link, getattr(link, "inner", None)
    if link is None:
        return None
    if outer is not None:
        outer.inner = link.inner
        return link
    del module.forward
    if link.inner is not None:
        module.forward = link.inner
    return link


def beside_watched(module: nn.Module) -> Any:
    """Return what stands in the module's `forward` without monitors around it, None for its class's own."""
    forward = module.__dict__.get("forward")
    while isinstance(forward, Around):
        forward = forward.inner
    return forward
