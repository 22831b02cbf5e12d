"""The models of bench/train_step.py, each with one batch and its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass
class Problem:
    """A float32 model, a batch (x, y) on its device, the loss of `model(x)` for y, and a learning rate."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    loss: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    lr: float


def classify(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def mlp(device: torch.device) -> Problem:
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    x, y = torch.randn(128, 784, device=device), torch.randint(10, (128,), device=device)
    return Problem(nn.Sequential(*layers).to(device), x, y, classify, 1e-4)


def resnet50(device: torch.device) -> Problem:
    from torchvision.models import resnet50 as build

    layout = torch.channels_last
    model = build().to(device, memory_format=layout)
    x = torch.randn(128, 3, 224, 224, device=device).to(memory_format=layout)
    return Problem(model, x, torch.randint(1000, (128,), device=device), classify, 1e-4)


class Block(nn.Module):
    """Attention and a small network, each behind a layer norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the next residual stream, of x's shape [batch, length, width]."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)
        x = x + self.project(heads.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2 in plain torch, without dropout, its 50257 tokens padded to a multiple of 64; the head is tied."""

    def __init__(self, tokens: int = 50304, length: int = 1024, width: int = 768, layers: int = 12, heads: int = 12):
        super().__init__()
        self.token, self.position = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, length, tokens] of tokens [batch, length]."""
        hidden = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(hidden)))


def gpt2(device: torch.device) -> Problem:
    tokens = torch.randint(50304, (8, 1025), device=device)

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return Problem(GPT2().to(device), tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), loss, 1e-4)


def gpt2_of_transformers(device: torch.device) -> Problem:
    from transformers import AutoModelForCausalLM, GPT2Config

    # transformers' defaults: 12 layers of 768, 50257 tokens, dropout 0.1
    model = AutoModelForCausalLM.from_config(GPT2Config(use_cache=False), attn_implementation="sdpa").to(device).train()
    tokens = torch.randint(50257, (8, 1024), device=device)
    return Problem(model, tokens, tokens, next_token, 1e-4)


def next_token(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=x).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())


MODELS: dict[str, Callable[[torch.device], Problem]] = {
    "mlp": mlp,
    "resnet50": resnet50,
    "gpt2": gpt2,
    "gpt2-transformers": gpt2_of_transformers,
}
