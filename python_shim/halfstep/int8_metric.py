"""How much worse a model has become, and what a sample proves of that: the measures of the accuracy guard.

A drop is what the float model has and the other lacks; its bound is one-sided, of 95 % confidence. That of top-1, and
of scores that say right or wrong, is exact. That of other scores and of agreement is by Student's t, which promises it
for normal values alone: of skewed ones it holds less often (see mean_at_most).

Both are for the one model that is judged. A set of layers that was searched for on the same samples had several
chances, which the bound does not know of.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from halfstep.int8_agreement import Agreement
from halfstep.int8_batches import tensors_of, without_labels
from halfstep.int8_bounds import drop_at_most, mean_at_most, samples_for, share_at_most
from halfstep.int8_graph import taken_by
from halfstep.int8_lent import devices_of, lent, same_random_numbers
from halfstep.int8_noise import powers_of
from halfstep.int8_verdict import CONFIDENCE, Call, Metric, Verdict

__all__ = ["CONFIDENCE", "Call", "Metric", "Verdict", "choose_metric"]

_RIGHT_AND_WRONG = frozenset((0.0, 1.0))
_FEWEST = 5  # scores of samples: fewer are taken for several measures, such as (accuracy, f1)


def choose_metric(
    eval_fn: Callable[[nn.Module], Any] | None,
    batches: Sequence[Any],
    call: Call,
    model: nn.Module,
) -> Metric:
    """Return the metric for a model, which is run once, without gradients, to see what it does.

    eval_fn: larger is better; one number, or one score for each sample, always in the same order. Without it: top-1 if
    every batch ends in integer labels [batch] and the model gives [batch, classes] for the rest; else the agreement of
    its floating-point outputs. call: call(model, inputs) is the output for a batch; labels are not passed to it.
    ValueError or TypeError for a model or an eval_fn by whose results nothing can be judged.
    """
    if eval_fn is not None:
        return _Scores(eval_fn, batches, model)
    if not batches:
        raise ValueError("batches is empty, expected at least one")
    with torch.no_grad():
        metric = _Top1.of(batches, call, model)
        return metric or Agreement(batches, call, model)


class _Scores(Metric):
    """The user's own measure. It is given copies, and each time the same random numbers."""

    def __init__(self, eval_fn: Callable[[nn.Module], Any], batches: Sequence[Any], model: nn.Module):
        self._eval_fn = eval_fn
        self._reference, single = self._run(model)
        if not all(map(math.isfinite, self._reference)):
            raise ValueError("eval_fn gives NaN or infinity for the float model, expected finite numbers")
        self.kind = "score" if single else "scores"
        distinct = set(self._reference)
        self.is_share = not single and distinct <= _RIGHT_AND_WRONG
        if not single and not self.is_share and len(self._reference) < _FEWEST:
            raise ValueError(
                f"eval_fn returned {len(self._reference)} numbers, expected one, or one for each of {_FEWEST} samples "
                "or more: of several measures return one"
            )
        # By how much one sample can change where scores have two values, as right and wrong have; None if not known.
        self._size = 1.0 if self.is_share else max(distinct) - min(distinct) or None
        self._two_valued = len(distinct) <= 2
        self.float_score = statistics.fmean(self._reference)
        super().__init__([without_labels(batch)[0] for batch in batches], len(self._reference))

    def _run(self, model: nn.Module) -> tuple[list[float], bool]:
        with torch.no_grad(), same_random_numbers(devices_of(model)), lent(model) as given:
            value = self._value(given)
        try:
            values = value.tolist() if hasattr(value, "tolist") else value
            single = not isinstance(values, Sequence)
            scores = [float(each) for each in ([values] if single else values)]
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"eval_fn returned {type(value).__name__}, expected a number or one number for each sample"
            ) from error
        if not scores:
            raise ValueError("eval_fn returned no score, expected a number or one number for each sample")
        return scores, single or len(scores) == 1

    def _value(self, model: nn.Module) -> Any:
        """Return what eval_fn gives. RuntimeError where it fails on a copy, after it did not on the model itself."""
        try:
            return self._eval_fn(model)
        except Exception as error:
            if not hasattr(self, "_reference"):
                raise
            taken = taken_by(model)
            takes = "" if taken is None else f", which takes the arguments ({', '.join(taken)}) of the batches alone"
            said = f"{type(error).__name__}: {error}"
            raise RuntimeError(
                f"eval_fn works on the float model but fails on the optimized copy, which it was given{takes}: {said}"
            ) from error

    def judge(self, model: nn.Module) -> Verdict:
        scores, _ = self._run(model)
        if len(scores) != self.samples:
            raise ValueError(f"eval_fn returned {len(scores)} scores, expected {self.samples} as for the float model")
        if not all(map(math.isfinite, scores)):
            return self._failed("eval_fn gives NaN or infinity")
        drops = [before - after for before, after in zip(self._reference, scores, strict=True)]
        if self.kind == "score":
            note = "eval_fn gives one number, which has no bound: let it return one score for each sample"
            return self._verdict(drops[0], drops[0], note)
        values = {*self._reference, *scores}
        size = 1.0 if values <= _RIGHT_AND_WRONG else max(values) - min(values)
        if not size:
            return self._verdict(0.0, math.inf, self._why_never())
        if len(values) <= 2:
            drop, bound = drop_at_most(drops.count(size), drops.count(-size), self.samples, CONFIDENCE)
            return self._verdict(size * drop, size * bound)
        if not any(drops):  # t would call no difference among few samples certain
            return self._of_no_difference(size * share_at_most(0, self.samples, CONFIDENCE))
        return self._verdict(*mean_at_most(drops, CONFIDENCE))

    def samples_needed(self, threshold: float) -> int | None:
        if self.kind == "scores" and self._two_valued:
            return self._size and samples_for(threshold / self._size, CONFIDENCE)
        if threshold < 0.0:
            return None
        return 1 if self.kind == "score" else 2

    def _why_never(self) -> str:
        if self._size is None:
            return f"all scores are {self._reference[0]:g}, so how much a sample can lose is not known"
        return super()._why_never()


