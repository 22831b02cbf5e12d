"""Small models with plans, for the tests of layer scopes."""

from __future__ import annotations

import torch
from halfstep import PrecisionPolicy
from halfstep.scopes import apply_plan
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8


def mlp(device: torch.device | str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)).to(device)


def planned(model: nn.Module, *rules: dict[str, str], default: str = "bfloat16") -> nn.Module:
    apply_plan(model, PrecisionPolicy("p", default, rules).plan(model))
    return model


HEAD = {"name": "2", "precision": "float32"}
ISLAND = {"name": "2", "precision": "float16"}


def autocast(device: torch.device | str = "cpu") -> torch.autocast:
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


class Outer(nn.Module):
    """A layer with a parameter of its own and layers inside, as a vision transformer with its class token is."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "plain":
            x = self.inner(x)
        elif self.how == "off":
            with torch.autocast(x.device.type, enabled=False):
                x = self.inner(x)
        else:
            x = checkpoint(self.inner, x, use_reentrant=self.how == "reentrant")
        return nn.functional.linear(self.norm(x), self.weight)


INNER = {"name": "inner", "precision": "bfloat16"}
