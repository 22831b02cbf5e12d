"""What an analysis leaves on disk beside the plots: report.html, report.json, and scalars for TensorBoard."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfstep._version import __version__
from halfstep.analysis_summary import SHARES, shares, speedups, with_memory
from halfstep.whole_files import write_file

if TYPE_CHECKING:
    from halfstep.analyzer import Analysis

# Field, its name on the page, how it is written. docs/analysis.md defines them.
_SECTIONS = {
    "Speed and memory": (
        ("average_speedup", "Speed-up over float32, median", "{:.2f}x"),
        ("peak_speedup", "Speed-up over float32, largest", "{:.2f}x"),
        ("memory_saved_gb", "Memory saved, median", "{:.3f} GiB"),
        ("memory_reduction", "Share of memory saved, median", "{:.1%}"),
        ("accuracy_preservation", "Accuracy kept (1 - relative difference of outputs)", "{:.4f}"),
        ("samples", "Sampled steps", "{:,}"),
        ("sample_seconds", "Time that the samples took", "{:.3f} s"),
    ),
    "Operations of the sampled steps": (
        ("fp16_ops_percentage", "float16", "{:.1%}"),
        ("bf16_ops_percentage", "bfloat16", "{:.1%}"),
        ("fp32_ops_percentage", "float32", "{:.1%}"),
        ("fp64_ops_percentage", "float64", "{:.1%}"),
        ("mixed_ops_percentage", "Inputs of several dtypes", "{:.1%}"),
        ("operations", "Operations counted", "{:,}"),
        ("casts", "Casts", "{:,}"),
        ("cast_bytes", "Bytes that casts read and wrote", "{:,}"),
    ),
    "Numerical stability": (
        ("steps", "Steps", "{:,}"),
        ("skipped_steps", "Skipped steps", "{:,}"),
        ("overflow_events", "Steps with an infinite or NaN gradient", "{:,}"),
        ("underflow_events", "Sampled steps with underflow", "{:,.0f}"),
        ("scale_adjustments", "Changes of the loss scale", "{:,}"),
        ("loss_scale_min", "Smallest loss scale", "{:,.10g}"),
        ("loss_scale_max", "Largest loss scale", "{:,.10g}"),
        ("loss_scale", "Loss scale at the end", "{:,.10g}"),
        ("missing_steps", "Steps missing in the timeline", "{:,}"),
    ),
}
_PLOTS = {
    "precision_timeline": "Share of operations in each precision, by step",
    "speedup_distribution": "Distribution of the speed-up over float32",
    "memory_usage": "Memory of the float32 and of the mixed run, by step",
    "numerical_stability": "Loss scale with skipped steps, gradient norm and underflow, by step",
}

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Mixed precision report</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: 0; }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 0.5rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; font-weight: normal; padding: 0.25rem 0.5rem 0.25rem 0; vertical-align: top; }}
tr {{ border-bottom: 1px solid #8884; }}
td {{ font-variant-numeric: tabular-nums; width: 60%; }}
small {{ opacity: 0.75; }}
img {{ width: 100%; background: #fff; padding: 0.5rem; box-sizing: border-box; border-radius: 4px; margin: 0.5rem 0; }}
</style>
</head>
<body>
<h1>Mixed precision report</h1>
<p>{subtitle}</p>
{body}
</body>
</html>
"""


def write(analysis: Analysis, folder: str | os.PathLike[str], *, plots: bool) -> None:
    """Write report.html and report.json into the folder, which is made if it is not there."""
    folder = Path(folder)
    page = as_html(analysis, plots=plots).encode()
    data = json.dumps(as_json(analysis), indent=1, allow_nan=False).encode()
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "report.html", lambda file: file.write(page))
    write_file(folder / "report.json", lambda file: file.write(data))


