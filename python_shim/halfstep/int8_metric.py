"""How much worse a model has become, and what a sample proves of that: the measures of the accuracy guard.

A drop is what the float model has and the other lacks; its bound is one-sided, of 95 % confidence. That of top-1, and
of scores that say right or wrong, is exact. That of other scores and of agreement is by Student's t, which promises it
for normal values alone: of skewed ones it holds less often (see mean_at_most).

Both are for the one model that is judged. A set of layers that was searched for on the same samples had several
chances, which the bound does not know of.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfstep._library import load_library
from halfstep.int8_batches import floating_tensors_of, size_of, tensors_of, without_labels
from halfstep.int8_bounds import drop_at_most, mean_at_most, samples_for, share_at_most

load_library()

CONFIDENCE = 0.95

Call = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Verdict:
    """What was measured of one model.

    drop: of the samples. bound: what the drop of all data is at most. samples: how many there were. kind: "score",
    "scores", "top-1" or "agreement". proxy: whether outputs were compared because nothing says what is right.
    note: what a reader must know, or "".
    """

    drop: float
    bound: float
    samples: int
    kind: str
    proxy: bool = False
    note: str = ""

    def kept(self, threshold: float) -> bool:
        """Return whether the drop is at most the threshold, as far as the samples can prove it."""
        return self.bound <= threshold


class Metric(abc.ABC):
    """Judges models by what the float model did.

    inputs: what the model is called with in each batch, labels left out. reference_bytes: memory of the CPU that is
    taken by what is kept of the float model.
    """

    kind: str
    proxy = False
    reference_bytes = 0

    def __init__(self, inputs: Sequence[Any], samples: int) -> None:
        self.inputs = list(inputs)
        self.samples = samples

    @abc.abstractmethod
    def judge(self, model: nn.Module) -> Verdict:
        """Return the verdict on a model. One whose results are NaN or infinite has an infinite drop."""

    @abc.abstractmethod
    def samples_needed(self, threshold: float) -> int | None:
        """Return with how many samples a model without any drop would be kept, None if with no number."""

    def shortage(self, threshold: float) -> str:
        """Return "", or why not even a model without any drop would be kept with these samples."""
        needed = self.samples_needed(threshold)
        if needed is not None and needed <= self.samples:
            return ""
        said = f"{self.kind} on {self.samples} samples cannot prove a drop of at most {threshold:g}: "
        return said + (f"{needed} samples are needed" if needed else "no number of samples can")

    def _verdict(self, drop: float, bound: float, note: str = "") -> Verdict:
        return Verdict(drop, bound, self.samples, self.kind, self.proxy, note)

    def _failed(self, note: str) -> Verdict:
        return self._verdict(math.inf, math.inf, note)


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
        return metric or _Agreement(batches, call, model)


class _Scores(Metric):
    """The user's own measure."""

    def __init__(self, eval_fn: Callable[[nn.Module], Any], batches: Sequence[Any], model: nn.Module):
        self._eval_fn = eval_fn
        self._reference, single = self._run(model)
        if not all(map(math.isfinite, self._reference)):
            raise ValueError("eval_fn gives NaN or infinity for the float model, expected finite numbers")
        self.kind = "score" if single else "scores"
        super().__init__([without_labels(batch)[0] for batch in batches], len(self._reference))

    def _run(self, model: nn.Module) -> tuple[list[float], bool]:
        with torch.no_grad():
            value = self._eval_fn(model)
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
        low, high = min(*self._reference, *scores), max(*self._reference, *scores)
        if {low, high}.issuperset({*self._reference, *scores}):
            size = high - low
            drop, bound = drop_at_most(drops.count(size), drops.count(-size), self.samples, CONFIDENCE)
            return self._verdict(size * drop, size * bound)
        drop, bound = mean_at_most(drops, CONFIDENCE)
        if not any(drops):  # t would call no difference among few samples certain
            bound = (high - low) * share_at_most(0, self.samples, CONFIDENCE)
        return self._verdict(drop, bound)

    def _counts(self) -> bool:
        """Return whether scores have two values, as right and wrong have: their bound is that of shares."""
        return len(set(self._reference)) <= 2

    def samples_needed(self, threshold: float) -> int | None:
        if self.kind == "scores" and self._counts():
            size = max(self._reference) - min(self._reference)
            return samples_for(threshold / (size or 1.0), CONFIDENCE)
        if threshold < 0.0:
            return None
        return 1 if self.kind == "score" else 2


