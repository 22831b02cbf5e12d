"""What is timed: calls of models on arguments that are there already, and on the batch as it was."""

from __future__ import annotations

import collections
import copy
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from halfstep import InferencePrecisionOptimizer, int8_carriers, int8_speed_guard
from halfstep.calibration_data import Batch, batch_of
from halfstep.half_model import CastModel
from halfstep.int8_form import Form
from halfstep.int8_graph import TRACING
from halfstep.int8_layers import Int8Layer
from halfstep.int8_report import RegionReport, Report
from halfstep.int8_speed import Timing, calls_of, loses, share_of, time_in_turns, time_on_device
from inference_cases import batches, trained_mlp
from torch import nn


class Noting(nn.Module):
    """Keeps what it was called with, and writes to it if told so."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes
        self.values: list[torch.Tensor] = []
        self.places: set[int] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.values.append(x.clone())
        self.places.add(x.data_ptr())
        return x.add_(1) if self.writes else x + 1


def test_the_batch_is_copied_before() -> None:
    models, x = [Noting(False), Noting(False)], torch.randn(4, 3)
    for call in calls_of(models, batch_of(models[0], x)):
        for _ in range(3):
            call()
    assert models[0].places == models[1].places
    assert len(models[0].places) == 1
    assert x.data_ptr() not in models[0].places


def test_a_model_that_writes_gets_the_batch_in_each_call_and_its_rivals_copy_as_well() -> None:
    writing, reading, x = Noting(True), Noting(False), torch.randn(4, 3)
    before = x.clone()
    calls = calls_of([writing, reading], batch_of(reading, x))
    for model in (writing, reading):
        model.values.clear()
    kept = [call() for call in calls for _ in range(3)]
    assert all(torch.equal(value, before) for model in (writing, reading) for value in model.values)
    assert len({out.data_ptr() for out in kept}) == 6
    assert torch.equal(x, before)


def test_a_model_that_takes_items_out_of_its_argument() -> None:
    class Popping(nn.Module):
        def forward(self, batch: dict[str, Any]) -> torch.Tensor:
            return batch.pop("x") * batch.pop("factor")

    model = Popping()
    (call,) = calls_of([model], Batch(({"x": torch.ones(2), "factor": 3},), {}, None, 2))
    assert [call().tolist() for _ in range(3)] == [[3.0, 3.0]] * 3


def test_no_copy_of_a_batch_is_in_the_times_of_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, during = [], []
    arguments = Batch.arguments

    def counted(batch: Batch) -> Any:
        copies.append(batch)
        return arguments(batch)

    def timed(*args: Any) -> Any:
        before = len(copies)
        found = time_in_turns(*args, rounds=3)
        during.append(len(copies) - before)
        return found

    monkeypatch.setattr(Batch, "arguments", counted)
    for module in (int8_carriers, int8_speed_guard):
        monkeypatch.setattr(module, "time_in_turns", timed)
    monkeypatch.setattr(int8_speed_guard, "loses", lambda _mine, _rival: False)
    inference = InferencePrecisionOptimizer(progress=False)
    inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    assert inference.report()["result"] == "int8"
    assert len(during) >= 2  # the float types, perhaps int8 in them, and int8 against them
    assert set(during) == {0}


def int8_layers(model: nn.Module) -> int:
    return sum(isinstance(module, Int8Layer) for module in model.modules())


def timed_by(milliseconds: Callable[[int], float]) -> Callable[..., list[Timing]]:
    """Return a time_in_turns() that says how long a model takes by the number of its int8 layers."""
    return lambda calls, *_: [Timing((milliseconds(int8_layers(call.func)),) * 3) for call in calls]


@pytest.mark.parametrize("whole_wins", [True, False])
def test_the_whole_model_decides_about_regions_that_are_slower_alone(
    monkeypatch: pytest.MonkeyPatch, whole_wins: bool
) -> None:
    slower = {"int8": Timing((2.0,) * 3), "float32": Timing((1.0,) * 3)}
    monkeypatch.setattr(Form, "time_region", lambda *_args: slower)
    for module in (int8_carriers, int8_speed_guard):
        monkeypatch.setattr(module, "time_in_turns", timed_by(lambda n: 10.0 - n if whole_wins else 10.0 + n))
    inference = InferencePrecisionOptimizer(progress=False, accuracy_threshold=0.5)
    model = inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    report = inference.report()
    if whole_wins:
        assert report["result"] == "int8"
        assert int8_layers(model) == len([r for r in report["regions"] for _ in r["layers"]])
        said = r"the model takes 7 ms in float32, without those that are slower alone 10 ms in float32: all are kept"
        assert any(re.search(said, note) for note in report["notes"])
    else:
        assert report["result"] != "int8"
        assert int8_layers(model) == 0
        assert {region["why"] for region in report["regions"]} == {"slower: 2 of float32's time, round by round"}


def test_what_is_printed_agrees_with_the_decision() -> None:
    mine, rival = Timing((1.0, 5.0, 5.1)), Timing((0.9, 4.9, 9.0))
    assert mine.median > rival.median
    assert loses(mine, rival)
    assert share_of(mine, rival, "float16") == "1.02 of float16's time, round by round"
    lasting, short = Timing((1.0, 2.02, 3.0)), Timing((0.99, 2.5, 2.99))  # medians say the contrary
    assert lasting.median < short.median
    assert loses(lasting, short)
    for ratio in (1.00004, 1 + 1e-12):
        close = Timing((ratio,))
        assert loses(close, Timing((1.0,)))
        assert not share_of(close, Timing((1.0,)), "float16").startswith("1 of")
    assert share_of(rival, rival, "float32").startswith("1 of")
    assert share_of(Timing((50.0,)), Timing((100.0,)), "float32").startswith("0.5 of")


@pytest.mark.parametrize("float_wins", [True, False])
def test_carrier_and_times_of_regions_are_those_of_what_came_back(
    monkeypatch: pytest.MonkeyPatch, float_wins: bool
) -> None:
    """bfloat16 is the fastest float type; the int8 model is faster in float32; at last the float model may win."""
    carriers: list[torch.dtype] = []
    turns = []

    def time_region(_form: Any, region: Any, _inners: Any, _layers: Any, _batch: Any, carrier: torch.dtype) -> Any:
        carriers.append(carrier)
        half = carrier == torch.bfloat16
        slow = "head" in region.layers
        int8 = 3.0 if slow else 0.5
        return {"int8": Timing((int8 + half,)), "float32": Timing((2.0,)), "bfloat16": Timing((1.75,))}

    def timed(calls: Any, *_: Any) -> list[Timing]:
        turns.append(calls)
        found = []
        for call in calls:
            half = isinstance(call.func, CastModel)
            if int8_layers(call.func):
                found.append((1.0 + half) * (10.0 if float_wins and len(turns) > 2 else 1.0))
            else:
                found.append(3.0 if half else 4.0)
        return [Timing((t,)) for t in found]

    monkeypatch.setattr(Form, "time_region", time_region)
    for module in (int8_carriers, int8_speed_guard):
        monkeypatch.setattr(module, "time_in_turns", timed)
    inference = InferencePrecisionOptimizer(progress=False, accuracy_threshold=0.5)
    result = inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    report, said = inference.report(), inference.explain()
    assert carriers[0] == torch.bfloat16
    if float_wins:
        assert report["result"] == report["carrier"] == "bfloat16"
        assert isinstance(result, CastModel)
        assert "int8 takes 3.33 of bfloat16's time, round by round: int8 is not used" in report["notes"]
        assert all(region["milliseconds"]["int8"] in (1.5, 4.0) for region in report["regions"])
        assert "where it is not int8" not in said
    else:
        assert (report["result"], report["carrier"]) == ("int8", "float32")
        assert said.startswith("int8 on cpu: the result is int8, and float32 where it is not int8\n")
        kept = [region for region in report["regions"] if region["state"] == "int8"]
        assert kept
        assert all(region["milliseconds"]["int8"] in (0.5, 3.0) for region in kept)


def test_a_layer_that_is_given_back_for_accuracy_has_times_of_whichever_carrier_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regions are timed in bfloat16, the fastest float type; then the model is faster in float32."""

    def time_region(*_: Any) -> dict[str, Timing]:
        return {"int8": Timing((1.0,)), "float32": Timing((3.0,)), "bfloat16": Timing((2.0,))}

    def timed(calls: Any, *_: Any) -> list[Timing]:
        halves = [isinstance(call.func, CastModel) for call in calls]
        int8 = [bool(int8_layers(call.func)) for call in calls]
        return [Timing((1.0 + half if mine else 4.0 - half,)) for half, mine in zip(halves, int8, strict=True)]

    monkeypatch.setattr(Form, "time_region", time_region)
    for module in (int8_carriers, int8_speed_guard):
        monkeypatch.setattr(module, "time_in_turns", timed)
    model = copy.deepcopy(trained_mlp())
    with torch.no_grad():
        model.first.weight[5] *= 1e4
        model.first.bias[5] *= 1e4
        model.second.weight[:, 5] /= 1e4
    inference = InferencePrecisionOptimizer(progress=False, smooth_quant=False, calibration_samples=1797)
    inference.optimize_for_inference(model, batches(1797), "cpu")
    report = inference.report()
    assert report["carrier"] == "float32"
    assert list(report["given_back"]) == ["second"]
    times = {region["layers"][0]: region["milliseconds"] for region in report["regions"]}
    assert times["second"] == {"int8": 1.0, "float32": 3.0, "bfloat16": 2.0}


