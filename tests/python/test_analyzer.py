"""MixedPrecisionAnalyzer: windows, the report's numbers, and a timeline that loses nothing."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from analysis_cases import Samples, Training, sample
from halfstep import MixedPrecisionAnalyzer, MixedPrecisionManager


@pytest.fixture(autouse=True)
def _quiet_and_quick() -> Iterator[None]:
    warnings.filterwarnings("ignore", message=".*has no float16 arithmetic.*")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of tiny steps
    yield
    torch.set_num_threads(threads)


def test_counts_the_window_alone(device: torch.device) -> None:
    training = Training(device.type, loss_scale=8.0, loss_scale_growth_interval=4)
    training.steps(6, overflow_every=3)
    analyzer = MixedPrecisionAnalyzer(training.manager)
    analyzer.start_analysis()
    before = training.scaler.counters()
    training.steps(20, overflow_every=7)
    after = training.scaler.counters()
    analyzer.stop_analysis()
    training.steps(6, overflow_every=2)
    report = analyzer.generate_report()
    assert (report["steps"], report["missing_steps"]) == (20, 0)
    assert report["overflow_events"] == report["skipped_steps"] == 2
    changes = [after[name] - before[name] for name in ("growths", "backoffs")]
    assert min(changes) > 0
    assert report["scale_adjustments"] == sum(changes)
    window = training.scaler.history()[6:26]
    assert report["loss_scale_min"] == min(record.scale for record in window)
    assert report["loss_scale_max"] == max(record.scale for record in window)
    assert report["duration_seconds"] > 0
    steps, scales, skipped, norms = analyzer.analysis().updates
    assert list(steps) == [record.step for record in window]
    assert list(scales) == [record.scale for record in window]
    assert [flag != 0 for flag in skipped] == [record.skipped for record in window]
    assert [norm for norm in norms if math.isfinite(norm)] == [r.norm for r in window if math.isfinite(r.norm)]


def test_summarizes_the_samples_of_the_window() -> None:
    training = Training()
    training.monitor.samples.append(sample(0, fp32_ms=100.0, time=0.0))
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        training.steps(3)
        counts = ({"float16": 6, "float32": 2}, {"float16": 2, "bfloat16": 1, "float64": 1, "mixed": 8})
        for fp32_ms, saved, difference, operations in (
            (2.0, 1, 0.1, counts[0]),
            (6.0, 2, 0.3, counts[1]),
            (3.0, 9, 0.2, {}),
        ):
            changes = {"mixed_bytes": (10 - saved) * 2**28, "fp32_bytes": 10 * 2**28, "operations": operations}
            training.monitor.samples.append(sample(1, fp32_ms, 2.0, difference=difference, **changes))
    training.monitor.samples.append(sample(3, fp32_ms=100.0))
    report = analyzer.generate_report()
    shares = [report[f"{name}_ops_percentage"] for name in ("fp16", "bf16", "fp32", "fp64", "mixed")]
    assert shares == [8 / 20, 1 / 20, 2 / 20, 1 / 20, 8 / 20]
    assert (report["operations"], report["casts"], report["cast_bytes"]) == (20, 12, 3000)
    assert (report["average_speedup"], report["peak_speedup"]) == (1.5, 3.0)
    assert report["memory_saved_gb"] == 0.5
    assert report["memory_reduction"] == pytest.approx(0.2)
    assert report["accuracy_preservation"] == pytest.approx(0.8)
    assert (report["samples"], report["sample_seconds"]) == (3, pytest.approx(0.015))


def test_mixed_that_loses_is_reported_so() -> None:
    training = Training()
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        training.monitor.samples.append(sample(0, 1.0, 2.0, fp32_bytes=2**20, mixed_bytes=2**21, difference=1.5))
    report = analyzer.generate_report()
    assert (report["average_speedup"], report["memory_reduction"]) == (0.5, -1.0)
    assert report["memory_saved_gb"] < 0
    assert report["accuracy_preservation"] == 0


def test_what_was_not_measured_is_nan_with_the_reason() -> None:
    training = Training(monitor=Samples(note="no float32 run under FSDP"))
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        unknown = {"fp32_ms": math.nan, "mixed_ms": math.nan, "fp32_bytes": 0, "mixed_bytes": 0}
        training.monitor.samples.append(sample(0, **unknown, difference=math.nan, operations={}))
    report = analyzer.generate_report()
    missing = {field for field, value in report.items() if isinstance(value, float) and math.isnan(value)}
    assert missing == set(report["notes"])
    assert {"average_speedup", "memory_saved_gb", "accuracy_preservation", "fp16_ops_percentage"} <= missing
    assert {"underflow_events", "loss_scale_min"} <= missing
    assert all(report["notes"].values())
    assert report["notes"]["average_speedup"] == report["notes"]["memory_reduction"] == "no float32 run under FSDP"
    assert report["steps"] == report["overflow_events"] == report["scale_adjustments"] == 0
    assert report["notes"]["loss_scale_min"] == "no step was trained in the analysed window"


def test_a_note_on_the_whole_run_is_no_reason_for_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    own = training.manager.get_statistics()
    own.memory_saved_bytes, own.notes = 5.0, {"memory_saved_bytes": "bytes saved for the backward pass"}
    monkeypatch.setattr(training.manager, "get_statistics", lambda: own)
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        pass
    report = analyzer.generate_report()
    assert report["notes"]["memory_saved_gb"] == "no step was sampled in the analysed window"


@pytest.mark.parametrize(
    ("kwargs", "note"),
    [
        ({"enable_monitoring": False}, "monitoring is off"),
        ({"precision_policy": "float32"}, "checks no gradients"),
    ],
)
def test_without_monitoring_or_a_scaler_all_is_nan(kwargs, note: str) -> None:
    manager = MixedPrecisionManager(framework="pytorch", **kwargs)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    with MixedPrecisionAnalyzer(manager) as analyzer:
        with manager.autocast_context():
            loss = model(torch.ones(2, 2)).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    report = analyzer.generate_report()
    for field in ("steps", "overflow_events", "scale_adjustments", "loss_scale", "loss_scale_max", "missing_steps"):
        assert math.isnan(report[field]), field
        assert note in report["notes"][field]
    assert not analyzer.analysis().updates.steps


def test_underflow_is_that_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    own = training.manager.get_statistics()
    own.underflow_events = 5.0
    monkeypatch.setattr(training.manager, "get_statistics", lambda: own)
    training.steps(2)
    training.monitor.lost += [(1, 0.5), (2, 0.5)]
    own.steps = 2
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        assert math.isnan(analyzer.generate_report()["underflow_events"]), "nothing was looked at in the window"
        training.steps(3)
        training.monitor.lost += [(3, 0.1), (4, 0.0), (5, 0.2)]
        own.underflow_events = 7.0
    assert analyzer.generate_report()["underflow_events"] == 2
    assert analyzer.analysis().underflow == [(3, 0.1), (4, 0.0), (5, 0.2)]


# -------------------------------------------------------------------------------------------------- out of order


def test_wrong_order_says_what_is_wrong() -> None:
    training = Training()
    analyzer = MixedPrecisionAnalyzer(training.manager)
    for call in (
        analyzer.generate_report,
        lambda: analyzer.plot_memory_usage("x.png"),
        lambda: analyzer.write_report("x"),
        lambda: analyzer.write_tensorboard("x"),
    ):
        with pytest.raises(RuntimeError, match=r"there is nothing to report; call start_analysis\(\) first"):
            call()
    with pytest.raises(RuntimeError, match=r"no analysis was started; call start_analysis\(\) first"):
        analyzer.stop_analysis()
    analyzer.start_analysis()
    with pytest.raises(RuntimeError, match="the analysis is running already"):
        analyzer.start_analysis()
    training.steps(2)
    assert analyzer.generate_report()["steps"] == 2, "of the open window, and the refusal changed nothing"
    training.steps(1)
    analyzer.stop_analysis()
    analyzer.stop_analysis()
    assert analyzer.generate_report()["steps"] == 3
    analyzer.start_analysis()
    assert analyzer.generate_report()["steps"] == 0, "another window"


def test_refuses_what_is_no_pytorch_manager() -> None:
    with pytest.raises(TypeError, match="manager is Linear, expected a MixedPrecisionManager"):
        MixedPrecisionAnalyzer(torch.nn.Linear(1, 1))

    class Another(MixedPrecisionManager):
        framework = "tensorflow"

    with pytest.raises(ValueError, match="manager is one of framework 'tensorflow', expected 'pytorch'"):
        MixedPrecisionAnalyzer(Another())


def test_the_manager_may_be_set_up_within_the_window() -> None:
    training = Training()
    manager = MixedPrecisionManager(framework="pytorch")
    with MixedPrecisionAnalyzer(manager) as analyzer:
        report = analyzer.generate_report()
        assert math.isnan(report["steps"])
        assert report["notes"]["steps"] == "setup_pytorch_training has not been called"
        training.manager = manager
        training.setup()
        training.steps(3)
    report = analyzer.generate_report()
    assert (report["steps"], report["missing_steps"]) == (3, 0)
    assert "steps" not in report["notes"]


def test_an_error_in_the_block_ends_the_window() -> None:
    training = Training()
    with pytest.raises(ZeroDivisionError), MixedPrecisionAnalyzer(training.manager) as analyzer:
        training.steps(2)
        raise ZeroDivisionError
    assert analyzer.generate_report()["steps"] == 2
    assert training.manager._manager.timelines == []


def test_a_forgotten_analyzer_leaves_nothing_behind() -> None:
    training = Training()
    analyzer = MixedPrecisionAnalyzer(training.manager)
    analyzer.start_analysis()
    assert len(training.manager._manager.timelines) == 1
    del analyzer
    gc.collect()
    assert training.manager._manager.timelines == []


def test_two_analyzers_have_windows_of_their_own() -> None:
    training = Training()
    with MixedPrecisionAnalyzer(training.manager) as outer:
        training.steps(2)
        with MixedPrecisionAnalyzer(training.manager) as inner:
            training.steps(3)
        training.steps(1)
    assert (outer.generate_report()["steps"], inner.generate_report()["steps"]) == (6, 3)


# ------------------------------------------------------------------------------------------------- the timeline


@pytest.mark.parametrize("contexts", [1, 3], ids=["one context a step", "three"])
def test_long_windows_lose_no_step(device: torch.device, contexts: int) -> None:
    training = Training(device.type, loss_scale=1024.0, loss_scale_growth_interval=60)
    training.steps(5)
    number = 1300
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        for i in range(number):
            training.step(math.inf if i % 100 == 99 else 1.0, contexts)
    analysis = analyzer.analysis()
    assert list(analysis.updates.steps) == list(range(6, 6 + number))
    assert sum(analysis.updates.skipped) == analysis.report["overflow_events"] == number // 100
    assert analysis.gaps == []


def test_several_updates_a_context_lose_no_step() -> None:
    """Where a step of the program holds many updates, the ring is copied more often."""
    training = Training()
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        for _ in range(250):
            training.step()
            for _ in range(5):
                training.step(contexts=0)
    assert analyzer.generate_report()["steps"] == 1500
    assert analyzer.analysis().gaps == []


def test_what_was_overwritten_is_reported_as_a_gap() -> None:
    training = Training()
    training.steps(7)
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        for _ in range(1100):
            training.step(contexts=0)
    analysis = analyzer.analysis()
    assert analysis.gaps == [(8, 7 + 1100 - 1024)]
    assert analysis.report["steps"] == 1100, "counters lose nothing"
    assert analysis.report["missing_steps"] == 1100 - 1024
    assert "call manager.autocast_context() in each step" in analysis.report["notes"]["missing_steps"]
    assert list(analysis.updates.steps) == list(range(7 + 1100 - 1023, 7 + 1100 + 1))


@pytest.mark.parametrize("trained", [0, 4], ids=["at once", "after some steps"])
def test_a_loaded_checkpoint_begins_the_window_anew(trained: int) -> None:
    old = Training(loss_scale_growth_interval=2)
    old.steps(30)
    training = Training(loss_scale_growth_interval=2)
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        training.steps(trained)
        training.scaler.load_state_dict(old.scaler.state_dict())
        training.steps(3)
    report = analyzer.generate_report()
    assert (report["steps"], report["missing_steps"]) == (3, 0)
    assert list(analyzer.analysis().updates.steps) == [31, 32, 33]
    expected = "a checkpoint was loaded into the scaler: the window begins anew after it, at step 31"
    assert report["notes"].get("steps") == (expected if trained else None)


def test_a_second_setup_begins_the_window_anew() -> None:
    training = Training()
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        training.steps(4)
        training.setup()
        training.steps(2)
    report = analyzer.generate_report()
    assert report["steps"] == 2
    assert report["notes"]["steps"] == "there is a new scaler: the window begins anew after it, at step 1"


def test_captured_steps_are_followed(device: torch.device) -> None:
    training = Training(device.type)
    training.steps(2)

    def step(x: torch.Tensor) -> torch.Tensor:
        training.optimizer.zero_grad()
        with training.manager.autocast_context():
            loss = training.model(x).square().mean()
        training.scaler.scale(loss).backward()
        training.scaler.step(training.optimizer)
        training.scaler.update()
        return loss

    captured = training.manager.capture(step)
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        for _ in range(1200):
            captured(training.x)
    assert captured.captures == (device.type == "cuda"), captured.explain()
    assert list(analyzer.analysis().updates.steps) == list(range(3, 1203))


@pytest.mark.cuda
def test_recording_never_waits_for_the_gpu() -> None:
    training = Training("cuda")
    training.steps(3)
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(600):
                training.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert analyzer.generate_report()["steps"] == 600
    assert analyzer.analysis().gaps == []


def test_a_compiled_forward_pass_may_open_the_context() -> None:
    training = Training(policy="mixed_bfloat16")

    @torch.compile(backend="eager")
    def forward(x: torch.Tensor) -> torch.Tensor:
        with training.manager.autocast_context():
            return training.model(x)

    expected = forward(training.x)
    with MixedPrecisionAnalyzer(training.manager) as analyzer:
        torch.testing.assert_close(forward(training.x), expected, rtol=0, atol=0)
        training.steps(2)
    assert analyzer.generate_report()["steps"] == 2
