"""The loss scale that follows the gradient norm: which norm, what overflows do, checkpoints, ranks' agreement."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from halfstep import GradScaler
from torch import nn

SEED = {"init_scale": 2.0**15, "growth_interval": 4}


def by_norm(norm: float) -> float:
    """The document's thresholds."""
    return 2**12 if norm > 10.0 else 2**18 if norm < 0.1 else 2**15


class Loop:
    """One parameter, whose gradient is chosen: its norm is the one given."""

    def __init__(self, device: torch.device, ask, **settings) -> None:
        self.parameter = nn.Parameter(torch.zeros(1, device=device))
        self.optimizer = torch.optim.SGD([self.parameter], lr=0.0)
        self.asked: list[float] = []

        def noted(norm: float):
            self.asked.append(norm)
            return ask(norm)

        self.scaler = GradScaler(device.type, scale_from_norm=noted, **{**SEED, **settings})

    def step(self, norm: float) -> float:
        """Return the scale after the step."""
        self.optimizer.zero_grad()
        self.scaler.scale(self.parameter * norm).sum().backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale()


def test_the_scale_follows_the_norm_one_step_behind(device: torch.device) -> None:
    loop = Loop(device, by_norm)
    scales = [loop.step(norm) for norm in (1.0, 100.0, 0.01, 0.01, 1.0, 1.0)]
    assert loop.asked == pytest.approx([1.0, 100.0, 0.01, 0.01, 1.0]), "of the step before the one that ends"
    assert scales == [2**15, 2**15, 2**12, 2**18, 2**18, 2**15]


def test_an_overflow_backs_off_and_limits_what_is_granted(device: torch.device) -> None:
    loop = Loop(device, lambda norm: 2**18, growth_interval=3)
    assert [loop.step(1.0) for _ in range(2)] == [2**15, 2**18]
    assert loop.step(math.inf) == 2**17
    assert [loop.step(1.0) for _ in range(2)] == [2**17] * 2, "what overflowed is not granted again"
    assert loop.step(1.0) == 2**18, "three clean steps lift the limit"
    assert all(norm == 1.0 for norm in loop.asked), "a skipped step has no say"
    assert loop.scaler.counters()["backoffs"] == 1


def test_overflows_in_a_row_back_off_each_time(device: torch.device) -> None:
    loop = Loop(device, lambda norm: 2**18)
    loop.step(1.0)
    loop.step(1.0)
    assert [loop.step(math.inf) for _ in range(3)] == [2**17, 2**16, 2**15]
    assert loop.step(1.0) == 2**15


def test_none_leaves_the_scale_to_the_rule(device: torch.device) -> None:
    loop = Loop(device, lambda norm: None, growth_interval=2)
    plain = GradScaler(device.type, **{**SEED, "growth_interval": 2})
    parameter = nn.Parameter(torch.zeros(1, device=device))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for norm in (1.0, 2.0, math.inf, 1.0, 1.0, 1.0):
        optimizer.zero_grad()
        plain.scale(parameter * norm).sum().backward()
        plain.step(optimizer)
        plain.update()
        assert loop.step(norm) == plain.get_scale()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (0.0, ValueError, "the loss scale for a gradient norm of 1 is 0.0, expected a number > 0"),
        (-2, ValueError, "is -2"),
        (math.inf, ValueError, "is inf"),
        (math.nan, ValueError, "is nan"),
        ("2", TypeError, "is '2'"),
        (True, TypeError, "is True"),
    ],
)
def test_an_answer_that_is_no_scale_changes_nothing(answer, error, message) -> None:
    loop = Loop(torch.device("cpu"), lambda norm: answer)
    assert loop.step(1.0) == 2**15
    with pytest.raises(error, match=message):
        loop.step(1.0)
    assert loop.scaler.get_scale() == 2**15
    assert loop.scaler.counters()["steps"] == 1, "the update has not happened"
    loop.scaler._request.ask = lambda norm: 2**10
    loop.scaler.update()
    assert loop.scaler.get_scale() == 2**10


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="scale_from_norm is 3, expected a function"):
        GradScaler("cpu", scale_from_norm=3)
    assert GradScaler("cpu", enabled=False, scale_from_norm=by_norm).get_scale() == 1.0


