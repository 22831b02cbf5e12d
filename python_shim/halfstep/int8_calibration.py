"""Runs a float model on the calibration batches and keeps what its layers were given."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfstep.calibration_data import Batch
from halfstep.int8_model import Candidate

METHODS = ("min_max", "percentile", "mse", "entropy", "moving_average")
_SAVE_EVERY = 5.0  # seconds


class Calibration:
    """The observers of a model's layers, and how many batches they have seen.

    With a `file`, what was seen is written there every few seconds, at the end, and when the calibration is
    interrupted, always as it was between two batches; a calibration of the same model by the same batches goes on from
    it. ValueError for a file of others, a damaged one, or one whose folder does not exist.
    """

    def __init__(self, candidates: Mapping[str, Candidate], batches: Sequence[Batch], file: str | os.PathLike | None):
        self.done = 0
        self.observers: dict[str, torch.ScriptObject] = {}
        for name, candidate in candidates.items():
            if candidate.kind != "embedding":
                self.observers[name] = torch.classes.halfstep.Observer(candidate.channel_dim)
        self._batches = batches
        self._file = None if file is None else Path(file)
        self._fingerprint: dict[str, Any] = {
            "layers": {name: list(candidates[name].module.weight.shape) for name in self.observers},
        }
        if self._file is not None and not self._file.parent.is_dir():
            raise ValueError(f"calibration_file is {self._file}, but there is no folder {self._file.parent}")

    def run(self, model: nn.Module, progress: bool | None) -> None:
        """Call the model on the batches that are left, with a progress bar if it is wanted (None: on a terminal)."""
        if self._file is not None:
            self._fingerprint["weights"] = _digest((*model.parameters(), *model.buffers()))
            self._fingerprint["batches"] = [
                [batch.size, _digest(tensor[:1] if tensor.dim() else tensor for tensor in batch.tensors().values())]
                for batch in self._batches
            ]
            if self._file.exists():
                self._resume(self._file)
        steps = range(self.done, len(self._batches))
        saved = time.monotonic()
        state: dict[str, Any] | None = None  # of the last whole batch, where the file does not have it
        try:
            with torch.no_grad(), _observing(model, self.observers):
                for step in _with_progress(steps, progress):
                    self._batches[step](model)
                    self.done = step + 1
                    if self._file is None:
                        continue
                    state = self._state()
                    if time.monotonic() - saved > _SAVE_EVERY:
                        _save(state, self._file)
                        state, saved = None, time.monotonic()
        finally:
            if state is not None:
                _save(state, self._file)

    def seen(self, name: str) -> bool:
        """Return whether the layer was called with finite values."""
        return self.observers[name].count() > 0

    def parameters(self, name: str, method: str, bits: int) -> tuple[float, int]:
        """Return scale and zero point of the layer's input."""
        return self.observers[name].parameters(method, False, bits)

    def _state(self) -> dict[str, Any]:
        """Return a copy of what has been seen: observers in use change in the middle of the next batch."""
        observers = {name: observer.state() for name, observer in self.observers.items()}
        return {"halfstep": "calibration", "done": self.done, "observers": observers, **self._fingerprint}

    def _resume(self, file: Path) -> None:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"calibration_file {file} cannot be read: {error}") from error
        if not isinstance(state, dict) or state.get("halfstep") != "calibration":
            raise ValueError(f"calibration_file {file} is no calibration of halfstep")
        for key, value in self._fingerprint.items():
            if state.get(key) != value:
                raise ValueError(
                    f"calibration_file {file} is of other {key} than this calibration; delete it, or name another file"
                )
        done, observers = state.get("done"), state.get("observers")
        if not isinstance(done, int) or not 0 <= done <= len(self._batches):
            raise ValueError(f"calibration_file {file} is damaged: done is {done!r}, of {len(self._batches)} batches")
        if not isinstance(observers, dict) or observers.keys() != self.observers.keys():
            raise ValueError(f"calibration_file {file} is damaged: its observers are not those of its layers")
        for name, observer in self.observers.items():
            try:
                observer.restore(observers[name])
            except Exception as error:  # of another type than state() gives, or refused
                raise ValueError(f"calibration_file {file} is damaged: the observer of {name}: {error}") from error
        self.done = done


def _save(state: Mapping[str, Any], file: Path) -> None:
    partial = file.with_name(file.name + ".partial")
    torch.save(dict(state), partial)
    partial.replace(file)  # an interruption here leaves the old file


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    """Return a digest of dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        if tensor.layout is torch.strided and not tensor.is_nested:
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
            digest.update(plain.view(torch.uint8).numpy())
        else:  # an input that has no plain bytes: by what is printed of it
            digest.update(str(tensor).encode())
    return digest.hexdigest()


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a layer was called on, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def _observing(model: nn.Module, observers: Mapping[str, Any]) -> Iterator[None]:
    handles = []

    def watch(observer: Any) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = first_argument(args, kwargs)
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                observer.observe(value)

        return hook

    try:
        for name, observer in observers.items():
            layer = model.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(watch(observer), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_progress(steps: range, progress: bool | None) -> Any:
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return steps
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        if progress:
            raise ModuleNotFoundError("progress=True shows a bar by tqdm: pip install tqdm") from None
        return steps
    return tqdm(steps, desc="calibrating", unit="batch", initial=steps.start, total=steps.stop, leave=False)
