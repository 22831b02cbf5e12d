"""The accuracy guard's proxy, where nothing says what is right: how much of a model's outputs is noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from halfstep.int8_batches import floating_tensors_of, size_of, without_labels
from halfstep.int8_bounds import ratios_at_most, share_at_most
from halfstep.int8_noise import Powers, is_finite, powers_of
from halfstep.int8_verdict import CONFIDENCE, Call, Metric, Verdict


class Agreement(Metric):
    """The share of noise in the power of the outputs: of each output over all samples, and of several the mean.

    Outputs count whose first dimension is the batch in every one; without any, a call is one sample, and all count.
    """

    kind = "agreement"
    proxy = True

    def __init__(self, batches: Sequence[Any], call: Call, model: nn.Module) -> None:
        self._call = call
        inputs: list[Any] = []
        self._references: list[list[torch.Tensor]] = []
        for batch in batches:
            rest, output = _output_of(batch, call, model)
            found = floating_tensors_of(output)
            if not any(tensor.numel() for tensor in found):
                raise TypeError(
                    f"the model's output is {type(output).__name__} without floating-point values, expected some: "
                    "pass eval_fn"
                )
            # A copy: a model may return a buffer that it writes again.
            self._references.append([tensor.detach().to("cpu", torch.float32, copy=True) for tensor in found])
            inputs.append(rest)
        sizes = [size_of(rest) for rest in inputs]
        everywhere = range(min(map(len, self._references)))
        pairs = list(zip(self._references, sizes, strict=True))
        places = [k for k in everywhere if all(_has_samples(reference[k], size) for reference, size in pairs)]
        self._by_call = not places
        self._places = places or list(everywhere)
        self._usable = [self._finite(self._powers(reference, reference)) for reference in self._references]
        self._rest_is_finite = all(is_finite(self._rest(reference)) for reference in self._references)
        self.reference_bytes = sum(each.nbytes for reference in self._references for each in reference)
        usable = sum(map(sum, self._usable))
        super().__init__(inputs, usable, sum(map(len, self._usable)) - usable)

    def judge(self, model: nn.Module) -> Verdict:
        """Return the verdict; a drop is infinite too if the outputs have other shapes than the float model's."""
        outputs: list[list[Powers]] = [[] for _ in self._places]
        with torch.no_grad():
            for rest, reference, usable in zip(self.inputs, self._references, self._usable, strict=True):
                found = floating_tensors_of(self._call(model, rest))
                if [tensor.shape for tensor in found] != [tensor.shape for tensor in reference]:
                    return self._failed("the outputs have other shapes than the float model's: pass eval_fn")
                if self._rest_is_finite and not is_finite(self._rest(found)):
                    return self._failed("the outputs hold NaN or infinity")
                for output, samples in zip(outputs, self._powers(reference, found), strict=True):
                    output += [sample for sample, is_usable in zip(samples, usable, strict=True) if is_usable]
        if not all(math.isfinite(noise) for output in outputs for noise, _ in output):
            return self._failed("the outputs hold NaN or infinity")
        share, bound = ratios_at_most(outputs, CONFIDENCE)
        if not any(noise for output in outputs for noise, _ in output):
            # t would call it certain; but outputs may be decisions, of which few samples need not show one that turns.
            return self._of_no_difference(max(bound, share_at_most(0, self.samples, CONFIDENCE)))
        return self._verdict(share, bound, "share of noise in the outputs' power, a proxy")

    def samples_needed(self, threshold: float) -> int | None:
        """Return with how many samples a model would be kept whose outputs differ by next to nothing."""
        return None if threshold < 0.0 else 2

    def _powers(self, reference: list[torch.Tensor], found: list[torch.Tensor]) -> list[list[Powers]]:
        """Return for each output that counts the powers of its samples."""
        pairs = [(reference[k], found[k]) for k in self._places]
        if not self._by_call:
            return [powers_of(a, b) for a, b in pairs]
        return [powers_of(a.reshape(1, -1), b.reshape(1, -1)) if a.numel() else [(0.0, 0.0)] for a, b in pairs]

    def _rest(self, found: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the outputs that do not count: what they become is not compared, but they must stay finite."""
        return [tensor for k, tensor in enumerate(found) if k not in self._places]

    @staticmethod
    def _finite(outputs: list[list[Powers]]) -> list[bool]:
        """Return for each sample whether all of its outputs are finite."""
        return [all(math.isfinite(power) for _, power in sample) for sample in zip(*outputs, strict=True)]


def _has_samples(tensor: torch.Tensor, size: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == size and tensor.numel() > 0


def _output_of(batch: Any, call: Call, model: nn.Module) -> tuple[Any, Any]:
    """Return what the model is called with, and its output: all of the batch, or what is left without labels."""
    rest, labels = without_labels(batch)
    if labels is None or rest is batch:
        return batch, call(model, batch)
    try:
        return batch, call(model, batch)
    except Exception:  # it takes no labels; if the fault is another one it comes again
        return rest, call(model, rest)
