"""Models lent to code of the user's own: whatever that does with them, the optimization goes on as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from halfstep.int8_model import copy_of


@contextlib.contextmanager
def lent(model: nn.Module) -> Iterator[nn.Module]:
    """Give a model to hand out, in eval mode.

    It is a copy: weights are the model's, as parameters of its own; modules and buffers are copied. So modes, running
    statistics, gradients, hooks, and where and in which type the tensors are stay the copy's. If a __deepcopy__ of the
    model's own refuses int8 layers it is the model itself, of which modes, buffers and gradients are put back.
    """
    try:
        copied = copy_of(model, {parameter: _alias(parameter) for parameter in model.parameters()}).eval()
    except Exception:  # code of the model's own
        copied = None
    if copied is not None:
        yield copied
        return
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            setattr(module, name, buffer.copy_(value))
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad).grad = None


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Return another parameter of the same memory."""
    if type(parameter) is not nn.Parameter:  # whatever it is, its class alone knows how it is made
        return parameter
    alias = nn.Parameter(parameter.detach(), parameter.requires_grad)
    vars(alias).update(vars(parameter))
    return alias


@contextlib.contextmanager
def same_random_numbers(devices: Iterable[torch.device]) -> Iterator[None]:
    """Let torch's generators, of the CPU and of the GPUs among the devices, go on later as if nothing was drawn."""
    with torch.random.fork_rng([device for device in dict.fromkeys(devices) if device.type == "cuda"]):
        yield


def devices_of(model: nn.Module) -> set[torch.device]:
    """Return where the model's tensors are."""
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}
