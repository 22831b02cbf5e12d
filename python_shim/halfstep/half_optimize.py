"""From a float model to one in float16 or bfloat16: weights are cast, the accuracy guard decides, both are timed."""

from __future__ import annotations

import torch
from torch import nn

from halfstep.calibration_data import Batch, calls_naming
from halfstep.half_model import float_dtype, half_model, name_of
from halfstep.int8_judge import tell
from halfstep.int8_metric import choose_metric
from halfstep.int8_model import weight_bytes
from halfstep.int8_optimize import Options, not_strict
from halfstep.int8_report import Report
from halfstep.int8_speed import calls_of, loses, time_briefly, times_of

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def optimize_half(
    reference: nn.Module, guard: list[Batch], device: torch.device, options: Options, report: Report
) -> nn.Module:
    """Return the model in the report's target if the guard is content, else `reference`, which is not changed.

    ValueError if options.strict and the model does not come back in the target.
    """
    target, own = report.target, name_of(float_dtype(reference))
    model = half_model(reference, HALVES[target])
    batches = [batch.on(device) for batch in guard]
    metric = choose_metric(options.eval_fn, batches, calls_naming(reference), reference)
    verdict = metric.of_itself() if model is reference else metric.judge(model)
    tell(report, metric, reference, guard)
    report.evaluations = report.budget = 1
    report.everywhere_was(verdict)
    report.kept = True
    if verdict.kept(options.threshold):
        report.result = report.carrier = target
        report.drop, report.bound = verdict.drop, None if metric.kind == "score" else verdict.bound
        if options.speed_guard and model is not reference:
            _compare_times(reference, model, batches[0], device, report)
    else:
        report.result = report.carrier = own
        report.drop = report.bound = 0.0  # of what came back
        said = metric.shortage(options.threshold) or (verdict.note if verdict.unchanged else verdict.in_words())
        failed = f"{target} does not keep the drop at {options.threshold:g} or less for certain ({said})"
        if options.strict:
            raise ValueError(not_strict({"": failed}, own))
        report.warn(f"{failed}; the float model came back")
        model = reference
    report.unchanged = model is reference
    report.bytes = {own: weight_bytes(reference), report.result: weight_bytes(model)}
    return model


def _compare_times(reference: nn.Module, model: nn.Module, batch: Batch, device: torch.device, report: Report) -> None:
    """Time both on a batch, and warn if the half one is slower: it was asked for, so it comes back all the same."""
    own = name_of(float_dtype(reference))
    theirs, mine = time_briefly(calls_of([reference, model], batch), device)
    report.milliseconds = {own: theirs.median, report.target: mine.median}
    if loses(mine, theirs):
        report.warn(
            f"{report.target} takes {times_of(mine, theirs)} times {own}'s time on this device ({device}): its weights "
            "are smaller, its calls slower"
        )
