"""What InferencePrecisionOptimizer has done, and why: as data and as text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


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


@dataclass
class Report:
    """Everything that is known of one optimization. `as_dict()` gives plain values."""

    target: str
    device: str
    result: str = "float"  # what came back: "int8", "bfloat16", "float16" or the model's own type
    carrier: str = ""  # the type of what is not int8
    threshold: float = 0.0
    metric: str = ""
    proxy: bool = False
    drop: float | None = None
    bound: float | None = None
    kept: bool = False
    everywhere: dict[str, float] = field(default_factory=dict)  # "drop" and "bound" with all layers changed
    samples: dict[str, int] = field(default_factory=dict)
    evaluations: int = 0
    budget: int = 0
    calibrator: str = ""
    regions: list[RegionReport] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)  # layers that never were candidates, and why
    given_back: dict[str, str] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    graph: str = ""
    bias_correction: str = ""
    milliseconds: dict[str, float] = field(default_factory=dict)  # of the whole model, one batch
    bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as nested dicts and lists of plain values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.target} on {self.device}: the result is {self.result}"]
        if self.drop is not None:
            word = "a proxy: " if self.proxy else ""
            kept = "kept" if self.kept else "NOT kept"
            bound = "no bound (one number)" if self.bound is None else f"95 % bound {_percent(self.bound)}"
            lines.append(
                f"accuracy ({word}{self.metric}): drop {_percent(self.drop)}, {bound}, "
                f"threshold {_percent(self.threshold)}: {kept}"
            )
        if self.everywhere and self.everywhere["bound"] > self.threshold:
            lines.append(
                f"{self.target} in every layer: drop {_percent(self.everywhere['drop'])}, "
                f"bound {_percent(self.everywhere['bound'])}"
            )
        if self.milliseconds:
            lines.append("whole model: " + _times(self.milliseconds))
        if self.bytes:
            lines.append("weights: " + ", ".join(f"{name} {size / 1e6:.3g} MB" for name, size in self.bytes.items()))
        for text in (self.graph, self.bias_correction):
            if text:
                lines.append(text)
        if self.folded:
            lines.append(f"batch norms folded: {', '.join(self.folded)}")
        if self.calibrator:
            lines.append(f"calibrator {self.calibrator}, evaluations: {self.evaluations} of at most {self.budget}")
        for region in self.regions:
            lines.append(_region(region))
        lines.extend(f"  {name}: float, {reason}" for name, reason in self.left.items())
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.3g} %"


def _times(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g} ms" for name, value in milliseconds.items())


def _region(region: RegionReport) -> str:
    parts = [region.state + (f" ({region.kernel})" if region.kernel else "")]
    if region.error is not None:
        parts.append(f"noise {_percent(region.error)}")
    if region.milliseconds:
        parts.append(_times(region.milliseconds))
    if region.fused:
        parts.append("with " + ", ".join(region.fused))
    if region.smoothed:
        parts.append("smoothed")
    if region.why:
        parts.append(region.why)
    return f"  {' -> '.join(region.layers)}: {'; '.join(parts)}"
