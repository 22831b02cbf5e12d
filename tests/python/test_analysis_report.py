"""report.html, report.json and the scalars for TensorBoard."""

from __future__ import annotations

import html.parser
import json
import math
import sys
import types
import warnings
from pathlib import Path

import pytest
from analysis_cases import Samples, Training, sample
from halfstep import MixedPrecisionAnalyzer


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", message=".*has no float16 arithmetic.*")


@pytest.fixture
def analyzer() -> MixedPrecisionAnalyzer:
    training = Training(loss_scale=2.0**10, monitor=Samples(note="why & <where>"))
    training.steps(2)
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        training.steps(5, overflow_every=4)
        training.monitor.samples.append(sample(2, fp32_ms=3.0, mixed_ms=2.0))
        training.monitor.samples.append(sample(5, fp32_ms=math.nan, fp32_bytes=0, difference=math.nan))
        training.monitor.lost.append((4, 0.25))
    return analyzer


def strict(text: str) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


class Page(html.parser.HTMLParser):
    """Looks at a page as a browser does."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_json_has_all_that_was_recorded(analyzer: MixedPrecisionAnalyzer, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    analyzer.write_report(folder, plots=False)
    data = strict((folder / "report.json").read_text())
    assert data["format"] == 1
    report = analyzer.generate_report()
    assert set(data["report"]) == set(report)
    assert data["report"]["steps"] == 5
    assert data["report"]["average_speedup"] == 1.5
    assert data["report"]["underflow_events"] == report["underflow_events"] == 1
    assert data["updates"]["step"] == [3, 4, 5, 6, 7]
    assert data["updates"]["skipped"] == [False, False, False, True, False]
    assert data["updates"]["scale"] == [1024.0] * 4 + [512.0]
    assert [norm is None for norm in data["updates"]["norm"]] == [False, False, False, True, False]
    assert [one["fp32_ms"] for one in data["samples"]] == [3.0, None]
    assert data["samples"][0]["operations"] == {"float16": 6, "float32": 3, "mixed": 1}
    assert data["underflow"] == [[4, 0.25]]
    assert data["gaps"] == []
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]


def test_the_page_is_one_file_that_needs_nothing_else(analyzer: MixedPrecisionAnalyzer, tmp_path: Path) -> None:
    analyzer.write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "base")]
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4
    assert all(image["src"].startswith("data:image/svg+xml;base64,") and image["alt"] for image in images)
    others = [value for _, found in page.tags for key, value in found.items() if key in ("src", "href")]
    assert others == [image["src"] for image in images]
    assert "url(" not in text
    for words in ("Speed-up over float32, median1.50x", "Steps5\n", "Share of memory saved, median25.0%"):
        assert words.replace("\n", "") in page.words
    analyzer.write_report(tmp_path)  # again, over the old one


def test_the_page_escapes_and_says_what_is_missing(tmp_path: Path) -> None:
    training = Training(monitor=Samples(note="<script>alert('&')</script>"))
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        pass
    analyzer.write_report(tmp_path, plots=False)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert "<script" not in text
    report = json.loads((tmp_path / "report.json").read_text())["report"]
    assert report["average_speedup"] is None
    assert report["notes"]["average_speedup"] == "<script>alert('&')</script>"
    assert text.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;") >= 5
    assert "Plots" not in page.words
    assert "not measured" in page.words
    assert "Smallest loss scalenot measured no step was trained in the analysed window" in page.words


def test_a_page_without_matplotlib(analyzer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="the plots need matplotlib, .*: pip install matplotlib"):
        analyzer.write_report(tmp_path / "report")
    assert not (tmp_path / "report").exists()
    analyzer.write_report(tmp_path / "report", plots=False)
    assert (tmp_path / "report" / "report.html").exists()


def test_a_file_in_the_way_of_the_folder(analyzer: MixedPrecisionAnalyzer, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    with pytest.raises(FileExistsError):
        analyzer.write_report(tmp_path / "report", plots=False)
    assert (tmp_path / "report").read_text() == "mine"


# -------------------------------------------------------------------------------------------------------- TensorBoard


class Writer:
    """Takes what tensorboard would write."""

    def __init__(self, log_dir: str) -> None:
        self.log_dir, self.closed = log_dir, False
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        Writer.last = self

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def add_scalar(self, tag: str, value: float, step: int, walltime: float | None = None) -> None:
        self.scalars.setdefault(tag, []).append((step, value))


def test_writes_scalars_for_tensorboard(analyzer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    analyzer.write_tensorboard(tmp_path / "runs")
    written = Writer.last
    assert (written.log_dir, written.closed) == (str(tmp_path / "runs"), True)
    scalars = {tag.removeprefix("halfstep/"): values for tag, values in written.scalars.items()}
    assert scalars["loss_scale"] == [(3, 1024.0), (4, 1024.0), (5, 1024.0), (6, 1024.0), (7, 512.0)]
    assert scalars["skipped"] == [(3, 0.0), (4, 0.0), (5, 0.0), (6, 1.0), (7, 0.0)]
    assert [step for step, _ in scalars["gradient_norm"]] == [3, 4, 5, 7], "no infinity"
    assert scalars["speedup"] == [(2, 1.5)], "of the sample that has one"
    assert scalars["memory/float32_bytes"] == [(2, 4 * 2**20)]
    assert scalars["memory/mixed_bytes"] == [(2, 3 * 2**20)]
    assert scalars["operations/float16"] == [(2, 0.6), (5, 0.6)]
    assert scalars["underflow_share"] == [(4, 0.25)]


def test_without_tensorboard_the_error_says_what_to_install(
    analyzer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="write_tensorboard needs tensorboard, .*: pip install tensorboard"):
        analyzer.write_tensorboard(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
