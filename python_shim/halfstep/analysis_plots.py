"""The four plots of an analysis, made with matplotlib without touching pyplot, its figures or its backend."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from halfstep.analysis_files import write_file
from halfstep.analysis_summary import NO_SAMPLE, NO_STEP, SHARES, shares, speedups, with_memory

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
_MIXED, _FLOAT32, _SKIPPED, _SAVED, _NORM = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#555555"
_STYLE = {
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "figure.dpi": 100.0,
    "savefig.dpi": 100.0,
    "svg.hashsalt": "halfstep",
}
_FEW = 40  # points that are drawn one by one
_MOST_POINTS = 1000  # of a line


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
    from matplotlib.figure import Figure

    title, draw, height = _PLOTS[name]
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(8, height), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        draw(figure, analysis)
        metadata = {"Date": None} if kind in ("svg", "svgz") else None  # the same data give the same file
        figure.savefig(file, format=kind, metadata=metadata)


def _import_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the plots need matplotlib, which is not installed: pip install matplotlib") from error


# ------------------------------------------------------------------------------------------------------- the plots


def _precision_timeline(figure: Figure, analysis: Analysis) -> None:
    axes = figure.subplots()
    counted = [sample for sample in analysis.samples if sum(sample.operations.values())]
    axes.set_ylabel("share of operations (%)")
    axes.set_ylim(0, 100)
    _steps(axes)
    if not counted:
        _say(axes, _reason(analysis, "operations", NO_SAMPLE))
        return
    rows = dict(zip(SHARES.values(), zip(*map(shares, counted), strict=True), strict=True))
    steps = [sample.step for sample in counted]
    end = max(analysis.last_step, steps[-1] + 1)
    bottom = [0.0] * (len(steps) + 1)
    for dtype, color in _PRECISIONS.items():
        if not any(rows[dtype]):
            continue
        top = [low + 100 * share for low, share in zip(bottom, [*rows[dtype], rows[dtype][-1]], strict=True)]
        field = next(field for field, name in SHARES.items() if name == dtype)
        label = f"{dtype}, {analysis.report[field]:.1%}"
        axes.fill_between([*steps, end], bottom, top, step="post", color=color, linewidth=0, label=label)
        bottom = top
    if len(steps) <= _FEW:
        axes.plot(steps, [0] * len(steps), "^", color="black", markersize=6, clip_on=False, zorder=5, label="sample")
    axes.set_xlim(steps[0], end)
    axes.set_title(f"{_count(len(steps), 'sampled step')}, each shown until the next; shares of all of them:")
    _legend(axes, reverse=True)


def _speedup_distribution(figure: Figure, analysis: Analysis) -> None:
    axes = figure.subplots()
    found = sorted(speedups(analysis.samples))
    axes.set_xlabel("speed-up: float32 time / mixed time of the same step")
    axes.set_ylabel("samples")
    if not found:
        _say(axes, _reason(analysis, "average_speedup", NO_SAMPLE))
        return
    median, peak = statistics.median(found), found[-1]
    low, high = min(found[0], 1.0), max(peak, 1.0)
    low, high = low - 0.05 * (high - low) - 0.02, high + 0.05 * (high - low) + 0.02
    bins = max(10, min(60, round(2 * math.sqrt(len(found)))))
    width = (high - low) / bins
    counts = [0] * bins
    for value in found:
        counts[min(bins - 1, int((value - low) / width))] += 1
    if len(found) <= _FEW:  # a dot for each sample, stacked where they are close
        heights = [0] * bins
        for value in found:
            index = min(bins - 1, int((value - low) / width))
            heights[index] += 1
            axes.plot(value, heights[index], "o", color=_MIXED, markersize=8, alpha=0.8)
    else:
        axes.bar([low + width * (i + 0.5) for i in range(bins)], counts, 0.92 * width, color=_MIXED)
    axes.set_ylim(0, max(counts) + max(1, 0.1 * max(counts)))
    axes.set_xlim(low, high)
    _whole_numbers(axes.yaxis)
    axes.axvline(1, color="#777777", linewidth=1.5, linestyle=":", label="1x: as fast as float32")
    axes.axvline(median, color="black", linewidth=1.5, label=f"median {median:.2f}x")
    axes.axvline(peak, color=_SKIPPED, linewidth=1.5, linestyle="--", label=f"peak {peak:.2f}x")
    axes.set_title(_count(len(found), "sampled step"))
    _legend(axes)


def _memory_usage(figure: Figure, analysis: Analysis) -> None:
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    found = with_memory(analysis.samples)
    lower.set_ylabel("saved (%)")
    _steps(lower)
    if not found:
        upper.set_ylabel("memory")
        _say(upper, _reason(analysis, "memory_saved_gb", NO_SAMPLE))
        _say(lower, "")
        return
    steps = [sample.step for sample in found]
    most = max(max(sample.fp32_bytes, sample.mixed_bytes) for sample in found)
    unit, name = next((size, name) for size, name in _UNITS if most >= size)
    kind = "peak memory" if analysis.report["device"] == "cuda" else "saved for backward"
    upper.set_ylabel(f"{kind} ({name})")
    for values, color, marker, label in (
        ([sample.fp32_bytes for sample in found], _FLOAT32, "s", "float32 run"),
        ([sample.mixed_bytes for sample in found], _MIXED, "o", "mixed run"),
    ):
        _line(upper, steps, [value / unit for value in values], color, label, marker)
    saved = [100 * (1 - sample.mixed_bytes / sample.fp32_bytes) for sample in found]
    _line(lower, steps, saved, _SAVED, f"saved, median {statistics.median(saved):.1f} %", "D")
    upper.set_ylim(0, 1.1 * most / unit)
    lower.set_ylim(min(0, 1.2 * min(saved)), max(5, 1.2 * max(saved)))
    lower.axhline(0, color="#777777", linewidth=1)
    upper.set_title(f"forward and backward pass of {_count(len(found), 'sampled step')}")
    _legend(upper)
    _legend(lower)


def _numerical_stability(figure: Figure, analysis: Analysis) -> None:
    scale, norm, underflow = figure.subplots(3, sharex=True, height_ratios=(2, 2, 1))
    updates = analysis.updates
    scale.set_ylabel("loss scale")
    norm.set_ylabel("gradient norm")
    underflow.set_ylabel("underflow (%)")
    _steps(underflow)
    if not updates.steps:
        _say(scale, _reason(analysis, "loss_scale_min", NO_STEP))
        _say(norm, "")
    else:
        _draw_updates(scale, norm, analysis)
    if analysis.underflow:
        steps, values = zip(*analysis.underflow, strict=True)
        _line(underflow, steps, [100 * value for value in values], _FLOAT32, "largest share of a gradient", "o")
        underflow.set_ylim(0, max(1.0, 120 * max(values)))
        _legend(underflow)
    else:
        _say(underflow, _reason(analysis, "underflow_events", "no gradients were sampled"))


def _draw_updates(scale: Axes, norm: Axes, analysis: Analysis) -> None:
    steps, scales, skipped, norms = analysis.updates
    bad = [i for i, flag in enumerate(skipped) if flag]
    ends = [i for i in range(len(steps)) if i in (0, len(steps) - 1) or scales[i] != scales[i - 1]]
    few = len(steps) <= _FEW
    scale.plot(
        [steps[i] for i in ends], [scales[i] for i in ends], color=_MIXED, drawstyle="steps-post", label="loss scale"
    )
    if few:
        scale.plot(steps, scales, "o", color=_MIXED, markersize=4)
    scale.set_yscale("log", base=2)
    scale.set_ylim(min(scales) / 4, max(scales) * 4)
    if bad:
        size = 7 if len(bad) <= _FEW else 4
        label = f"skipped step ({len(bad)} of {len(steps)})"
        points = [steps[i] for i in bad], [scales[i] for i in bad]
        scale.plot(*points, "x", color=_SKIPPED, markersize=size, label=label, zorder=4)
    good = [i for i in range(len(steps)) if math.isfinite(norms[i]) and norms[i] > 0]
    if good:
        _line(norm, [steps[i] for i in good], [norms[i] for i in good], _NORM, "of applied steps, unscaled", ".")
        norm.set_yscale("log")
        for i in bad[: _FEW + 1] if len(bad) <= _FEW else []:
            norm.axvline(steps[i], color=_SKIPPED, linewidth=0.8, alpha=0.6)
    else:
        _say(norm, "no finite gradient norm was recorded")
    for number, (first, last) in enumerate(analysis.gaps):
        for axes in (scale, norm):
            label = "not recorded" if number == 0 and axes is scale else None
            axes.axvspan(first - 0.5, last + 0.5, color="#BBBBBB", alpha=0.5, linewidth=0, label=label)
    _legend(scale)
    if good:
        _legend(norm)


_PLOTS = {
    "precision_timeline": ("Operations by precision", _precision_timeline, 4.0),
    "speedup_distribution": ("Speed-up over float32", _speedup_distribution, 4.0),
    "memory_usage": ("Memory", _memory_usage, 5.0),
    "numerical_stability": ("Numerical stability", _numerical_stability, 6.5),
}
NAMES = tuple(_PLOTS)
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (0, "bytes"))

# ------------------------------------------------------------------------------------------------------------ parts


def _line(axes: Axes, steps: Sequence[float], values: Sequence[float], color: str, label: str, marker: str) -> None:
    """Draw values over steps; of many points the range in each of some hundred spans, and its median."""
    if len(steps) <= _MOST_POINTS:
        style = {"marker": marker, "markersize": 5} if len(steps) <= _FEW else {"linewidth": 1.0}
        axes.plot(steps, values, color=color, label=label, **style)
        return
    span = math.ceil(2 * len(steps) / _MOST_POINTS)
    parts = [slice(i, i + span) for i in range(0, len(steps), span)]
    middles = [steps[part][len(steps[part]) // 2] for part in parts]
    lows, highs = ([choose(values[part]) for part in parts] for choose in (min, max))
    axes.fill_between(middles, lows, highs, color=color, alpha=0.3, linewidth=0, label="range")
    axes.plot(middles, [statistics.median(values[part]) for part in parts], color=color, linewidth=1.0, label=label)


def _steps(axes: Axes) -> None:
    axes.set_xlabel("step (update of the loss scale)")
    _whole_numbers(axes.xaxis)


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(8, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _legend(axes: Axes, *, reverse: bool = False) -> None:
    """Put the legend beside the axes, where it can cover nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, reverse=reverse)


def _say(axes: Axes, reason: str) -> None:
    """Say in the empty plot that nothing was recorded, and why."""
    text = f"Nothing was recorded:\n{reason}" if reason else "Nothing was recorded."
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="#333333", wrap=True)
    axes.set_yticks([])
    axes.grid(False)


def _reason(analysis: Analysis, field: str, otherwise: str) -> str:
    return analysis.report["notes"].get(field, otherwise)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
