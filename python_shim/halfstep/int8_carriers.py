"""The float model in each floating-point type, and which of them carries what is not int8."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from halfstep.calibration_data import Batch
from halfstep.half_model import CastModel, float_dtype, half_model, is_uniform, name_of
from halfstep.int8_batches import floating_tensors_of
from halfstep.int8_noise import finite_of, powers_of, share_of
from halfstep.int8_report import Report
from halfstep.int8_speed import calls_of, seconds_of, time_in_turns

_HALVES = (torch.bfloat16, torch.float16)
_HOPELESS = 4.0  # times the own type's time on the probe, in a call that is long enough to count
_COUNTS = 0.01  # seconds


class Carriers:
    """The reference and its form by type: `own` is the reference's type, `carrier` that of what is not int8.

    reference: the float model that users know. form: the one whose layers are replaced, in the same type.
    `fastest` is the type of the float model that int8 has to beat, and the carrier unless int8 is faster in its own.
    `half` is the faster of the halves in which the model runs, None without one. `inners` holds the form in the types
    in which regions are timed: its own, the carrier, and `half`.
    """

    def __init__(self, reference: nn.Module, form: nn.Module) -> None:
        self.own = float_dtype(reference)
        self.fastest = self.carrier = self.own
        self.half: torch.dtype | None = None
        self.inners = {self.own: form}
        self._models = {self.own: reference}

    @property
    def inner(self) -> nn.Module:
        """The form in the carrier's type."""
        return self.inners[self.carrier]

    def model(self, dtype: torch.dtype) -> nn.Module:
        """Return the reference in this type, called as it is in its own."""
        if dtype not in self._models:
            self._models[dtype] = half_model(self._models[self.own], dtype)
        return self._models[dtype]

    def outside(self, inner: nn.Module) -> nn.Module:
        """Return a module that is called as the reference is, around one in the carrier's type."""
        return inner if self.carrier == self.own else CastModel(inner, self.carrier, self.own)

    def choose(self, batch: Batch, probe: Batch, device: torch.device, report: Report) -> None:
        """Take the fastest float type for what is not int8, and for the model that int8 has to beat.

        Halves are tried on the probe: one that fails, gives something else than finite outputs or takes several times
        as long is none. Without instructions for a type a processor takes twenty times as long, minutes in all.
        """
        models = {self.own: self.model(self.own)}
        if self.own == torch.float32 and is_uniform(models[self.own]):
            with torch.no_grad():
                wanted = floating_tensors_of(probe(models[self.own]))
            own = seconds_of(partial(probe, models[self.own]), device)
            for dtype in _HALVES:
                why = self._obstacle(dtype, probe, wanted) or self._too_slow(dtype, probe, own, device)
                if why:
                    report.notes.append(f"{name_of(dtype)} {why}")
                else:
                    models[dtype] = self.model(dtype)
        timings = time_in_turns(calls_of(list(models.values()), batch), device)
        report.timed_samples = batch.size
        times = {dtype: timing.median for dtype, timing in zip(models, timings, strict=True)}
        report.milliseconds = {name_of(dtype): milliseconds for dtype, milliseconds in times.items()}
        self.fastest = self.carrier = min(times, key=times.__getitem__)
        halves = sorted((dtype for dtype in times if dtype != self.own), key=times.__getitem__)
        if halves:  # the better of them is timed in every region, whether it is the carrier or not
            self.half = halves[0]
            self.inners[self.half] = half_model(self.inners[self.own], self.half).module
        if len(halves) > 1:
            faster, slower = map(name_of, halves)
            report.halves = f"regions are not timed in {slower}: the whole model is faster in {faster}"

    def _too_slow(self, dtype: torch.dtype, probe: Batch, own: float, device: torch.device) -> str:
        """Return "" or why it is not worth the time to measure the model in this type."""
        seconds = seconds_of(partial(probe, self.model(dtype)), device)
        if seconds < max(_COUNTS, _HOPELESS * own):
            return ""
        return f"is not used: {probe.size} samples take {1e3 * seconds:.3g} ms, {1e3 * own:.3g} in {name_of(self.own)}"

    def _obstacle(self, dtype: torch.dtype, probe: Batch, wanted: list[torch.Tensor]) -> str:
        """Return "" or why the model is not used in this type."""
        try:
            with torch.no_grad():
                outputs = floating_tensors_of(probe(self.model(dtype)))
                noise = [share_of(finite_of(powers_of(*pair))) for pair in zip(wanted, outputs, strict=True)]
        except Exception as error:  # the model's own code may refuse half in any way
            return f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return "" if all(map(math.isfinite, noise)) else "is not used: its outputs are not finite"
