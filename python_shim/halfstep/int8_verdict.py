"""What the accuracy guard's measures have in common: the verdict on a model, and what a metric must tell."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

CONFIDENCE = 0.95

Call = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Verdict:
    """What was measured of one model.

    drop: of the samples. bound: what the drop of all data is at most. samples: how many there were. kind: "score",
    "scores", "top-1" or "agreement". proxy: whether outputs were compared because nothing says what is right.
    note: what a reader must know, or "". unchanged: whether nothing differed in any sample, so that only more samples
    could lower the bound.
    """

    drop: float
    bound: float
    samples: int
    kind: str
    proxy: bool = False
    note: str = ""
    unchanged: bool = False

    def kept(self, threshold: float) -> bool:
        """Return whether the drop is at most the threshold, as far as the samples can prove it."""
        return self.bound <= threshold

    def in_words(self) -> str:
        """Return the drop and its bound, or why there are none."""
        if not math.isfinite(self.drop):
            return self.note
        return f"the drop is {self.drop:.3g}, " + (
            f"its bound {self.bound:.3g}" if math.isfinite(self.bound) else "and it has no bound"
        )


class Metric(abc.ABC):
    """Judges models by what the float model did.

    inputs: what the model is called with in each batch, labels left out. samples: by how many it judges.
    reference_bytes: memory of the CPU that is taken by what is kept of the float model. float_score: what the float
    model reaches, None where it is only compared with itself. is_share: whether a drop is a
    share of the samples or of power, 0.02 for 2 %, rather than in the units of a score. notes: what a reader must know
    of the samples.
    """

    kind: str
    proxy = False
    is_share = True
    reference_bytes = 0
    float_score: float | None = None

    def __init__(self, inputs: Sequence[Any], samples: int, left_out: int = 0) -> None:
        """left_out: samples for which the float model gives NaN or infinity; ValueError if there are no others."""
        self.inputs = list(inputs)
        self.samples = samples
        self.notes: list[str] = []
        if left_out:
            said = f"{left_out} of {samples + left_out} samples to judge by"
            if not samples:
                raise ValueError(
                    f"the float model's outputs hold NaN or infinity for {said}, expected some without, or an eval_fn"
                )
            self.notes.append(f"{said} are left out: the float model's outputs hold NaN or infinity for them")

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
        return said + (f"{needed} samples are needed" if needed else self._why_never())

    def of_itself(self) -> Verdict:
        """Return the verdict on the float model itself: it needs no samples."""
        return self._verdict(0.0, 0.0, "the float model itself")

    def _why_never(self) -> str:
        return "no number of samples can"

    def _verdict(self, drop: float, bound: float, note: str = "", unchanged: bool = False) -> Verdict:
        return Verdict(drop, bound, self.samples, self.kind, self.proxy, note, unchanged)

    def _failed(self, note: str) -> Verdict:
        return self._verdict(math.inf, math.inf, note)

    def _of_no_difference(self, bound: float) -> Verdict:
        """Return the verdict on a model of which no sample differs: there may be ones that do."""
        said = f"nothing differs in {self.samples} samples, which proves a bound of {bound:.3g}: it takes more samples"
        return self._verdict(0.0, bound, said, unchanged=True)
