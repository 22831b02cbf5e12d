"""The numbers of an analysis: docs/analysis.md defines each. What was not measured is NaN, with the reason."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from halfstep.statistics import NAN, MixedPrecisionStatistics

if TYPE_CHECKING:
    from halfstep.analysis_timeline import Updates
    from halfstep.monitoring import Monitor, Sample

GIB = 2**30

SHARES = {
    "fp16_ops_percentage": "float16",
    "fp32_ops_percentage": "float32",
    "mixed_ops_percentage": "mixed",
    "bf16_ops_percentage": "bfloat16",
    "fp64_ops_percentage": "float64",
}
# Fields by what they come from, and the manager's field whose note says why they are not there.
_OPERATIONS = (*SHARES, "operations", "casts", "cast_bytes"), "total_operations"
_TIMES = ("average_speedup", "peak_speedup"), "speedup_factor"
_MEMORY = ("memory_saved_gb", "memory_reduction"), "memory_saved_bytes"
_ACCURACY = ("accuracy_preservation",), "accuracy_preservation"
_COUNTS = ("overflow_events", "scale_adjustments", "steps", "skipped_steps", "missing_steps"), "steps"
_SCALES = ("loss_scale_min", "loss_scale_max"), "steps"

NO_SAMPLE = "no step was sampled in the analysed window"
NO_STEP = "no step was trained in the analysed window"


def summarize(
    own: MixedPrecisionStatistics,
    device: str,
    monitor: Monitor | None,
    samples: list[Sample],
    counts: dict[str, int],
    updates: Updates,
    missing: int,
    underflow_events: float,
    duration: float,
) -> dict[str, Any]:
    """Return the report.

    own: the manager's statistics of the whole run. device: "cpu" or "cuda". The rest is of the window: samples,
    counters of the scaler, its updates, how many of these are missing, steps with underflow, seconds.
    """
    notes: dict[str, str] = {}
    # A note on what the manager has measured in the whole run is no reason why the window has none.
    known = {name: note for name, note in own.notes.items() if math.isnan(getattr(own, name, NAN))}
    if monitor is not None and monitor.note:
        known.update(dict.fromkeys((_TIMES[1], _MEMORY[1], _ACCURACY[1]), monitor.note))

    def group(fields: tuple[tuple[str, ...], str], values: dict[str, float] | str) -> dict[str, float]:
        """Return the values, or NaN for each field and the reason, which the manager may know better."""
        names, source = fields
        if not isinstance(values, str):
            return values
        notes.update(dict.fromkeys(names, known.get(source) or values))
        return dict.fromkeys(names, NAN)

    measured = not math.isnan(own.steps)
    report = group(_OPERATIONS, _operations(samples))
    compared = "the sampled steps were not run in float32 as well" if samples else NO_SAMPLE
    report |= group(_TIMES, _times(samples) or compared)
    report |= group(_MEMORY, _memory(samples) or compared)
    report |= group(_ACCURACY, _accuracy(samples) or compared)
    report["underflow_events"] = underflow_events
    if math.isnan(underflow_events):
        notes["underflow_events"] = known.get("underflow_events") or "no gradients were sampled in the analysed window"
    report |= group(_COUNTS, _counts(counts, missing) if measured else NO_STEP)
    report |= group(_SCALES, _scales(updates) if measured and updates.steps else NO_STEP)
    report |= group((("loss_scale",), "loss_scale"), {"loss_scale": own.loss_scale} if measured else NO_STEP)
    return {
        "framework": own.framework,
        "precision_policy": own.precision_policy,
        "device": device,
        **{field: report[field] for field in _ORDER},
        "duration_seconds": duration,
        "samples": len(samples),
        "sample_seconds": math.fsum(sample.seconds for sample in samples),
        "notes": notes,
    }


_ORDER = (
    *SHARES,
    "average_speedup",
    "peak_speedup",
    "memory_saved_gb",
    "memory_reduction",
    "accuracy_preservation",
    "overflow_events",
    "underflow_events",
    "scale_adjustments",
    "steps",
    "skipped_steps",
    "missing_steps",
    "loss_scale_min",
    "loss_scale_max",
    "loss_scale",
    "operations",
    "casts",
    "cast_bytes",
)


def speedups(samples: Iterable[Sample]) -> list[float]:
    """Return float32 time over mixed time of the samples that have both."""
    return [s.fp32_ms / s.mixed_ms for s in samples if s.fp32_ms > 0 and s.mixed_ms > 0]


def with_memory(samples: Iterable[Sample]) -> list[Sample]:
    """Return the samples whose memory was measured in both runs."""
    return [sample for sample in samples if sample.fp32_bytes > 0 and sample.mixed_bytes > 0]


def shares(sample: Sample) -> list[float]:
    """Return which share of a sample's operations ran in each precision of SHARES; NaN without any."""
    total = sum(sample.operations.values())
    return [sample.operations.get(dtype, 0) / total if total else NAN for dtype in SHARES.values()]


def _operations(samples: list[Sample]) -> dict[str, float] | str:
    counted = Counter()
    for sample in samples:
        counted.update(sample.operations)
    total = counted.total()
    if not total:
        return "no operations were counted in the sampled steps" if samples else NO_SAMPLE
    return {
        **{field: counted[dtype] / total for field, dtype in SHARES.items()},
        "operations": total,
        "casts": sum(sample.casts for sample in samples),
        "cast_bytes": sum(sample.cast_bytes for sample in samples),
    }


def _times(samples: list[Sample]) -> dict[str, float] | None:
    found = speedups(samples)
    return {"average_speedup": statistics.median(found), "peak_speedup": max(found)} if found else None


def _memory(samples: list[Sample]) -> dict[str, float] | None:
    found = with_memory(samples)
    if not found:
        return None
    saved = statistics.median(sample.fp32_bytes - sample.mixed_bytes for sample in found)
    reduction = statistics.median(1 - sample.mixed_bytes / sample.fp32_bytes for sample in found)
    return {"memory_saved_gb": saved / GIB, "memory_reduction": reduction}


def _accuracy(samples: list[Sample]) -> dict[str, float] | None:
    found = [sample.difference for sample in samples if not math.isnan(sample.difference)]
    return {"accuracy_preservation": max(0.0, 1 - statistics.median(found))} if found else None


def _counts(counts: dict[str, int], missing: int) -> dict[str, float]:
    return {
        "overflow_events": counts["skipped"],
        "scale_adjustments": counts["growths"] + counts["backoffs"],
        "steps": counts["steps"],
        "skipped_steps": counts["skipped"],
        "missing_steps": missing,
    }


def _scales(updates: Updates) -> dict[str, float]:
    return {"loss_scale_min": min(updates.scales), "loss_scale_max": max(updates.scales)}
