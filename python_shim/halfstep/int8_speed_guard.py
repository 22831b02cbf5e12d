"""The speed guard: which regions, and at last which whole model, are not slower in int8 than in the float types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from halfstep.half_model import name_of
from halfstep.int8_form import Region
from halfstep.int8_metric import Verdict
from halfstep.int8_speed import Timing, calls_of, loses, time_in_turns

if TYPE_CHECKING:
    from halfstep.int8_optimize import Int8Run


class SpeedGuard:
    """Times one optimization's regions and models, and remembers the regions' milliseconds by their layers."""

    def __init__(self, run: Int8Run) -> None:
        self._run = run
        self._times: dict[tuple[str, ...], dict[str, float]] = {}

    def faster(self, names: frozenset[str]) -> frozenset[str]:
        """Return the layers of those regions that are not slower in int8 than in the float types."""
        kept = set(names)
        for region in self._run.regions(names):
            timed = self._time(region, names)
            rivals = [timing for key, timing in timed.items() if key != "int8"]
            if rivals and loses(timed["int8"], rival := min(rivals, key=lambda timing: timing.median)):
                kept.difference_update(region.layers)
                for name in region.layers:
                    self._run.report.given_back[name] = f"slower: int8 {timed['int8']}, float {rival}"
        return frozenset(kept)

    def milliseconds(self, region: Region, names: frozenset[str]) -> dict[str, float]:
        """Return the times of a region of these int8 layers by type; it is timed now if it was part of a larger one."""
        if tuple(region.layers) not in self._times:
            self._time(region, names)
        return self._times[tuple(region.layers)]

    def known(self, name: str) -> dict[str, float]:
        """Return the times of the first region that was timed with this layer; empty if none was."""
        return next((times for layers, times in self._times.items() if name in layers), {})

    def fastest(self, model: nn.Module, verdict: Verdict) -> tuple[nn.Module, Verdict | None, str]:
        """Return the int8 model, or the float one that is faster in turns on a whole batch and keeps the threshold.

        With it come its verdict, None for the reference, and what it is: "int8" or the name of its type.
        """
        run, carriers, report = self._run, self._run.carriers, self._run.report
        kinds = list(dict.fromkeys((carriers.own, carriers.carrier)))
        models = [*(carriers.model(dtype) for dtype in kinds), model]
        *rivals, mine = time_in_turns(calls_of(models, run.batches[0]), run.device)
        report.milliseconds.update({name_of(dtype): t.median for dtype, t in zip(kinds, rivals, strict=True)})
        report.milliseconds["int8"] = mine.median
        if loses(mine, rivals[-1]):
            best = run.best_float()
            if best[2] == name_of(carriers.carrier) or loses(mine, rivals[0]):
                report.notes.append(f"int8 takes {mine}, {name_of(carriers.carrier)} {rivals[-1]}: int8 is not used")
                return best
        return model, verdict, "int8"

    def _time(self, region: Region, names: frozenset[str]) -> dict[str, Timing]:
        run = self._run
        timed = run.form.time_region(
            region, run.carriers.inners, run.layers(names), run.batches[0], run.carriers.carrier
        )
        self._times[tuple(region.layers)] = {key: timing.median for key, timing in timed.items()}
        return timed
