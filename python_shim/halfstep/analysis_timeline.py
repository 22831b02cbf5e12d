"""The updates of a manager's scaler in a window of time, kept beyond the ring of 1024 that the device has."""

from __future__ import annotations

import collections
import time
from array import array
from typing import TYPE_CHECKING, NamedTuple

import torch

from halfstep.host_copy import send
from halfstep.scaler_state import COUNTERS, ScalerState

if TYPE_CHECKING:
    from halfstep.pytorch import PyTorchManager

_MOST_CALLS = 128  # ticks from one copy to the next, a tick being a step
_MOST_IN_FLIGHT = 16


class Updates(NamedTuple):
    """One entry for each update of the scale, oldest first; the columns are those of ScaleRecord."""

    steps: array
    scales: array
    skipped: array
    norms: array

    @classmethod
    def none(cls) -> Updates:
        """Return what there is of no updates."""
        return cls(*(array("d") for _ in cls._fields))


class Timeline:
    """Follows the scaler of a manager's latest setup, which may come after the start of the window.

    tick() is called about once a step. Every 128 calls it copies the scaler's history to the host in the background,
    behind what the device has been given so far, so no call waits; read() waits. What was overwritten before a copy saw
    it is missing and shows in gaps(). A new scaler, and a checkpoint that is loaded into this one, count their steps
    from elsewhere: the window then begins anew, and `restarts` says why.
    """

    def __init__(self, manager: PyTorchManager) -> None:
        self._manager = manager
        self.restarts: list[str] = []
        self._begin()
        if self._scaler is not None:
            self._base = self._scaler.counters()

    def _begin(self) -> None:
        self.began = time.time()
        self._scaler: ScalerState | None = self._manager._scaler
        # What the counters were when the scaler was made or loaded; each of these makes another list.
        self._origin = None if self._scaler is None else self._scaler._init_counters
        self._base = dict(zip(COUNTERS, self._origin or [0] * len(COUNTERS), strict=True))
        self._rows = array("d")
        self._ticked = False
        self._calls, self._interval = 0, _MOST_CALLS
        self._in_flight: collections.deque[tuple[torch.Tensor, torch.cuda.Event | None]] = collections.deque()
        self._free: list[torch.Tensor] = []

    def _follow(self) -> None:
        """Begin anew if the scaler counts from elsewhere now."""
        scaler = self._manager._scaler
        if scaler is self._scaler and (scaler is None or scaler._init_counters is self._origin):
            return
        reason = ""
        if self._ticked:  # else nothing was trained before
            reason = "a checkpoint was loaded into the scaler" if scaler is self._scaler else "there is a new scaler"
        self._begin()
        if reason:
            self.restarts.append(f"{reason}: the window begins anew after it, at step {self.first}")

    # --------------------------------------------------------------------------------------------------- recording

    def tick(self) -> None:
        """Note that a step is about to run. Waits for nothing, and does nothing while a CUDA graph is captured."""
        self._follow()
        self._ticked = True
        self._calls += 1
        if not self._in_flight and self._calls < self._interval:
            return
        history = None if self._scaler is None else self._scaler._history
        if history is None or (history.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self._take_arrived()
        if self._calls >= self._interval and len(self._in_flight) < _MOST_IN_FLIGHT:
            self._calls = 0
            self._in_flight.append(send(history, self._free.pop() if self._free else None))
            self._take_arrived()

    def _take_arrived(self) -> None:
        while self._in_flight:
            copy, event = self._in_flight[0]
            if event is not None and not event.query():
                return
            self._in_flight.popleft()
            if self._take(copy.tolist()) > len(copy) // 2:  # many updates a tick: look more often
                self._interval = max(1, self._interval // 2)
            self._free.append(copy)

    def _take(self, rows: list[list[float]]) -> int:
        """Keep the rows that are new, and return how many those are."""
        last = self._rows[-4] if self._rows else self._base["steps"]
        new = sorted(row for row in rows if row[0] > last)
        for row in new:
            self._rows.extend(row)
        return len(new)

    # ----------------------------------------------------------------------------------------------------- reading

    def read(self) -> dict[str, int]:
        """Take all that is there up to now, and return how far the scaler's counters went in the window (waits)."""
        self._follow()
        if self._scaler is None:
            return dict.fromkeys(COUNTERS, 0)
        for copy, event in self._in_flight:
            if event is not None:
                event.synchronize()
            self._take(copy.tolist())
        self._in_flight.clear()
        if self._scaler._history is not None:
            self._take(self._scaler._history.tolist())
        return {name: count - self._base[name] for name, count in self._scaler.counters().items()}

    @property
    def first(self) -> int:
        """The number of the window's first update."""
        return self._base["steps"] + 1

    def updates(self) -> Updates:
        """Return what is kept."""
        return Updates(*(self._rows[column::4] for column in range(4)))

    def gaps(self, steps: int) -> list[tuple[int, int]]:
        """Return the first and last number of each run of missing updates, of a window with so many."""
        gaps = []
        expected = self.first
        for step in [*map(int, self._rows[0::4]), self.first + steps]:
            if step > expected:
                gaps.append((expected, step - 1))
            expected = step + 1
        return gaps
