"""The report of the last step, which never waits."""

from __future__ import annotations

import math

import pytest
import torch
from halfstep import GradScaler, release
from torch import nn


def named(device: torch.device, kind=torch.optim.SGD):
    good, bad = (nn.Parameter(torch.ones(4, device=device)) for _ in range(2))
    return good, bad, kind([("encoder.weight", good), ("decoder.weight", bad)], lr=1.0)


def one_step(scaler: GradScaler, good, bad, optimizer, factor: float = 1.0) -> None:
    optimizer.zero_grad()
    factors = torch.ones_like(good)
    factors[1].fill_(factor)
    scaler.scale((good + bad * factors).sum()).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad], ids=["fused", "torchs"])
def test_says_what_happened(device: torch.device, kind) -> None:
    good, bad, optimizer = named(device, kind)
    scaler = GradScaler(device.type, init_scale=8.0, name_overflows=True)
    assert scaler.last_step() is None
    assert scaler.skipped_steps == 0
    one_step(scaler, good, bad, optimizer)
    report = scaler.last_step(wait=True)
    assert (report.step, report.skipped, report.reason, report.scale) == (1, False, "", 8.0)
    assert report.norm == pytest.approx(math.sqrt(8.0))
    assert report.overflowed == ()
    for number, (factor, reason) in enumerate([(math.inf, "inf"), (math.nan, "nan")], start=2):
        one_step(scaler, good, bad, optimizer, factor)
        report = scaler.last_step(wait=True)
        assert (report.step, report.skipped, report.reason) == (number, True, reason)
        assert report.skipped_steps == scaler.skipped_steps == number - 1
        assert report.overflowed == ("decoder.weight",)
    assert report.scale == 4.0


def test_names_cost_nothing_unless_asked_for(device: torch.device) -> None:
    good, bad, optimizer = named(device)
    scaler = GradScaler(device.type)
    one_step(scaler, good, bad, optimizer, math.inf)
    report = scaler.last_step(wait=True)
    assert report.skipped
    assert report.overflowed == ()


def test_reports_arrive_in_order_and_reach_the_end(device: torch.device) -> None:
    good, bad, optimizer = named(device)
    scaler = GradScaler(device.type)
    seen = []
    for i in range(1100):  # once around the ring of 1024 records
        one_step(scaler, good, bad, optimizer, math.inf if i % 100 == 7 else 1.0)
        report = scaler.last_step()
        if report is not None:
            seen.append((report.step, report.skipped_steps))
    assert seen == sorted(seen)
    assert scaler.last_step(wait=True).step == 1100
    assert scaler.skipped_steps == 11


def test_a_loaded_scaler_reports_its_own_steps(device: torch.device) -> None:
    good, bad, optimizer = named(device)
    scaler = GradScaler(device.type)
    one_step(scaler, good, bad, optimizer, math.inf)
    resumed = GradScaler(device.type)
    resumed.load_state_dict(scaler.state_dict())
    assert resumed.last_step() is None
    assert resumed.skipped_steps == 1
    one_step(resumed, good, bad, optimizer)
    report = resumed.last_step(wait=True)
    assert (report.step, report.skipped, report.skipped_steps) == (2, False, 1)


@pytest.mark.cuda
def test_never_waits_for_the_gpu() -> None:
    good, bad, optimizer = named(torch.device("cuda"))
    scaler = GradScaler("cuda", name_overflows=True)
    one_step(scaler, good, bad, optimizer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            one_step(scaler, good, bad, optimizer)
            scaler.last_step()
            assert scaler.skipped_steps == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scaler.last_step(wait=True).step == 6


def test_what_a_step_takes_and_what_it_names() -> None:
    import numpy as np

    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = GradScaler("cpu", init_scale=1.0)
    scaler.scale(parameter.sum()).backward()
    for wrong in (True, 0, "1", torch.ones(())):
        with pytest.raises(ValueError, match="max_norm is .*, expected a number > 0"):
            scaler.step(optimizer, max_norm=wrong)
    with pytest.raises(TypeError, match="got 1.0 for the optimizer's closure; the norm is max_norm="):
        scaler.step(optimizer, 1.0)
    scaler.step(optimizer, max_norm=np.float32(1.0))
    torch.testing.assert_close(parameter.detach(), torch.full((4,), 0.5))
    with pytest.raises(TypeError, match="release: got a Parameter, expected an optimizer"):
        release(parameter)
