"""Scripted and traced modules under eager autocast: training, inference, and which of torch's switches matter."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from halfstep import AutocastContext, GradScaler, PrecisionPolicy, apply_plan
from torch import nn

warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.jit")

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


def as_script(model: nn.Module, x: torch.Tensor, how: str) -> nn.Module:
    if how == "eager":
        return model
    return torch.jit.script(model) if how == "script" else torch.jit.trace(model, x, check_trace=False)


def train(how: str, device: torch.device, around=nullcontext) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses of five steps under eager autocast, and the parameters after them."""
    torch.manual_seed(0)
    x, y = torch.randn(32, WIDTH, device=device), torch.randint(4, (32,), device=device)
    model = as_script(Net().to(device), x, how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scaler = GradScaler(device.type, init_scale=256.0)
    losses = []
    with around():
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
    around = nullcontext if optimized else lambda: torch.jit.optimized_execution(False)
    losses, parameters = train(how, device, around)
    expected_losses, expected = train("eager", device)
    assert losses[-1] < 0.9 * losses[0]
    assert losses == pytest.approx(expected_losses, rel=0.02)
    for name, value in parameters.items():
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.01)


def fresh(model_class: type[nn.Module], device: torch.device) -> nn.Module:
    """Return a model of a class of its own: scripts of one class share their compiled forward, switches and all."""
    torch.manual_seed(0)
    return type(model_class.__name__, (model_class,), {})().to(device)


@pytest.mark.parametrize("how", ["script", "trace"])
def test_with_the_jits_pass_off_a_second_step_fails(device: torch.device, how: str) -> None:
    with jit_autocast_pass(False), pytest.raises(RuntimeError, match="dtype|scalar type"):
        train(how, device)
