"""Batches and outputs as the accuracy guard sees them: tensors somewhere in tuples, lists, mappings and dataclasses.

A batch may also be an object that knows its `labels` (or None) and `size`, and cuts itself by `part(begin, end)`, or
in several ways by `ways_to_cut(count)`, as calibration_data.Batch does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from halfstep.containers import map_tensors, tensors_of


def floating_tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the floating-point tensors in `value`, in their order."""
    return [tensor for tensor in tensors_of(value) if tensor.is_floating_point()]


def _knows_itself(batch: Any) -> bool:
    return all(hasattr(batch, name) for name in ("labels", "size", "part"))


def size_of(batch: Any) -> int:
    """Return how many samples a batch has: the first dimension of its first tensor. ValueError without one."""
    if _knows_itself(batch):
        return batch.size
    for tensor in tensors_of(batch):
        if tensor.dim() > 0:
            return tensor.shape[0]
    raise ValueError(f"a batch is {type(batch).__name__} without a tensor whose first dimension is the batch")


def first_samples(batch: Any, count: int) -> Any:
    """Return the first samples of a batch, as views. What has another first dimension is for all of them."""
    size = size_of(batch)
    if size <= count:
        return batch
    if _knows_itself(batch):
        return batch.part(0, count)

    return map_tensors(lambda value: value[:count] if value.dim() > 0 and value.shape[0] == size else value, batch)


def with_fewer_samples(batch: Any) -> Iterator[Any]:
    """Yield the batch with one sample less and with half of them, as views, in each way in which it may be cut.

    Nothing for a batch of one sample, or without a tensor of samples. A model may take none of them.
    """
    try:
        size = size_of(batch)
    except ValueError:
        return
    for count in dict.fromkeys((size - 1, size // 2)):
        if 0 < count < size:
            yield from batch.ways_to_cut(count) if hasattr(batch, "ways_to_cut") else [first_samples(batch, count)]


def without_labels(batch: Any) -> tuple[Any, torch.Tensor | None]:
    """Return what the model is called with, and the labels: integers [batch] at the end of a tuple or list, or None.

    Of (input, labels) the input alone is left, else a tuple or list of the rest.
    """
    if _knows_itself(batch):
        return batch, batch.labels
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[-1], torch.Tensor):
        return batch, None
    labels = batch[-1]
    inputs = batch[0] if len(batch) == 2 else batch[:-1]
    integers = not labels.is_floating_point() and not labels.is_complex() and labels.dtype is not torch.bool
    if not integers or not tensors_of(inputs) or labels.shape != (size_of(inputs),):
        return batch, None
    return inputs, labels
