"""What InferencePrecisionOptimizer has done, and why: as data and as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfstep.int8_verdict import Verdict

_NAMED = 8  # names that stand in one line at most


@dataclass
class RegionReport:
    """A chain of layers between which values stay int8; a layer by itself is one too."""

    layers: list[str]
    state: str  # "int8" or "float"
    why: str = ""
    kernel: str = ""
    error: float | None = None  # share of noise in the power of its output, on float inputs
    milliseconds: dict[str, float] = field(default_factory=dict)  # by "float32", "bfloat16", "float16", "int8"
    fused: list[str] = field(default_factory=list)
    calibrator: str = ""
    smoothed: bool = False
    timed: list[str] = field(default_factory=list)  # the layers of the region whose times these are, if they are more


@dataclass
class Report:
    """Everything that is known of one optimization. `as_dict()` gives plain values."""

    target: str
    device: str
    result: str = "float"  # what came back: "int8", "bfloat16", "float16" or the model's own type
    carrier: str = ""  # the type of what is not int8
    arguments: list[str] | None = None  # that a traced model takes; None: all that the model's forward has
    threshold: float = 0.0
    metric: str = ""
    proxy: bool = False
    is_share: bool = True  # whether drop, bound and threshold are shares, 0.02 for 2 %, or in the units of a score
    drop: float | None = None
    bound: float | None = None
    float_score: float | None = None  # what the metric gives for the float model, if that is a number
    judged: int = 0  # samples that the metric judges by
    kept: bool = False
    unchanged: bool = False  # whether the float model itself came back
    everywhere: dict[str, float] = field(default_factory=dict)  # "drop" and "bound" with all layers changed
    everywhere_failed: str = ""  # why these are infinite: NaN, infinity or other shapes
    samples: dict[str, int] = field(default_factory=dict)
    evaluations: int = 0
    budget: int = 0
    calibrator: str = ""
    regions: list[RegionReport] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)  # layers and weights that never were candidates, and why
    given_back: dict[str, str] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)  # taken apart, so that its products are layers
    graph: str = ""
    bias_correction: str = ""
    nonfinite: dict[str, int] = field(default_factory=dict)  # NaN and infinities in calibration, by layer
    milliseconds: dict[str, float] = field(default_factory=dict)  # of the whole model, one batch
    timed_samples: int = 0  # of that batch, by which regions are timed too
    halves: str = ""  # which half type regions are timed in, where there are two
    bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # those of the notes that are raised as warnings too

    def warn(self, note: str) -> None:
        """Add a note that nobody should miss: optimize_for_inference() warns of it."""
        self.notes.append(note)
        self.warnings.append(note)

    def everywhere_was(self, verdict: Verdict) -> None:
        """Note the verdict on the model with all layers changed."""
        self.everywhere = {"drop": verdict.drop, "bound": verdict.bound}
        self.everywhere_failed = "" if math.isfinite(verdict.drop) else verdict.note

    @property
    def score(self) -> float | None:
        """What the metric gives for the result: the float model's less the drop."""
        return None if self.float_score is None or self.drop is None else self.float_score - self.drop

    def as_dict(self) -> dict[str, Any]:
        """Return the report as nested dicts and lists of plain values."""
        return {**dataclasses.asdict(self), "score": self.score}

    def __str__(self) -> str:
        lines = [f"{self.target} on {self.device}: the result is {self.result}"]
        if self.result == "int8" and self.carrier:
            lines[0] += f", and {self.carrier} where it is not int8"
        if self.drop is not None:
            word = "a proxy: " if self.proxy else ""
            kept = "kept" if self.kept else "NOT kept"
            bound = "no bound (one number)" if self.bound is None else f"95 % bound {self._amount(self.bound)}"
            said = f"drop {self._amount(self.drop)}, {bound}, threshold {self._amount(self.threshold)}: {kept}"
            if self.unchanged:
                said = "no drop (the float model, unchanged)"
            if self.score is not None:
                scores = dict.fromkeys(map(self._level, (self.float_score, self.score)))
                said = f"{' -> '.join(scores)}, {said}"
            judged = f" of {self.judged} samples" if self.judged > 1 else ""
            lines.append(f"accuracy ({word}{self.metric}{judged}): {said}")
        if self.everywhere and self.everywhere["bound"] > self.threshold:
            said = f"drop {self._amount(self.everywhere['drop'])}, bound {self._amount(self.everywhere['bound'])}"
            lines.append(f"{self.target} in every layer: {self.everywhere_failed or said}")
        if self.milliseconds:
            batch = f", batches of {self.timed_samples}" if self.timed_samples else ""
            lines.append(f"whole model{batch}: {_times(self.milliseconds)}")
        if self.bytes:
            lines.append("weights: " + ", ".join(f"{name} {size / 1e6:.3g} MB" for name, size in self.bytes.items()))
        if shares := self._shares():
            lines.append(shares)
        lines.extend(text for text in (self.halves, self.graph, self.bias_correction) if text)
        if self.arguments is not None:
            lines.append(f"it takes the arguments ({', '.join(self.arguments)}); others keep their defaults")
        if self.attention:
            lines.append(f"attention taken apart into layers: {_first([_shown(name) for name in self.attention])}")
        if self.folded:
            lines.append(f"batch norms folded: {_first(self.folded)}")
        if self.calibrator:
            lines.append(f"calibrator {self.calibrator}, evaluations: {self.evaluations} of at most {self.budget}")
        if self.nonfinite:
            counts = [f"{_shown(name)} ({count})" for name, count in self.nonfinite.items()]
            lines.append(
                f"calibration: {sum(self.nonfinite.values())} values of layers' inputs were NaN or infinite, and "
                f"were left out: {_first(counts)}"
            )
        reasons = [region.why for region in self.regions if region.state == "float"]
        shared = {why for why in reasons if why and reasons.count(why) > 1}
        lines.extend(_region(region, shared) for region in self.regions)
        lines.extend(
            f"  {line}"
            for why in dict.fromkeys(reasons)
            if why in shared
            for line in grouped(
                {name: f"float, {why}" for region in self.regions if region.why == why for name in region.layers}
            )
        )
        state = "float" if self.target == "int8" else f"not {self.target}"
        lines.extend(f"  {line}" for line in grouped({name: f"{state}, {why}" for name, why in self.left.items()}))
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)

    def _shares(self) -> str:
        """Return what the result takes of the float model's time and bytes, as far as they are known."""
        own = next(iter(self.bytes), "")
        parts = [
            f"{values[self.result] / values[own]:.2g} of its {what}"
            for what, values in (("time", self.milliseconds), ("bytes", self.bytes))
            if values.get(own) and self.result != own and self.result in values
        ]
        return f"compared with {own}: {', '.join(parts)}" if parts else ""

    def _amount(self, drop: float) -> str:
        """Return a drop, a bound or a threshold in its units."""
        if math.isinf(drop):
            return "unknown"
        return _percent(drop) if self.is_share else f"{drop:.3g}"

    def _level(self, score: float) -> str:
        """Return a score in its units, with digits for small drops."""
        return f"{100 * score:.4g} %" if self.is_share else f"{score:.5g}"


