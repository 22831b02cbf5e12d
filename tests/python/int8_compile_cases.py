"""Whole int8 models for compilers, in float32 and halves, and how often they call each op of halfstep's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from int8_file_cases import KINDS, carry, optimized
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class TextEncoder(nn.Module):
    """Embeddings, nn.MultiheadAttention in two layers of nn.TransformerEncoder, and a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.words(ids), src_key_padding_mask=ids == 0).mean(1))


class Bag(nn.Module):
    """Words looked up, their mean, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.words(ids).mean(1))


def ids(samples: int) -> torch.Tensor:
    out = torch.randint(1, 50, (samples, 6))
    out[0, 4:] = 0
    return out


MADE = {**KINDS, "text": (lambda: TextEncoder().eval(), ids), "bag": (lambda: Bag().eval(), ids)}
# What each of them must have called for its test to be of use.
EXPECTED = {
    "resnet": {"int8_conv2d": 8, "int8_linear": 1},
    "mobilenet": {"int8_conv2d": 6, "int8_linear": 2},
    "signal": {"int8_conv2d": 2, "int8_linear": 1},
    "text": {"int8_embedding": 1, "int8_linear": 9, "layer_norm_int8": 4},
    "bag": {"int8_embedding": 1, "int8_linear": 2},
}


def int8_model(
    kind: str, dtype: torch.dtype, device: str, monkeypatch: Any, **options: Any
) -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
    """Return an int8 model in which `dtype` is the type of what is not int8, and what makes a batch for it."""
    if dtype != torch.float32:
        carry(dtype, monkeypatch)
        options = {"speed_guard": True, **options}
    monkeypatch.setitem(KINDS, kind, MADE[kind])
    _, model, x = optimized(kind, device, **options)
    assert calls_of(model, x) == EXPECTED[kind]
    return model, lambda samples: MADE[kind][1](samples).to(device)


def _plain(op: torch._ops.OpOverload) -> str:
    """Return the op's name, that of an eager call too."""
    return op._opname.removesuffix("_named_dtype")


class Calls(TorchDispatchMode):
    """Counts the calls of halfstep's ops while it is entered, in programs of compilers too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "halfstep":
            self.counts[_plain(func)] += 1
        return func(*args, **(kwargs or {}))


def calls_of(model: Callable[..., Any], *args: torch.Tensor) -> Counter[str]:
    """Count the calls of halfstep's ops in one call of the model."""
    with torch.no_grad(), Calls() as calls:
        model(*args)
    return calls.counts


def calls_in(graph: torch.fx.Graph) -> Counter[str]:
    """Count the calls of halfstep's ops in a graph of ATen ops."""
    return Counter(
        _plain(node.target)
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "halfstep"
    )


def noise(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference as a share of what was expected."""
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    return float((out.double() - expected.double()).norm() / expected.double().norm())
