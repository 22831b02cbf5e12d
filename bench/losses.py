"""Final losses of a 6-layer character model: float32, torch.amp and halfstep, uncaptured and captured, side by side.

    python bench/losses.py [--device cuda|cpu] [--dtype float16|bfloat16] [--steps 300] [--seeds 3]

The text is this repository's own documents and sources. For a seed all runs start from the same weights and see the
same batches; the clip is 1.0 and the optimizer fused AdamW. Printed is the mean loss of the last 20 steps. A CPU has no
capture, and trains a narrower model in bfloat16 so that the script can be tried.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from halfstep import MixedPrecisionConfig, MixedPrecisionManager
from timing import machine
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
LAST, RATE = 20, 6e-4
RUNS = ("float32", "torch.amp", "ours", "ours captured, residual half", "ours captured, residual float32")

Step = Callable[[torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """Attention and a small network, each behind a layer norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the next residual stream, of x's shape [batch, length, width]."""
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, 2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class CharacterModel(nn.Module):
    """Six blocks; the head shares the embedding's weight."""

    def __init__(self, characters: int, length: int, width: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads=width // 32) for _ in range(6)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, length, characters] of characters [batch, length]."""
        x = self.embed(text) + self.place.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def read_text() -> tuple[torch.Tensor, int]:
    """Return the repository's text as character numbers, and how many characters there are."""
    files = [path for pattern in ("*.md", "docs/*.md", "csrc/**/*.h", "torch_ops/*.cpp") for path in ROOT.glob(pattern)]
    text = "\n".join(path.read_text() for path in sorted(files))
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([numbers[character] for character in text]), len(numbers)


def make_step(run: str, model: nn.Module, dtype: torch.dtype, device: torch.device, steps: int) -> Step | None:
    """Return the training step of one run; None where there is no capture."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    ours = run.startswith("ours")
    if ours:
        policy = f"mixed_{str(dtype).removeprefix('torch.')}"
        manager = MixedPrecisionManager("pytorch", config=MixedPrecisionConfig(policy))
        _, optimizer, scaler = manager.setup_pytorch_training(model, optimizer)
    else:
        scaler = torch.amp.GradScaler(device.type, enabled=run == "torch.amp" and dtype is torch.float16)

    def step(text: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        autocast = torch.autocast(device.type, dtype=dtype, enabled=run != "float32")
        with manager.autocast_context() if ours else autocast:
            loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        scaler.scale(loss).backward()
        if not ours:  # halfstep's scaler clips in its step
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    if "captured" in run:
        if device.type != "cuda":
            return None
        step = manager.capture(step, residual=run.rpartition(" ")[2])
    # Up, and down to nothing: at a constant rate chance decides over the last digits of a loss.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.15)

    def scheduled(text: torch.Tensor) -> torch.Tensor:
        loss = step(text)
        schedule.step()
        return loss

    return scheduled


def final_loss(run: str, seed: int, options: argparse.Namespace) -> float | None:
    device = torch.device(options.device)
    text, characters = read_text()
    batch, length, width = (64, 256, 384) if device.type == "cuda" else (8, 64, 64)
    torch.manual_seed(seed)
    model = CharacterModel(characters, length, width).to(device)
    step = make_step(run, model, getattr(torch, options.dtype), device, options.steps)
    if step is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(options.steps):
        starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
        # A clone: the result of a captured step may be the same memory in every replay.
        losses.append(step(text[starts + torch.arange(length + 1)].to(device)).clone())
    return torch.stack(losses[-LAST:]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help="default: float16 on a GPU")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.dtype = options.dtype or ("float16" if options.device.startswith("cuda") else "bfloat16")
    print(f"{machine(torch.device(options.device))}, {options.dtype}, {options.steps} steps\n")
    print(f"| run | {' | '.join(f'seed {seed}' for seed in range(options.seeds))} | mean | over float32 |")
    print("|---" * (3 + options.seeds) + "|")
    reference = None
    for run in RUNS:
        losses = [final_loss(run, seed, options) for seed in range(options.seeds)]
        if None in losses:
            print(f"| {run} | not on a CPU |")
            continue
        mean = statistics.mean(losses)
        reference = reference or mean
        cells = " | ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {run} | {cells} | {mean:.4f} | {mean / reference:.4f} |", flush=True)


if __name__ == "__main__":
    main()
