"""A loss scale that a function of the gradient norm asks for, one applied step behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from halfstep.config import check_scale
from halfstep.host_copy import send

_ops = torch.ops.halfstep


class ScaleRequest:
    """Asks after each update for the scale of the next step, and has it granted up to what overflows allow.

    ask: gets the L2 norm of the unscaled gradients of the newest applied step that lies at least one update back;
    returns a number > 0 within float32, or None to leave the scale to the rule. The norm travels to the host while the
    device works on the step in between. Which step it is of depends on no timing, so ranks whose norms are equal ask
    for equal scales. On a GPU the host runs at most one step ahead by it.
    limit: the highest scale that is granted; the device lowers it with overflows and raises it with the rule's growth.
    """

    def __init__(self, ask: Callable[[float], float | None], limit: float) -> None:
        self.ask = ask
        self.set_state(limit, math.nan)

    def set_state(self, limit: float, norm: float) -> None:
        """Start from here: with this limit and this norm of an applied step, NaN for none."""
        self._limit, self._norm = limit, norm
        self._record: torch.Tensor | None = None
        # The host's copy, into the same memory each time, and when it has arrived.
        self._copy: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def set_limit(self, limit: float) -> None:
        """Grant no more than this, until the rule's growth raises it."""
        self._limit = limit
        if self._record is not None:
            self._record[0].fill_(limit)

    def state(self) -> tuple[float, float]:
        """Return limit and norm as they are now (waits)."""
        if self._record is None:
            return self._limit, self._norm
        limit, norm, found = self._record.tolist()
        return limit, self._norm if found else norm

    def wanted(self) -> float:
        """Return what is asked for now, NaN for nothing; ValueError or TypeError for an answer that is no scale."""
        if self._copy is not None:
            if self._arrived is not None:
                self._arrived.synchronize()  # of the update before: what came since keeps the device busy
            _, norm, found = self._copy.tolist()
            if not found:
                self._norm = norm
        if not math.isfinite(self._norm):
            return math.nan
        answer = self.ask(self._norm)
        if answer is None:
            return math.nan
        check_scale(f"the loss scale for a gradient norm of {self._norm:g}", answer)
        return float(answer)

    def grant(
        self, wanted: float, scale: torch.Tensor, counters: torch.Tensor, history: torch.Tensor, rule: dict[str, Any]
    ) -> None:
        """Set the scale, on the device and after its update, and send the update's norm to the host."""
        if self._record is None:
            values = [self._limit, math.nan, 1.0]
            self._record = torch.tensor(values, dtype=torch.float64).to(scale.device)
        bounds = {name: rule[name] for name in ("growth_factor", "min_scale", "max_scale")}
        _ops.request_scale_(scale, counters, history, self._record, wanted, **bounds)
        self._copy, self._arrived = send(self._record, self._copy, self._arrived)

    def __getstate__(self) -> dict[str, Any]:
        limit, norm = self.state()
        return {"ask": self.ask, "limit": limit, "norm": norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.ask = state["ask"]
        self.set_state(state["limit"], state["norm"])