class _Top1(Metric):
    """How many samples are no longer classified as their labels say, less those that now are."""

    kind = "top-1"

    def __init__(
        self,
        inputs: Sequence[Any],
        call: Call,
        labels: list[torch.Tensor],
        right: list[list[float]],
        finite: list[bool],
    ) -> None:
        super().__init__(inputs, sum(map(len, right)))
        self._call, self._labels, self._right, self._finite = call, labels, right, finite

    @classmethod
    def of(cls, batches: Sequence[Any], call: Call, model: nn.Module) -> _Top1 | None:
        """Return the metric, None for batches without labels or a model whose outputs are no logits for them."""
        inputs, labels, right, finite = [], [], [], []
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
            right.append(torch.ops.halfstep.top1_correct(logits, label).tolist())
            finite.append(_is_finite([logits]))
        return cls(inputs, call, labels, right, finite)

    def judge(self, model: nn.Module) -> Verdict:
        lost = gained = 0
        with torch.no_grad():
            for rest, label, before, finite in zip(self.inputs, self._labels, self._right, self._finite, strict=True):
                logits = _logits_of(self._call(model, rest))
                if logits is None:
                    raise ValueError("the model's output is no longer [batch, classes]")
                # Classes that the float model masks by an infinity may stay so.
                if finite and not _is_finite([logits]):
                    return self._failed("the outputs hold NaN or infinity")
                after = torch.ops.halfstep.top1_correct(logits, label).tolist()
                lost += sum(b > a for b, a in zip(before, after, strict=True))
                gained += sum(b < a for b, a in zip(before, after, strict=True))
        note = f"{lost} of {self.samples} samples lost, {gained} gained"
        return self._verdict(*drop_at_most(lost, gained, self.samples, CONFIDENCE), note)

    def samples_needed(self, threshold: float) -> int | None:
        return samples_for(threshold, CONFIDENCE)


class _Agreement(Metric):
    """The share of noise in the power of the outputs, for each sample the mean of the outputs that have samples."""

    kind = "agreement"
    proxy = True

    def __init__(self, batches: Sequence[Any], call: Call, model: nn.Module) -> None:
        self._call = call
        inputs, self._references, self._finite = [], [], True
        for batch in batches:
            rest, output = _output_of(batch, call, model)
            found = floating_tensors_of(output)
            if not any(tensor.numel() for tensor in found):
                raise TypeError(
                    f"the model's output is {type(output).__name__} without floating-point values, expected some: "
                    "pass eval_fn"
                )
            self._finite = self._finite and _is_finite(found)
            # A copy: a model may return a buffer that it writes again.
            self._references.append([tensor.detach().to("cpu", torch.float32, copy=True) for tensor in found])
            inputs.append(rest)
        self._sizes = [
            size if any(_has_samples(tensor, size) for tensor in reference) else 1
            for size, reference in zip(map(size_of, inputs), self._references, strict=True)
        ]
        self.reference_bytes = sum(each.nbytes for reference in self._references for each in reference)
        super().__init__(inputs, sum(self._sizes))

    def judge(self, model: nn.Module) -> Verdict:
        if not self._finite:
            return self._failed("the float model's own outputs hold NaN or infinity: pass eval_fn")
        noises: list[float] = []
        with torch.no_grad():
            for rest, reference, size in zip(self.inputs, self._references, self._sizes, strict=True):
                found = floating_tensors_of(self._call(model, rest))
                if [tensor.shape for tensor in found] != [tensor.shape for tensor in reference]:
                    return self._failed("the outputs have other shapes than the float model's: pass eval_fn")
                if not _is_finite(found):
                    return self._failed("the outputs hold NaN or infinity")
                noises += _noises(reference, found, size)
        return self._verdict(*mean_at_most(noises, CONFIDENCE), "share of noise in the outputs' power, a proxy")

    def samples_needed(self, threshold: float) -> int | None:
        return None if threshold < 0.0 else 2


def _has_samples(tensor: torch.Tensor, size: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == size and tensor.numel() > 0


def _noises(reference: list[torch.Tensor], found: list[torch.Tensor], size: int) -> list[float]:
    """Return the share of noise for each of `size` samples. Without outputs [size, ...] the call is one sample."""
    pairs = [(a, b) for a, b in zip(reference, found, strict=True) if _has_samples(a, size)]
    if not pairs:
        pairs = [(a.reshape(1, -1), b.reshape(1, -1)) for a, b in zip(reference, found, strict=True) if a.numel()]
    shares = [torch.ops.halfstep.output_noise(a, b).tolist() for a, b in pairs]
    return [math.fsum(sample) / len(shares) for sample in zip(*shares, strict=True)]


def _output_of(batch: Any, call: Call, model: nn.Module) -> tuple[Any, Any]:
    """Return what the model is called with, and its output: all of the batch, or what is left without labels."""
    rest, labels = without_labels(batch)
    if labels is None or rest is batch:
        return batch, call(model, batch)
    try:
        return batch, call(model, batch)
    except Exception:  # it takes no labels; if the fault is another one it comes again
        return rest, call(model, rest)


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


def _is_finite(tensors: list[torch.Tensor]) -> bool:
    """Return whether all values are finite (waits for the device)."""
    held = [tensor.detach() for tensor in tensors if tensor.numel()]
    for tensor in held:
        found = torch.zeros((), dtype=torch.float32, device=tensor.device)
        norm = torch.empty((), dtype=torch.float32, device=tensor.device)
        one = torch.full((), 1.0, dtype=torch.float32, device=tensor.device)
        torch.ops.halfstep.check_gradients_([tensor], one, found, norm)
        if found.item():
            return False
    return True
