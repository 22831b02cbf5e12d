"""Tensors inside tuples, lists, mappings, dataclasses, and whatever else torch's pytree has been told of."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch.utils import _pytree as pytree


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors in `value`, in their order."""
    found: list[torch.Tensor] = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        else:
            found += [tensor for item in _items_of(leaf).values() for tensor in tensors_of(item)]
    return found


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return a copy of `value` with function(tensor) in place of each tensor, in the order of tensors_of().

    Containers keep their class and all else that they hold. Mappings and dataclasses without a tensor are not copied.
    """

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return function(leaf)
        items = _items_of(leaf)
        if not any(tensors_of(item) for item in items.values()):
            return leaf
        return _with_items(leaf, {key: map_tensors(function, item) for key, item in items.items()})

    return pytree.tree_map(of_leaf, value)


def is_dataclass(value: Any) -> bool:
    """Return whether `value` is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _items_of(leaf: Any) -> dict[Any, Any]:
    """Return what a container holds that pytree does not know, such as a tokenizer's BatchEncoding or a ModelOutput."""
    if isinstance(leaf, Mapping):
        return dict(leaf.items())
    if is_dataclass(leaf):
        names = [each.name for each in dataclasses.fields(leaf)]
        return {name: getattr(leaf, name) for name in names if hasattr(leaf, name)}
    return {}


def _with_items(leaf: Any, items: dict[Any, Any]) -> Any:
    if isinstance(leaf, Mapping) and not isinstance(leaf, MutableMapping):
        return type(leaf)(items)
    result = copy.copy(leaf)
    for key, item in items.items():
        if isinstance(leaf, Mapping):
            result[key] = item
        else:
            object.__setattr__(result, key, item)  # the dataclass may be frozen
    return result
