"""Runs a float model on the calibration batches and keeps what its layers were given."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
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

    With a `file`, what was seen is written there every few seconds and at the end, always between two batches; after an
    interruption a calibration of the same layers goes on from it. ValueError for a file of other layers.
    """

    def __init__(self, candidates: Mapping[str, Candidate], batches: Sequence[Batch], file: str | os.PathLike | None):
        self.done = 0
        self.observers: dict[str, torch.ScriptObject] = {}
        for name, candidate in candidates.items():
            if candidate.kind != "embedding":
                self.observers[name] = torch.classes.halfstep.Observer(candidate.channel_dim)
        self._batches = batches
        self._file = None if file is None else Path(file)
        self._fingerprint = {
            "layers": {name: list(candidates[name].module.weight.shape) for name in self.observers},
            "batches": [batch.size for batch in batches],
        }
        if self._file is not None and self._file.exists():
            self._resume(self._file)

    def run(self, model: nn.Module, progress: bool | None) -> None:
        """Call the model on the batches that are left, with a progress bar if it is wanted (None: on a terminal)."""
        steps = range(self.done, len(self._batches))
        saved = time.monotonic()
        with torch.no_grad(), _observing(model, self.observers):
            for step in _with_progress(steps, progress):
                self._batches[step](model)
                self.done = step + 1
                if self._file is not None and (time.monotonic() - saved > _SAVE_EVERY or self.done == steps.stop):
                    self._save(self._file)
                    saved = time.monotonic()

    def seen(self, name: str) -> bool:
        """Return whether the layer was called with finite values."""
        return self.observers[name].count() > 0

    def parameters(self, name: str, method: str, bits: int) -> tuple[float, int]:
        """Return scale and zero point of the layer's input."""
        return self.observers[name].parameters(method, False, bits)

    def _save(self, file: Path) -> None:
        state = {name: observer.state() for name, observer in self.observers.items()}
        whole = {"halfstep": "calibration", "done": self.done, "observers": state, **self._fingerprint}
        partial = file.with_name(file.name + ".partial")
        torch.save(whole, partial)
        partial.replace(file)  # an interruption here leaves the old file

    def _resume(self, file: Path) -> None:
        try:
            whole = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"calibration_file {file} cannot be read: {error}") from error
        if not isinstance(whole, dict) or whole.get("halfstep") != "calibration":
            raise ValueError(f"calibration_file {file} is no calibration of halfstep")
        for key, value in self._fingerprint.items():
            if whole.get(key) != value:
                raise ValueError(
                    f"calibration_file {file} is of other {key} than this calibration; delete it, or name another file"
                )
        for name, observer in self.observers.items():
            observer.restore(whole["observers"][name])
        self.done = int(whole["done"])


@contextmanager
def _observing(model: nn.Module, observers: Mapping[str, Any]) -> Iterator[None]:
    handles = []

    def watch(observer: Any) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else kwargs.get("input", kwargs.get("x"))
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
