"""Train scikit-learn's digits by a plain loop and by a captured step, and compare times and losses.

python examples/captured_step.py. On a CPU, where nothing is captured, both run as they are written.
"""

from __future__ import annotations

import time

import torch
from halfstep import MixedPrecisionManager
from sklearn.datasets import load_digits
from torch import nn

EPOCHS, BATCH = 20, 64


def train(x: torch.Tensor, y: torch.Tensor, *, capture: bool) -> tuple[float, float, str]:
    """Return the mean loss of the last epoch, the seconds of all but the first one, and what the capture says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 10)).to(x.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = EPOCHS * (len(x) // BATCH)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    policy = "mixed_float16" if x.is_cuda else "mixed_bfloat16"
    manager = MixedPrecisionManager(framework="pytorch", precision_policy=policy)
    _, _, scaler = manager.setup_pytorch_training(model, optimizer)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        with manager.autocast_context():
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    captured = manager.capture(step) if capture else None
    for epoch in range(EPOCHS):
        if epoch == 1:
            begin = time.perf_counter()
        total = torch.zeros((), device=x.device)
        order = torch.randperm(len(x), device=x.device)
        for batch in order.split(BATCH)[: len(x) // BATCH]:
            total += (captured or step)(x[batch], y[batch])
            scheduler.step()
    loss = total.item() / (len(x) // BATCH)
    return loss, time.perf_counter() - begin, captured.explain() if captured else ""


def main() -> None:
    """Print both."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_digits()
    x = torch.tensor(data.data / 16.0, dtype=torch.float32, device=device)
    y = torch.tensor(data.target, device=device)
    for capture in (False, True):
        loss, seconds, said = train(x, y, capture=capture)
        print(f"{'captured' if capture else 'plain':8}  loss {loss:.4f}  {seconds:.2f} s")
    print(said)


if __name__ == "__main__":
    main()
