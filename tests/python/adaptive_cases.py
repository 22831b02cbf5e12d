"""Models and loops that several tests of AdaptivePrecisionManager use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from halfstep import AdaptivePrecisionManager
from torch import nn


def half_type(device: torch.device) -> str:
    """float16, and on a CPU, where that takes long, bfloat16."""
    return "float16" if device.type == "cuda" else "bfloat16"


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


class Probe(nn.Module):
    """Notes in which dtype its layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        self.seen.append(y.dtype)
        return y


def step(
    adaptive: AdaptivePrecisionManager,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[], torch.Tensor],
    batch: int,
) -> float:
    """One batch as the user's document writes it."""
    with adaptive.adaptive_context(model=model, batch_idx=batch) as context:
        optimizer.zero_grad()
        loss = loss_of()
        if context.is_stable(loss):
            loss.backward()
            optimizer.step()
        else:
            context.fallback_to_fp32()
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
    return loss.item()


def train(
    adaptive: AdaptivePrecisionManager, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, steps: int
) -> list[float]:
    """Several batches on one input."""
    return [step(adaptive, model, optimizer, lambda: model(x).square().mean(), batch) for batch in range(steps)]
