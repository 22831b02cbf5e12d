"""The speed guard: which regions, and at last which whole model, are not slower in int8 than in the float types."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from halfstep.half_model import name_of
from halfstep.int8_form import Region
from halfstep.int8_graph import TRACING
from halfstep.int8_metric import Verdict
from halfstep.int8_speed import Timing, calls_of, loses, share_of, time_in_turns

if TYPE_CHECKING:
    from halfstep.int8_optimize import Int8Run


class SpeedGuard:
    """Times one optimization's regions and models, and remembers the regions' milliseconds by carrier and layers."""

    def __init__(self, run: Int8Run) -> None:
        self._run = run
        self._times: dict[tuple[torch.dtype, tuple[str, ...]], dict[str, float]] = {}

    def faster(self, names: frozenset[str]) -> frozenset[str]:
        """Return the layers of those regions that are not slower in int8 than in the float types.

        Regions are timed alone, so the casts between them are nobody's: the model with these layers, and the one with
        all of them, each in the carrier and in the model's own type, are timed in turns, and the fastest is taken.
        """
        kept = set(names)
        slower: dict[str, str] = {}
        for region in self._run.regions(names):
            timed = self._time(region, names)
            rivals = [key for key in timed if key != "int8"]
            if not rivals:
                continue
            rival = min(rivals, key=lambda key: timed[key].median)
            if loses(timed["int8"], timed[rival]):
                kept.difference_update(region.layers)
                why = f"slower: {share_of(timed['int8'], timed[rival], rival)}"
                slower.update(dict.fromkeys(region.layers, why))
        chosen = self._fastest_whole(frozenset(kept), names)
        self._run.report.given_back.update((name, why) for name, why in slower.items() if name not in chosen)
        return chosen

    def _fastest_whole(self, kept: frozenset[str], names: frozenset[str]) -> frozenset[str]:
        """Return one of both sets, and set the carrier with which it is fastest."""
        run, carriers = self._run, self._run.carriers
        dtypes = dict.fromkeys((carriers.fastest, carriers.own))
        ways = [(layers, dtype) for dtype in dtypes for layers in dict.fromkeys((kept, names)) if layers]
        if (kept, carriers.fastest) not in ways:
            ways.insert(0, (kept, carriers.fastest))  # the float model
        if len(ways) == 1:
            return kept
        models = []
        for layers, dtype in ways:
            carriers.carrier = dtype
            models.append(run.build(layers))
        timings = time_in_turns(calls_of(models, run.batches[0]), run.device)
        best = min(range(len(ways)), key=lambda way: timings[way].median)
        if not loses(timings[0], timings[best]):
            best = 0
        chosen, carriers.carrier = ways[best]
        if chosen != kept:
            run.report.notes.append(
                f"with all regions in int8 the model takes {timings[best]} in {name_of(ways[best][1])}, without those "
                f"that are slower alone {timings[0]} in {name_of(ways[0][1])}: all are kept"
            )
        return chosen

    def milliseconds(self, region: Region, names: frozenset[str]) -> dict[str, float]:
        """Return the times of a region of these int8 layers by type; it is timed now if it was part of a larger one."""
        key = (self._run.carriers.carrier, tuple(region.layers))
        if key not in self._times:
            self._time(region, names)
        return self._times[key]

    def known(self, name: str, carrier: str) -> tuple[tuple[str, ...], dict[str, float]]:
        """Return the first region with this layer that was timed, and its times; empty if none was.

        One in this carrier, if there is one: the carrier may have changed after all regions were timed.
        """
        found = [(dtype, layers, times) for (dtype, layers), times in self._times.items() if name in layers]
        found.sort(key=lambda each: name_of(each[0]) != carrier)
        return found[0][1:] if found else ((), {})

    def fastest(self, model: nn.Module, verdict: Verdict) -> tuple[nn.Module, Verdict | None, str]:
        """Return the int8 model, or the float one that is faster in turns on a whole batch and keeps the threshold.

        With it come its verdict, None for the reference, and what it is: "int8" or the name of its type.
        """
        run, carriers, report = self._run, self._run.carriers, self._run.report
        half = carriers.half if run.options.compiled else None  # it may be the fastest compiled, if not in eager code
        kinds = list(dict.fromkeys((carriers.own, half or carriers.own, carriers.fastest)))
        models = [*map(carriers.model, kinds), model]
        with TRACING if run.options.compiled else contextlib.nullcontext():
            compiled = self._compiled(models) if run.options.compiled else None
            *times, mine = time_in_turns(calls_of(compiled or models, run.batches[0]), run.device)
        rivals = dict(zip(kinds, times, strict=True))
        if compiled:
            report.milliseconds = {}  # those of eager code are no measure for these
            carriers.fastest = min(rivals, key=lambda dtype: rivals[dtype].median)
        report.milliseconds.update({name_of(dtype): timing.median for dtype, timing in rivals.items()})
        report.milliseconds["int8"] = mine.median
        rival = rivals[carriers.fastest]
        if loses(mine, rival):
            best = run.best_float()
            if best[2] == name_of(carriers.fastest) or loses(mine, rivals[carriers.own]):
                share = share_of(mine, rival, name_of(carriers.fastest))
                report.notes.append(f"int8 takes {share}: int8 is not used")
                return best
        return model, verdict, "int8"

    def _compiled(self, models: list[nn.Module]) -> list[nn.Module] | None:
        """Return the models compiled, as they are going to be used; None if one of them cannot be compiled."""
        compiled = [torch.compile(model) for model in models]
        try:
            with torch.inference_mode():
                for model in compiled:
                    self._run.batches[0](model)
        except Exception as error:  # a compiler may fail in any way
            said = (str(error).splitlines() or [""])[0]
            self._run.report.notes.append(
                f"models are timed without torch.compile, which fails: {type(error).__name__}: {said}"
            )
            return None
        self._run.report.notes.append("whole models are timed compiled; what came back is not compiled yet")
        return compiled

    def _time(self, region: Region, names: frozenset[str]) -> dict[str, Timing]:
        run = self._run
        timed = run.form.time_region(
            region, run.carriers.inners, run.layers(names), run.batches[0], run.carriers.carrier
        )
        self._times[run.carriers.carrier, tuple(region.layers)] = {key: timing.median for key, timing in timed.items()}
        return timed
