"""What float16 costs the gradients of sampled steps: how much of each may have been lost below its range."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch

from halfstep.grad_scaler import GRADIENT_STATISTICS
from halfstep.optimizer import current

_EVERY = 64  # updates of the scale
_KEPT = 256  # tables on the device, until somebody asks
_KNOWN = 4096  # results
# Half of the smallest distance of two float16, squared: the most that a value below the normal range, or one that
# became 0, can add to the square of the error.
_LOST = 2.0**-50


class Underflow:
    """Tables of gradients as they were computed, multiplied by the loss scale. A scaler fills them in sampled steps.

    That reads each gradient of a sampled step once more and writes none. Nothing waits for the device before
    shares() is called.
    """

    def __init__(self, every: int = _EVERY) -> None:
        self._every = every
        self._updates = 0
        self._step: list[torch.Tensor] = []  # tables of the step under way
        self._unread: collections.deque[tuple[torch.Tensor, list[torch.Tensor]]] = collections.deque(maxlen=_KEPT)
        self._shares: collections.deque[tuple[int, float]] = collections.deque(maxlen=_KNOWN)

    def look(self, device: torch.device, rows: int, check: Callable[..., None]) -> None:
        """Let `check`, a form of check_gradients_, fill a table of scaled gradients if this step is sampled."""
        # The first step often overflows while the scale is found.
        if self._updates % self._every != 1 % self._every or getattr(current, "recorder", None) is not None:
            return
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        one = torch.full((), 1.0, dtype=torch.float32, device=device)
        found = torch.zeros((), dtype=torch.float32, device=device)
        norm = torch.empty((), dtype=torch.float32, device=device)
        table = torch.empty((rows, len(GRADIENT_STATISTICS)), dtype=torch.float32, device=device)
        check(one, found, norm, table)
        self._step.append(table)

    def updated(self, counters: torch.Tensor) -> None:
        """Note that the scale was updated: these are the scaler's counters after it."""
        self._updates += 1
        if self._step:
            self._unread.append((counters[0].to(counters.dtype, copy=True), self._step))
            self._step = []

    def shares(self) -> list[tuple[int, float]]:
        """Return (step, largest share lost by one of its gradients) of the last sampled steps, oldest first (waits).

        The share is an upper bound of what the error is of the gradient in squares, at most 1. Steps with an infinite
        or NaN gradient are left out: they were skipped.
        """
        while self._unread:
            step, tables = self._unread.popleft()
            rows = [dict(zip(GRADIENT_STATISTICS, row, strict=True)) for table in tables for row in table.tolist()]
            if not any(row["non_finite"] for row in rows):
                self._shares.append((int(step), max(map(_share, rows), default=0.0)))
        return list(self._shares)

    def __getstate__(self) -> dict[str, Any]:
        return {"_every": self._every}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_every"])


def _share(row: dict[str, float]) -> float:
    lost = (row["zeros"] + row["below_half"]) * _LOST
    return min(1.0, lost / row["sum_of_squares"]) if row["sum_of_squares"] else float(lost > 0)
