"""The batches by which a model is calibrated and judged: read once, cached, and split in two."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from halfstep.containers import is_dataclass, map_tensors, tensors_of
from halfstep.signatures import signature_of

_LABELS = ("labels", "label", "target", "targets", "y")
_FROM_NUMPY = "; torch.from_numpy(array) or torch.as_tensor(array) makes a tensor of a NumPy array"
# A tensor of a call: the argument's place or name, how many tensors that has, and which of them it is.
Key = tuple[int | str, int, int]


@dataclass
class Batch:
    """The arguments of one call of a model, and what the answer should be.

    number: its place in the data, for error messages.
    shared: tensors that are for all samples, though their first dimension may be as long as the batch. whole: part()
    does not cut the batch, because it cannot be told which tensors are shared. left_out: the tensors of samples that
    forward does not take and that are no labels, in words.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: torch.Tensor | None
    size: int  # samples: the first dimension of the first tensor that has one
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    shared: frozenset[Key] = frozenset()
    whole: bool = False
    left_out: tuple[str, ...] = ()
    number: int | None = None  # in the calibration data

    def __call__(self, model: nn.Module) -> Any:
        """Call the model on this batch, moved where it was said to be."""
        args, kwargs = self.arguments()
        return model(*args, **kwargs)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments, moved where the batch was said to be.

        They are copies each time: a model may write to them.
        """
        return self._mapped(lambda _, tensor: self._moved(tensor))

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = self.dtype if tensor.is_floating_point() else None
        copied = tensor.detach().to(self.device or tensor.device, dtype or tensor.dtype, copy=True)
        return copied.requires_grad_(tensor.requires_grad)

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """Return the batch as it will be called there; nothing is moved before."""
        return replace(self, device=device, dtype=dtype)

    def part(self, begin: int, end: int) -> Batch:
        """Return the samples begin .. end - 1, as views; all of them if the batch is `whole`.

        What is shared, or has another first dimension, is for all samples.
        """
        if self.whole:
            return self

        args, kwargs = self._mapped(lambda key, tensor: tensor[begin:end] if self._follows(key, tensor) else tensor)
        labels = None if self.labels is None else self.labels[begin:end]
        return replace(self, args=args, kwargs=kwargs, labels=labels, size=min(end, self.size) - begin)

    def ways_to_cut(self, count: int) -> Iterator[Batch]:
        """Yield the first `count` samples, as views; if the batch is `whole`, in both ways that may be right.

        Nothing is shared, or all is but the tensor by which the size goes. A model may refuse one of the two.
        """
        yield replace(self, whole=False).part(0, count)
        if self.whole:
            keys = [key for key, tensor in self.tensors().items() if tensor.dim() > 0]
            yield replace(self, whole=False, shared=frozenset(keys[1:])).part(0, count)

    def twice(self) -> Batch:
        """Return a batch with each of its samples twice."""
        args, kwargs = self._mapped(
            lambda key, tensor: torch.cat([tensor, tensor]) if self._follows(key, tensor) else tensor
        )
        labels = None if self.labels is None else torch.cat([self.labels] * 2)
        return replace(self, args=args, kwargs=kwargs, labels=labels, size=2 * self.size)

    def _follows(self, key: Key, tensor: torch.Tensor) -> bool:
        """Return whether the tensor has samples."""
        return key not in self.shared and tensor.dim() > 0 and tensor.shape[0] == self.size

    def tensors(self) -> dict[Key, torch.Tensor]:
        """Return the tensors of the arguments."""
        found: dict[Key, torch.Tensor] = {}
        self._mapped(lambda key, tensor: found.setdefault(key, tensor))
        return found

    def without_finite_values(self) -> list[str]:
        """Return the arguments, as "argument 0" or by name, with a floating-point tensor that has no finite value."""
        found: dict[str, None] = {}
        for (place, _, _), tensor in self.tensors().items():
            if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.layout is not torch.strided:
                continue
            flat = tensor.detach().flatten()
            # The first values say it of all batches but broken ones; those alone are gone through as a whole.
            if not any(math.isfinite(value) for part in (flat[:64], flat) for value in part.tolist()):
                found[f"argument {place}" if isinstance(place, int) else place] = None
        return list(found)

    def copied(self) -> Batch:
        """Return the batch with tensors of its own: a loader may fill its buffers again."""
        args, kwargs = self._mapped(lambda _, tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))
        return replace(self, args=args, kwargs=kwargs, labels=None if self.labels is None else self.labels.clone())

    def _mapped(self, function: Callable[[Key, torch.Tensor], torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def argument(place: int | str, value: Any) -> Any:
            count, number = len(tensors_of(value)), itertools.count()
            return map_tensors(lambda tensor: function((place, count, next(number)), tensor), value)

        args = tuple(argument(place, value) for place, value in enumerate(self.args))
        return args, {name: argument(name, value) for name, value in self.kwargs.items()}


def _is_of_numpy(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "numpy"  # which need not be installed


def _is_labels(value: Any, size: int) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.shape == (size,)
        and not value.is_floating_point()
        and not value.is_complex()
        and value.dtype != torch.bool
    )


def _is_class(value: Any) -> bool:
    """Return whether this is the label of one sample, as a dataset gives it."""
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and value.dtype in (torch.int64, torch.int32)
    return isinstance(value, int) and not isinstance(value, bool)


class _Parameters:
    """What forward takes: names by place, names, those that it needs, and whether any place and any name are taken."""

    def __init__(self, model: nn.Module) -> None:
        self.by_place: list[str] = []
        self.names: set[str] = set()
        self.needed: set[str] = set()
        self.any_place = self.any_name = False
        try:
            parameters = signature_of(model).parameters.values()
        except (TypeError, ValueError):
            self.any_place = self.any_name = True
            return
        for parameter in parameters:
            if parameter.kind is parameter.VAR_POSITIONAL:
                self.any_place = True
            elif parameter.kind is parameter.VAR_KEYWORD:
                self.any_name = True
            else:
                self.names.add(parameter.name)
                if parameter.kind is not parameter.KEYWORD_ONLY:
                    self.by_place.append(parameter.name)
                if parameter.default is parameter.empty:
                    self.needed.add(parameter.name)

    def is_argument(self, place: int) -> bool:
        """Return whether an integer [batch] at this place is an argument rather than labels."""
        if place >= len(self.by_place):
            return False
        name = self.by_place[place]
        return name in self.needed or name not in _LABELS


def batch_of(model: nn.Module, value: Any) -> Batch:
    """Return what a loader gave as a call of the model.

    A tuple or list is positional arguments; an integer tensor [batch] at its end is for the judge if forward has no
    parameter for it, or an optional one that is named as labels are; what forward cannot take is left out. A mapping is
    keyword arguments, but for integer [batch] labels that forward does not need, or the only argument if forward has
    none of its names. Anything else that has tensors is the only argument. TypeError without a tensor of samples.
    """
    if isinstance(value, Batch):
        return value
    size = next((tensor.shape[0] for tensor in tensors_of(value) if tensor.dim() > 0), None)
    if size is None:
        parts = list(value.values()) if isinstance(value, Mapping) else pytree.tree_leaves(value)
        raise TypeError(
            f"a calibration batch is {type(value).__name__} without a tensor of samples, expected a tensor, a tuple, a "
            "dict or a dataclass of tensors whose first dimension is the batch"
            + (_FROM_NUMPY if any(map(_is_of_numpy, parts)) else "")
        )
    takes = _Parameters(model)
    if isinstance(value, Mapping):
        return _of_mapping(takes, dict(value.items()), value, size)
    if isinstance(value, (tuple, list)):
        args, labels = tuple(value), None
        if len(args) > 1 and _is_labels(args[-1], size) and not takes.is_argument(len(args) - 1):
            args, labels = args[:-1], args[-1]
        place = len(args) - 1
        if (
            len(args) > 1
            and labels is None
            and _is_class(args[-1])
            and not (takes.any_place or takes.is_argument(place))
        ):
            raise ValueError(
                f"a calibration batch ends in {args[-1]!r}, one class that forward has no parameter for: a sample "
                "without a batch, expected batches, as a torch.utils.data.DataLoader gives them"
            )
        taken = len(args) if takes.any_place else len(takes.by_place)
        left_out = [(f"place {place}", item) for place, item in enumerate(args) if place >= taken]
        return Batch(args[:taken], {}, labels, size, left_out=_in_words(left_out, size))
    return Batch((value,), {}, None, size)


def _of_mapping(takes: _Parameters, kwargs: dict[str, Any], value: Any, size: int) -> Batch:
    if takes.by_place and not takes.any_name and takes.names.isdisjoint(kwargs):
        return Batch((value,), {}, None, size)
    labels = None
    for key in _LABELS:
        if key in kwargs and key not in takes.needed and _is_labels(kwargs[key], size):
            labels = kwargs.pop(key)
            break
    given = kwargs
    if not takes.any_name:
        kwargs = {key: item for key, item in kwargs.items() if key in takes.names}
    left_out = [(key, item) for key, item in given.items() if key not in kwargs]
    return Batch((), kwargs, labels, size, left_out=_in_words(left_out, size))


def _in_words(left_out: Iterable[tuple[str, Any]], size: int) -> tuple[str, ...]:
    """Return where and what the tensors of samples are that forward does not take, and labels of another number."""
    return tuple(
        f"{where}: {str(item.dtype).removeprefix('torch.')} [{', '.join(map(str, (rows, *item.shape[1:])))}]"
        for where, item in left_out
        if isinstance(item, torch.Tensor) and (rows := _rows_of(item, size))
    )


def _rows_of(item: torch.Tensor, size: int) -> str:
    if item.shape[:1] == (size,):
        return "batch"
    count = item.numel()
    return f"{count} for {size} samples" if count > 1 and _is_labels(item, count) else ""


def looks_like_labels(model: nn.Module, batch: Batch) -> str:
    """Return "" or the parameter of forward that takes the integers [batch] at the end of positional arguments."""
    place, takes = len(batch.args) - 1, _Parameters(model)
    if not 0 < place < len(takes.by_place) or not _is_labels(batch.args[place], batch.size):
        return ""
    return takes.by_place[place]


def collect(model: nn.Module, data: Any, samples: int) -> list[Batch]:
    """Read `data` once, up to `samples` samples, and return them in batches with tensors of their own.

    data: a loader or any other iterable of batches, or one batch: a tensor, or a mapping or dataclass of tensors.
    More samples come back where the last batch cannot be cut, see Batch.whole.
    """
    if isinstance(data, (torch.Tensor, Mapping)) or (is_dataclass(data) and not isinstance(data, Iterable)):
        data = [data]
    if _is_of_numpy(data):
        raise TypeError(f"calibration_data is {type(data).__name__}, expected an iterable of batches{_FROM_NUMPY}")
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise TypeError(f"calibration_data is {type(data).__name__}, expected an iterable of batches")
    if _is_one_batch(data):
        raise TypeError(
            f"calibration_data is a {type(data).__name__} of inputs and labels, which are one batch, expected an "
            "iterable of batches: [(x, labels)]"
        )
    batches: list[Batch] = []
    left = samples
    for number, value in enumerate(data):
        batch = replace(batch_of(model, value), number=number)
        if batch.size > 0:
            # The last one may be much larger than what is left; it is copied when it has been cut.
            batches.append(batch.copied() if batch.size < left else batch)
            left -= batch.size
        if left <= 0:
            break
    if not batches:
        raise ValueError("calibration_data is empty, expected at least one batch")
    shared, whole = _shared(batches)
    batches = [replace(batch, shared=shared, whole=whole) for batch in batches]
    if left <= 0:
        batches[-1] = batches[-1].part(0, batches[-1].size + left).copied()
    return batches


def _is_one_batch(data: Any) -> bool:
    """Return whether this is (x, labels): tensors that cannot be batches of one model."""
    if not isinstance(data, (tuple, list)) or len(data) < 2 or not all(isinstance(t, torch.Tensor) for t in data):
        return False
    x, labels = data[0], data[-1]
    return x.dim() > 0 and _is_labels(labels, x.shape[0]) and (x.dim() > 1 or x.is_floating_point())


def _shared(batches: list[Batch]) -> tuple[frozenset[Key], bool]:
    """Return the tensors that are not cut with the batch, and whether that is in doubt.

    A tensor of samples is as long as the batch in each one. With batches of one size that may be chance: one that holds
    the same values in all of them, and whose length the input has as another dimension too, or that is square, may be a
    mask [tokens, tokens] or positions [tokens]. Of one batch alone, the first tensor is taken for samples.
    """
    seen: dict[Key, list[tuple[torch.Tensor, int]]] = {}
    for batch in batches:
        for key, tensor in batch.tensors().items():
            seen.setdefault(key, []).append((tensor, batch.size))
    first = next((key for key, found in seen.items() if found[0][0].dim() > 0), None)
    shared, whole = set(), False
    for key, found in seen.items():
        if any(tensor.dim() == 0 or tensor.shape[0] != size for tensor, size in found):
            shared.add(key)
        elif len({size for _, size in found}) == 1 and (key != first or len(found) > 1):
            tensor, size = found[0]
            could_be_shared = size in (*seen[first][0][0].shape[1:], *tensor.shape[1:2])
            whole |= could_be_shared and all(_same(tensor, other) for other, _ in found[1:])
    return frozenset(shared), whole


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)


@contextlib.contextmanager
def naming(batch: Any, model: nn.Module) -> Iterator[None]:
    """Raise what a float model raises on a batch of calibration data as a ValueError that says which one it is.

    A device that has no memory left is no fault of the batch: that stays as it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        number = getattr(batch, "number", None)
        if number is None:
            raise
        raise ValueError(
            f"batch {number} of calibration_data makes the model raise {type(error).__name__}: {error}\n"
            f"It was called with {_called_with(batch, model)}"
        ) from error


