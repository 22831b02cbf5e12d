"""Times of models and layers, taken in turns so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ROUNDS = 9
_SHORTEST = 1e-3  # seconds that one round lasts at least: shorter calls are repeated within it
_LONGEST = 20.0  # seconds that all rounds together may take; at least three are run


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median of the rounds, and the quartiles."""

    median: float
    lower: float
    upper: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.3g} ms"


def _run(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Return the seconds of one call, of `repeats` in a row."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def time_in_turns(calls: Sequence[Callable[[], Any]], device: torch.device, rounds: int = ROUNDS) -> list[Timing]:
    """Time the calls round by round, each once a round, after a warm-up; no gradients are recorded."""
    with torch.inference_mode():
        repeats = []
        for call in calls:
            call()
            _run(call, 1, device)
            once = _run(call, 1, device)
            repeats.append(max(1, min(200, int(_SHORTEST / max(once, 1e-7)))))
        taken: list[list[float]] = [[] for _ in calls]
        begin = time.perf_counter()
        for done in range(rounds):
            for times, call, count in zip(taken, calls, repeats, strict=True):
                times.append(_run(call, count, device))
            if done >= 2 and time.perf_counter() - begin > _LONGEST:
                break
    result = []
    for times in taken:
        lower, median, upper = statistics.quantiles([1e3 * t for t in times], n=4) if len(times) > 1 else [times[0]] * 3
        result.append(Timing(median, lower, upper, len(times)))
    return result


def loses(mine: Timing, rival: Timing, margin: float = 0.0) -> bool:
    """Return whether `mine` is slower than its rival by more than the margin, and not by noise alone."""
    return mine.median > rival.median * (1.0 + margin) and mine.median > rival.upper
