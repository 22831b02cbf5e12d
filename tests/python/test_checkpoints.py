"""Saved scalers: both ways with torch, every way of saving, and what is refused."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from halfstep import GradScaler
from scaler_cases import one_parameter, used_scaler


def test_checkpoints_go_both_ways_with_torch() -> None:
    ours = used_scaler()
    torchs = torch.amp.GradScaler("cpu")
    torchs.load_state_dict(ours.state_dict())
    assert {**torchs.state_dict(), "halfstep": ours.state_dict()["halfstep"]} == ours.state_dict()
    back = GradScaler("cpu", min_scale=2.0)
    back.load_state_dict(torchs.state_dict())
    assert back.get_scale() == ours.get_scale()
    assert back._get_growth_tracker() == ours._get_growth_tracker()
    assert back.state_dict()["halfstep"]["min_scale"] == 2.0
    assert back.counters()["steps"] == 0


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy", "torch.save"])
@pytest.mark.parametrize("used_before", [False, True])
def test_all_state_survives(way: str, used_before: bool) -> None:
    ours = used_scaler(hysteresis=2, refill="on_growth", min_scale=1.0, max_scale=4096.0)
    assert ours.counters() | {"steps": 5, "skipped": 1} == ours.counters()
    if way == "pickle":
        back = pickle.loads(pickle.dumps(ours))
    elif way == "deepcopy":
        back = copy.deepcopy(ours)
    else:
        state = ours.state_dict()
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        back = used_scaler() if used_before else GradScaler("cpu")
        back.load_state_dict(state)
    assert back.state_dict() == ours.state_dict()
    for scaler in (back, ours):
        parameter, optimizer = one_parameter()
        scaler.scale(parameter.sum() * math.inf).backward()
        scaler.step(optimizer)
        scaler.update()
    assert back.state_dict() == ours.state_dict()


def test_a_fixed_and_a_moving_scale_do_not_turn_into_each_other() -> None:
    fixed = {"init_scale": 1.0, "min_scale": 1.0, "max_scale": 1.0}
    moving = used_scaler()
    for state, settings, scale in (
        (moving.state_dict(), fixed, 1.0),
        (torch.amp.GradScaler("cpu", init_scale=4096.0).state_dict(), fixed, 1.0),
        (GradScaler("cpu", **fixed).state_dict(), {"init_scale": 64.0}, 64.0),
    ):
        scaler = GradScaler("cpu", **settings)
        before = {key: value for key, value in scaler.state_dict()["halfstep"].items() if key != "counters"}
        with pytest.warns(UserWarning, match="Only its counters are taken"):
            scaler.load_state_dict(state)
        assert scaler.get_scale() == scale
        after = scaler.state_dict()["halfstep"]
        assert {key: after[key] for key in before} == before
        assert after["counters"] == state.get("halfstep", {}).get("counters", after["counters"])


BAD_STATES = {
    "missing keys": (lambda s: s.pop("growth_factor"), ValueError, "missing keys"),
    "foreign keys": (lambda s: s.update(lr=1.0), ValueError, r"unknown keys \['lr'\]"),
    "huge scale": (lambda s: s.update(scale=1e300), ValueError, "'scale' is 1e.300"),
    "huge tracker": (lambda s: s.update(_growth_tracker=2**40), ValueError, "'_growth_tracker' is"),
    "bool scale": (lambda s: s.update(scale=True), ValueError, "'scale' is True"),
    "huge credit": (lambda s: s["halfstep"].update(hysteresis_left=2**40), ValueError, "'hysteresis_left' is"),
    "negative counter": (lambda s: s["halfstep"]["counters"].update(steps=-5), ValueError, "'steps' is -5"),
    "fractional counter": (lambda s: s["halfstep"]["counters"].update(steps=2.5), ValueError, "'steps' is 2.5"),
    "nan scale": (lambda s: s.update(scale=math.nan), ValueError, "'scale' is nan"),
    "negative scale": (lambda s: s.update(scale=-2.0), ValueError, "'scale' is -2.0"),
    "text scale": (lambda s: s.update(scale="big"), ValueError, "'scale' is 'big'"),
    "growth factor": (lambda s: s.update(growth_factor=0.5), ValueError, "growth_factor is 0.5"),
    "own part": (lambda s: s.update(halfstep=3), TypeError, "halfstep.* is int, expected a dict"),
    "own keys": (lambda s: s["halfstep"].pop("refill"), ValueError, r"missing keys \['refill'\]"),
    "own refill": (lambda s: s["halfstep"].update(refill="x"), ValueError, "refill is 'x'"),
    "counters": (lambda s: s["halfstep"]["counters"].pop("steps"), ValueError, r"missing keys \['steps'\]"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_bad_state_dict_changes_nothing(case: str) -> None:
    change, error, message = BAD_STATES[case]
    scaler = used_scaler()
    before = scaler.state_dict()
    state = copy.deepcopy(used_scaler(hysteresis=3, min_scale=1.0).state_dict())
    change(state)
    with pytest.raises(error, match=message):
        scaler.load_state_dict(state)
    assert scaler.state_dict() == before
