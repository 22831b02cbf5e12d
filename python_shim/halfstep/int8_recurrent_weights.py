"""The last step of an optimization, if asked for: int8 weights of recurrent layers, as far as the guard allows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from halfstep.half_model import CastModel, name_of
from halfstep.int8_form import first_call
from halfstep.int8_metric import Verdict
from halfstep.int8_model import replace_layers
from halfstep.int8_recurrent import int8_recurrent
from halfstep.int8_report import RegionReport
from halfstep.int8_speed import calls_of, time_in_turns

if TYPE_CHECKING:
    from halfstep.int8_optimize import Int8Run

_ROUNDS = 5
_KERNEL = "weights alone, for their size: the speed guard is not asked"


class RecurrentWeights:
    """Stores the recurrent layers' weights of a run's result in int8, and says so in its report."""

    def __init__(self, run: Int8Run) -> None:
        self._run = run
        self._report = run.report
        self._layers: dict[str, nn.Module] = {}
        for name, module in run.recurrent.items():
            try:
                self._layers[name] = int8_recurrent(module, run.options.bits)
            except ValueError as error:
                self._report.left[name] = str(error)

    def store(self, model: nn.Module) -> nn.Module:
        """Return the model with as many recurrent layers stored in int8 as keep the threshold; all, if they may.

        If not all may, they are tried one by one, the largest first, while evaluations are left.
        """
        run, report = self._run, self._report
        threshold = run.options.threshold
        if shortage := run.metric.shortage(threshold):
            report.left.update(dict.fromkeys(self._layers, f"its int8 weights cannot be judged: {shortage}"))
            return model
        stored: dict[str, nn.Module] = {}
        verdict = self._judged(model, self._layers) if self._layers else None
        if verdict and verdict.kept(threshold):
            stored = self._layers
        elif len(self._layers) == 1:
            self._refuse(next(iter(self._layers)), verdict)
        elif verdict:
            verdict = None
            for name in sorted(self._layers, key=lambda name: bytes_of(run.recurrent[name]), reverse=True):
                if run.judge.evaluations >= report.budget:
                    report.left[name] = "a recurrent layer for which the guard had no evaluation left"
                    continue
                tried = self._judged(model, stored | {name: self._layers[name]})
                if tried.kept(threshold):
                    stored[name], verdict = self._layers[name], tried
                else:
                    self._refuse(name, tried)
        if not stored or verdict is None:
            return model
        return self._told(model, self._with(model, stored), stored, verdict)

    def _with(self, model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
        inner = replace_layers(self._inside(model), layers)
        return CastModel(inner, model.dtype, model.out_dtype) if self._is_cast(model) else inner

    def _is_cast(self, model: nn.Module) -> bool:
        return isinstance(model, CastModel) and model is not self._run.reference

    def _inside(self, model: nn.Module) -> nn.Module:
        return model.module if self._is_cast(model) else model

    def _judged(self, model: nn.Module, layers: dict[str, nn.Module]) -> Verdict:
        return self._run.judge.fresh(self._with(model, layers))

    def _refuse(self, name: str, verdict: Verdict) -> None:
        self._report.left[name] = f"a recurrent layer: with int8 weights {verdict.in_words()}"

    def _told(self, before: nn.Module, after: nn.Module, stored: dict[str, nn.Module], verdict: Verdict) -> nn.Module:
        """Fill the report for the model after the change, and return it."""
        run, report = self._run, self._report
        report.result = "int8"
        report.carrier = name_of(self._run.own if not self._is_cast(before) else before.dtype)
        report.evaluations = run.judge.evaluations
        report.drop, report.bound, report.kept = verdict.drop, verdict.bound, True
        for name, layer in stored.items():
            module = self._inside(before).get_submodule(name)
            dtype = name_of(next(module.parameters()).dtype)
            sizes = f"{bytes_of(module)} bytes in {dtype}, {bytes_of(layer)} in int8"
            times = self._times(before, module, layer, dtype)
            report.regions.append(RegionReport([name], "int8", kernel=_KERNEL, why=sizes, milliseconds=times))
        if report.milliseconds:  # of the model that comes back
            (timing,) = time_in_turns(calls_of([after], run.batches[0]), run.device, _ROUNDS)
            report.milliseconds["int8"] = timing.median
        return after

    def _times(self, model: nn.Module, module: nn.Module, layer: nn.Module, dtype: str) -> dict[str, float]:
        """Time both layers on what the first call with a batch gives them; empty for a layer that is not called."""
        taken = first_call(module, model, self._run.batches[0].arguments())
        if taken is None:
            return {}
        args, kwargs = taken
        calls = [partial(each, *args, **kwargs) for each in (module, layer)]
        float_time, int8_time = time_in_turns(calls, self._run.device, _ROUNDS)
        return {dtype: float_time.median, "int8": int8_time.median}


def bytes_of(layer: nn.Module) -> int:
    """Return the bytes of a recurrent layer's weights and biases."""
    total = sum(parameter.nbytes for parameter in layer.parameters())
    for module in layer.modules():
        if isinstance(packed := getattr(module, "packed", None), torch.ScriptObject):
            total += sum(t.nbytes for t in (packed.weight(), packed.scales(), packed.bias()) if t is not None)
    return total
