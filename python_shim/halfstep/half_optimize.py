"""From a float model to one in float16 or bfloat16: weights are cast, the accuracy guard decides, both are timed."""

from __future__ import annotations

import copy

import torch
from torch import nn

from halfstep.calibration_data import Batch, calls_naming
from halfstep.half_layers import cast_layers, differs_in_attention
from halfstep.half_model import CastModel, float_dtype, half_model, name_of
from halfstep.int8_attention import replace_attention
from halfstep.int8_judge import tell
from halfstep.int8_metric import choose_metric
from halfstep.int8_model import check_globs_name_layers, not_selected, weight_bytes
from halfstep.int8_optimize import Options, not_strict
from halfstep.int8_report import Report, grouped
from halfstep.int8_speed import calls_of, loses, time_briefly, times_of

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_PROBED = 32  # samples on which a model in two types is tried out


def optimize_half(
    reference: nn.Module, guard: list[Batch], device: torch.device, options: Options, report: Report
) -> nn.Module:
    """Return the model in the report's target if the guard is content, else `reference`, which is not changed.

    ValueError if options.strict and the model does not come back in the target.
    """
    target, own = report.target, name_of(float_dtype(reference))
    batches = [batch.on(device) for batch in guard]
    model = _half(reference, batches[0], options, report)
    metric = choose_metric(options.eval_fn, batches, calls_naming(reference), reference)
    verdict = metric.of_itself() if model is reference else metric.judge(model)
    tell(report, metric, reference, guard)
    report.evaluations = report.budget = 1
    report.everywhere_was(verdict)
    report.kept = True
    if verdict.kept(options.threshold):
        report.result = own if model is reference else target
        report.carrier = name_of(model.dtype) if isinstance(model, CastModel) else own
        report.drop, report.bound = verdict.drop, None if metric.kind == "score" else verdict.bound
        if options.speed_guard and model is not reference:
            _compare_times(reference, model, batches[0], device, report)
    else:
        report.result = report.carrier = own
        report.drop, report.bound, report.attention = 0.0, 0.0, []  # of what came back
        said = metric.shortage(options.threshold) or (verdict.note if verdict.unchanged else verdict.in_words())
        failed = f"{target} does not keep the drop at {options.threshold:g} or less for certain ({said})"
        if options.strict:
            raise ValueError(not_strict({"": failed}, own))
        report.warn(f"{failed}; the float model came back")
        model = reference
    report.unchanged = model is reference
    report.bytes = {own: weight_bytes(reference), report.result: weight_bytes(model)}
    return model


def _half(reference: nn.Module, batch: Batch, options: Options, report: Report) -> nn.Module:
    """Return a copy in the target but for what the user left out, called as `reference` is; itself if nothing is cast.

    ValueError if include and exclude part what cannot be parted, or leave something out and options.strict.
    """
    dtype, own = HALVES[report.target], float_dtype(reference)
    include, exclude = options.include, options.exclude
    if not include and not exclude:
        return half_model(reference, dtype)
    if isinstance(reference, torch.jit.ScriptModule):
        raise ValueError(
            f"include and exclude are given with target_precision={report.target!r} and a model of TorchScript, whose "
            "layers cannot be cast one by one: expected neither of them, or the model before it was scripted"
        )
    check_globs_name_layers(include, exclude, (name for name, _ in reference.named_modules(remove_duplicate=False)))
    if own == dtype:
        return reference

    def type_of(name: str) -> torch.dtype:
        return own if not_selected(name, include, exclude) else dtype

    model = copy.deepcopy(reference)
    if differs_in_attention(model, type_of):
        model, report.attention, _ = replace_attention(model)
    floating = [name for name, module in model.named_modules() if _has_floats(module)]
    report.left = {name: why for name in floating if (why := not_selected(name, include, exclude))}
    if options.strict and report.left:
        raise ValueError(not_strict(report.left, name_of(own)))
    if len(report.left) == len(floating):
        report.attention = []
        report.warn(f"no layer of the model was left to make {report.target} ({'; '.join(grouped(report.left))})")
        return reference
    cast_layers(model, type_of, own)
    model = model if type_of("") == own else CastModel(model, dtype, own)
    try:
        with torch.no_grad():
            batch.part(0, _PROBED)(model)
    except Exception as error:  # the model's own code may take a layer's type for that of all
        raise ValueError(
            f"the model does not run in {report.target} without the layers that include and exclude leave in "
            f"{name_of(own)}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from error
    return model


def _has_floats(module: nn.Module) -> bool:
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.is_floating_point() for tensor in tensors)


def _compare_times(reference: nn.Module, model: nn.Module, batch: Batch, device: torch.device, report: Report) -> None:
    """Time both on a batch, and warn if the half one is slower: it was asked for, so it comes back all the same."""
    own = name_of(float_dtype(reference))
    theirs, mine = time_briefly(calls_of([reference, model], batch), device)
    report.milliseconds = {own: theirs.median, report.target: mine.median}
    report.timed_samples = batch.size
    if loses(mine, theirs):
        report.warn(
            f"{report.target} takes {times_of(mine, theirs)} times {own}'s time on this device ({device}): its weights "
            "are smaller, its calls slower"
        )
