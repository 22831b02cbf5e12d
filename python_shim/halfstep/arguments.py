"""Arguments and results of a captured step: tensors inside tuples, lists and mappings, and constants."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch


class UnsupportedArgument(TypeError):
    """A value whose tensors, if it has any, cannot be found."""


def flatten(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Append the tensors in `value` and return all the rest of it, with their shapes, as something to compare by."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_nested:
            raise UnsupportedArgument(f"it has a tensor of layout {value.layout}, nested or not")
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    kind = type(value)
    if isinstance(value, (tuple, list)):
        return kind, tuple([flatten(item, tensors) for item in value])
    if value is None or kind in (bool, int, float, str) or isinstance(value, (torch.dtype, torch.device)):
        return kind, value
    if isinstance(value, MutableMapping) and not _has_other_tensors(value):
        return kind, tuple([(key, flatten(item, tensors)) for key, item in value.items()])
    raise UnsupportedArgument(
        f"it has a {kind.__name__} (supported: tensors, tuples, lists, dicts and other mutable mappings without "
        "tensors beside their items, numbers, strings)"
    )


def _has_other_tensors(mapping: MutableMapping[Any, Any]) -> bool:
    """Return whether attributes hold tensors that are not items."""
    items = {id(item) for item in mapping.values()}
    attributes = getattr(mapping, "__dict__", {}).values()
    return any(isinstance(each, torch.Tensor) and id(each) not in items for each in attributes)


def rebuild(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """Return `value` with other tensors in place of its own, in the order of flatten()."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, (tuple, list)):
        items = [rebuild(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        for key, item in value.items():
            result[key] = rebuild(item, tensors)
        return result
    return value


def describe(value: Any) -> str:
    """Return the tensors in `value` in short, such as "float32[128, 784], int64[128]"."""
    tensors: list[torch.Tensor] = []
    try:
        flatten(value, tensors)
    except UnsupportedArgument as error:
        return str(error)
    shown = [f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors]
    return ", ".join(shown) or "no tensors"
