"""Tensors inside tuples, lists, mappings, dataclasses, and whatever else torch's pytree has been told of."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


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
        if leaf is None or isinstance(leaf, PLAIN):  # torch.compile cannot ask None whether it is a dataclass
            return leaf
        items = _items_of(leaf)
        if not any(tensors_of(item) for item in items.values()):
            return leaf
        return _with_items(leaf, {key: map_tensors(function, item) for key, item in items.items()})

    return pytree.tree_map(of_leaf, value)


def structure_of(value: Any) -> Any:
    """Return all of `value` but its tensors' values, as something to compare by: containers' classes, tensors' shapes.

    TypeError for what may hold tensors that tensors_of() does not find, and for tensors that have no strides.
    """
    leaves, form = pytree.tree_flatten(value)
    return form, [_structure_of_leaf(leaf) for leaf in leaves]


def _structure_of_leaf(leaf: Any) -> Any:
    kind = type(leaf)
    if isinstance(leaf, torch.Tensor):
        if leaf.layout is not torch.strided or leaf.is_nested:
            raise TypeError(f"it has a tensor of layout {leaf.layout}, nested or not")
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    if leaf is None or isinstance(leaf, PLAIN):
        return kind, leaf
    if not isinstance(leaf, Mapping) and not is_dataclass(leaf):
        raise TypeError(f"it has a {kind.__name__}, in which tensors may be")
    return kind, [(key, structure_of(item)) for key, item in _items_of(leaf).items()]


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


def _is_field(mapping: Mapping[Any, Any], key: Any) -> bool:
    """Return whether this is a dataclass, a field of which holds the item too."""
    return is_dataclass(mapping) and any(each.name == key for each in dataclasses.fields(mapping))


def _with_items(leaf: Any, items: dict[Any, Any]) -> Any:
    if isinstance(leaf, Mapping) and not isinstance(leaf, MutableMapping):
        return type(leaf)(items)
    result = copy.copy(leaf)
    for key, item in items.items():
        if isinstance(leaf, Mapping):
            result[key] = item
        if not isinstance(leaf, Mapping) or _is_field(leaf, key):
            object.__setattr__(result, key, item)  # the dataclass may be frozen
    return result