class _Top1(Metric):
    """How many samples are no longer classified as their labels say, less those that now are.

    A sample with a NaN among the float model's logits is left out. Classes that it masks by an infinity may stay so.
    """

    kind = "top-1"

    def __init__(
        self, inputs: Sequence[Any], call: Call, labels: list[torch.Tensor], answers: list[list[tuple[float, float]]]
    ) -> None:
        """answers: for each sample of each batch 1 if it is right, and the power of its logits."""
        powers = [power for batch in answers for _, power in batch]
        left_out = sum(map(math.isnan, powers))
        super().__init__(inputs, len(powers) - left_out, left_out)
        self._call, self._labels, self._answers = call, labels, answers
        right = sum(is_right for batch in answers for is_right, power in batch if not math.isnan(power))
        self.float_score = right / self.samples

    @classmethod
    def of(cls, batches: Sequence[Any], call: Call, model: nn.Module) -> _Top1 | None:
        """Return the metric, None for batches without labels or a model whose outputs are no logits for them."""
        inputs, labels, answers = [], [], []
        pairs = [without_labels(batch) for batch in batches]
        if any(label is None for _, label in pairs):
            return None
        for rest, label in pairs:
            try:
                logits = _logits_of(call(model, rest))
            except Exception:
                # What looks like labels may be an argument. If not, the metric that is tried next meets this again.
                return None
            if logits is None or logits.shape[0] != label.shape[0]:
                return None
            if not all(0 <= each < logits.shape[1] for each in label.tolist()):
                return None
            inputs.append(rest)
            labels.append(label)
            answers.append(_answers(logits, label))
        return cls(inputs, call, labels, answers)

    def judge(self, model: nn.Module) -> Verdict:
        lost = gained = 0
        with torch.no_grad():
            for rest, label, answers in zip(self.inputs, self._labels, self._answers, strict=True):
                logits = _logits_of(self._call(model, rest))
                if logits is None:
                    raise ValueError("the model's output is no longer [batch, classes]")
                for (before, power), (after, now) in zip(answers, _answers(logits, label), strict=True):
                    if math.isnan(power):
                        continue
                    if math.isnan(now) or (math.isinf(now) and not math.isinf(power)):
                        return self._failed("the outputs hold NaN or infinity")
                    lost += before > after
                    gained += before < after
        note = f"{lost} of {self.samples} samples lost, {gained} gained"
        return self._verdict(*drop_at_most(lost, gained, self.samples, CONFIDENCE), note)

    def samples_needed(self, threshold: float) -> int | None:
        return samples_for(threshold, CONFIDENCE)


def _answers(logits: torch.Tensor, label: torch.Tensor) -> list[tuple[float, float]]:
    """Return for each sample 1 if its largest logit is the label's, and the power of its logits."""
    right = torch.ops.halfstep.top1_correct(logits, label).tolist()
    return [(each, power) for each, (_, power) in zip(right, powers_of(logits, logits), strict=True)]


def _logits_of(output: Any) -> torch.Tensor | None:
    """Return the output [batch, classes]: itself, its "logits", or the only or first of several. None if it is not."""
    if isinstance(output, Mapping) and "logits" in output:
        logits = output["logits"]
    elif not isinstance(output, torch.Tensor) and hasattr(output, "logits"):
        logits = output.logits
    else:
        logits = next(iter(tensors_of(output)), None)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        return None
    return logits
