"""Runs a float model on the calibration batches and keeps what its layers were given."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from halfstep.calibration_data import Batch, naming
from halfstep.int8_calibration_file import CalibrationFile, digest_of
from halfstep.int8_model import Candidate

METHODS = ("min_max", "percentile", "mse", "entropy", "moving_average")
_SAVE_EVERY = 5.0  # seconds


class Calibration:
    """The observers of a model's layers, and how many batches they have seen.

    With a `file`, what was seen is written there every few seconds, at the end, and when the calibration is
    interrupted, always as it was between two batches; a calibration of the same model by the same batches goes on from
    it. ValueError for a file of others.
    """

    def __init__(self, candidates: Mapping[str, Candidate], batches: Sequence[Batch], file: CalibrationFile | None):
        self.done = 0
        self.observers: dict[str, torch.ScriptObject] = {}
        for name, candidate in candidates.items():
            if candidate.kind != "embedding":
                self.observers[name] = torch.classes.halfstep.Observer(candidate.channel_dim)
        self._batches = batches
        self._file = file
        if file is not None:
            file.expect(layers={name: list(candidates[name].module.weight.shape) for name in self.observers})
            file.expect_batches(batches)

    def run(self, model: nn.Module, progress: bool | None) -> None:
        """Call the model on the batches that are left, with a progress bar if it is wanted (None: on a terminal)."""
        if self._file is not None:
            self._file.expect(weights=digest_of((*model.parameters(), *model.buffers())))
            self.done = self._file.restore(self.observers)
        steps = range(self.done, len(self._batches))
        saved = time.monotonic()
        state: dict[str, Any] | None = None  # of the last whole batch, where the file does not have it
        try:
            layers = {name: model.get_submodule(name) for name in self.observers}
            with torch.no_grad(), seeing_inputs(layers, self._observe):
                for step in _with_progress(steps, progress):
                    with naming(self._batches[step], model):
                        self._batches[step](model)
                    self.done = step + 1
                    if self._file is None:
                        continue
                    # Copies: observers in use change in the middle of the next batch.
                    state = {name: observer.state() for name, observer in self.observers.items()}
                    if time.monotonic() - saved > _SAVE_EVERY:
                        self._file.save(self.done, state)
                        state, saved = None, time.monotonic()
        finally:
            if state is not None:
                self._file.save(self.done, state)

    def _observe(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            self.observers[name].observe(value)

    def seen(self, name: str) -> bool:
        """Return whether the layer was called with finite values."""
        return self.observers[name].count() > 0

    def parameters(self, name: str, method: str, bits: int) -> tuple[float, int]:
        """Return scale and zero point of the layer's input."""
        return self.observers[name].parameters(method, False, bits)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a layer was called on, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def seeing_inputs(layers: Mapping[str, nn.Module], see: Callable[[str, Any], None]) -> Iterator[None]:
    """Call see(name, what the layer is called on) before every call of these layers."""

    def watch(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(name, first_argument(args, kwargs))

    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(partial(watch, name), with_kwargs=True))
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
