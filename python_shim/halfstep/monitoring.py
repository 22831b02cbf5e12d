"""When a training loop is sampled, and what is kept of it."""

from __future__ import annotations

import collections
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from halfstep import shadow
from halfstep.shadow import Sample
from halfstep.statistics import MixedPrecisionStatistics
from halfstep.underflow import Underflow

_BUDGET = 100.0  # between two samples, times what the last one cost: at most 1 % of a run goes into them
_FIRST = 2  # the call of the model that is sampled first: the very first makes compilers and libraries ready
_KEPT = 4096
_THRESHOLD = 1e-4

_SPEED = ("speedup_factor", "average_speedup", "peak_speedup")
_MEMORY = ("memory_saved_bytes", "memory_reduction")
_OPERATIONS = {
    "fp16_operations": "float16",
    "bf16_operations": "bfloat16",
    "fp32_operations": "float32",
    "mixed_operations": "mixed",
}
SAMPLED_FIELDS = (*_SPEED, *_MEMORY, "accuracy_preservation", "total_operations", *_OPERATIONS)


class Monitor:
    """Samples the training of one model, that of the latest setup.

    It takes the first sample in the model's second call in training mode, the next once 100 times the cost of the last
    one has passed. A call that must not be sampled (see shadow.hindrance) leaves it to the next one. What raises ends
    the sampling: `note` says why, and training goes on.

    samples: at most 4096, the latest. note: "" or why no float32 run is sampled (any more).
    stability_threshold: the share of a gradient lost below float16's range above which a step counts as an underflow.
    budget: how many times its cost must have passed before the next sample. clock: seconds that only go up.
    """

    def __init__(self, scaler: Any, note: str = "", *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.samples: collections.deque[Sample] = collections.deque(maxlen=_KEPT)
        self.note = note
        self.stability_threshold = _THRESHOLD
        self.budget = _BUDGET
        self.gradients: Underflow | None = None  # where gradients are float16
        self._scaler = scaler
        self._clock = clock
        self._calls = 0
        self._due = -math.inf
        self._hindrance = ""
        self._compiled = False
        self._on_cpu = False
        self._sampling = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hear that the model is called, and take a sample if one is due."""
        if self.note or self._sampling or not module.training or not torch.is_grad_enabled():
            return
        self._calls += 1
        if self._calls < _FIRST or self._clock() < self._due:
            return
        model = shadow.unwrapped(module)[1]
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._hindrance = shadow.hindrance(device)
        if not self._hindrance:
            self._on_cpu = device.type == "cpu"
            self._sample(module, model, args, kwargs)

    def _sample(self, module: nn.Module, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start = self._clock()
        self._sampling = True
        try:
            step = self._scaler.counters()["steps"]
            self.samples.append(shadow.take(model, args, kwargs, step=step, first=not self.samples))
            self._compiled = shadow.compiled_parts(module)
        except shadow.CannotSample as error:
            self.note = str(error)
        except Exception as error:  # whatever the model raises: it may be made for one call a step
            message = str(error).strip().splitlines() or [""]
            self.note = f"a sample raised {type(error).__name__}: {message[0]}"
        finally:
            self._sampling = False
            end = self._clock()
            self._due = end + self.budget * (end - start)

    def underflow(self) -> list[tuple[int, float]]:
        """Return (step, largest share that one of its gradients lost) of the steps that were looked at (waits)."""
        return [] if self.gradients is None else self.gradients.shares()

    def fill(self, result: MixedPrecisionStatistics) -> dict[str, str]:
        """Set what was sampled; return why other fields stay NaN, and how some numbers were measured."""
        notes: dict[str, str] = {}
        self._fill_underflow(result, notes)
        if not self.samples:
            notes.update(dict.fromkeys(SAMPLED_FIELDS, self.note or self._none_yet()))
            return notes
        self._fill_runs(result, notes)
        self._fill_operations(result, notes)
        return notes

    def _none_yet(self) -> str:
        why = f"; the last call that was due was none: {self._hindrance}" if self._hindrance else ""
        return (
            "no sample yet: the first is taken in the model's second call in training mode, under autocast and not in "
            f"compiled code{why}"
        )

    def _fill_runs(self, result: MixedPrecisionStatistics, notes: dict[str, str]) -> None:
        speedups = [sample.fp32_ms / sample.mixed_ms for sample in self.samples if sample.mixed_ms > 0]
        if speedups:
            result.speedup_factor = result.average_speedup = statistics.median(speedups)
            result.peak_speedup = max(speedups)
            if len(speedups) == 1:
                notes.update(dict.fromkeys(_SPEED, "of one sample"))
        else:
            notes.update(dict.fromkeys(_SPEED, "the clock is too coarse for this model"))
        if self._on_cpu:
            notes.update(dict.fromkeys(_MEMORY, "bytes that the forward pass saves for the backward pass (CPU)"))
        if self._compiled:
            how = "measured without torch.compile, which the loop uses: samples run the model as it is written"
            notes.update(dict.fromkeys((*_SPEED, *_MEMORY), how))
        result.memory_saved_bytes = statistics.median(s.fp32_bytes - s.mixed_bytes for s in self.samples)
        shares = [1 - sample.mixed_bytes / sample.fp32_bytes for sample in self.samples if sample.fp32_bytes > 0]
        if shares:
            result.memory_reduction = statistics.median(shares)
        else:
            notes["memory_reduction"] = "a float32 pass keeps no memory for the backward pass"
        differences = [sample.difference for sample in self.samples if not math.isnan(sample.difference)]
        if differences:
            result.accuracy_preservation = max(0.0, 1.0 - statistics.median(differences))
        else:
            notes["accuracy_preservation"] = "the model's outputs in eval mode cannot be compared"

    def _fill_operations(self, result: MixedPrecisionStatistics, notes: dict[str, str]) -> None:
        counts: collections.Counter[str] = collections.Counter()
        for sample in self.samples:
            counts.update(sample.operations)
        if not counts:
            reason = "operations are not counted by dtype in this build, or another counter was running"
            notes.update(dict.fromkeys(("total_operations", *_OPERATIONS), reason))
            return
        result.total_operations = sum(counts.values())
        for field, dtype in _OPERATIONS.items():
            setattr(result, field, counts[dtype])

    def _fill_underflow(self, result: MixedPrecisionStatistics, notes: dict[str, str]) -> None:
        if self.gradients is None:
            notes["underflow_events"] = "no layer computes in float16, and gradients are looked at for its range alone"
            return
        shares = self.underflow()
        if shares:
            result.underflow_events = sum(share > self.stability_threshold for _, share in shares)
        else:
            notes["underflow_events"] = (
                "no step's gradients were looked at: the scaler does so in its second step and in every 64th after "
                "it, where none is infinite or NaN, sharded or captured"
            )
