"""The batches by which a model is calibrated and judged: read once, cached, and split in two."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_LABELS = ("labels", "label")


@dataclass
class Batch:
    """The arguments of one call of a model, and what the answer should be."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: torch.Tensor | None
    size: int  # samples: the first dimension of the first tensor
    device: torch.device | None = field(default=None)
    dtype: torch.dtype | None = field(default=None)

    def __call__(self, model: nn.Module) -> Any:
        """Call the model on this batch, moved where it was said to be."""
        args, kwargs = self.args, self.kwargs
        if self.device is not None or self.dtype is not None:
            args, kwargs = pytree.tree_map(self._moved, (args, kwargs))
        return model(*args, **kwargs)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        dtype = self.dtype if value.is_floating_point() else None
        return value.to(self.device or value.device, dtype or value.dtype)

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """Return the batch as it will be called there; nothing is moved before."""
        return Batch(self.args, self.kwargs, self.labels, self.size, device, dtype)

    def part(self, begin: int, end: int) -> Batch:
        """Return the samples begin .. end - 1. What has another first dimension is for all of them."""

        def cut(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == self.size:
                return value[begin:end]
            return value

        args, kwargs, labels = pytree.tree_map(cut, (self.args, self.kwargs, self.labels))
        return Batch(args, kwargs, labels, min(end, self.size) - begin, self.device, self.dtype)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _is_labels(value: Any, size: int) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.shape == (size,)
        and not value.is_floating_point()
        and not value.is_complex()
        and value.dtype != torch.bool
    )


def _positional(model: nn.Module) -> tuple[int, float, set[str], bool]:
    """Return how many positional arguments forward needs and takes, its names, and whether it takes any name."""
    least, most, names, any_name = 0, 0.0, set(), False
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 0, float("inf"), set(), True
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            most = float("inf")
        elif parameter.kind is parameter.VAR_KEYWORD:
            any_name = True
        else:
            names.add(parameter.name)
            if parameter.kind is not parameter.KEYWORD_ONLY:
                most += 1
                least += parameter.default is parameter.empty
    return least, most, names, any_name


def batch_of(model: nn.Module, value: Any) -> Batch:
    """Return what a loader gave as a call of the model.

    A tensor is the only argument. Of a tuple or list, integer labels [batch] at the end are for the judge, and so is
    whatever forward takes no argument for; the rest are positional arguments. A mapping is keyword arguments, but for
    integer "labels". TypeError for anything else, or without a tensor.
    """
    if isinstance(value, Batch):
        return value
    tensors = _tensors(value)
    if not tensors or tensors[0].dim() == 0:
        raise TypeError(
            f"a calibration batch is {type(value).__name__} without a tensor of samples, expected a tensor, a tuple or "
            "a dict of tensors whose first dimension is the batch"
        )
    size = tensors[0].shape[0]
    least, most, names, any_name = _positional(model)
    if isinstance(value, torch.Tensor):
        return Batch((value,), {}, None, size)
    if isinstance(value, Mapping):
        kwargs, labels = dict(value), None
        for key in _LABELS:
            if key in kwargs and _is_labels(kwargs[key], size):
                labels = kwargs.pop(key)
                break
        if not any_name:
            kwargs = {key: item for key, item in kwargs.items() if key in names}
        return Batch((), kwargs, labels, size)
    if isinstance(value, (tuple, list)):
        args, labels = tuple(value), None
        if len(args) > max(1, least) and _is_labels(args[-1], size):
            args, labels = args[:-1], args[-1]
        if len(args) > most:
            args = args[: int(most)]
        return Batch(args, {}, labels, size)
    raise TypeError(f"a calibration batch is {type(value).__name__}, expected a tensor, a tuple, a list or a dict")


def collect(model: nn.Module, data: Any, samples: int) -> list[Batch]:
    """Read `data` once, up to `samples` samples, and return them in batches.

    data: a loader or any other iterable of batches, or one batch: a tensor, or a dict of tensors.
    """
    if isinstance(data, (torch.Tensor, Mapping)):
        data = [data]
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise TypeError(f"calibration_data is {type(data).__name__}, expected an iterable of batches")
    batches: list[Batch] = []
    left = samples
    for value in data:
        batch = batch_of(model, value)
        if batch.size > left:
            batch = batch.part(0, left)
        if batch.size > 0:
            batches.append(batch)
            left -= batch.size
        if left <= 0:
            break
    if not batches:
        raise ValueError("calibration_data is empty, expected at least one batch")
    return batches


def split(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return (two thirds to calibrate by, one third for the guard): every third batch, or of few batches a part each.

    One sample alone serves both.
    """
    if len(batches) >= 3:
        return [b for i, b in enumerate(batches) if i % 3 != 2], batches[2::3]
    calibration, guard = [], []
    for batch in batches:
        cut = batch.size - max(1, batch.size // 3)
        if cut > 0:
            calibration.append(batch.part(0, cut))
        guard.append(batch.part(cut, batch.size))
    return calibration or guard, guard
