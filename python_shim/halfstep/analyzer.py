"""MixedPrecisionAnalyzer: what mixed precision did to a training run, from one moment to another."""

from __future__ import annotations

import dataclasses
import math
import os
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from halfstep.analysis_summary import summarize
from halfstep.analysis_timeline import Timeline, Updates
from halfstep.manager import MixedPrecisionManager
from halfstep.statistics import NAN

if TYPE_CHECKING:
    from halfstep.monitoring import Monitor, Sample


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What was recorded in the window: the report, and what the plots are made of.

    gaps: first and last number of updates that are missing in `updates`. underflow: step and share.
    """

    report: dict[str, Any]
    updates: Updates
    gaps: list[tuple[int, int]]
    samples: list[Sample]
    underflow: list[tuple[int, float]]

    @property
    def last_step(self) -> int:
        """The newest step that anything is known of."""
        steps = [int(step) for step in self.updates.steps[-1:]]
        steps += [sample.step for sample in self.samples[-1:]] + [step for step, _ in self.underflow[-1:]]
        return max(steps, default=0)


class MixedPrecisionAnalyzer:
    """Records a training run of a manager, and reports on it.

    manager: a MixedPrecisionManager of framework "pytorch". It may be set up later, within the window.

        analyzer = MixedPrecisionAnalyzer(manager)
        with analyzer:  # or start_analysis() and stop_analysis()
            train()
        print(analyzer.generate_report()["average_speedup"])
        analyzer.plot_numerical_stability("stability.png")
        analyzer.write_report("report")

    Report and plots are of the window alone, while it is open of the window so far. To read them waits for the device;
    the loop itself never does. docs/analysis.md defines the fields of the report and tells how to read the plots.
    """

    def __init__(self, manager: MixedPrecisionManager) -> None:
        if not isinstance(manager, MixedPrecisionManager):
            raise TypeError(f"manager is {type(manager).__name__}, expected a MixedPrecisionManager")
        if manager.framework != "pytorch":
            raise ValueError(f"manager is one of framework {manager.framework!r}, expected 'pytorch'")
        self._manager = manager
        self._timeline: Timeline | None = None  # of the open window
        self._analysis: Analysis | None = None  # of the closed one
        self._forget: Callable[[], None] = lambda: None

    def start_analysis(self) -> None:
        """Open a window; what an earlier one recorded is dropped. RuntimeError if one is open."""
        if self._timeline is not None:
            raise RuntimeError("start_analysis: the analysis is running already; call stop_analysis() first")
        timelines = self._manager._manager.timelines
        self._timeline = Timeline(self._manager._manager)
        self._analysis = None
        self._underflow_before = self._monitor(), self._manager.get_statistics().underflow_events
        timelines.append(self._timeline)
        self._forget = weakref.finalize(self, _remove, timelines, self._timeline)

    def stop_analysis(self) -> None:
        """Close the window. RuntimeError if there was none; nothing happens if it is closed already."""
        if self._timeline is None:
            if self._analysis is None:
                raise RuntimeError("stop_analysis: no analysis was started; call start_analysis() first")
            return
        self._forget()
        self._analysis = self._read()
        self._timeline = None

    def __enter__(self) -> MixedPrecisionAnalyzer:
        self.start_analysis()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop_analysis()

    def generate_report(self) -> dict[str, Any]:
        """Return the report as a dictionary; what was not measured is NaN, with the reason in its "notes"."""
        return dict(self.analysis("generate_report").report)

    def analysis(self, caller: str = "analysis") -> Analysis:
        """Return what was recorded: the report, each update of the scale, each sample."""
        if self._analysis is not None:
            return self._analysis
        if self._timeline is None:
            raise RuntimeError(f"{caller}: there is nothing to report; call start_analysis() first")
        return self._read()

    # ------------------------------------------------------------------------------------------------------- files

    def plot_precision_timeline(self, path: str | os.PathLike[str]) -> None:
        """Draw in which precision the operations of the sampled steps ran. Files: see plot_numerical_stability."""
        self._plot("precision_timeline", path)

    def plot_speedup_distribution(self, path: str | os.PathLike[str]) -> None:
        """Draw the speed-ups of the sampled steps over float32. Files: see plot_numerical_stability."""
        self._plot("speedup_distribution", path)

    def plot_memory_usage(self, path: str | os.PathLike[str]) -> None:
        """Draw the memory of the sampled steps and of their float32 runs. Files: see plot_numerical_stability."""
        self._plot("memory_usage", path)

    def plot_numerical_stability(self, path: str | os.PathLike[str]) -> None:
        """Draw loss scale, skipped steps, gradient norm and underflow.

        The ending of `path` decides on the format, such as .png, .svg or .pdf; ValueError for one that matplotlib does
        not have, FileNotFoundError without the folder, ImportError without matplotlib. The file is there once it is
        whole. pyplot and its figures are left alone.
        """
        self._plot("numerical_stability", path)

    def _plot(self, name: str, path: str | os.PathLike[str]) -> None:
        from halfstep import analysis_plots

        analysis_plots.save(name, self.analysis(f"plot_{name}"), path)

    def write_report(self, folder: str | os.PathLike[str], *, plots: bool = True) -> None:
        """Write report.html, one page with numbers and plots, and report.json with all that was recorded.

        folder: made if it is not there; the two files are replaced. plots: False does without matplotlib.
        analysis_report.as_json() describes the JSON.
        """
        from halfstep import analysis_report

        analysis_report.write(self.analysis("write_report"), folder, plots=plots)

    def write_tensorboard(self, log_dir: str | os.PathLike[str]) -> None:
        """Write what was recorded as scalars for TensorBoard, by step. ImportError without tensorboard."""
        from halfstep import analysis_report

        analysis_report.write_tensorboard(self.analysis("write_tensorboard"), log_dir)

    # ----------------------------------------------------------------------------------------------------- reading

    def _monitor(self) -> Monitor | None:
        return self._manager._manager.monitor

    def _read(self) -> Analysis:
        """Return what is there up to now."""
        timeline, monitor = self._timeline, self._monitor()
        counts = timeline.read()
        underflow = [] if monitor is None else [entry for entry in monitor.underflow() if entry[0] >= timeline.first]
        ended = time.time()
        samples = [] if monitor is None else [s for s in list(monitor.samples) if timeline.began <= s.time <= ended]
        own = self._manager.get_statistics()
        updates, gaps = timeline.updates(), timeline.gaps(counts["steps"])
        if math.isnan(own.steps):  # monitoring is off, or no gradients are checked
            updates, gaps = Updates.none(), []
        events = NAN
        if underflow and not timeline.restarts:  # else it is not known how many there were before
            before, known = self._underflow_before
            events = own.underflow_events - (known if monitor is before and known > 0 else 0)
        missing = sum(last - first + 1 for first, last in gaps)
        report = summarize(
            own,
            self._manager._manager.device_type,
            monitor,
            samples,
            counts,
            updates,
            missing,
            events,
            ended - timeline.began,
        )
        if missing:
            report["notes"]["missing_steps"] = (
                "the device keeps the last 1024 updates, and these were overwritten before they were read: call "
                "manager.autocast_context() in each step"
            )
        if timeline.restarts:
            report["notes"]["steps"] = "; ".join(timeline.restarts)
        if (
            monitor is not None
            and len(monitor.samples) == monitor.samples.maxlen
            and samples[:1] == [monitor.samples[0]]
        ):
            report["notes"]["samples"] = f"only the last {len(samples)} samples are kept"
        return Analysis(report, updates, gaps, samples, underflow)


def _remove(timelines: list[Timeline], timeline: Timeline) -> None:
    timelines.remove(timeline)
