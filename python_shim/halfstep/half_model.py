"""A model whose weights are stored in another floating-point type, and that is called as before."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from halfstep.containers import map_tensors


class CastModel(nn.Module):
    """Casts floating-point inputs to the model's dtype, and floating-point results to `out_dtype`.

    `module` is the model inside. Arguments and results may be nested in tuples, lists, mappings and dataclasses, which
    keep their classes.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.out_dtype = out_dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model inside."""
        args, kwargs = cast_floats((args, kwargs), self.dtype)
        return cast_floats(self.module(*args, **kwargs), self.out_dtype)

    def extra_repr(self) -> str:
        """Name both types."""
        return f"{self.dtype} inside, {self.out_dtype} outside"


def name_of(dtype: torch.dtype) -> str:
    """Return "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def cast_floats(value: Any, dtype: torch.dtype, only: torch.dtype | None = None) -> Any:
    """Return a copy of `value`, tensors in containers, with its floats, or those in `only` alone, in `dtype`."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        is_meant = tensor.is_floating_point() if only is None else tensor.dtype == only
        return tensor.to(dtype) if is_meant else tensor

    return map_tensors(cast, value)


def float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of most of the model's floating-point parameters, by elements; float32 without any."""
    elements = _elements(model)
    return max(elements, key=elements.__getitem__) if elements else torch.float32


def is_uniform(model: nn.Module) -> bool:
    """Return whether the model's floating-point parameters are of one dtype; if not, float_dtype() is the main one."""
    return len(_elements(model)) <= 1


def _elements(model: nn.Module) -> dict[torch.dtype, int]:
    elements: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            elements[parameter.dtype] = elements.get(parameter.dtype, 0) + parameter.numel()
    return elements


def half_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of the model with floating-point weights and buffers in `dtype`; `model` itself if it has it."""
    own = float_dtype(model)
    return model if own == dtype else CastModel(copy.deepcopy(model).to(dtype), dtype, own)
