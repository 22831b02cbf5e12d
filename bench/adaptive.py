"""Final losses under AdaptivePrecisionManager, and with a layer that float16 cannot hold, side by side with float32.

    python bench/adaptive.py [--device cuda|cpu] [--steps 300] [--seeds 3]

Three models (an MLP on scikit-learn's digits, a CNN on synthetic images of CIFAR's size, a character model on this
repository's text), and each once more with a planted layer: its weights are 10^6 times as large, and a layer norm
behind it takes that back. For a seed all runs start from the same weights and see the same batches; the rate rises and
falls, the optimizer is AdamW. Printed is the mean loss of the last 20 steps, and for adaptive runs how many batches
were unstable, which layers were left in float32, and the share of layers in half.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from halfstep import AdaptivePrecisionManager, MixedPrecisionManager
from losses import CharacterModel, read_text
from timing import machine
from torch import nn

LAST = 20
RUNS = ("float32", "mixed_float16", "mixed_bfloat16", "adaptive float16", "adaptive bfloat16")

Batches = Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]


class Planted(nn.Module):
    """A linear layer whose output leaves float16's range, and the norm that takes it back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        with torch.no_grad():
            self.wide.weight.mul_(1e6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the norm makes of it."""
        return self.norm(self.wide(x))


def optional(width: int, planted: bool) -> nn.Module:
    return Planted(width) if planted else nn.Identity()


def digits(planted: bool, device: torch.device) -> tuple[nn.Module, Batches]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32, device=device) / 16
    y = torch.tensor(data.target, device=device)
    # Labels that are wrong at random keep the loss away from 0, where ratios say nothing.
    wrong = torch.rand(len(y), generator=torch.Generator().manual_seed(1)).to(device) < 0.3
    y = torch.where(wrong, torch.randint(10, y.shape, generator=torch.Generator().manual_seed(2)).to(device), y)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), optional(128, planted), nn.Linear(128, 10))

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(x), (128,), generator=generator).to(device)
        return x[rows], y[rows]

    return model, batch


def images(planted: bool, device: torch.device) -> tuple[nn.Module, Batches]:
    def stage(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]

    model = nn.Sequential(
        *stage(3, 32), *stage(32, 64), *stage(64, 64), nn.Flatten(), optional(1024, planted), nn.Linear(1024, 10)
    )
    centres = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(3))

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(10, (64,), generator=generator)
        x = 0.05 * centres[y] + torch.randn(64, 3, 32, 32, generator=generator)
        return x.to(device), y.to(device)

    return model, batch


class Characters(CharacterModel):
    """CharacterModel, with logits [tokens, characters] and what may be planted before its last norm."""

    def __init__(self, characters: int, length: int, width: int, planted: bool) -> None:
        super().__init__(characters, length, width)
        self.blocks.append(optional(width, planted))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Return logits of characters [batch, length]."""
        return super().forward(text).flatten(0, 1)


def characters(planted: bool, device: torch.device) -> tuple[nn.Module, Batches]:
    text, count = read_text()
    size, length, width = (64, 256, 384) if device.type == "cuda" else (8, 64, 64)

    def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(text) - length, (size, 1), generator=generator)
        rows = text[starts + torch.arange(length + 1)].to(device)
        return rows[:, :-1], rows[:, 1:].flatten()

    return Characters(count, length, width, planted), batch


def train(run: str, build: Callable, seed: int, options: argparse.Namespace) -> tuple[float, str]:
    """Return the mean loss of the last steps, and what became of the layers."""
    device = torch.device(options.device)
    torch.manual_seed(seed)
    model, batches = build(device=device)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=options.steps + 1, pct_start=0.15)
    adaptive = AdaptivePrecisionManager(precision=run.split()[1]) if run.startswith("adaptive") else None
    if adaptive is None:
        manager = MixedPrecisionManager("pytorch", run, enable_monitoring=False)
        _, _, scaler = manager.setup_pytorch_training(model, optimizer)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for number in range(options.steps):
        x, y = batches(generator)
        optimizer.zero_grad()
        if adaptive is None:
            with manager.autocast_context():
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            with adaptive.adaptive_context(model, number) as context:
                loss = F.cross_entropy(model(x), y)
                if not context.is_stable(loss):
                    context.fallback_to_fp32()
                    loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    final = torch.stack(losses[-LAST:]).mean().item()
    if adaptive is None:
        return final, f"{scaler.counters()['skipped']} skipped"
    stats = adaptive.get_adaptation_stats()
    left = ", ".join(name for name, layer in stats["layers"].items() if layer["state"] == "float32")
    return final, (
        f"{stats['unstable_batches']} unstable, {stats['skipped_steps']} skipped, float32: {left or 'none'}, "
        f"half: {stats['fp16_ratio']:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(f"{machine(torch.device(options.device))}, {options.steps} steps\n")
    print(f"| model | run | {' | '.join(f'seed {n}' for n in range(options.seeds))} | over float32 | in the last |")
    print("|---" * (4 + options.seeds) + "|")
    for build in (digits, images, characters):
        for planted in (False, True):
            reference = None
            for run in RUNS:
                if options.device == "cpu" and run == "mixed_float16":
                    continue
                results = [train(run, functools.partial(build, planted), n, options) for n in range(options.seeds)]
                mean = statistics.mean(loss for loss, _ in results)
                reference = reference or mean
                cells = " | ".join(f"{loss:.4f}" for loss, _ in results)
                name = build.__name__ + (", planted" if planted else "")
                print(f"| {name} | {run} | {cells} | {mean / reference:.4f} | {results[-1][1]} |", flush=True)


if __name__ == "__main__":
    main()
