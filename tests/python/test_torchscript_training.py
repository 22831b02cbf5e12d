"""Scripted and traced modules under eager autocast: training, inference, and which of torch's switches matter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from halfstep import AutocastContext, GradScaler, PrecisionPolicy, apply_plan
from torch import nn

pytestmark = [
    pytest.mark.usefixtures("no_jit_fuser"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

WIDTH = 16
STEPS = 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, WIDTH))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)) + x)


@contextmanager
def jit_autocast_pass(enabled: bool) -> Iterator[None]:
    before = torch._C._jit_set_autocast_mode(enabled)
    try:
        yield
    finally:
        torch._C._jit_set_autocast_mode(before)


def make(device: torch.device) -> nn.Module:
    """Return a model of a class of its own: scripts of one class share their compiled forward, switches and all."""
    torch.manual_seed(0)
    return type("Net", (Net,), {})().to(device)


def as_script(model: nn.Module, x: torch.Tensor, how: str) -> nn.Module:
    if how == "eager":
        return model
    return torch.jit.script(model) if how == "script" else torch.jit.trace(model, x, check_trace=False)


def train(how: str, device: torch.device) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses of five steps under eager autocast, and the parameters after them."""
    model = make(device)
    x, y = torch.randn(32, WIDTH, device=device), torch.randint(4, (32,), device=device)
    model = as_script(model, x, how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scaler = GradScaler(device.type, init_scale=256.0)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with AutocastContext(device.type, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())
    return losses, {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("optimized", [True, False], ids=["pass on", "optimized_execution(False)"])
@pytest.mark.parametrize("how", ["script", "trace"])
def test_five_steps_as_in_eager(device: torch.device, how: str, optimized: bool) -> None:
    with nullcontext() if optimized else torch.jit.optimized_execution(False):
        losses, parameters = train(how, device)
    expected_losses, expected = train("eager", device)
    assert losses[-1] < 0.9 * losses[0]
    assert losses == pytest.approx(expected_losses, rel=0.02)
    for name, value in parameters.items():
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.01)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_with_the_jits_pass_off_a_second_step_fails(device: torch.device, how: str) -> None:
    with jit_autocast_pass(False), pytest.raises(RuntimeError, match="dtype|scalar type"):
        train(how, device)


def test_inference_with_the_jits_pass_off_has_the_bits_of_eager(device: torch.device) -> None:
    model, x = make(device).eval(), torch.randn(4, WIDTH, device=device)
    traced = as_script(model, x, "trace")
    with torch.no_grad(), AutocastContext(device.type, dtype=torch.bfloat16), jit_autocast_pass(False):
        expected = model(x)
        for _ in range(3):
            assert torch.equal(traced(x), expected)


def test_scripted_inference_with_the_jits_pass_off_is_near_eager(device: torch.device) -> None:
    model, x = make(device).eval(), torch.randn(4, WIDTH, device=device)
    scripted = as_script(model, x, "script")
    with torch.no_grad(), AutocastContext(device.type, dtype=torch.bfloat16), jit_autocast_pass(False):
        expected = model(x)
        for _ in range(3):
            got = scripted(x)
            assert got.dtype is expected.dtype
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def test_a_trace_under_autocast_keeps_the_plans_casts(device: torch.device) -> None:
    model, x = make(device).eval(), torch.randn(4, WIDTH, device=device)
    rules = [{"name": "head", "precision": "float32"}, {"name": "body.0", "precision": "float16"}]
    apply_plan(model, PrecisionPolicy("test", "bfloat16", rules).plan(model))
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False):
        expected = model(x)
        traced = torch.jit.trace(model, x, check_trace=False)
    assert expected.dtype is torch.float32
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(traced(x), expected), "without autocast, since the casts are in the trace"


def test_loading_changes_none_of_torchs_switches() -> None:
    code = """
import torch
def switches():
    pass_on = torch._C._jit_set_autocast_mode(True)
    torch._C._jit_set_autocast_mode(pass_on)
    profiling = torch._C._jit_set_profiling_executor(True)
    torch._C._jit_set_profiling_executor(profiling)
    return (pass_on, profiling, torch._C._get_graph_executor_optimize(), torch._C._jit_texpr_fuser_enabled(),
            torch._C._jit_can_fuse_on_cpu(), torch._C._jit_can_fuse_on_gpu(), torch.get_default_dtype())
before = switches()
import halfstep
halfstep.load_library()
import halfstep.lowering, halfstep.scopes, halfstep.manager
assert switches() == before, (before, switches())
assert before[0], "torch's default"
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "python_shim")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
