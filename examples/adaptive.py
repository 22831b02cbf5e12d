"""Train a network with one layer that float16 cannot hold: in float32, in plain float16, and adaptively.

python examples/adaptive.py. The layer's weights are large, and a layer norm behind it takes that back. In float32 this
is no problem, in plain float16 every step is skipped. The adaptive run finds the layer in its first batch and trains
all others in half precision.
"""

from __future__ import annotations

import logging

import torch
from halfstep import AdaptivePrecisionManager
from sklearn.datasets import load_digits
from torch import nn

EPOCHS, BATCH = 8, 64


class Net(nn.Module):
    """A classifier of scikit-learn's digits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.wide, self.norm = nn.Linear(64, 128), nn.Linear(128, 128), nn.LayerNorm(128)
        self.hidden, self.head = nn.Linear(128, 64), nn.Linear(64, 10)
        with torch.no_grad():
            self.wide.weight.mul_(1e6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, 10] of pixels [batch, 64]."""
        x = torch.relu(self.norm(self.wide(torch.relu(self.embed(x)))))
        return self.head(torch.relu(self.hidden(x)))


def plain(x: torch.Tensor, y: torch.Tensor, *, half: bool) -> float:
    """Return the last loss of a loop with torch's own autocast and scaler."""
    model = build(x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(x.device.type, enabled=half)
    for rows in batches(len(x)):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype=torch.float16, enabled=half):
            loss = nn.functional.cross_entropy(model(x[rows]).float(), y[rows])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return loss.item()


def adaptive(x: torch.Tensor, y: torch.Tensor) -> tuple[float, AdaptivePrecisionManager]:
    """Return the last loss of the adaptive loop, and its manager."""
    model = build(x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    manager = AdaptivePrecisionManager(adaptation_interval=50)
    for number, rows in enumerate(batches(len(x))):
        with manager.adaptive_context(model, number) as context:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            if not context.is_stable(loss):
                context.fallback_to_fp32()
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
    return loss.item(), manager


def build(x: torch.Tensor) -> Net:
    """Return the same network each time, where the data are."""
    torch.manual_seed(0)
    return Net().to(x.device)


def batches(count: int) -> list[torch.Tensor]:
    """Return the rows of each batch of all epochs."""
    generator = torch.Generator().manual_seed(0)
    return [rows for _ in range(EPOCHS) for rows in torch.randperm(count, generator=generator).split(BATCH)]


def main() -> None:
    """Train three times and compare."""
    logging.basicConfig(format="  %(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32, device=device) / 16
    y = torch.tensor(data.target, device=device)
    print(f"float32: loss {plain(x, y, half=False):.4f}")
    print(f"float16: loss {plain(x, y, half=True):.4f}")
    loss, manager = adaptive(x, y)
    stats = manager.get_adaptation_stats()
    print(f"adaptive: loss {loss:.4f}, {stats['fp16_ratio']:.0%} of the layers in float16 at the end")
    for decision in stats["decisions"]:
        print(f"  batch {decision['batch']}: {decision['layer']} {decision['from']} -> {decision['to']}", end="")
        print(f" ({decision['reason']})")


if __name__ == "__main__":
    main()