def as_json(analysis: Analysis) -> dict[str, Any]:
    """Return all that was recorded as what JSON can hold: null for NaN and infinity.

    halfstep: version of the package. format: 1, counted up when a later version means something else by an entry.
    report: what generate_report() returns.
    updates: lists of one length, an entry for each update of the scaler: "step" (its number), "scale" (the loss scale
        in force), "skipped", "norm" (L2 norm of the unscaled gradients; null where none was taken or is finite).
    gaps: [first, last] of each run of updates that are missing there.
    samples: a dictionary for each sampled step, with the fields of halfstep.monitoring.Sample.
    underflow: [step, share] of steps whose gradients were sampled: the largest share of a gradient's squared
        norm that may be lost below float16's range.
    """
    steps, scales, skipped, norms = analysis.updates
    data = {
        "halfstep": __version__,
        "format": 1,
        "report": analysis.report,
        "updates": {
            "step": [int(step) for step in steps],
            "scale": list(scales),
            "skipped": [flag != 0 for flag in skipped],
            "norm": list(norms),
        },
        "gaps": analysis.gaps,
        "samples": [dataclasses.asdict(sample) for sample in analysis.samples],
        "underflow": analysis.underflow,
    }
    return _finite(data)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def as_html(analysis: Analysis, *, plots: bool = True) -> str:
    """Return the page: numbers, reasons for those that are missing, and the plots, all in one text."""
    report = analysis.report
    body = []
    for title, fields in _SECTIONS.items():
        rows = [_row(name, report[field], form, report["notes"].get(field, "")) for field, name, form in fields]
        body.append(f"<h2>{html.escape(title)}</h2>\n<table>\n{''.join(rows)}</table>")
    if plots:
        body.append("<h2>Plots</h2>")
        body += [_image(analysis, name, text) for name, text in _PLOTS.items()]
    facts = (
        f"{report['framework']}, {report['precision_policy']}, on {report['device']}",
        f"{report['duration_seconds']:,.1f} seconds",
        f"halfstep {__version__}",
    )
    return _PAGE.format(subtitle=html.escape("; ".join(facts)), body="\n".join(body))


def _row(name: str, value: float, form: str, note: str) -> str:
    shown = "not measured" if isinstance(value, float) and math.isnan(value) else form.format(value)
    note = f" <small>{html.escape(note)}</small>" if note else ""
    return f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(shown)}{note}</td></tr>\n'


def _image(analysis: Analysis, name: str, text: str) -> str:
    """Return the plot as an image within the page, so that no two plots share names, and no script in it could run."""
    from halfstep import analysis_plots

    file = io.BytesIO()
    analysis_plots.render(name, analysis, file, "svg")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/svg+xml;base64,{data}">'


def write_tensorboard(analysis: Analysis, log_dir: str | os.PathLike[str]) -> None:
    """Write the updates, samples and underflow shares as scalars under "halfstep/"."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "write_tensorboard needs tensorboard, which is not installed: pip install tensorboard"
        ) from error
    with SummaryWriter(log_dir=os.fspath(log_dir)) as writer:
        for step, scale, skipped, norm in zip(*analysis.updates, strict=True):
            writer.add_scalar("halfstep/loss_scale", scale, int(step))
            writer.add_scalar("halfstep/skipped", skipped, int(step))
            if math.isfinite(norm):
                writer.add_scalar("halfstep/gradient_norm", norm, int(step))
        for sample in analysis.samples:
            for name, value in _scalars_of(sample).items():
                writer.add_scalar(f"halfstep/{name}", value, sample.step, walltime=sample.time)
        for step, share in analysis.underflow:
            writer.add_scalar("halfstep/underflow_share", share, step)


def _scalars_of(sample: Any) -> dict[str, float]:
    """Return what was measured in a sample."""
    values: dict[str, float] = {}
    for ratio in speedups([sample]):
        values["speedup"] = ratio
    for known in with_memory([sample]):
        values |= {"memory/float32_bytes": known.fp32_bytes, "memory/mixed_bytes": known.mixed_bytes}
    counted = dict(zip(SHARES.values(), shares(sample), strict=True))
    return values | {f"operations/{dtype}": share for dtype, share in counted.items() if not math.isnan(share)}
