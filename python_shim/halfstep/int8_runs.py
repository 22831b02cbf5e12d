"""Runs of a traced model: whether it computes what the model does, of which shapes its values are, and what they are.

`call(model, batch)` is how the owner of the data calls a model on one batch. All run without gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node

from halfstep.calibration_data import naming
from halfstep.containers import map_tensors, structure_of, tensors_of
from halfstep.int8_batches import with_fewer_samples

Call = Callable[[nn.Module, Any], Any]
# For each node that gives a tensor: its shape and dtype on a batch, and on a smaller one.
Shapes = dict[str, tuple[tuple[torch.Size, torch.dtype], ...]]


def given_arguments(model: nn.Module, batch: Any, call: Call) -> tuple[str, ...]:
    """Return which parameters of the model's forward `call` passes."""
    given: dict[str, None] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.update(dict.fromkeys(inspect.signature(module.forward).bind(*args, **kwargs).arguments))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            call(model, _copy(batch))
    finally:
        handle.remove()
    return tuple(given)


def disagreement(graph_module: GraphModule, model: nn.Module, batches: Iterable[Any], call: Call) -> str:
    """Return "" if both give the same bits, or where they do not.

    Each batch is also run with fewer samples, if it can be cut and the model takes it: a size that a trace baked in
    shows then.
    """
    for number, batch in enumerate(batches):
        with torch.no_grad():
            with naming(batch, model):
                expected = call(model, _copy(batch))
            found = _difference(graph_module, batch, expected, call)
            if not found:
                for smaller in with_fewer_samples(batch):
                    try:
                        expected = call(model, _copy(smaller))
                    except Exception:  # the model does not take fewer samples
                        continue
                    found = _difference(graph_module, smaller, expected, call)
                    found = found and f"{found}, with fewer samples"
                    break
        if found:
            return f"on batch {number}: {found}"
    return ""


def _difference(graph_module: GraphModule, batch: Any, expected: Any, call: Call) -> str:
    try:
        out = call(graph_module, _copy(batch))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        if structure_of(out) != structure_of(expected):
            return "the outputs differ in structure, shape or dtype"
    except TypeError as error:
        return f"the output cannot be compared: {error}"
    return "" if all(map(_same, tensors_of(out), tensors_of(expected))) else "the outputs differ"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors of one shape and dtype have the same values, a NaN being one."""
    if torch.equal(a, b):
        return True
    return (a.is_floating_point() or a.is_complex()) and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _copy(batch: Any) -> Any:
    """Copy the tensors, to which a model may write."""
    return map_tensors(lambda tensor: tensor.detach().clone(), batch)


def shapes_of(graph_module: GraphModule, batch: Any, call: Call) -> Shapes:
    """Return the shapes and dtypes of all nodes on the batch and, where it can be cut, on a smaller one."""
    seen = [_shapes(graph_module, batch, call)]
    for smaller in with_fewer_samples(batch):
        try:
            seen.append(_shapes(graph_module, smaller, call))
        except Exception:  # the model does not take fewer samples
            continue
        break
    return {name: tuple(run[name] for run in seen) for name in seen[0] if all(name in run for run in seen)}


def _shapes(graph_module: GraphModule, batch: Any, call: Call) -> dict[str, tuple[torch.Size, torch.dtype]]:
    shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def note(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            shapes[name] = value.shape, value.dtype

    with torch.no_grad():
        call(_Watched(graph_module, note), _copy(batch))
    return shapes


def capture(graph_module: GraphModule, batch: Any, call: Call, names: Collection[str]) -> dict[str, Any]:
    """Return the values of these nodes on the batch, copied: what subgraph() takes. KeyError for a name unknown."""
    values: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        if name in names:
            values[name] = _copy(value)

    with torch.no_grad():
        call(_Watched(graph_module, note), _copy(batch))
    missing = [name for name in names if name not in values]
    if missing:
        raise KeyError(f"the graph has no node {', '.join(missing)}")
    return values


class _Watched(nn.Module):
    """Stands for the graph module in one call and tells of each node's value."""

    def __init__(self, graph_module: GraphModule, note: Callable[[str, Any], None]) -> None:
        super().__init__()
        self._interpreter = _Watcher(graph_module, note)
        self._signature = inspect.signature(graph_module.forward)
        self.training = graph_module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._interpreter.run(*self._signature.bind(*args, **kwargs).args)


class _Watcher(Interpreter):
    def __init__(self, graph_module: GraphModule, note: Callable[[str, Any], None]) -> None:
        super().__init__(graph_module)
        self._note = note

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self._note(n.name, value)
        return value
