"""Inference with lowered modules against the same model cast by hand, both scripted.

    python bench/lowered.py [--device cuda|cpu] [--dtype float16|bfloat16] [--small]

By hand is `model.half()` on a half input: every parameter and every op in half precision. The lowered module gets the
float32 input. It keeps autocast's float32 ops, unless it was lowered with half reductions.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from halfstep import PrecisionPolicy, lower
from timing import machine, measure
from torch import nn

warnings.filterwarnings("ignore", category=DeprecationWarning)


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the next image."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


def resnet(blocks: tuple[int, ...]) -> nn.Module:
    """Return ResNet-50 for (3, 4, 6, 3)."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(inputs, 64 * 2**stage, 2 if stage and not block else 1))
            inputs = 256 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class Block(nn.Module):
    """GPT-2's block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the next hidden states."""
        batch, length, width = x.size()
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """GPT-2's shape."""

    def __init__(self, width: int, depth: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, width // 64) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.size(1), device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def cases(small: bool) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Yield (name, model, input)."""
    if small:
        yield "ResNet, one block a stage", resnet((1, 1, 1, 1)), torch.randn(2, 3, 64, 64)
        yield "GPT, two layers", Gpt(256, 2, 1024, 64), torch.randint(1024, (2, 64))
    else:
        yield "ResNet-50", resnet((3, 4, 6, 3)), torch.randn(64, 3, 224, 224)
        yield "GPT-2 small", Gpt(768, 12, 50257, 1024), torch.randint(50257, (8, 1024))


def scripts(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.jit.ScriptModule, bool]]:
    """Yield (name, module, whether its floating inputs are to be half)."""
    name = str(dtype).removeprefix("torch.")
    plan = PrecisionPolicy.named(f"mixed_{name}").plan(model)
    scripted = torch.jit.script(model)
    yield "cast by hand", torch.jit.script(copy.deepcopy(model).to(dtype)), True
    yield "lowered", lower(scripted, plan), False
    yield "lowered, half reductions", lower(scripted, plan, half_reductions=True), False
    yield "float32", scripted, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], help="default: float16 on a GPU")
    parser.add_argument("--small", action="store_true", help="small models (always on a CPU)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "bfloat16"))
    print(f"{machine(device)}, {dtype}\n")
    print("| model | module | ms | times the one cast by hand |")
    print("|---|---|---|---|")
    for name, model, x in cases(arguments.small or device.type == "cpu"):
        model, x = model.eval().to(device), x.to(device)
        by_hand = None
        for kind, module, half in scripts(model, dtype):
            value = x.to(dtype) if half and x.is_floating_point() else x

            def run(module: Callable = module, value: torch.Tensor = value) -> None:
                with torch.no_grad():
                    module(value)

            time = measure(run, device)
            by_hand = by_hand or time
            print(f"| {name} | {kind} | {time:.3f} | {time / by_hand:.3f} |", flush=True)


if __name__ == "__main__":
    main()
