"""What GradScaler needs to know of an optimizer's gradients: names, shards, and whether the ops will take them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# Of models that were set up: an optimizer that was given model.parameters() has no names.
_names = WeakTensorKeyDictionary()


def name_parameters(model: torch.nn.Module) -> None:
    """Let reports name these parameters as the model does, where their optimizer has no names for them."""
    for name, parameter in model.named_parameters():
        _names[parameter] = name


def parameter_name(group: dict[str, Any], number: int, index: int) -> str:
    """Return what to call a parameter of an optimizer's group: the name it was given, its model's, else its place."""
    names = group.get("param_names")
    if names:
        return names[index]
    return _names.get(group["params"][index]) or f"parameter {index} of group {number}"


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """Return all parameters of an optimizer. Their names take a hundred times as long."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield (name, parameter) of an optimizer."""
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            yield parameter_name(group, number, index), parameter


def element_count(parameter: torch.nn.Parameter) -> int | None:
    """Return how many elements the gradient has, None without one."""
    return None if parameter.grad is None else parameter.grad.numel()


def check_gradient(name: str, grad: torch.Tensor, *, allow_fp16: bool, written: bool) -> None:
    """Raise if the ops would refuse the gradient, naming its parameter."""
    if grad.dtype not in _FLOATING:
        expected = ", ".join(map(str, _FLOATING))
        raise TypeError(f"GradScaler: the gradient of {name} has dtype {grad.dtype}, expected one of {expected}")
    if grad.dtype is torch.float16 and not allow_fp16:
        raise ValueError("Attempting to unscale FP16 gradients.")
    if grad.layout not in (torch.strided, torch.sparse_coo):
        raise ValueError(f"GradScaler: the gradient of {name} has layout {grad.layout}, expected strided or sparse_coo")
    if grad.device.type == "meta":
        raise ValueError(f"GradScaler: the gradient of {name} is on the meta device, which holds no values")
    if written and grad.layout is torch.strided and torch._debug_has_internal_overlap(local_shard(grad)[1]) == 1:
        raise ValueError(
            f"GradScaler: the gradient of {name} is expanded, several of its elements share memory; clone() it first"
        )


def local_shard(grad: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Return a DTensor's mesh and this rank's shard, or (None, grad) for any other tensor."""
    distributed = sys.modules.get("torch.distributed.tensor")  # where it was never imported, nothing is a DTensor
    if distributed is None or not isinstance(grad, distributed.DTensor):
        return None, grad
    return grad.device_mesh, grad._local_tensor


def reduce_over_meshes(found: torch.Tensor, meshes: Iterable[Any]) -> None:
    """Make the flag the largest of all ranks that hold shards, so that all skip or none does.

    The meshes come in the order of the parameters, which is the same on all ranks.
    """
    for mesh in meshes:
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(
                found, op=torch.distributed.ReduceOp.MAX, group=mesh.get_group(mesh_dim=dimension)
            )


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on `device`; a copy to the CPU, which the host reads next, is awaited."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def count_in_words(count: int | None) -> str:
    """Return an element_count for a message."""
    return "none" if count is None else f"{count} elements"
