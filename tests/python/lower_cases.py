"""Models and plans for the tests of lower(): what scripts and traces, and what only scripts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 16


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, WIDTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.head(self.body(x).relu()), dim=-1)


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)))


class Cnn(nn.Module):
    """Two blocks of one class, a pool, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ConvBlock(3, 8)
        self.second = ConvBlock(8, 8)
        self.head = nn.Linear(8, 4)
        for norm in (self.first.norm, self.second.norm):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.first(x), 2)
        x = x + self.second(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Convolutions(nn.Module):
    """With biases, which TorchScript knows as optional."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.line = nn.Conv1d(4, 4, 3)
        self.head = nn.Conv3d(1, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.line(self.up(self.first(x)).flatten(2))
        return self.head(x.unsqueeze(1).unsqueeze(1))


class Attention(nn.Module):
    """A transformer block; attention by torch's function, or by products and a softmax in this module's own code."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.position = nn.Parameter(torch.randn(1, 6, WIDTH))
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.position
        q, k, v = self.qkv(self.norm(x)).view(x.size(0), x.size(1), 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) / 8**0.5, dim=-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(x)


class Products(nn.Module):
    """Parameters used by this module's own code, through views and twice, one tied to a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, WIDTH, WIDTH))
        self.both = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.embedding = nn.Embedding(11, WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.randn(WIDTH))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = x @ self.weight[0].t() + self.offset
        x = torch.tanh(x @ self.weight[1])
        x = x @ self.both + self.both.sum(0)
        return self.head(x)


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.norm(torch.sigmoid(self.first(x))))


class Branches(nn.Module):
    """Conditions, a loop, lists that grow, and a concatenation of types."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, x: torch.Tensor, steps: int = 3) -> torch.Tensor:
        if x.size(0) > 2:
            y = self.inner(x)
            y = y + x
        else:
            y = torch.exp(self.other(x))
        states: list[torch.Tensor] = []
        for i in range(steps):
            y = torch.tanh(self.other(y)) if i % 2 == 0 else y * 0.5
            states.append(y)
        mixed = torch.cat([torch.stack(states).mean(0), x], dim=-1)
        return self.head(mixed)


class Taking(nn.Module):
    """A layer whose inputs are containers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(
        self,
        pair: tuple[torch.Tensor, torch.Tensor],
        several: list[torch.Tensor],
        named: dict[str, torch.Tensor],
        maybe: torch.Tensor | None = None,
    ) -> torch.Tensor:
        result = pair[0] @ self.weight + pair[1] + several[0] * several[1] + named["x"]
        if maybe is not None:
            result = result + maybe
        return result


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.taking = Taking()

    def forward(self, x: torch.Tensor, use: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.before(x)
        maybe: torch.Tensor | None = None
        if use:
            maybe = y
        several = [y]
        several.append(x)
        return self.taking((y, x), several, {"x": y}, maybe), self.taking((y, y), several, {"x": x})


class Pair(NamedTuple):
    first: torch.Tensor
    others: tuple[torch.Tensor, torch.Tensor]


class TakingNamed(nn.Module):
    """A layer whose input is a named tuple, and whose result is another one of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, pair: Pair) -> Pair:
        return Pair(pair.first @ self.weight + pair.others[0], (pair.first, pair.others[1]))


class NamedTuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.taking = TakingNamed()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.before(x)
        pair = self.taking(Pair(y, (x, y)))
        return pair.first + pair.others[1], self.taking(pair).first


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    traces: bool = True


def floats(*shape: int) -> Callable[[], tuple]:
    return lambda: (torch.randn(shape),)


CASES = {
    "mlp": Case(Mlp, floats(4, WIDTH)),
    "cnn": Case(Cnn, floats(2, 3, 8, 8)),
    "convolutions": Case(Convolutions, floats(2, 3, 8, 8)),
    "attention": Case(lambda: Attention(fused=True), floats(2, 6, WIDTH)),
    "attention by hand": Case(lambda: Attention(fused=False), floats(2, 6, WIDTH)),
    "products": Case(Products, lambda: (torch.randint(11, (2, 3)),)),
    "shared": Case(Shared, floats(4, WIDTH)),
    "branches": Case(Branches, floats(4, WIDTH), traces=False),
    "other branch": Case(Branches, floats(2, WIDTH), traces=False),
    "containers": Case(Containers, floats(4, WIDTH), traces=False),
    "named tuples": Case(NamedTuples, floats(4, WIDTH), traces=False),
}

# (default, rules): the half type of the default is the ambient one, bfloat16 where that is float32.
PLANS = {
    "half": ("bfloat16", []),
    "float16": ("float16", []),
    "norms": ("bfloat16", [{"type": "*Norm*", "precision": "float32"}]),
    "head": ("bfloat16", [{"name": "head", "precision": "float32"}, {"name": "*norm", "precision": "float32"}]),
    "islands": (
        "bfloat16",
        [
            {"name": "*conv", "precision": "float16"},
            {"name": "*.0", "precision": "float16"},
            {"name": "taking", "precision": "float16"},
            {"name": "inner", "precision": "float16"},
            {"name": "again", "precision": "float16"},
            {"name": "first", "precision": "float16"},
            {"name": "qkv", "precision": "float16"},
        ],
    ),
    "siblings": ("bfloat16", [{"name": "first*", "precision": "float32"}, {"name": "other", "precision": "float32"}]),
    "taking": ("bfloat16", [{"name": "taking", "precision": "float32"}]),
    "only float32": ("float32", []),
    "one half layer": (
        "float32",
        [{"name": "head", "precision": "bfloat16"}, {"name": "taking", "precision": "bfloat16"}],
    ),
}
