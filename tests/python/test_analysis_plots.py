"""The four plots: files, formats, what they say, and what they leave alone."""

from __future__ import annotations

import dataclasses
import gzip
import io
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.style
import pytest
from analysis_cases import Training, sample
from halfstep import MixedPrecisionAnalyzer, analysis_plots
from halfstep.analysis_timeline import Updates
from halfstep.analyzer import Analysis

NAMES = ("precision_timeline", "speedup_distribution", "memory_usage", "numerical_stability")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", message=".*has no float16 arithmetic.*")


def analyzed(steps: int = 12, samples: int = 3) -> MixedPrecisionAnalyzer:
    training = Training(loss_scale=2.0**10, loss_scale_growth_interval=5)
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        training.steps(steps, overflow_every=4)
        for i in range(samples):
            training.monitor.samples.append(sample(i, fp32_ms=2.0 + 0.01 * (i % 7)))
            training.monitor.lost.append((i + 1, 0.001 * (i % 9)))
    return analyzer


def words(name: str, analysis: Analysis, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the plot as SVG, which keeps its words if it is told to."""
    monkeypatch.setitem(analysis_plots.STYLE, "svg.fonttype", "none")
    file = io.BytesIO()
    analysis_plots.render(name, analysis, file, "svg")
    return file.getvalue().decode()


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", NAMES)
def test_the_ending_decides_on_the_format(name: str, tmp_path: Path) -> None:
    analyzer = analyzed()
    plot = getattr(analyzer, f"plot_{name}")
    starts = {"a.png": b"\x89PNG", "b.PDF": b"%PDF", "c.svg": b"<?xml", "d.jpeg": b"\xff\xd8"}
    for file, start in starts.items():
        plot(tmp_path / file)
        assert (tmp_path / file).read_bytes().startswith(start)
    plot(str(tmp_path / "e.svgz"))
    assert b"<svg" in gzip.decompress((tmp_path / "e.svgz").read_bytes())
    assert sorted(os.listdir(tmp_path)) == [*sorted(starts), "e.svgz"], "no other file stays"
    plot(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "c.svg").read_bytes()


def test_bad_paths_say_what_is_wrong(tmp_path: Path) -> None:
    analyzer = analyzed()
    for path in ("plot", "plot.", "plot.docx", ".png"):
        with pytest.raises(ValueError, match="expected a file name with one of the endings .*png.*svg"):
            analyzer.plot_memory_usage(tmp_path / path)
    with pytest.raises(FileNotFoundError, match="the folder '.*missing' for 'plot.png' does not exist"):
        analyzer.plot_memory_usage(tmp_path / "missing" / "plot.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError, match="folder.png' is a folder, expected the name of a file"):
        analyzer.plot_memory_usage(tmp_path / "folder.png")
    with pytest.raises(TypeError, match="int"):
        analyzer.plot_memory_usage(3)
    assert os.listdir(tmp_path) == ["folder.png"]


def test_a_plot_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analyzer = analyzed()
    path = tmp_path / "plot.png"
    path.write_text("old")

    def broken(figure, analysis) -> str:
        raise ZeroDivisionError

    monkeypatch.setitem(analysis_plots._PLOTS, "memory_usage", ("Memory", broken, 4.0))
    with pytest.raises(ZeroDivisionError):
        analyzer.plot_memory_usage(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plot.png"]
    monkeypatch.undo()
    link = tmp_path / "link.png"
    link.symlink_to(path)
    analyzer.plot_memory_usage(link)
    assert link.is_symlink()
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analyzer = analyzed()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in NAMES:
        with pytest.raises(ImportError, match="the plots need matplotlib, .*: pip install matplotlib"):
            getattr(analyzer, f"plot_{name}")(tmp_path / "plot.png")
    assert os.listdir(tmp_path) == []


def test_pyplot_and_the_users_settings_are_left_alone(tmp_path: Path) -> None:
    code = f"""
import sys, warnings
sys.path.insert(0, {str(Path(__file__).parent)!r})
warnings.simplefilter("ignore")
import matplotlib
from test_analysis_plots import analyzed, NAMES
matplotlib.rcParams["font.size"] = 31
matplotlib.rcParams["text.usetex"] = True  # would need TeX
settings = lambda: {{name: matplotlib.rcParams._get(name) for name in matplotlib.rcParams}}  # [] would load pyplot
before = settings()
analyzer = analyzed()
for name in NAMES:
    getattr(analyzer, "plot_" + name)({str(tmp_path)!r} + f"/{{name}}.png")
assert "matplotlib.pyplot" not in sys.modules
assert settings() == before
print("good")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "good\n", result.stderr


def test_importing_the_analyzer_imports_no_matplotlib() -> None:
    code = "import sys, halfstep; halfstep.MixedPrecisionAnalyzer; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "False\n", result.stderr


# ----------------------------------------------------------------------------------------------------- what they say


def test_they_say_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analyzed(steps=12, samples=3).analysis()
    drawn = {name: words(name, analysis, monkeypatch) for name in NAMES}
    assert "3 sampled steps (triangles), each shown until the next" in drawn["precision_timeline"]
    for label in ("float16 60.0 %", "float32 30.0 %", "mixed 10.0 %", "share of operations (%)"):
        assert label in drawn["precision_timeline"]
    assert "bfloat16" not in drawn["precision_timeline"], "no entry for what there is none of"
    assert "median 1.00x" in drawn["speedup_distribution"]
    assert "peak 1.01x" in drawn["speedup_distribution"]
    assert "saved for backward (MiB)" in drawn["memory_usage"], "what a CPU's number is"
    assert "saved, median 25.0 %" in drawn["memory_usage"]
    assert "skipped step (3 of 12)" in drawn["numerical_stability"]
    assert "Numerical stability: 12 steps" in drawn["numerical_stability"]
    on_gpu = dataclasses.replace(analysis, report={**analysis.report, "device": "cuda"})
    assert "after the forward pass (MiB)" in words("memory_usage", on_gpu, monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_window_is_said_to_be_empty(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = words(name, analyzed(0, 0).analysis(), monkeypatch)
    assert "Nothing was recorded" in drawn
    if name == "numerical_stability":
        assert "no step was trained in the analysed window" in drawn


def test_parts_that_are_missing_do_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = words("numerical_stability", analyzed(5, 0).analysis(), monkeypatch)
    assert "skipped step (1 of 5)" in drawn
    assert drawn.count("Nothing was recorded") == 1


def test_gaps_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analyzed(12, 0).analysis()
    assert "not recorded" not in words("numerical_stability", analysis, monkeypatch)
    kept = Updates(*(column[:4] + column[8:] for column in analysis.updates))
    assert "not recorded" in words(
        "numerical_stability", dataclasses.replace(analysis, updates=kept, gaps=[(5, 8)]), monkeypatch
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [1, 2, 10, 41, 2500])
def test_any_number_of_points_is_drawn(name: str, number: int) -> None:
    """2,500 updates are made of 10, for they are only drawn here."""
    analysis = analyzed(10, 0).analysis()
    repeated = [type(column)("d", [column[i % 10] for i in range(number)]) for column in analysis.updates]
    repeated[0] = type(repeated[0])("d", range(1, number + 1))
    samples = [sample(i, fp32_ms=2.0 + 0.01 * (i % 7)) for i in range(number)]
    underflow = [(i + 1, 0.001 * (i % 9)) for i in range(number)]
    analysis = dataclasses.replace(analysis, updates=Updates(*repeated), samples=samples, underflow=underflow)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that does not fit, limits that are equal
        analysis_plots.render(name, analysis, file, "svg")
    assert len(file.getvalue()) < 1_000_000


@pytest.mark.parametrize(
    ("scale", "norm"),
    [(0.0, 0.0), (2.0**-149, 1e-300), (3.4e38, math.inf), (1.0, math.nan), (65536.0, 3e38)],
)
def test_extreme_numbers_are_drawn(scale: float, norm: float) -> None:
    analysis = analyzed(3, 0).analysis()
    steps, scales, skipped, norms = analysis.updates
    scales[1], norms[1] = scale, norm
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analysis_plots.render("numerical_stability", analysis, io.BytesIO(), "png")


def test_nothing_in_a_plot_covers_another_thing() -> None:
    """The legends, titles and labels of all axes, in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    dtypes = dict.fromkeys(("float16", "bfloat16", "mixed", "float32", "float64"), 1)
    analysis = analyzed(60, 30).analysis()
    samples = [dataclasses.replace(one, operations=dtypes) for one in analysis.samples]
    analysis = dataclasses.replace(
        analysis, samples=samples, report={**analysis.report, "fp64_ops_percentage": 0.2, "bf16_ops_percentage": 0.2}
    )
    for name in NAMES:
        with matplotlib.style.context(["default", analysis_plots.STYLE]):
            figure = analysis_plots.draw(name, analysis)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
        boxes = [figure._suptitle.get_window_extent()]
        for axes in figure.axes:
            boxes.append(axes.get_window_extent())
            boxes += [legend.get_window_extent() for legend in [axes.get_legend()] if legend]
            boxes += [label.get_window_extent() for label in (axes.xaxis.label, axes.yaxis.label) if label.get_text()]
        width, height = canvas.get_width_height()
        for i, box in enumerate(boxes):
            assert box.x0 >= 0, name
            assert box.y0 >= 0, name
            assert box.x1 <= width, name
            assert box.y1 <= height, name
            for other in boxes[:i]:
                assert not box.padded(-1).overlaps(other), name
