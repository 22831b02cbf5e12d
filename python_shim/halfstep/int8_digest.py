"""A digest of what a traced model computes, by which other code is told from the code that was traced."""

from __future__ import annotations

import enum
import hashlib
import inspect
import json
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from halfstep.half_model import name_of

# Settings of torch's modules that change nothing in eval mode, or no value.
_WITHOUT_EFFECT = ("training", "inplace", "momentum", "dropout", "p", "sparse", "scale_grad_by_freq")
_TORCHS = (
    "torch.nn.",
    "halfstep.int8_attention",
)  # modules whose attributes are settings; the latter stand for torch's
_SETTINGS = (bool, int, float, str, tuple, list, type(None), types.FunctionType, types.BuiltinFunctionType)


def digest_of(graph_module: GraphModule) -> str:
    """Return a SHA-256 of the graph: operations in their order, their arguments and constants, and layers' settings.

    Not of weights, devices, names of arguments, nor of what code does inside of a module that is called whole. Modules
    and functions count by their short names, which stay as they are when torch moves them.
    """
    places = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    digest = hashlib.sha256()
    for node in places:
        kwargs = [[key, _plain(value, places)] for key, value in sorted(node.kwargs.items())]
        line = [node.op, _target(graph_module, node), _plain(node.args, places), kwargs]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def settings_of(model: nn.Module) -> str:
    """Return a SHA-256 of the settings of torch's modules in the model, by their names; it need not be traced."""
    found = [each for each in _settings(model) if each[2]]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _target(root: nn.Module, node: Node) -> Any:
    if node.op == "call_module":
        return [node.target, _settings(root.get_submodule(str(node.target)))]
    if node.op == "call_function":
        return getattr(node.target, "__name__", type(node.target).__name__)
    return node.target if node.op in ("call_method", "get_attr") else ""


def _settings(layer: nn.Module) -> list[Any]:
    """Return name, class and settings of each module in `layer`."""
    found = []
    for name, module in layer.named_modules():
        values = [[key, _plain(getattr(module, key, None), {})] for key in sorted(_keys(module))]
        found.append([name, type(module).__name__, values])
    return found


def _keys(module: nn.Module) -> set[str]:
    """Return the names of a module's settings.

    Of torch's modules they are all plain public attributes. What a subclass adds may be anything, such as a counter: of
    its attributes those count that the class of torch has arguments for.
    """
    base = next(kind for kind in type(module).__mro__ if kind.__module__.startswith(_TORCHS))
    names = set(vars(module))
    if base is not type(module):
        names &= set(inspect.signature(base.__init__).parameters)
    names = {name for name in names if not name.startswith("_") and isinstance(vars(module)[name], _SETTINGS)}
    return (names | set(getattr(module, "__constants__", ()))) - set(_WITHOUT_EFFECT)


def _plain(value: Any, places: Mapping[Node, int]) -> Any:
    """Return an argument as what JSON can hold; objects by their class, since their addresses differ."""
    if isinstance(value, Node):
        return {"node": places[value]}
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, (float, complex, range)):
        return {type(value).__name__: repr(value)}
    if isinstance(value, slice):
        return {"slice": [_plain(each, places) for each in (value.start, value.stop, value.step)]}
    if isinstance(value, (tuple, list)):
        return [_plain(each, places) for each in value]
    if isinstance(value, Mapping):
        return {"dict": [[_plain(key, places), _plain(each, places)] for key, each in value.items()]}
    if isinstance(value, torch.dtype):
        return {"dtype": name_of(value)}
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return {"function": value.__qualname__}
    if isinstance(value, (torch.memory_format, torch.layout, enum.Enum)):
        return {"name": str(value)}
    return {"object": type(value).__name__}
