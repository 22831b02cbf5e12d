"""What is timed: calls of models on arguments that are there already, and on the batch as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from halfstep import InferencePrecisionOptimizer, int8_carriers, int8_speed_guard
from halfstep.calibration_data import Batch, batch_of
from halfstep.int8_speed import calls_of, time_in_turns
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
    assert during == [0, 0]  # the float types, and int8 against them
