"""The four plots of an analysis, made with matplotlib without touching pyplot, its figures or its backend."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from halfstep.analysis_axes import (
    FEW,
    MOST_POINTS,
    STYLE,
    count,
    legend,
    line,
    percent,
    powers_of_two,
    say,
    steps_axis,
    whole_numbers,
)
from halfstep.analysis_summary import SHARES, shares, speedups, with_memory
from halfstep.whole_files import write_file

if TYPE_CHECKING:
    import os

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from halfstep.analyzer import Analysis

# The palette of Okabe and Ito, which the colour-blind can tell apart; the order of the stack goes from half upwards.
_PRECISIONS = {
    "float16": "#0072B2",
    "bfloat16": "#56B4E9",
    "mixed": "#CC79A7",
    "float32": "#E69F00",
    "float64": "#D55E00",
}
_MIXED, _FLOAT32, _SKIPPED, _SAVED, _NORM, _UNDERFLOW = (
    "#0072B2",
    "#E69F00",
    "#D55E00",
    "#009E73",
    "#555555",
    "#CC79A7",
)


def save(name: str, analysis: Analysis, path: str | os.PathLike[str]) -> None:
    """Draw the plot `name` and write it to `path`, in the format of its ending."""
    target = Path(path)
    _import_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if target.suffix[1:].lower() not in formats:
        raise ValueError(f"path is {str(path)!r}, expected a file name with one of the endings {', '.join(formats)}")
    write_file(target, lambda file: render(name, analysis, file, target.suffix[1:].lower()))


def render(name: str, analysis: Analysis, file: BinaryIO, kind: str) -> None:
    """Draw the plot `name` and write it to an open file in a format of matplotlib's."""
    _import_matplotlib()
    import matplotlib.style

    metadata = {"Date": None} if kind in ("svg", "svgz") else None  # the same data give the same file
    with matplotlib.style.context(["default", STYLE]):  # whatever the user has set
        draw(name, analysis).savefig(file, format=kind, metadata=metadata)


