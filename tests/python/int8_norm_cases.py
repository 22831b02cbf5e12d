"""Small models with layer norms before and behind their int8 layers, and the same with halfstep's own float norms."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
import torch.nn.functional as F
from halfstep.int8_layers import Int8Linear
from torch import nn
from torch.fx import GraphModule

SIZE, HEADS = 16, 2


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(SIZE, SIZE) for _ in range(4))
        self.heads, self.root = HEADS, (SIZE // HEADS) ** 0.5  # scripts read no globals

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = _heads(self.q(x), self.heads), _heads(self.k(x), self.heads), _heads(self.v(x), self.heads)
        weights = torch.softmax(q @ k.transpose(-1, -2) / self.root, dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape))


class PreNorm(nn.Module):
    """A block of a vision transformer, and a head behind a last norm: no norm is read by anything but int8 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2, self.ln3 = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE, eps=1e-3), nn.LayerNorm(SIZE)
        self.attention = Attention()
        self.fc1, self.act, self.fc2 = nn.Linear(SIZE, 32), nn.ReLU(), nn.Linear(32, SIZE)
        self.head = nn.Linear(SIZE, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.ln1(x))
        x = x + self.fc2(self.act(self.fc1(self.ln2(x))))
        return self.head(self.ln3(x))


class PostNorm(nn.Module):
    """A layer as BERT's: norms are read by int8 layers and by the addition behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.ln0, self.ln1, self.ln2 = (nn.LayerNorm(SIZE) for _ in range(3))
        self.attention = Attention()
        self.fc1, self.fc2 = nn.Linear(SIZE, 32), nn.Linear(32, SIZE)
        self.pool = nn.Linear(SIZE, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.ln0(x)
        x = self.ln1(self.attention(x) + x)
        x = self.ln2(self.fc2(F.relu(self.fc1(x))) + x)
        return self.pool(x[:, 0])


class Functions(nn.Module):
    """Norms that are functions, with parameters of the model's own and without; int8 passes through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(SIZE)), nn.Parameter(torch.randn(SIZE))
        self.a, self.b, self.c = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 3)
        self.size = SIZE

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(F.layer_norm(x, (self.size,), self.scale, bias=self.shift, eps=1e-4).reshape(-1, self.size))
        y = torch.layer_norm(x, [self.size])
        return self.c(self.b(y) * y.shape[0] + x)


MODELS: dict[str, type[nn.Module]] = {"pre-norm": PreNorm, "post-norm": PostNorm, "functions": Functions}
FUSED: dict[str, dict[str, str]] = {  # the norm of each layer that has one
    "pre-norm": {
        **{f"attention.{name}": "ln1" for name in "qkv"},
        "fc1": "ln2",
        "head": "ln3",
    },
    "post-norm": {**{f"attention.{name}": "ln0" for name in "qkv"}, "fc1": "ln1"},
    "functions": {"a": "layer_norm", "b": "layer_norm_1"},
}


def batch_of(samples: int) -> torch.Tensor:
    return torch.randn(samples, 5, SIZE) * 2 + 1


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a model whose norms do something, and a batch."""
    model = MODELS[name]().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model, batch_of(4)


def by_rows(graph_module: GraphModule) -> GraphModule:
    """Let all int8 layers quantize each row of their input by its own scale."""
    for module in graph_module.modules():
        if isinstance(module, Int8Linear):
            module.input_scale, module.input_zero_point = None, 0
    return graph_module


class _OwnNorm(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.ops.halfstep.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class _OwnRmsNorm(nn.RMSNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.ops.halfstep.rms_norm(input, self.normalized_shape, self.weight, self.eps)


def make_own(norm: nn.LayerNorm | nn.RMSNorm) -> None:
    """Let halfstep compute the norm, in float."""
    norm.__class__ = _OwnRmsNorm if isinstance(norm, nn.RMSNorm) else _OwnNorm


_OWN = {F.layer_norm: "layer_norm", torch.layer_norm: "layer_norm", F.rms_norm: "rms_norm", torch.rms_norm: "rms_norm"}


def with_own_norms(graph_module: GraphModule, names: Collection[str]) -> GraphModule:
    """Return a copy in which halfstep computes these norms, in float: modules and nodes by their names."""
    twin = copy.deepcopy(graph_module)
    for name, module in twin.named_modules():
        if name in names:
            make_own(module)
    for node in twin.graph.nodes:
        if node.op == "call_function" and node.name in names:
            node.target = getattr(torch.ops.halfstep, _OWN[node.target])
    twin.recompile()
    return twin