@pytest.mark.parametrize("through", ["state_dict", "pickle", "deepcopy"])
def test_a_resumed_run_goes_on_as_it_would_have(device: torch.device, through: str) -> None:
    norms = [1.0, 100.0, math.inf, 0.01, 0.01, 0.01, 1.0, 100.0, 0.01]
    whole = Loop(device, by_norm)
    expected = [whole.step(norm) for norm in norms]
    for stop in range(1, len(norms)):
        loop = Loop(device, by_norm)
        scales = [loop.step(norm) for norm in norms[:stop]]
        if through == "state_dict":
            state = loop.scaler.state_dict()
            assert set(state["halfstep"]["request"]) == {"limit", "norm"}
            resumed = GradScaler(device.type, scale_from_norm=by_norm, **SEED)
            resumed.load_state_dict(state)
        else:
            loop.scaler._request.ask = by_norm  # a local function cannot be pickled
            resumed = pickle.loads(pickle.dumps(loop.scaler)) if through == "pickle" else copy.deepcopy(loop.scaler)
        loop.scaler = resumed
        scales += [loop.step(norm) for norm in norms[stop:]]
        assert scales == expected, f"stopped after {stop}"


def test_checkpoints_of_others_start_without_a_limit() -> None:
    theirs = torch.amp.GradScaler("cpu", init_scale=256.0)
    theirs.scale(torch.ones(()))
    loop = Loop(torch.device("cpu"), by_norm)
    loop.step(math.inf)
    loop.scaler.load_state_dict(theirs.state_dict())
    loop.step(0.01)
    assert loop.step(0.01) == 2**18
    state = loop.scaler.state_dict()
    assert GradScaler("cpu").load_state_dict(state) is None, "a scaler without a function takes the rest"
    state["halfstep"]["request"]["limit"] = -1.0
    with pytest.raises(ValueError, match="'limit' is -1.0"):
        loop.scaler.load_state_dict(state)
    del state["halfstep"]["request"]["limit"]
    with pytest.raises(ValueError, match="missing keys"):
        loop.scaler.load_state_dict(state)


def test_a_scale_that_is_set_is_the_limit() -> None:
    loop = Loop(torch.device("cpu"), lambda norm: 2**18)
    loop.step(1.0)
    loop.scaler.set_scale(2.0**14)
    assert loop.step(1.0) == 2**14
    with pytest.raises(ValueError, match="scale is 0"):
        loop.scaler.set_scale(0)


@pytest.mark.cuda
def test_nothing_waits_for_the_step_that_ends() -> None:
    loop = Loop(torch.device("cuda"), by_norm)
    loop.step(1.0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            loop.optimizer.zero_grad()
            loss = loop.scaler.scale(loop.parameter).sum()
            torch.cuda._sleep(200_000_000)  # a tenth of a second: update() returns while the device works on it
            loss.backward()
            loop.scaler.step(loop.optimizer)
            done = torch.cuda.Event()
            done.record()
            loop.scaler.update()
            assert not done.query(), "update() has waited for its own step"
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_a_graph_of_the_users_own_follows_with_after_replay() -> None:
    loop = Loop(torch.device("cuda"), by_norm)
    factor = torch.ones((), device="cuda")

    def body() -> None:
        loop.optimizer.zero_grad(set_to_none=False)
        loop.scaler.scale(loop.parameter * factor).sum().backward()
        loop.scaler.unscale_(loop.optimizer)
        loop.scaler.update()

    loop.step(1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    scales = []
    for norm in (100.0, 0.01, 0.01, 1.0):
        factor.fill_(norm)
        graph.replay()
        loop.scaler.after_replay()
        scales.append(loop.scaler.get_scale())
    assert scales == [2**15, 2**12, 2**18, 2**18]
