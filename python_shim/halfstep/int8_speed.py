"""Times of models and layers, taken in turns so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from halfstep.calibration_data import Batch
from halfstep.containers import tensors_of
from halfstep.graph_capture import capturing

ROUNDS = 15
_SHORTEST = 1e-3  # seconds that one round lasts at least: shorter calls are repeated within it
_CAPTURED = 10  # calls in a CUDA graph, whose own launch takes as long as a small kernel
_LONGEST = 20.0  # seconds that all rounds together may take; at least three are run
_FEWEST_CALLS = 6  # that time_in_turns() makes of each: a warm-up of three, and three rounds


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, in each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

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
    return [Timing(tuple(1e3 * seconds for seconds in times)) for times in taken]


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call that was made before, the shorter of two: a rough look."""
    with torch.inference_mode():
        return min(_run(call, 1, device) for _ in range(2))


def time_briefly(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[Timing]:
    """Time the calls as time_in_turns() does; where its fewest rounds would take too long, by one call of each.

    The calls have been made before: nothing is warmed up for that one.
    """
    with torch.inference_mode():
        once = [_run(call, 1, device) for call in calls]
    if _FEWEST_CALLS * sum(once) > _LONGEST:
        return [Timing((1e3 * seconds,)) for seconds in once]
    return time_in_turns(calls, device)


def time_on_device(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[Timing]:
    """Time the calls as time_in_turns() does, on a GPU without what the host takes to launch them.

    There they are replays of CUDA graphs: a few kernels alone are over before Python has launched the next ones, which
    in the whole model it has done long before. If one of the calls cannot be captured, all are timed as they are.
    """
    if device.type != "cuda":
        return time_in_turns(calls, device)
    try:
        with torch.inference_mode():
            graphs = [_captured(call, device) for call in calls]
    except RuntimeError:
        return time_in_turns(calls, device)
    timings = time_in_turns([graph.replay for graph in graphs], device)
    return [Timing(tuple(time / _CAPTURED for time in timing.rounds)) for timing in timings]


def _captured(call: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph:
    """Return a graph of some calls in a row."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what is made at the first call cannot be made in a capture
        call()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, torch.cuda.graph_pool_handle(), stream):
        for _ in range(_CAPTURED):
            call()
    return graph


def calls_of(models: Sequence[nn.Module], batch: Batch) -> list[Callable[[], Any]]:
    """Return for each model a call on the batch, for time_in_turns(): all on the same arguments, copied beforehand.

    If one of the models changes its arguments, each call of all of them copies the batch first: after some calls that
    model would get something else than the batch, such as indices out of range.
    """
    args, kwargs = arguments = batch.arguments()
    if all(_leaves_alone(model, arguments, batch) for model in models):
        return [partial(model, *args, **kwargs) for model in models]
    return [partial(batch, model) for model in models]


def _leaves_alone(model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], batch: Batch) -> bool:
    """Return whether the model can be called again on these arguments, which are the batch's, and leaves their values.

    Called twice, since it may take an item out of a mapping that it was given. NaN is never equal: such a batch is
    copied.
    """
    args, kwargs = arguments
    with torch.no_grad():
        model(*args, **kwargs)
        try:
            model(*args, **kwargs)
            pairs = zip(tensors_of(arguments), tensors_of(batch.arguments()), strict=True)
            return all(torch.equal(*pair) for pair in pairs)
        except Exception:  # of the model's code, or of tensors that cannot be compared
            return False


def loses(mine: Timing, rival: Timing) -> bool:
    """Return whether `mine` took longer than its rival in the median of the rounds, each compared with its neighbour.

    What slows the machine down for a while slows both down, so this is steadier than a comparison of two medians, which
    may say the contrary.
    """
    return _ratio(mine, rival) > 1.0


def share_of(mine: Timing, rival: Timing, name: str) -> str:
    """Return what loses() decides by, as "1.02 of float16's time, round by round"."""
    return f"{times_of(mine, rival)} of {name}'s time, round by round"


def times_of(mine: Timing, rival: Timing) -> str:
    """Return what loses() decides by, as "1.02"; more than 1 is never shown as 1."""
    ratio = _ratio(mine, rival)
    digits = next(n for n in range(3, 18) if ratio == 1.0 or float(f"{ratio:.{n}g}") != 1.0)
    return f"{ratio:.{digits}g}"


def _ratio(mine: Timing, rival: Timing) -> float:
    return statistics.median(a / b for a, b in zip(mine.rounds, rival.rounds, strict=True))
