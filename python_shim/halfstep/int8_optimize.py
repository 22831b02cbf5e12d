"""From a float model and calibration batches to an int8 model: the steps, in their order.

calibrate; choose the type of what is not int8; give back layers that are slower in int8; let the accuracy guard give
back layers that cost too much; correct biases; compare the whole model's time with the fastest float model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from halfstep.calibration_data import Batch
from halfstep.half_model import CastModel, float_dtype, half_model, is_uniform, name_of
from halfstep.int8_batches import floating_tensors_of
from halfstep.int8_calibration import METHODS, Calibration, first_argument
from halfstep.int8_form import Form, Region
from halfstep.int8_guard import guard
from halfstep.int8_judge import Judge, call
from halfstep.int8_layers import pack
from halfstep.int8_metric import Verdict, choose_metric
from halfstep.int8_model import Candidate, Int8Settings
from halfstep.int8_ranking import Ranking, rank_layers
from halfstep.int8_recurrent import take_recurrent
from halfstep.int8_recurrent_weights import RecurrentWeights
from halfstep.int8_report import RegionReport, Report
from halfstep.int8_script_form import ScriptForm
from halfstep.int8_search import default_budget
from halfstep.int8_speed import Timing, loses, time_in_turns

_HALVES = (torch.bfloat16, torch.float16)
_PROBED = 32  # samples by which layers are compared
_NOISY = 1e-3  # the share of noise, 30 dB, up to which a layer needs no smoothing


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
    strict: bool
    bits: int
    recurrent_weights: bool
    progress: bool | None
    calibration_file: Any


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters, buffers and packed weights, each counted once."""
    tensors = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        packed = getattr(module, "packed", None)
        if isinstance(packed, torch.ScriptObject):
            parts = [packed.weight(), packed.scales(), packed.bias(), packed.input_factors()]
            tensors[id(packed)] = sum(t.numel() * t.element_size() for t in parts if t is not None)
    return sum(tensors.values())


