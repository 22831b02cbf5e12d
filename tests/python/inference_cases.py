"""Small trained models and their data for the tests of int8 inference."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return scikit-learn's 1797 handwritten digits as images [n, 1, 8, 8] in 0 .. 1, and their labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[order], torch.tensor(data.target)[order]


class Mlp(nn.Module):
    """Two hidden layers with a functional activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 96)
        self.head = nn.Linear(96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x.flatten(1)))
        return self.head(F.relu(self.second(x)))


class Cnn(nn.Module):
    """Convolutions with batch norms, a residual addition and a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.block = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.block_norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.deep(x))
        out = self.block_norm(self.block(x))
        out += x
        x = self.relu(out)
        x = self.relu(self.down(x))
        return self.head(x.flatten(1))


def trained(model: nn.Module, epochs: int = 6) -> nn.Module:
    """Train on the first 1200 digits and return the model in eval mode."""
    images, labels = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(epochs):
        for begin in range(0, 1200, 50):
            loss = F.cross_entropy(model(images[begin : begin + 50]), labels[begin : begin + 50])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@functools.cache
def trained_mlp() -> nn.Module:
    """Return a trained Mlp; do not change it."""
    torch.manual_seed(0)
    return trained(Mlp())


@functools.cache
def trained_cnn() -> nn.Module:
    """Return a trained Cnn; do not change it."""
    torch.manual_seed(0)
    return trained(Cnn())


def batches(count: int = 1200, size: int = 60, *, labels: bool = True) -> list:
    """Return the first `count` digits in batches."""
    images, targets = digits()
    starts = range(0, count, size)
    if labels:
        return [(images[i : i + size], targets[i : i + size]) for i in starts]
    return [images[i : i + size] for i in starts]


def accuracy(model: nn.Module, device: str = "cpu") -> float:
    """Return the share of right answers on the 597 digits that were not trained on."""
    images, labels = digits()
    with torch.no_grad():
        return (model(images[1200:].to(device)).argmax(1).cpu() == labels[1200:]).float().mean().item()
