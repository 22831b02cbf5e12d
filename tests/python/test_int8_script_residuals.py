"""Additions that int8 products of TorchScript take over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from int8_script_cases import calls, frozen, noise, optimized, scripted, traced
from torch import nn

pytestmark = pytest.mark.usefixtures("no_jit_fuser")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, 8)


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 8, 6, 6)


def signals(count: int) -> torch.Tensor:
    return torch.randn(count, 8, 6)


class Blocks(nn.Module):
    """Layers that are each added to what they read, the last one in place."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.c = make(), make(), make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x + self.a(x))
        x = F.gelu(self.b(x) + x)
        y = self.c(x)
        y += x
        return y


class Together(nn.Module):
    """Products that are added to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x) + self.c(x)


class ResNet(nn.Module):
    """A block with a shortcut of its own and one without, with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.a = nn.Conv2d(8, 16, 1, stride=2), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.b, self.c, self.d = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(5))
        for norm in self.norms:
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norms
        y = n[1](self.b(torch.relu(n[0](self.a(x)))))
        y = torch.relu(y + n[2](self.shortcut(x)))
        return torch.relu(y + n[4](self.d(torch.relu(n[3](self.c(y))))))


class Embedded(nn.Module):
    """A residual convolution before a norm that writes int8."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.norm, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.place(x)
        return self.head(self.norm(x.flatten(2).transpose(1, 2)))


class NormTwice(nn.Module):
    """A norm whose result is added to one product, and read by another one later."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return (x + self.b(x)) * torch.tanh(self.a(x))


OF_BLOCKS = ["a + residual + relu", "b + residual + gelu", "c + residual"]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor], list[str]]] = {
    "linear": (
        lambda: Blocks(lambda: nn.Linear(8, 8)),
        rows,
        OF_BLOCKS,
    ),
    "conv2d": (
        lambda: Blocks(lambda: nn.Conv2d(8, 8, 3, padding=1)),
        pictures,
        OF_BLOCKS,
    ),
    "conv1d": (
        lambda: Blocks(lambda: nn.Conv1d(8, 8, 3, padding=1)),
        signals,
        OF_BLOCKS,
    ),
    "together": (Together, pictures, ["a + residual", "c + residual"]),
    "resnet": (
        ResNet,
        pictures,
        ["a + relu + int8 out", "b + residual + relu", "c + relu + int8 out", "d + residual + relu"],
    ),
    "embedded": (Embedded, pictures, ["place + residual", "head + norm norm"]),
    "norm": (NormTwice, rows, ["b + norm norm + residual", "a + norm norm"]),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", [scripted, traced, frozen])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_additions_in_networks(name: str, way: Callable[..., Any], device: str) -> None:
    make, batch, expected = NETWORKS[name]
    joined = name == "norm" and way is frozen and device == "cuda"  # there torch.jit.freeze makes one product of both
    model = make().eval().to(device)
    inference, result = optimized(way(model, batch(2).to(device)), batch, device)
    fused = [line for region in inference.report()["regions"] for line in region["fused"]]
    assert sorted(fused) == (["linear_0 + norm norm"] if joined else sorted(expected))
    assert calls(result, "aten::add") == int(joined)
    for size in (1, 5):
        x = batch(size).to(device)
        with torch.no_grad():
            assert noise(model(x), result(x)) < 0.01


class Sums(nn.Module):
    """Additions that no layer may take over, and two that one may."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(8, 8) for _ in range(5))
        self.shift = nn.Parameter(torch.randn(1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.a(x) + self.shift)  # expanded
        y = x + torch.ones(8)
        y += self.b(x)  # written to what others may see: in eager code y is the one of the next line too
        y = y.mul_(0.5)
        z = torch.relu(self.c(y)) + x  # an activation stands between
        z = torch.add(self.d(z), z, alpha=2)
        w = self.e(z)
        z.mul_(0.5)  # what e reads is written before the addition
        return w + z


def test_additions_that_no_layer_may_take_over() -> None:
    model = Sums().eval()
    inference, result = optimized(scripted(model, None), rows, accuracy_threshold=1.0)
    fused = [line for region in inference.report()["regions"] for line in region["fused"]]
    assert fused == ["c + relu"]
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert noise(model(x), result(x)) < 0.02
        assert noise(model(x[:1]), result(x[:1])) < 0.02


def test_additions_of_one_shape_are_taken_over() -> None:
    class Residuals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            y += x
            x = torch.sigmoid(y)
            x = x + self.b(x)
            z = x.unsqueeze(1)
            return torch.add(self.c(z), z).relu()

    model = Residuals().eval()
    inference, result = optimized(scripted(model, None), rows)
    fused = [line for region in inference.report()["regions"] for line in region["fused"]]
    assert fused == ["a + residual", "b + residual", "c + residual + relu"]
    for size in (1, 5):
        x = torch.randn(size, 8)
        with torch.no_grad():
            assert noise(model(x), result(x)) < 0.02