def draw(name: str, analysis: Analysis) -> Figure:
    """Return the plot `name` as a figure, in the style of the moment."""
    from matplotlib.figure import Figure

    title, fill, height = _PLOTS[name]
    figure = Figure(figsize=(8, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    title += fill(figure, analysis)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def _import_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the plots need matplotlib, which is not installed: pip install matplotlib") from error


# ------------------------------------------------------------------------------------------------------- the plots


def _precision_timeline(figure: Figure, analysis: Analysis) -> str:
    axes = figure.subplots()
    axes.set_ylabel("share of operations (%)")
    axes.set_ylim(0, 100)
    counted = [sample for sample in analysis.samples if sum(sample.operations.values())]
    if not counted:
        say(axes, _reason(analysis, "operations"))
        return ""
    rows = dict(zip(SHARES.values(), zip(*map(shares, counted), strict=True), strict=True))
    steps = [sample.step for sample in counted]
    end = max(analysis.last_step, steps[-1] + 1)
    bottom = [0.0] * (len(steps) + 1)
    for dtype, color in _PRECISIONS.items():
        if not any(rows[dtype]):
            continue
        top = [low + 100 * share for low, share in zip(bottom, [*rows[dtype], rows[dtype][-1]], strict=True)]
        field = next(field for field, name in SHARES.items() if name == dtype)
        label = f"{dtype} {percent(analysis.report[field])}"
        axes.fill_between([*steps, end], bottom, top, step="post", color=color, linewidth=0, label=label)
        bottom = top
    if len(steps) <= FEW:
        axes.plot(steps, [0] * len(steps), "^", color="black", markersize=6, clip_on=False, zorder=5)
    steps_axis(axes, steps[0], end, margin=0)
    legend(axes)
    marks = " (triangles)" if len(steps) <= FEW else ""
    return f": {count(len(steps), 'sampled step')}{marks}, each shown until the next"


def _speedup_distribution(figure: Figure, analysis: Analysis) -> str:
    axes = figure.subplots()
    axes.set_xlabel("speed-up: float32 time / mixed time of the same step")
    found = sorted(speedups(analysis.samples))
    if not found:
        say(axes, _reason(analysis, "average_speedup"))
        return ""
    median, peak = statistics.median(found), found[-1]
    low, high = min(found[0], 1.0), max(peak, 1.0)
    low, high = low - 0.05 * (high - low) - 0.02, high + 0.05 * (high - low) + 0.02
    axes.set_xlim(low, high)
    if len(found) <= FEW:  # a dot for each sample, in the lowest row that has room
        rows: list[float] = []
        for value in found:
            row = next((i for i, last in enumerate(rows) if value - last > (high - low) / 60), len(rows))
            rows[row : row + 1] = [value]
            axes.plot(value, row + 1, "o", color=_MIXED, markersize=8)
        axes.set_ylim(0, max(4, len(rows)) + 1)
        axes.set_yticks([])
        axes.set_ylabel("samples, a dot each")
    else:
        bins = min(60, round(2 * math.sqrt(len(found))))
        tallest = max(axes.hist(found, bins=bins, range=(found[0], peak), color=_MIXED, rwidth=0.92)[0])
        axes.set_ylim(0, 1.1 * tallest)
        whole_numbers(axes.yaxis)
        axes.set_ylabel("samples")
    axes.axvline(1, color="#777777", linewidth=2, linestyle=":", label="1x: as fast as float32")
    axes.axvline(median, color="black", linewidth=1.5, label=f"median {median:.2f}x")
    axes.axvline(peak, color=_SKIPPED, linewidth=1.5, linestyle="--", label=f"peak {peak:.2f}x")
    legend(axes)
    return f": {count(len(found), 'sampled step')}"


def _memory_usage(figure: Figure, analysis: Analysis) -> str:
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    upper.set_ylabel("memory")
    lower.set_ylabel("saved (%)")
    found = with_memory(analysis.samples)
    if not found:
        say(upper, _reason(analysis, "memory_saved_gb"))
        say(lower, "")
        return ""
    steps = [sample.step for sample in found]
    most = max(max(sample.fp32_bytes, sample.mixed_bytes) for sample in found)
    unit, name = next((size, name) for size, name in _UNITS if most >= size)
    kind = "after the forward pass" if analysis.report["device"] == "cuda" else "saved for backward"
    upper.set_ylabel(f"{kind} ({name})")
    line(upper, steps, [sample.fp32_bytes / unit for sample in found], _FLOAT32, "float32", "s")
    line(upper, steps, [sample.mixed_bytes / unit for sample in found], _MIXED, "mixed", "o")
    saved = [100 * (1 - sample.mixed_bytes / sample.fp32_bytes) for sample in found]
    line(lower, steps, saved, _SAVED, f"saved, median {percent(statistics.median(saved) / 100)}", "D")
    upper.set_ylim(0, 1.1 * most / unit)
    lower.set_ylim(min(0, 1.2 * min(saved)), max(5, 1.2 * max(saved)))
    lower.axhline(0, color="#777777", linewidth=1)
    steps_axis(lower, steps[0], steps[-1])
    legend(upper)
    legend(lower)
    return f": {count(len(found), 'sampled step')}"


def _numerical_stability(figure: Figure, analysis: Analysis) -> str:
    scale, norm, lost = figure.subplots(3, sharex=True, height_ratios=(2, 2, 1))
    scale.set_ylabel("loss scale")
    norm.set_ylabel("gradient norm")
    lost.set_ylabel("underflow (%)")
    steps = list(analysis.updates.steps)
    if steps:
        _draw_scale(scale, analysis)
        _draw_norm(norm, analysis)
        for first, last in analysis.gaps:
            for axes in (scale, norm):
                label = "not recorded" if (axes, first) == (scale, analysis.gaps[0][0]) else None
                # Opaque and above the lines, which would bridge the gap.
                axes.axvspan(first - 0.5, last + 0.5, color="#CCCCCC", linewidth=0, zorder=3, label=label)
        legend(scale)
    else:
        say(scale, _reason(analysis, "loss_scale_min"))
        say(norm, "")
    if analysis.underflow:
        sampled, values = zip(*analysis.underflow, strict=True)
        label = "largest share that a gradient may have lost below float16's range"
        line(lost, sampled, [100 * value for value in values], _UNDERFLOW, label, "o")
        lost.set_ylim(0, max(1.0, 120 * max(values)))
        legend(lost)
        steps += sampled
    else:
        say(lost, _reason(analysis, "underflow_events"))
    if steps:
        edges = [edge for gap in analysis.gaps for edge in gap]
        steps_axis(lost, min(*edges, *steps[:1], min(steps)), max(*edges, *steps[-1:], max(steps)))
    return f": {count(len(analysis.updates.steps), 'step')}" if steps else ""


def _draw_scale(axes: Axes, analysis: Analysis) -> None:
    steps, scales, skipped, _ = analysis.updates
    ends = [i for i in range(len(steps)) if i in (0, len(steps) - 1) or scales[i] != scales[i - 1]]
    marker = "o" if len(steps) <= FEW else ""
    axes.plot(
        [steps[i] for i in ends], [scales[i] for i in ends], color=_MIXED, drawstyle="steps-post", label="loss scale"
    )
    if marker:
        axes.plot(steps, scales, marker, color=_MIXED, markersize=4)
    bad = [i for i, flag in enumerate(skipped) if flag]
    if bad:
        label = f"skipped step ({len(bad):,} of {len(steps):,})"
        size = 7 if len(bad) <= FEW else 4
        points = [steps[i] for i in bad], [scales[i] for i in bad]
        axes.plot(*points, "x", color=_SKIPPED, markersize=size, markeredgewidth=1.5, label=label, zorder=4)
    positive = [value for value in scales if value > 0] or [1.0]  # at 0 it is below the axes
    powers_of_two(axes, min(positive), max(positive))


def _draw_norm(axes: Axes, analysis: Analysis) -> None:
    steps, _, skipped, norms = analysis.updates
    good = [i for i, norm in enumerate(norms) if math.isfinite(norm) and norm > 0]
    if not good:
        say(axes, "no gradient had a norm above 0 that is finite")
        return
    zeros = sum(norm == 0 for norm in norms)
    label = "of the unscaled gradients" + (f" ({count(zeros, 'step')} with norm 0 not shown)" if zeros else "")
    if len(steps) <= MOST_POINTS:  # the line has a hole where there is none
        line(axes, steps, [norm if math.isfinite(norm) and norm > 0 else math.nan for norm in norms], _NORM, label, ".")
    else:
        line(axes, [steps[i] for i in good], [norms[i] for i in good], _NORM, label, ".")
    shown = [norms[i] for i in good]
    if max(shown) > 20 * min(shown):
        axes.set_ylim(min(shown) / 1.5, min(1.5 * max(shown), sys.float_info.max))
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.15 * max(shown))
    bad = [step for step, flag in zip(steps, skipped, strict=True) if flag]
    for number, step in enumerate(bad if len(bad) <= FEW else []):
        axes.axvline(step, color=_SKIPPED, linewidth=0.8, alpha=0.7, label=None if number else "skipped step")
    legend(axes)


def _reason(analysis: Analysis, field: str) -> str:
    return analysis.report["notes"].get(field, "")


_PLOTS = {
    "precision_timeline": ("Operations by precision", _precision_timeline, 4.0),
    "speedup_distribution": ("Speed-up over float32", _speedup_distribution, 4.0),
    "memory_usage": ("Memory", _memory_usage, 5.0),
    "numerical_stability": ("Numerical stability", _numerical_stability, 6.5),
}
NAMES = tuple(_PLOTS)
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (0, "bytes"))