class Int8Run:
    """One optimization. `reference` is the float model, in eval mode on the device; nothing of it is changed."""

    def __init__(
        self,
        reference: nn.Module,
        calibration: list[Batch],
        guard: list[Batch],
        device: torch.device,
        options: Options,
        report: Report,
    ) -> None:
        self.reference = reference
        self.own = float_dtype(reference)
        self.device = device
        self.options = options
        self.report = report
        self.batches = [batch.on(device) for batch in calibration]
        self.guard = [batch.on(device) for batch in guard]
        self.probe = self.batches[0].part(0, _PROBED)
        kind = ScriptForm if isinstance(reference, torch.jit.ScriptModule) else Form
        self.form = kind(reference, self.batches, options.fold_batch_norm, report)
        self.candidates, left = self.form.candidates(self.batches, options.include, options.exclude)
        self.recurrent: dict[str, nn.RNNBase] = {}
        if options.recurrent_weights:
            self.recurrent = take_recurrent(self.form.model, left, options.include, options.exclude)
        report.left.update(left)
        self.settings: dict[str, Int8Settings] = {}
        self.carrier = self.own
        self._floating: dict[torch.dtype, nn.Module] = {self.own: reference}
        self.inners = {self.own: self.form.model}  # the float model by type
        self.inner = self.form.model  # in the carrier's
        self.shortage = ""
        self.region_times: dict[tuple[str, ...], dict[str, float]] = {}
        self.float_times: dict[torch.dtype, Timing] = {}

    # ------------------------------------------------------------------------------------------------------- the whole

    def run(self) -> nn.Module:
        """Return the model that keeps the promise: int8 where it pays and holds, else a float one."""
        options, report = self.options, self.report
        calibration = self.calibrate()
        self.quantize(calibration)
        if options.strict and report.left:
            raise ValueError("strict=True, but layers stay float:\n" + _listed(report.left))
        if options.speed_guard:
            self.choose_carrier()
        report.carrier = name_of(self.carrier)
        self.metric = choose_metric(options.eval_fn, self.guard, call, self.reference)
        report.metric, report.proxy = self.metric.kind, self.metric.proxy
        if report.proxy and any(batch.labels is not None for batch in self.guard):
            report.notes.append(
                "batches have labels, but not one class of the outputs for each sample: outputs are compared"
            )
        names = frozenset(self.candidates)
        self.use(calibration, self.methods[0])
        if options.speed_guard:
            names = self.faster(names)
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
        left = report.budget - self.options.bias_correction - (self.carrier != self.own)
        tried: dict[str, Verdict] = {}
        for method in self.methods:
            self.use(calibration, method)
            tried[method] = self.judge.judge(names)
            if tried[method].kept(threshold):
                return names
            if self.judge.shortage(threshold):
                break
        best = min(tried, key=lambda method: tried[method].bound)
        report.everywhere = {"drop": tried[best].drop, "bound": tried[best].bound}
        self.use(calibration, best)
        found = guard(
            self.judge,
            [name for name in self.candidates if name in names],
            lambda quantized: quantized,
            lambda: self.rank(names),
            threshold,
            left - len(tried) + 1,  # what it asks first is known already
        )
        search = found.search
        if found.ranking is not None and found.ranking.note:
            report.notes.append(found.ranking.note)
        for place, name in enumerate(search.given_back):
            report.given_back[name] = f"given back for accuracy, number {place + 1} of the most harmful"
        if not search.quantized:
            drop = report.everywhere["drop"]
            self.shortage = search.note or f"with all of them it is {drop:.3g}, and no part of them keeps it"
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
                model, verdict, result = self.fastest(model, verdict)
            if result != "int8":
                report.given_back.update(dict.fromkeys(chosen, "the whole model is not faster with int8 layers"))
                chosen = frozenset()
        else:
            if self.shortage:  # else it was the speed guard that left nothing to judge
                report.notes.append(
                    f"no int8 layers keep the drop at {options.threshold:g} or less for certain ({self.shortage}); the "
                    "float model came back"
                )
            model, verdict, result = self.best_float()
        self.describe(chosen, verdict, result)
        if self.recurrent:
            model = RecurrentWeights(self).store(model)
            result = report.result
        report.bytes = {name_of(self.own): weight_bytes(self.reference), result: weight_bytes(model)}
        names = sorted((frozenset(self.candidates) - chosen) | (frozenset(self.recurrent) & frozenset(report.left)))
        if options.strict and names:
            reasons = {name: report.given_back.get(name) or report.left.get(name, "") for name in names}
            raise ValueError("strict=True, but layers stay float:\n" + _listed(reasons))
        return model

    # ------------------------------------------------------------------------------------------------------- the steps

    def calibrate(self) -> Calibration:
        """Observe the inputs of all candidates; those that are never called stay float."""
        calibration = Calibration(self.candidates, self.batches, self.options.calibration_file)
        calibration.run(self.form.model, self.options.progress)
        for name in [n for n in calibration.observers if not calibration.seen(n)]:
            self.report.left[name] = "it got no finite values during calibration"
            del self.candidates[name]
        return calibration

    def quantize(self, calibration: Calibration) -> None:
        """Quantize the weights of all candidates, smoothed where that helps."""
        self.packed: dict[str, torch.ScriptObject] = {}
        smoothed: dict[str, torch.ScriptObject] = {}
        for name, candidate in list(self.candidates.items()):
            try:
                self.packed[name] = self._pack(candidate)
            except ValueError as error:
                self.report.left[name] = str(error)
                del self.candidates[name]
                continue
            if self.options.smooth_quant and candidate.can_be_smoothed and self.options.activations == "static":
                smoothed[name] = self._smooth(candidate, calibration.observers[name])
        self.ranges = {name: self._smoothed_range(calibration, name, packed) for name, packed in smoothed.items()}
        if self.options.smooth_quant == "auto" and smoothed:
            method = self.methods[0]
            variants = {
                name: [
                    Int8Settings(self.packed[name], *calibration.parameters(name, method, self.options.bits)),
                    Int8Settings(smoothed[name], *self.ranges[name]),
                ]
                for name in smoothed
            }
            noise = self.layer_noise(variants)
            smoothed = {name: packed for name, packed in smoothed.items() if name in noise and _is_worth(*noise[name])}
        self.smoothed = set(smoothed)
        self.packed.update(smoothed)

    def use(self, calibration: Calibration, method: str) -> None:
        """Take the ranges of the inputs by this estimator."""
        self.report.calibrator = method
        self.settings = {}
        for name, candidate in self.candidates.items():
            if candidate.kind == "embedding" or self.options.activations == "dynamic":
                self.settings[name] = Int8Settings(self.packed[name])
            elif name in self.smoothed:
                self.settings[name] = Int8Settings(self.packed[name], *self.ranges[name])
            else:
                scale, zero_point = calibration.parameters(name, method, self.options.bits)
                self.settings[name] = Int8Settings(self.packed[name], scale, zero_point)

    @property
    def methods(self) -> tuple[str, ...]:
        """The estimators to try, the cheapest first."""
        return METHODS[:4] if self.options.calibrator == "auto" else (self.options.calibrator,)

    def choose_carrier(self) -> None:
        """Take the fastest float type for what is not int8, and for the model that int8 has to beat."""
        models = {self.own: self.reference}
        if self.own == torch.float32 and is_uniform(self.reference):
            with torch.no_grad():
                wanted = floating_tensors_of(self.probe(self.reference))
            for dtype in _HALVES:
                model = self.floating(dtype)
                try:
                    with torch.no_grad():
                        outputs = floating_tensors_of(self.probe(model))
                        noise = [
                            _mean(torch.ops.halfstep.output_noise(*pair)) for pair in zip(wanted, outputs, strict=True)
                        ]
                except Exception as error:  # the model's own code may refuse half in any way
                    said = (str(error).splitlines() or [""])[0]
                    self.report.notes.append(f"{name_of(dtype)} fails: {type(error).__name__}: {said}")
                    continue
                if all(math.isfinite(share) for share in noise):
                    models[dtype] = model
        times = time_in_turns([partial(self.batches[0], model) for model in models.values()], self.device)
        self.float_times = dict(zip(models, times, strict=True))
        self.carrier = min(self.float_times, key=lambda dtype: self.float_times[dtype].median)
        self.report.milliseconds = {name_of(dtype): timing.median for dtype, timing in self.float_times.items()}
        halves = [dtype for dtype in self.float_times if dtype != self.own]
        if halves:  # the better of them is timed in every region, whether it is the carrier or not
            half = min(halves, key=lambda dtype: self.float_times[dtype].median)
            self.inners[half] = half_model(self.form.model, half).module
        self.inner = self.inners[self.carrier]

    def faster(self, names: frozenset[str]) -> frozenset[str]:
        """Return the layers of those regions that are not slower in int8 than in the float types."""
        kept = set(names)
        for region in self.regions(names):
            timed = self._time(region, names)
            rivals = [timing for key, timing in timed.items() if key != "int8"]
            if rivals and loses(timed["int8"], rival := min(rivals, key=lambda timing: timing.median)):
                kept.difference_update(region.layers)
                for name in region.layers:
                    self.report.given_back[name] = f"slower: int8 {timed['int8']}, float {rival}"
        return frozenset(kept)

    def _time(self, region: Region, names: frozenset[str]) -> dict[str, Timing]:
        timed = self.form.time_region(region, self.inners, self._layers(names), self.batches[0], self.carrier)
        self.region_times[tuple(region.layers)] = {key: timing.median for key, timing in timed.items()}
        return timed

    def rank(self, names: frozenset[str]) -> Ranking:
        """Return the layers, the most harmful first."""
        layers = {name: self.settings[name].layer(self.candidates[name], self.own) for name in names}
        return rank_layers(self.form.model, layers, self.batches, call)

    def correct_biases(self, chosen: frozenset[str], model: nn.Module, verdict: Verdict) -> tuple[nn.Module, Verdict]:
        """Move the biases by the mean error of each layer, unless the guard likes the model better as it is."""
        before = self.settings
        shifted = self.mean_shifts(chosen)
        self.settings = {
            name: replace(old, packed=shifted[name]) if name in shifted else old for name, old in before.items()
        }
        corrected = self.build(chosen)
        judged = self.judge.fresh(corrected)
        if judged.bound <= verdict.bound:
            self.report.bias_correction = f"biases corrected in {len(shifted)} layers"
            return corrected, judged
        self.settings = before
        self.report.bias_correction = "no bias correction: it made the drop larger"
        return model, verdict

    def fastest(self, model: nn.Module, verdict: Verdict) -> tuple[nn.Module, Verdict | None, str]:
        """Return the int8 model, or the float one that is faster in turns on a whole batch and keeps the threshold."""
        kinds = list(dict.fromkeys((self.own, self.carrier)))
        models = [*(self.floating(dtype) for dtype in kinds), model]
        *rivals, mine = time_in_turns([partial(self.batches[0], each) for each in models], self.device)
        self.report.milliseconds.update({name_of(dtype): t.median for dtype, t in zip(kinds, rivals, strict=True)})
        self.report.milliseconds["int8"] = mine.median
        if loses(mine, rivals[-1]):
            best = self.best_float()
            if best[2] == name_of(self.carrier) or loses(mine, rivals[0]):
                self.report.notes.append(f"int8 takes {mine}, {name_of(self.carrier)} {rivals[-1]}: int8 is not used")
                return best
        return model, verdict, "int8"

    def best_float(self) -> tuple[nn.Module, Verdict | None, str]:
        """Return the fastest float model if it keeps the threshold, else the reference, which needs no verdict."""
        if self.carrier != self.own:
            verdict = self.judge.judge(frozenset())
            if verdict.kept(self.options.threshold):
                return self.floating(self.carrier), verdict, name_of(self.carrier)
            most = f"{self.options.threshold:g} or less"
            self.report.notes.append(
                f"{name_of(self.carrier)} is faster, but cannot be shown to keep the drop at {most}"
            )
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
        if self.metric.kind == "score":
            report.bound = None
        if result != "int8":  # what was done to get there is not in what came back
            report.folded, report.bias_correction = [], ""
        products = {n: [s] for n, s in self.settings.items() if n in self.candidates}
        noise = self.layer_noise(products)
        kernel = torch.ops.halfstep.int8_kernel(self.device)
        regions = self.regions(chosen) if chosen else []
        for region in regions:
            if self.options.speed_guard and tuple(region.layers) not in self.region_times:
                self._time(region, chosen)  # it was part of a larger one
            shares = [noise[name][0] for name in region.layers if name in noise]
            report.regions.append(
                RegionReport(
                    region.layers,
                    "int8",
                    kernel=kernel,
                    error=max(shares, default=None),
                    milliseconds=self.region_times.get(tuple(region.layers), {}),
                    fused=region.fused,
                    calibrator=report.calibrator,
                    smoothed=any(name in self.smoothed for name in region.layers),
                )
            )
        for name in self.candidates:
            if name not in chosen:
                why = report.given_back.get(name, "")
                error = noise[name][0] if name in noise else None
                times = next((t for layers, t in self.region_times.items() if name in layers), {})
                report.regions.append(RegionReport([name], "float", why=why, error=error, milliseconds=times))

    def build(self, names: frozenset[str]) -> nn.Module:
        """Return a model in which these layers are int8, called as the reference is."""
        if not names:
            return self.floating(self.carrier)
        return self._outside(self.form.build(self.inner, self._layers(names), self.carrier))

    def regions(self, names: frozenset[str]) -> list[Region]:
        """Return the regions of build(names)."""
        return self.form.regions(self.inner, self._layers(names), self.carrier)

    def floating(self, dtype: torch.dtype) -> nn.Module:
        """Return the float model in this type."""
        if dtype not in self._floating:
            self._floating[dtype] = half_model(self.reference, dtype)
        return self._floating[dtype]

    # ------------------------------------------------------------------------------------------------ what they use

    def layer_noise(self, variants: Mapping[str, list[Int8Settings]]) -> dict[str, list[float]]:
        """Return, for layers that the probe calls, the share of noise in the output of each of their int8 variants."""
        noise: dict[str, list[float]] = {}

        def visit(name: str, value: torch.Tensor, output: torch.Tensor) -> None:
            layers = [settings.layer(self.candidates[name], self.own) for settings in variants[name]]
            shares = [_mean(torch.ops.halfstep.output_noise(output, layer(value))) for layer in layers]
            noise.setdefault(name, shares)

        self._visit_layers(variants, [self.probe], visit)
        return noise

    def mean_shifts(self, names: frozenset[str]) -> dict[str, torch.ScriptObject]:
        """Return packed weights whose bias makes up for the mean of the quantization error of each layer's output."""
        shifts: dict[str, list[torch.Tensor]] = {}

        def visit(name: str, value: torch.Tensor, output: torch.Tensor) -> None:
            candidate = self.candidates[name]
            dim = candidate.channel_dim % output.dim()
            int8 = self.settings[name].layer(candidate, self.own)(value)
            shifts.setdefault(name, []).append(torch.ops.halfstep.mean_difference(output, int8, dim))

        products = {name: None for name in names if self.candidates[name].kind != "embedding"}
        self._visit_layers(products, self.batches[:8], visit)
        return {name: self.settings[name].packed.corrected(found) for name, found in shifts.items()}

    def _visit_layers(self, names: Mapping[str, Any], batches: list[Batch], visit: Callable[..., None]) -> None:
        """Call visit(name, input, output) at every call of these layers in the float form."""
        handles = []

        def hook_for(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
                visit(name, first_argument(args, kwargs), output)

            return hook

        try:
            handles = [
                self.form.model.get_submodule(n).register_forward_hook(hook_for(n), with_kwargs=True) for n in names
            ]
            with torch.no_grad():
                for batch in batches:
                    batch(self.form.model)
        finally:
            for handle in handles:
                handle.remove()

    def _layers(self, names: frozenset[str]) -> dict[str, nn.Module]:
        return {
            name: self.settings[name].layer(candidate, self.carrier)
            for name, candidate in self.candidates.items()
            if name in names
        }

    def _outside(self, inner: nn.Module) -> nn.Module:
        return inner if self.carrier == self.own else CastModel(inner, self.carrier, self.own)

    def _pack(self, candidate: Candidate, weight: torch.Tensor | None = None, factors: Any = None) -> Any:
        return pack(
            candidate.weight if weight is None else weight,
            candidate.bias,
            bits=self.options.bits,
            input_factors=factors,
            **candidate.geometry,
        )

    def _smooth(self, candidate: Candidate, observer: Any) -> torch.ScriptObject:
        largest = observer.channel_max().to(self.device)
        factors, inverse = torch.ops.halfstep.smoothing_factors(largest, candidate.weight)
        return self._pack(candidate, torch.ops.halfstep.scale_columns(candidate.weight, factors), inverse)

    def _smoothed_range(self, calibration: Calibration, name: str, packed: Any) -> tuple[float, int]:
        """Return scale and zero point for the smoothed input, by its largest magnitude."""
        observer = calibration.observers[name]
        # The histogram is of the input as it came; what is known of the smoothed one is its largest magnitude and sign.
        positive = observer.min() >= 0
        levels = (1 << self.options.bits) - 1 if positive else (1 << (self.options.bits - 1)) - 1
        largest = observer.channel_max().to(self.device)
        scale = torch.ops.halfstep.smoothed_scale(largest, packed.input_factors(), levels)
        return scale, -(1 << (self.options.bits - 1)) if positive else 0


def _is_worth(plain: float, smoothed: float) -> bool:
    """Return whether smoothing pays: it costs a product for each element of the input, and no int8 can come in."""
    return plain > _NOISY and smoothed < 0.5 * plain


def _listed(reasons: Mapping[str, str]) -> str:
    return "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())


def _mean(shares: torch.Tensor) -> float:
    return math.fsum(shares.tolist()) / max(1, shares.numel())
