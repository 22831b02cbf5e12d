"""A model whose weights are stored in another floating-point type, and that is called as before."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


class CastModel(nn.Module):
    """Casts floating-point inputs to the model's dtype, and floating-point results to `out_dtype`.

    `module` is the model inside. Arguments and results may be nested in tuples, lists and dicts.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.out_dtype = out_dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model inside."""
        args, kwargs = _cast((args, kwargs), self.dtype)
        return _cast(self.module(*args, **kwargs), self.out_dtype)

    def extra_repr(self) -> str:
        """Name both types."""
        return f"{self.dtype} inside, {self.out_dtype} outside"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(cast, value)


def float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's floating-point parameters, float32 without any; ValueError if they differ."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(kinds) > 1:
        raise ValueError(f"the model's parameters are {sorted(map(str, kinds))}, expected one floating-point type")
    return next(iter(kinds), torch.float32)


def half_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of the model with floating-point weights and buffers in `dtype`; `model` itself if it has it."""
    own = float_dtype(model)
    return model if own == dtype else CastModel(copy.deepcopy(model).to(dtype), dtype, own)
