"""What the last step did, read from the device without waiting for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch

from halfstep.host_copy import send

Tables = list[tuple[list[str], torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One update of the scaler.

    step: its number, from 1. skipped: whether a gradient was infinite or NaN. reason: "inf", "nan", or "" for a step
    that was applied. scale: the loss scale of this step. norm: the L2 norm of the unscaled gradients (NaN for sharded
    ones). skipped_steps: all skipped so far. overflowed: the parameters with infinite or NaN gradients, those with most
    of them first, where the scaler was made with name_overflows=True.
    """

    step: int
    skipped: bool
    reason: str
    scale: float
    norm: float
    skipped_steps: int
    overflowed: tuple[str, ...]


class Reporter:
    """Copies a scaler's memory to the host in the background, and reads the last copy that has arrived."""

    def __init__(self) -> None:
        self._latest: StepReport | None = None
        self._pending: tuple[list[torch.Tensor], list[list[str]], torch.cuda.Event | None] | None = None

    def poll(self, counters: torch.Tensor, history: torch.Tensor, tables: Tables, *, wait: bool) -> StepReport | None:
        """Return the newest report that is here; with `wait` that of the last update. None before the first one."""
        if wait:
            self._pending = None  # older than what is asked for
        if self._pending is None:
            self._copy([counters, history, *(table for _, table in tables)], [names for names, _ in tables])
        values, names, event = self._pending
        if wait and event is not None:
            event.synchronize()
        if event is None or event.query():
            self._pending = None
            self._latest = _read(values, names)
        return self._latest

    def _copy(self, tensors: Iterable[torch.Tensor], names: list[list[str]]) -> None:
        sent = [send(tensor) for tensor in tensors]
        events = [event for _, event in sent if event is not None]
        self._pending = ([copy for copy, _ in sent], names, events[-1] if events else None)


def _read(values: list[torch.Tensor], names: list[list[str]]) -> StepReport | None:
    counters, history, *tables = values
    step, skipped_steps = counters[:2].tolist()
    if step == 0:
        return None
    row = history[(step - 1) % len(history)].tolist()
    if row[0] != step:
        return None  # counted before this scaler was loaded
    worst = sorted(
        (
            (bad, name)
            for listed, table in zip(names, tables, strict=True)
            for name, (bad, *_) in zip(listed, table.tolist(), strict=True)
            if bad > 0
        ),
        reverse=True,
    )
    skipped = row[2] != 0
    reason = ("nan" if math.isnan(row[3]) else "inf") if skipped else ""
    return StepReport(int(step), skipped, reason, row[1], row[3], skipped_steps, tuple(name for _, name in worst))
