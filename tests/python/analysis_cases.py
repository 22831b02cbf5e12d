"""What the tests of analyses share: a manager with a monitor that holds given samples, and training to look at."""

from __future__ import annotations

import math
import time

import torch
from halfstep import MixedPrecisionConfig, MixedPrecisionManager
from halfstep.monitoring import Monitor
from halfstep.shadow import Sample
from torch import nn


class Samples(Monitor):
    """A monitor whose samples and gradients are given by hand, so that their numbers are known."""

    def __init__(self, note: str = "") -> None:
        super().__init__(None, note)
        self.gradients = True  # they are looked at
        self.lost: list[tuple[int, float]] = []

    def underflow(self) -> list[tuple[int, float]]:
        return list(self.lost)


def sample(step: int, fp32_ms: float = 3.0, mixed_ms: float = 2.0, **changes) -> Sample:
    values = {
        "step": step,
        "time": time.time(),
        "fp32_ms": fp32_ms,
        "mixed_ms": mixed_ms,
        "fp32_bytes": 4 * 2**20,
        "mixed_bytes": 3 * 2**20,
        "difference": 0.01,
        "seconds": 0.005,
        "operations": {"float16": 6, "float32": 3, "mixed": 1},
        "casts": 4,
        "cast_bytes": 1000,
    }
    return Sample(**{**values, **changes})


class Training:
    """A small network under a manager; step(factor) multiplies the loss, so that infinity makes an overflow."""

    def __init__(
        self, device: str = "cpu", policy: str = "mixed_float16", monitor: Samples | None = None, **config
    ) -> None:
        self.manager = MixedPrecisionManager(config=MixedPrecisionConfig(precision_policy=policy, **config))
        self.device = torch.device(device)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(self.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.x = torch.randn(8, 4, device=self.device)
        self.setup(monitor)

    def setup(self, monitor: Samples | None = None) -> None:
        _, _, self.scaler = self.manager.setup_pytorch_training(self.model, self.optimizer)
        self.manager._manager.monitor = monitor or Samples()

    @property
    def monitor(self) -> Samples:
        return self.manager._manager.monitor

    def step(self, factor: float = 1.0, contexts: int = 1) -> None:
        self.optimizer.zero_grad()
        for _ in range(contexts):
            context = self.manager.autocast_context()
        with context if contexts else torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(self.x).square().mean()
        (self.scaler.scale(loss) * factor).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def steps(self, number: int, overflow_every: int = 0) -> None:
        for i in range(1, number + 1):
            self.step(math.inf if overflow_every and i % overflow_every == 0 else 1.0)