def calls_naming(reference: nn.Module) -> Callable[[nn.Module, Batch], Any]:
    """Return a function that calls a model on a batch; errors of the reference alone are as naming() gives them."""

    def call(model: nn.Module, batch: Batch) -> Any:
        with naming(batch, model) if model is reference else contextlib.nullcontext():
            return batch(model)

    return call


def _called_with(batch: Batch, model: nn.Module) -> str:
    def shown(value: Any) -> str:
        tensors = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors_of(value)]
        if isinstance(value, torch.Tensor):
            return tensors[0]
        return type(value).__name__ + (f" of {', '.join(tensors)}" if tensors else "")

    parts = [f"{name}={shown(value)}" if name else shown(value) for name, value in _with_names(batch, model)]
    said = f"({', '.join(parts)}), the first dimension of which is the batch"
    if len(batch.args) == 1 and isinstance(batch.args[0], Mapping):
        given, signature = list(map(str, batch.args[0])), signature_of(model)
        if signature.parameters.keys().isdisjoint(given):
            bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
            said += (
                f"; none of its keys {', '.join(given)} is a parameter of forward{inspect.Signature(bare)}, so the "
                "mapping itself was the argument"
            )
    return said


def _with_names(batch: Batch, model: nn.Module) -> list[tuple[str, Any]]:
    """Return the arguments by the names of forward's parameters, "" where there is none."""
    try:
        bound = signature_of(model).bind(*batch.args, **batch.kwargs)
    except (TypeError, ValueError):
        return [*(("", value) for value in batch.args), *batch.kwargs.items()]
    named: list[tuple[str, Any]] = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named.extend(("", each) for each in value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.extend(value.items())
        else:
            named.append((name, value))
    return named


def split(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return (two thirds to calibrate by, one third for the guard): every third batch, or of few batches a part each.

    One sample alone serves both, and so does a batch alone that is whole.
    """
    if len(batches) >= 3:
        return [b for i, b in enumerate(batches) if i % 3 != 2], batches[2::3]
    if len(batches) == 2 and batches[0].whole:
        return batches[:1], batches[1:]
    calibration, guard = [], []
    for batch in batches:
        cut = batch.size - max(1, batch.size // 3)
        if cut > 0:
            calibration.append(batch.part(0, cut))
        guard.append(batch.part(cut, batch.size))
    return calibration or guard, guard