class SlowHalf(nn.Module):
    """A layer that takes long in float16, as on a processor without instructions for it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.calls: collections.Counter[torch.dtype] = collections.Counter()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls[x.dtype] += 1
        if x.dtype == torch.float16:
            time.sleep(0.05)
        return self.layer(x.flatten(1))

    def __deepcopy__(self, memo: Any) -> SlowHalf:
        made = SlowHalf()
        made.load_state_dict(self.state_dict())
        made.calls = self.calls  # of all copies together
        return made


def test_a_type_that_is_hopelessly_slow_is_not_measured() -> None:
    model = SlowHalf().eval()
    inference = InferencePrecisionOptimizer(progress=False, accuracy_threshold=0.5)
    inference.optimize_for_inference(model, batches(), "cpu")
    report = inference.report()
    assert model.calls[torch.float16] == 3, "to see whether it works, and twice to see how fast"
    assert {"float32", "bfloat16"} <= report["milliseconds"].keys()
    assert "float16" not in report["milliseconds"]
    (note,) = (note for note in report["notes"] if note.startswith("float16 is not used: "))
    assert re.fullmatch(r"float16 is not used: \d+ samples take 5\d(\.\d+)? ms, \S+ in float32", note), note
    assert report["halves"] == ""


def test_layers_tell_that_a_time_is_their_regions() -> None:
    region = RegionReport(["a"], "float", "slow", milliseconds={"int8": 2.0, "float32": 1.0}, timed=["a", "b"])
    alone = RegionReport(["c"], "float", "small", milliseconds={"int8": 3.0})
    lines = str(Report("int8", "cpu", regions=[region, alone])).splitlines()
    assert "  a: float; int8 2 ms, float32 1 ms in a region of 2 layers; slow" in lines
    assert "  c: float; int8 3 ms; small" in lines


@pytest.mark.parametrize("carrier", ["bfloat16", "float32"])
def test_the_carrier_is_the_type_in_which_the_int8_model_is_fastest(
    monkeypatch: pytest.MonkeyPatch, carrier: str
) -> None:
    def timed(calls: Any, *_: Any) -> list[Timing]:
        found = []
        for call in calls:
            types = {p.dtype for p in call.func.parameters()}
            half = isinstance(call.func, CastModel) and "bfloat16" in str(call.func.dtype)
            if int8_layers(call.func):
                found.append(1.0 if half == (carrier == "bfloat16") else 2.0)
            else:
                found.append(3.0 if half else 4.0 if types <= {torch.float32} else 5.0)
        return [Timing((t,) * 3) for t in found]

    monkeypatch.setattr(Form, "time_region", lambda *_args: {"int8": Timing((1.0,)), "float32": Timing((2.0,))})
    for module in (int8_carriers, int8_speed_guard):
        monkeypatch.setattr(module, "time_in_turns", timed)
    inference = InferencePrecisionOptimizer(progress=False, accuracy_threshold=0.5)
    inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    assert inference.report()["result"] == "int8"
    assert inference.report()["carrier"] == carrier


class Compiled(nn.Module):
    """What a test has torch.compile return."""

    def __init__(self, model: nn.Module, fails: bool) -> None:
        super().__init__()
        self.model, self.fails = model, fails

    def forward(self, *args: Any) -> Any:
        if self.fails:
            raise RuntimeError("no compiler")
        return self.model(*args)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("asked", [True, None])
def test_compiled_models_are_compared_with_compiled_ones(
    monkeypatch: pytest.MonkeyPatch, asked: bool | None, fails: bool
) -> None:
    timed: list[list[nn.Module]] = []

    def time(calls: Any, *_: Any) -> list[Timing]:
        timed.append([call.func for call in calls])
        return [Timing((10.0 - int8_layers(call.func),) * 3) for call in calls]

    model = trained_mlp()
    given = model if asked else torch.compile(model)  # it is not called, so nothing is compiled
    monkeypatch.setattr(torch, "compile", lambda each: Compiled(each, fails))
    for module in (int8_carriers, int8_speed_guard):
        monkeypatch.setattr(module, "time_in_turns", time)
    monkeypatch.setattr(Form, "time_region", lambda *_args: {"int8": Timing((1.0,)), "float32": Timing((2.0,))})
    inference = InferencePrecisionOptimizer(progress=False, accuracy_threshold=0.5, compiled=asked)
    result = inference.optimize_for_inference(given, batches(), "cpu")
    assert not isinstance(result, Compiled)
    assert all(isinstance(each, Compiled) != fails for each in timed[-1])
    assert not any(isinstance(each, Compiled) for each in timed[0])
    notes = inference.report()["notes"]
    assert any(("no compiler" if fails else "timed compiled") in note for note in notes)


def test_a_half_that_is_fast_only_when_compiled_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(model: nn.Module) -> str:
        inner = model.model if isinstance(model, Compiled) else model
        return "int8" if int8_layers(inner) else str(next(inner.parameters()).dtype)

    def time(calls: Any, *_: Any) -> list[Timing]:
        compiled = isinstance(calls[0].func, Compiled)
        eager = {"torch.float32": 1.0, "torch.bfloat16": 2.0, "torch.float16": 3.0, "int8": 0.9}
        when_compiled = {"torch.float32": 1.0, "torch.bfloat16": 0.5, "int8": 0.7}
        return [Timing(((when_compiled if compiled else eager)[kind(call.func)],) * 3) for call in calls]

    monkeypatch.setattr(torch, "compile", lambda each: Compiled(each, False))
    for module in (int8_carriers, int8_speed_guard):
        monkeypatch.setattr(module, "time_in_turns", time)
    monkeypatch.setattr(Form, "time_region", lambda *_args: {"int8": Timing((1.0,)), "float32": Timing((2.0,))})
    for compiled, expected in ((False, "int8"), (True, "bfloat16")):
        inference = InferencePrecisionOptimizer(progress=False, accuracy_threshold=0.5, compiled=compiled)
        inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
        report = inference.report()
        assert report["result"] == expected
    assert report["milliseconds"] == {"float32": 1.0, "bfloat16": 0.5, "int8": 0.7}


@pytest.mark.parametrize("compiled", [False, True])
def test_no_trace_begins_while_compiled_models_are_called(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """A compiled model refuses to be called while torch.fx traces, in whichever thread."""
    locked: list[bool] = []

    def timed(calls: Any, device: torch.device) -> list[Timing]:
        locked.append(TRACING.locked())
        return time_in_turns(calls, device, 1)

    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(int8_speed_guard, "time_in_turns", timed)
    monkeypatch.setattr(int8_speed_guard, "loses", lambda mine, rival: False)
    inference = InferencePrecisionOptimizer(progress=False, accuracy_threshold=0.5, compiled=compiled)
    inference.optimize_for_inference(trained_mlp(), batches(), "cpu")
    assert locked[-1] is compiled
    assert not TRACING.locked()


def test_an_eager_model_is_compared_with_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda _model: pytest.fail("was compiled"))
    for compiled in (None, False):
        InferencePrecisionOptimizer(progress=False, compiled=compiled).optimize_for_inference(
            trained_mlp(), batches(), "cpu"
        )


@pytest.mark.cuda
def test_times_on_the_device_leave_out_the_host() -> None:
    cuda = torch.device("cuda")
    x = torch.randn(64, 64, device=cuda)
    launched = []

    def call() -> torch.Tensor:
        launched.append(None)
        return x + x

    (timing,) = time_on_device([call], cuda)
    assert len(launched) == 11  # once to warm up and ten times to capture: none of it is timed
    assert all(time > 0 for time in timing.rounds)


@pytest.mark.cuda
def test_what_cannot_be_captured_is_timed_as_it_is() -> None:
    cuda = torch.device("cuda")
    x = torch.randn(64, 64, device=cuda)
    calls = [lambda: x + x, lambda: (x + x).sum().item()]
    assert len(time_on_device(calls, cuda)) == 2
    assert torch.rand(4, device=cuda).shape == (4,)  # the random state is not a capture's
