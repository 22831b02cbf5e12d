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


def gpt2(device: torch.device) -> Problem:
    from transformers import AutoModelForCausalLM, GPT2Config

    # transformers' defaults: 12 layers of 768, 50257 tokens, dropout 0.1
    model = AutoModelForCausalLM.from_config(GPT2Config(use_cache=False), attn_implementation="sdpa").to(device).train()
    tokens = torch.randint(50257, (8, 1024), device=device)
    return Problem(model, tokens, tokens, next_token, 1e-4)


def next_token(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=x).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())


MODELS: dict[str, Callable[[torch.device], Problem]] = {"mlp": mlp, "resnet50": resnet50, "gpt2": gpt2}
