"""The scale rule as a torch op: torch's own op and the peers' simulators, over random histories."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import halfstep
import peers
import pytest
import scale_gradients
import torch
from halfstep.scale_rule import PRESETS, rule_of
from halfstep.scaler_state import COUNTERS, HISTORY_SHAPE
from hypothesis import given, settings
from hypothesis import strategies as st

halfstep.load_library()
ops = torch.ops.halfstep

RULE_NAMES = ("growth_factor", "backoff_factor", "growth_interval", "min_scale", "max_scale")
RULE_NAMES += ("hysteresis", "refill", "growth_delay")


def preset(name: str) -> dict:
    return dict(zip(("init_scale", *RULE_NAMES), ops.scale_preset(name), strict=True))


class Scale:
    """The op's state, on a device."""

    def __init__(self, rule: dict, device: str | torch.device = "cpu") -> None:
        self.rule = {name: rule[name] for name in RULE_NAMES}
        self.scale = torch.tensor(rule["init_scale"], dtype=torch.float32, device=device)
        self.growth_tracker = torch.tensor(-rule["growth_delay"], dtype=torch.int32, device=device)
        self.hysteresis_left = torch.tensor(rule["hysteresis"], dtype=torch.int32, device=device)
        self.counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        self.history = torch.zeros(HISTORY_SHAPE, dtype=torch.float64, device=device)

    def step(self, *found: float, norm: tuple[float, ...] = ()) -> float:
        flags = [torch.tensor(float(flag), device=self.scale.device) for flag in found]
        norms = [torch.tensor(float(value), device=self.scale.device) for value in norm]
        ops.update_scale_(
            self.scale,
            self.growth_tracker,
            self.hysteresis_left,
            self.counters,
            self.history,
            flags,
            norms,
            **self.rule,
        )
        return self.scale.item()


PEER_RULES = {
    "torch": lambda: preset("torch"),
    "keras": lambda: preset("keras"),
    "tf_keras": lambda: {**preset("keras"), "min_scale": 1.0},
    "megatron": lambda: preset("megatron"),
    "deepspeed": lambda: preset("deepspeed"),
    "deepspeed_consecutive": lambda: {**preset("deepspeed"), "refill": "on_clean_step"},
    "apex": lambda: preset("apex"),
    "paddle": lambda: preset("paddle"),
}
WITH_HYSTERESIS = {"megatron", "deepspeed", "deepspeed_consecutive", "apex", "paddle"}


@pytest.mark.parametrize("peer", PEER_RULES)
@settings(deadline=None, max_examples=60)
@given(
    found=st.lists(st.booleans(), max_size=60),
    exponent=st.integers(-2, 40),
    interval=st.integers(1, 6),
    hysteresis=st.integers(1, 4),
)
def test_the_presets_follow_their_peers(
    peer: str, found: list[bool], exponent: int, interval: int, hysteresis: int
) -> None:
    rule = {**PEER_RULES[peer](), "growth_interval": interval}
    rule["init_scale"] = max(2.0**exponent, rule["min_scale"])
    if peer in WITH_HYSTERESIS:
        rule["hysteresis"] = hysteresis
    oracle = peers.PEERS[peer](init_scale=rule["init_scale"], growth_interval=interval, hysteresis=hysteresis)
    ours = Scale(rule)
    assert [ours.step(flag) for flag in found] == [oracle.step(flag) for flag in found]


@settings(deadline=None, max_examples=100)
@given(
    found=st.lists(st.booleans(), max_size=60),
    init_scale=st.floats(2.0**-149, torch.finfo(torch.float32).max, width=32),
    growth_factor=st.floats(1.0, 1e6, exclude_min=True),
    backoff_factor=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
    interval=st.integers(1, 5),
)
def test_torch_is_followed_bit_for_bit_with_any_factors(
    found: list[bool], init_scale: float, growth_factor: float, backoff_factor: float, interval: int
) -> None:
    rule = {**preset("torch"), "init_scale": init_scale, "growth_factor": growth_factor}
    rule |= {"backoff_factor": backoff_factor, "growth_interval": interval}
    ours = Scale(rule)
    scale, tracker = ours.scale.clone(), ours.growth_tracker.clone()
    for flag in found:
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(flag)), growth_factor, backoff_factor, interval)
        ours.step(flag)
        assert ours.scale.item() == scale.item()
        assert ours.growth_tracker.item() == tracker.item()


@pytest.mark.cuda
def test_the_gpu_follows_the_cpu() -> None:
    generator = torch.Generator().manual_seed(1)
    for name in PEER_RULES:
        rule = {**PEER_RULES[name](), "growth_interval": 3}
        cpu, cuda = Scale(rule), Scale(rule, "cuda")
        for i in range(60):
            flag = torch.rand((), generator=generator).item() < 0.4
            norm = (math.nan if i % 5 == 0 else math.inf,) if flag else (float(i), 1.0)
            assert cuda.step(flag, norm=norm) == cpu.step(flag, norm=norm)
        for attribute in ("growth_tracker", "hysteresis_left", "counters"):
            assert torch.equal(getattr(cuda, attribute).cpu(), getattr(cpu, attribute))
        torch.testing.assert_close(cuda.history.cpu(), cpu.history, rtol=1e-15, atol=0, equal_nan=True)


