"""InferencePrecisionOptimizer with float16 and bfloat16: what it times, leaves out, refuses and writes to files."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from halfstep import InferencePrecisionOptimizer, half_optimize, int8_speed
from halfstep.int8_speed import Timing, time_briefly
from inference_cases import batches, trained_mlp
from torch import nn

HALVES = ("float16", "bfloat16")


def optimizer(target: str = "float16", **options: Any) -> InferencePrecisionOptimizer:
    return InferencePrecisionOptimizer(target, **{"speed_guard": False, **options})


def take(monkeypatch: pytest.MonkeyPatch, own: float, half: float) -> None:
    """Let the model take so many milliseconds in its own type and in the half one."""
    monkeypatch.setattr(half_optimize, "time_briefly", lambda _calls, _device: [Timing((own,)), Timing((half,))])


@pytest.mark.parametrize("target", HALVES)
def test_strict_raises_where_the_float_model_would_come_back(target: str) -> None:
    with pytest.warns(UserWarning, match="the float model came back"):
        result = optimizer(target, accuracy_threshold=0.0).optimize_for_inference(trained_mlp(), batches(), "cpu")
    assert next(result.parameters()).dtype == torch.float32
    said = rf"strict=True, but layers stay float32:\n  the model itself: {target} does not keep the drop at 0 or less"
    with pytest.raises(ValueError, match=said):
        optimizer(target, accuracy_threshold=0.0, strict=True).optimize_for_inference(trained_mlp(), batches(), "cpu")
    inference = optimizer(target, strict=True)
    inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    assert inference.report()["result"] == target


def test_a_half_model_that_is_slower_comes_back_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 2.0, 15.0)
    inference = optimizer(speed_guard=True)
    said = r"float16 takes 7.5 times float32's time on this device \(cpu\): its weights are smaller, its calls slower"
    with pytest.warns(UserWarning, match=said):
        result = inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    assert {parameter.dtype for parameter in result.parameters()} == {torch.float16}
    assert inference.report()["milliseconds"] == {"float32": 2.0, "float16": 15.0}
    assert ": float32 2 ms, float16 15 ms" in inference.explain()


def test_a_half_model_that_is_faster_comes_back_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, 2.0, 1.0)
    inference = optimizer("bfloat16", speed_guard=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    assert inference.report()["milliseconds"] == {"float32": 2.0, "bfloat16": 1.0}


def test_both_are_timed_on_one_guard_batch() -> None:
    inference = optimizer(speed_guard=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    times = inference.report()["milliseconds"]
    assert list(times) == ["float32", "float16"]
    assert min(times.values()) > 0.0


def test_nothing_is_timed_without_the_guard_or_where_the_model_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_optimize, "time_briefly", lambda *_: pytest.fail("timed"))
    inference = optimizer()
    inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    assert inference.report()["milliseconds"] == {}
    half = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).half()
    data = [images.half() for images in batches(labels=False)]
    inference = optimizer(speed_guard=True, accuracy_threshold=0.1)
    inference.optimize_for_inference(half, data, "cpu")
    assert inference.report()["unchanged"]


def test_calls_that_would_take_minutes_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [0, 0]

    def call(place: int) -> None:
        counts[place] += 1

    monkeypatch.setattr(int8_speed, "_LONGEST", 0.0)
    timings = time_briefly([lambda: call(0), lambda: call(1)], torch.device("cpu"))
    assert counts == [1, 1]
    assert [len(timing.rounds) for timing in timings] == [1, 1]
    monkeypatch.setattr(int8_speed, "_LONGEST", 20.0)
    timings = time_briefly([lambda: call(0), lambda: call(1)], torch.device("cpu"))
    assert [len(timing.rounds) for timing in timings] == [int8_speed.ROUNDS] * 2


@pytest.mark.parametrize("target", HALVES)
def test_options_that_mean_nothing_are_refused(target: str) -> None:
    with pytest.raises(ValueError, match=f"bits is 4 with target_precision='{target}', expected 8: only int8 has lev"):
        InferencePrecisionOptimizer(target, bits=4)
    with pytest.raises(ValueError, match=f"calibration_file is 'state.pt' with target_precision='{target}', expected"):
        InferencePrecisionOptimizer(target, calibration_file="state.pt")
    InferencePrecisionOptimizer(target, bits=8, calibration_file=None)