def grouped(reasons: Mapping[str, str], what: str = "layers", most: int = _NAMED) -> list[str]:
    """Return a line for each reason: "name: reason", or "12 layers: reason (names)", in the order of the first names.

    what: the names' plural. most: how many names stand there; the others are counted.
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(_shown(name))
    return [
        f"{found[0]}: {reason}" if len(found) == 1 else f"{len(found)} {what}: {reason} ({_first(found, most)})"
        for reason, found in names.items()
    ]


def _shown(name: str) -> str:
    """Return a layer's name; that of a model that is itself the layer is empty."""
    return name or "the model itself"


def _first(texts: Sequence[str], most: int = _NAMED) -> str:
    shown = ", ".join(texts[:most])
    return shown if len(texts) <= most else f"{shown} and {len(texts) - most} more"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.3g} %"


def _times(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g} ms" for name, value in milliseconds.items())


def _region(region: RegionReport, shared: set[str]) -> str:
    """Return the region's line, without a reason that is `shared` and has a line of its own."""
    parts = [region.state + (f" ({region.kernel})" if region.kernel else "")]
    if region.error is not None:
        parts.append(f"noise {_percent(region.error)}")
    if region.milliseconds:
        parts.append(
            _times(region.milliseconds) + (f" in a region of {len(region.timed)} layers" if region.timed else "")
        )
    if region.fused:
        parts.append("with " + ", ".join(region.fused))
    if region.smoothed:
        parts.append("smoothed")
    if region.why and not (region.state == "float" and region.why in shared):
        parts.append(region.why)
    return f"  {', '.join(map(_shown, region.layers))}: {'; '.join(parts)}"