def test_a_step_that_overflowed_twice_counts_once(device: torch.device) -> None:
    scale = Scale(preset("torch"), device)
    assert scale.step(1.0, 1.0, 0.0) == 32768.0
    assert dict(zip(COUNTERS, scale.counters.tolist(), strict=True))["skipped"] == 1


@pytest.mark.parametrize("count", [64, 65, 300])
def test_any_number_of_flags_and_norms(device: torch.device, count: int) -> None:
    scale = Scale(preset("torch"), device)
    scale.step(*[0.0] * (count - 1), 1.0, norm=(2.0,) * count)
    assert scale.scale.item() == 32768.0
    assert scale.history[0, 3].item() == pytest.approx(2.0 * math.sqrt(count), rel=1e-6)
    flags = [torch.zeros((), device=device) for _ in range(count)]
    assert ops.combine_found(flags).item() == 0.0
    flags[count // 2].fill_(7.0)
    assert ops.combine_found(flags).item() == 1.0


def test_the_state_beyond_scale_and_tracker_is_optional(device: torch.device) -> None:
    scale, tracker = torch.tensor(8.0, device=device), torch.tensor(0, dtype=torch.int32, device=device)
    ops.update_scale_(scale, tracker, None, None, None, [torch.ones((), device=device)], [])
    assert scale.item() == 4.0


def test_opcheck(device: torch.device) -> None:
    state = Scale(preset("megatron"), device)
    flags = [torch.ones((), device=device), torch.zeros((), device=device)]
    arguments = (state.scale, state.growth_tracker, state.hysteresis_left, state.counters, state.history, flags, flags)
    torch.library.opcheck(ops.update_scale_.default, arguments, state.rule)
    torch.library.opcheck(ops.combine_found.default, (flags,))


def test_unknown_presets_are_named() -> None:
    with pytest.raises(ValueError, match="preset is 'colossal', expected one of 'torch', 'keras', 'megatron'"):
        ops.scale_preset("colossal")


BAD_ARGUMENTS = [
    ({"growth_factor": 0.5}, ValueError, "growth_factor is 0.5"),
    ({"backoff_factor": math.nan}, ValueError, "backoff_factor is nan"),
    ({"growth_interval": 0}, ValueError, "growth_interval is 0"),
    ({"min_scale": -1.0}, ValueError, "min_scale is -1"),
    ({"max_scale": math.inf}, ValueError, "max_scale is inf"),
    ({"hysteresis": 0}, ValueError, "hysteresis is 0"),
    ({"refill": "always"}, ValueError, "refill is 'always', expected one of 'on_growth'"),
    ({"growth_delay": -1}, ValueError, "growth_delay is -1"),
    ({"found": []}, ValueError, "found is an empty list"),
    ({"found": [torch.ones(2)]}, ValueError, "found has 2 elements"),
    ({"norm": [torch.ones((), dtype=torch.float64)]}, TypeError, "norm has dtype Double"),
    ({"scale": torch.tensor(1)}, TypeError, "scale has dtype Long"),
    ({"counters": torch.zeros(3, dtype=torch.int64)}, ValueError, "counters has 3 elements, expected 8"),
    ({"counters": None}, ValueError, "got history without counters"),
    ({"hysteresis_left": None, "hysteresis": 2}, ValueError, "expected hysteresis_left"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS, ids=[case[2] for case in BAD_ARGUMENTS])
def test_bad_arguments_are_named_and_nothing_is_written(changes: dict, error: type, message: str) -> None:
    state = Scale(preset("torch"))
    arguments = {
        "scale": state.scale,
        "growth_tracker": state.growth_tracker,
        "hysteresis_left": state.hysteresis_left,
        "counters": state.counters,
        "history": state.history,
        "found": [torch.ones(())],
        "norm": [],
        **state.rule,
        **changes,
    }
    with pytest.raises(error, match=f"update_scale_: .*{message}"):
        ops.update_scale_(**arguments)
    assert state.scale.item() == 65536.0
    assert not state.counters.any()


def test_the_golden_header_is_what_the_simulators_say() -> None:
    header = Path(__file__).parents[1] / "core" / "golden_trajectories.h"
    assert header.read_text() == peers.render_header()


def test_the_trajectories_that_tensorflow_is_compared_with_are_those_of_the_ops() -> None:
    expected = scale_gradients.expected()
    assert list(expected) == list(scale_gradients.RULES)
    for name, rule in scale_gradients.RULES.items():
        assert scale_gradients.torch_door(rule) == expected[name], name


def test_presets_that_need_no_library_are_the_cores() -> None:
    for name in PRESETS:
        assert dataclasses.astuple(rule_of(name)) == tuple(torch.ops.halfstep.scale_preset(name)), name
