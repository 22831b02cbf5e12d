"""Statistics of a model's layers during one forward pass, and of the backward pass that follows."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@contextlib.contextmanager
def watching(monitor: Any, layers: Mapping[nn.Module, int], *, gradients: bool) -> Iterator[None]:
    """Let `monitor` see the layers that this thread calls meanwhile: inputs, outputs and, later, their gradients.

    monitor: a torch.classes.halfstep.StabilityMonitor. layers: modules and their numbers there. gradients: False looks
    at outputs alone. torch's hooks for all modules are used, for the time of the pass, so no module is changed.
    """
    thread = threading.get_ident()

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        layer = layers.get(module)
        # A layer that writes to its input gets the input, not a view of it.
        if layer is None or threading.get_ident() != thread or getattr(module, "inplace", False):
            return None
        return tuple(monitor.watch_input(layer, arg) if isinstance(arg, torch.Tensor) else arg for arg in args)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        layer = layers.get(module)
        if layer is not None and threading.get_ident() == thread:
            watch_outputs(monitor, layer, output, gradients=gradients)

    hooks = [register_module_forward_hook(after)]
    if gradients:
        hooks.append(register_module_forward_pre_hook(before))
    monitor.begin_step()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def watch_outputs(monitor: Any, layer: int, value: Any, *, gradients: bool) -> None:
    """Show `monitor` the tensors that a layer has returned."""
    if isinstance(value, torch.Tensor):
        monitor.watch_output(layer, value, gradients)
    elif isinstance(value, (tuple, list)):
        for item in value:
            watch_outputs(monitor, layer, item, gradients=gradients)
    elif isinstance(value, Mapping):
        for item in value.values():
            watch_outputs(monitor, layer, item, gradients=gradients)
