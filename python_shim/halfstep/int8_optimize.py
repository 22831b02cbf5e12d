"""From a float model and calibration batches to an int8 model: the steps, in their order.

calibrate; quantize the weights; choose the type of what is not int8; give back layers that are slower in int8; let the
accuracy guard give back layers that cost too much; correct biases; compare the whole model's time with the fastest
float model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfstep.calibration_data import Batch, calls_naming
from halfstep.half_model import name_of
from halfstep.int8_calibration import METHODS, Calibration
from halfstep.int8_calibration_file import CalibrationFile
from halfstep.int8_carriers import Carriers
from halfstep.int8_form import Form, Region
from halfstep.int8_graph import taken_by
from halfstep.int8_guard import guard
from halfstep.int8_judge import Judge, call, tell
from halfstep.int8_metric import choose_metric
from halfstep.int8_model import weight_bytes
from halfstep.int8_ranking import Ranking, rank_layers
from halfstep.int8_recurrent import take_recurrent
from halfstep.int8_recurrent_weights import RecurrentWeights
from halfstep.int8_report import RegionReport, Report, grouped
from halfstep.int8_script_form import ScriptForm
from halfstep.int8_search import default_budget
from halfstep.int8_settings import LayerSettings, Scheme
from halfstep.int8_speed_guard import SpeedGuard
from halfstep.int8_verdict import Verdict

_PROBED = 32  # samples by which layers are compared


@dataclass(frozen=True)
class Options:
    """What the user chose; see InferencePrecisionOptimizer."""

    threshold: float
    eval_fn: Callable[[nn.Module], Any] | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    calibrator: str
    activations: str
    smooth_quant: bool | str
    bias_correction: bool
    fold_batch_norm: bool
    speed_guard: bool
    compiled: bool
    strict: bool
    bits: int
    recurrent_weights: bool
    progress: bool | None


class Int8Run:
    """One optimization. `reference` is the float model, in eval mode on the device; nothing of it is changed.

    `candidates` are the layers that may be int8, `settings` what makes them so, `carriers` the float models that stand
    around them or against them; `judge` and `speed` decide.
    """

    def __init__(
        self,
        reference: nn.Module,
        calibration: list[Batch],
        guard: list[Batch],
        device: torch.device,
        options: Options,
        report: Report,
        file: CalibrationFile | None = None,
    ) -> None:
        self.reference = reference
        self.device = device
        self.options = options
        self.report = report
        self.batches = [batch.on(device) for batch in calibration]
        self._file = file
        if file is not None:  # before the model is traced and run
            file.expect_batches(self.batches)
        self.guard = [batch.on(device) for batch in guard]
        probe = self.batches[0].part(0, _PROBED)
        kind = ScriptForm if isinstance(reference, torch.jit.ScriptModule) else Form
        self.form = kind(reference, self.batches, options.fold_batch_norm, report)
        self.candidates, left = self.form.candidates(self.batches, options.include, options.exclude)
        self.recurrent: dict[str, nn.RNNBase] = {}
        if options.recurrent_weights:
            self.recurrent = take_recurrent(self.form.model, left, options.include, options.exclude)
        report.left = {**left, **report.left}  # what is known of attention says more than its class does
        self.carriers = Carriers(reference, self.form.model)
        self.own = self.carriers.own
        scheme = Scheme(options.activations, options.smooth_quant, options.bits)
        self.settings = LayerSettings(self.form.model, self.candidates, self.batches, probe, scheme, device, self.own)
        self.speed = SpeedGuard(self)
        self.shortage = ""
        self._probe = probe

    # ------------------------------------------------------------------------------------------------------- the whole

    def run(self) -> nn.Module:
        """Return the model that keeps the promise: int8 where it pays and holds, else a float one."""
        options, report = self.options, self.report
        calibration = self.calibrate()
        report.left.update(self.settings.quantize(calibration, self.methods[0]))
        if options.strict and report.left:
            raise ValueError(not_strict(report.left))
        if options.speed_guard:
            self.carriers.choose(self.batches[0], self._probe, self.device, report)
        self.metric = choose_metric(options.eval_fn, self.guard, calls_naming(self.reference), self.reference)
        tell(report, self.metric, self.reference, self.guard)
        if not self.candidates and not self.recurrent:
            reasons = "; ".join(grouped(report.left)) or "it has no such layers"
            report.warn(f"no layer of the model was left to make int8 ({reasons})")
        names = frozenset(self.candidates)
        self.use(calibration, self.methods[0])
        if options.speed_guard:
            names = self.speed.faster(names)
        report.carrier = name_of(self.carriers.carrier)
        self.judge = Judge(self, self.metric)
        chosen = self.search(calibration, names)
        return self.finish(chosen)

    def search(self, calibration: Calibration, names: frozenset[str]) -> frozenset[str]:
        """Return the layers with which the accuracy guard is content; all estimators are tried before any is lost."""
        report, threshold = self.report, self.options.threshold
        report.budget = default_budget(len(names))
        if not names:
            return names
        # Behind the search come the biases and, where it has another type than the reference, the float model.
        left = report.budget - self.options.bias_correction - (self.carriers.fastest != self.own)
        tried: dict[str, Verdict] = {}
        for method in self.methods:
            self.use(calibration, method)
            tried[method] = self.judge.judge(names)
            if tried[method].kept(threshold):
                return names
            if self.judge.shortage(threshold) or tried[method].unchanged:
                break
        best = min(tried, key=lambda method: tried[method].bound)
        everywhere = tried[best]
        report.everywhere_was(everywhere)
        self.use(calibration, best)
        found = guard(
            [name for name in self.candidates if name in names],
            self.judge.judge,
            lambda: self.rank(names),
            threshold,
            self.judge.shortage(threshold) or (everywhere.note if everywhere.unchanged else ""),
            left - len(tried) + 1,  # what it asks first is known already
        )
        search = found.search
        if found.ranking is not None and found.ranking.note:
            report.notes.append(found.ranking.note)
        for place, name in enumerate(search.given_back):
            report.given_back[name] = f"given back for accuracy, number {place + 1} of the most harmful"
        if not search.quantized:
            self.shortage = search.note or f"with all of them {everywhere.in_words()}; no part of them keeps it"
        if not search.kept:
            report.given_back.update(dict.fromkeys(names, f"the threshold cannot be kept: {search.note}"))
        return search.quantized

    def finish(self, chosen: frozenset[str]) -> nn.Module:
        """Correct biases, compare the whole model's times, fill the report, and return the model."""
        report, options = self.report, self.options
        if chosen:
            model, verdict, result = self.build(chosen), self.judge.judge(chosen), "int8"
            if options.bias_correction:
                model, verdict = self.correct_biases(chosen, model, verdict)
            if options.speed_guard:
                model, verdict, result = self.speed.fastest(model, verdict)
            if result != "int8":
                report.given_back.update(dict.fromkeys(chosen, "the whole model is not faster with int8 layers"))
                chosen = frozenset()
        else:
            if self.shortage:  # else it was the speed guard that left nothing to judge
                report.warn(
                    f"no int8 layers keep the drop at {options.threshold:g} or less for certain ({self.shortage}); the "
                    "float model came back"
                )
            model, verdict, result = self.best_float()
        self.describe(chosen, verdict, result)
        if self.recurrent:
            model = RecurrentWeights(self).store(model)
            result = report.result
        report.unchanged = model is self.reference
        if self.metric.kind == "score":
            report.bound = None
        taken = taken_by(model)
        report.arguments = None if taken is None else list(taken)
        report.bytes = {name_of(self.own): weight_bytes(self.reference), result: weight_bytes(model)}
        names = sorted((frozenset(self.candidates) - chosen) | (frozenset(self.recurrent) & frozenset(report.left)))
        if options.strict and names:
            raise ValueError(
                not_strict({name: report.given_back.get(name) or report.left.get(name, "") for name in names})
            )
        return model

    # ------------------------------------------------------------------------------------------------------- the steps

    def calibrate(self) -> Calibration:
        """Observe the inputs of all candidates; those that are never called stay float."""
        calibration = Calibration(self.candidates, self.batches, self._file)
        calibration.run(self.form.model, self.options.progress)
        for name, observer in calibration.observers.items():
            if observer.nonfinite():
                self.report.nonfinite[name] = observer.nonfinite()
            if not calibration.seen(name):
                self.report.left[name] = "it got no finite values during calibration"
                del self.candidates[name]
        return calibration

    def use(self, calibration: Calibration, method: str) -> None:
        """Take the ranges of the inputs by this estimator."""
        self.report.calibrator = method
        self.settings.use(calibration, method)

    @property
    def methods(self) -> tuple[str, ...]:
        """The estimators to try, the cheapest first."""
        return METHODS[:4] if self.options.calibrator == "auto" else (self.options.calibrator,)

    def rank(self, names: frozenset[str]) -> Ranking:
        """Return the layers, the most harmful first."""
        return rank_layers(self.form.model, self.settings.layers(names, self.own), self.batches, call)

    def correct_biases(self, chosen: frozenset[str], model: nn.Module, verdict: Verdict) -> tuple[nn.Module, Verdict]:
        """Move the biases by the mean error of each layer, unless the guard likes the model better as it is."""
        before = self.settings.settings
        shifted = self.settings.with_mean_shifts(chosen)
        self.settings.settings = {**before, **shifted}
        corrected = self.build(chosen)
        judged = self.judge.fresh(corrected)
        if judged.bound <= verdict.bound:
            self.report.bias_correction = f"biases corrected in {len(shifted)} layers"
            return corrected, judged
        self.settings.settings = before
        self.report.bias_correction = "no bias correction: it made the drop larger"
        return model, verdict

    def best_float(self) -> tuple[nn.Module, Verdict | None, str]:
        """Return the fastest float model if it keeps the threshold, else the reference, which needs no verdict."""
        fastest = self.carriers.fastest
        if fastest != self.own:
            verdict = self.judge.judge(frozenset())
            if verdict.kept(self.options.threshold):
                return self.carriers.model(fastest), verdict, name_of(fastest)
            most = f"{self.options.threshold:g} or less"
            self.report.notes.append(f"{name_of(fastest)} is faster, but cannot be shown to keep the drop at {most}")
        return self.reference, None, name_of(self.own)

    def describe(self, chosen: frozenset[str], verdict: Verdict | None, result: str) -> None:
        """Fill the report."""
        report = self.report
        report.result = result
        report.evaluations = self.judge.evaluations
        if verdict is not None:
            report.drop, report.bound, report.kept = verdict.drop, verdict.bound, verdict.kept(self.options.threshold)
        else:
            report.drop, report.bound, report.kept = 0.0, 0.0, True
        if result != "int8":  # what was done to get there is not in what came back
            report.attention, report.folded, report.bias_correction = [], [], ""
            report.carrier = result
        noise = self.settings.noise()
        kernel = torch.ops.halfstep.int8_kernel(self.device)
        for region in self.regions(chosen) if chosen else []:
            report.regions.append(
                RegionReport(
                    region.layers,
                    "int8",
                    kernel=kernel,
                    error=max((noise[name] for name in region.layers if name in noise), default=None),
                    milliseconds=self.speed.milliseconds(region, chosen) if self.options.speed_guard else {},
                    fused=region.fused,
                    calibrator=report.calibrator,
                    smoothed=any(name in self.settings.smoothed for name in region.layers),
                )
            )
        for name in self.candidates:
            if name not in chosen:
                layers, times = self.speed.known(name, report.carrier)
                told = RegionReport([name], "float", report.given_back.get(name, ""), error=noise.get(name))
                told.milliseconds, told.timed = times, list(layers) if len(layers) > 1 else []
                report.regions.append(told)

    # -------------------------------------------------------------------------------------------- the models in between

    def build(self, names: frozenset[str]) -> nn.Module:
        """Return a model in which these layers are int8, called as the reference is; without any, the float one."""
        carriers = self.carriers
        if not names:
            return carriers.model(carriers.fastest)
        return carriers.outside(self.form.build(carriers.inner, self.layers(names), carriers.carrier))

    def regions(self, names: frozenset[str]) -> list[Region]:
        """Return the regions of build(names)."""
        return self.form.regions(self.carriers.inner, self.layers(names), self.carriers.carrier)

    def layers(self, names: frozenset[str]) -> dict[str, nn.Module]:
        """Return the int8 layers of these names, as they stand in the carrier."""
        return self.settings.layers(names, self.carriers.carrier)


def not_strict(reasons: Mapping[str, str], kept: str = "float") -> str:
    """Return why strict=True raises: layers by name, with the reasons for which they stay in the type `kept`."""
    lines = grouped(reasons, most=len(reasons))  # all: there is no report that has the others
    return "\n  ".join([f"strict=True, but layers stay {kept}:", *lines])
