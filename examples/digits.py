"""Train a 3-layer network on scikit-learn's digits twice, in fp32 and in mixed precision, and compare.

Runs on the GPU if there is one. `make demo` calls it; `python examples/digits.py --help` shows its options.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings

import torch
from halfstep import MixedPrecisionManager
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm


class SimpleNet(nn.Module):
    """Three linear layers with dropout: 64 pixels in, 10 digits out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 512)
        self.fc2 = nn.Linear(512, 512)
        self.fc3 = nn.Linear(512, 10)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        x = self.dropout(self.relu(self.fc1(x)))
        x = self.dropout(self.relu(self.fc2(x)))
        return self.fc3(x)


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Return a training and a test set."""
    data = load_digits()
    x = torch.tensor(data.data / 16.0, dtype=torch.float32)
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    split = int(0.8 * len(x))
    return TensorDataset(x[order[:split]], y[order[:split]]), TensorDataset(x[order[split:]], y[order[split:]])


def train(policy: str, arguments: argparse.Namespace, device: torch.device):
    """Train with one policy; return the per-epoch (loss, accuracy), the manager and the scaler."""
    torch.manual_seed(arguments.seed)
    training, test = digits(arguments.seed)
    loader = DataLoader(training, batch_size=arguments.batch, shuffle=True)
    test_x, test_y = (tensor.to(device) for tensor in test.tensors)

    model = SimpleNet().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()
    manager = MixedPrecisionManager(
        framework="pytorch", precision_policy=policy, initial_loss_scale=arguments.initial_loss_scale
    )
    manager.update_config(loss_scale_growth_interval=arguments.growth_interval)
    model, optimizer, scaler = manager.setup_pytorch_training(model, optimizer)

    results = []
    progress = tqdm(total=arguments.epochs * len(loader), desc=f"{policy:15}", unit="step", leave=True)
    for _ in range(arguments.epochs):
        model.train()
        total = torch.zeros((), device=device)
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            with manager.autocast_context():
                loss = criterion(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
            progress.update()
        model.eval()
        with torch.no_grad(), manager.autocast_context():
            accuracy = model(test_x).argmax(1).eq(test_y).float().mean().item()
        results.append((total.item() / len(loader), accuracy))
    progress.close()
    return results, manager, scaler


def print_scale_path(scaler) -> None:
    """Print each value of the loss scale with the steps it was in force."""
    history = scaler.history()
    print("\nLoss scale:")
    start = 0
    for i, record in enumerate(history):
        last = i + 1 == len(history) or history[i + 1].scale != record.scale
        if last:
            first = history[start].step
            skipped = sum(r.skipped for r in history[start : i + 1])
            print(
                f"  steps {first:4d} to {record.step:4d}   {record.scale:>10,.0f}"
                + f"   skipped {skipped}" * bool(skipped)
            )
            start = i + 1
    print(f"  next step             {scaler.get_scale():>10,.0f}")


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="mixed_float16", choices=("mixed_float16", "mixed_bfloat16"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--initial-loss-scale", type=float, default=2.0**24, help="high, to show it being found")
    parser.add_argument("--growth-interval", type=int, default=50, help="steps without overflow before it grows")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*has no float16 arithmetic.*")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    print(f"Digits, 3 layers, batch {arguments.batch}, on {name}, torch {torch.__version__}\n")
    start = time.perf_counter()
    plain, _, _ = train("float32", arguments, device)
    mixed, manager, scaler = train(arguments.policy, arguments, device)

    print("\nThe loss scale starts too high on purpose, to show it being found: the first steps are skipped.")
    if device.type == "cpu" and arguments.policy == "mixed_float16":
        print("float16 on a CPU is for show: most emulate it, and mixed_bfloat16 is the policy to use there.")
    print(f"\nepoch   float32 loss  accuracy   {arguments.policy} loss  accuracy")
    width = len(arguments.policy) + 5
    for epoch, (a, b) in enumerate(zip(plain, mixed, strict=True), 1):
        print(f"{epoch:5d}   {a[0]:12.4f}  {a[1]:8.1%}   {b[0]:{width}.4f}  {b[1]:8.1%}")
    print_scale_path(scaler)

    statistics = manager.get_comprehensive_stats()
    del statistics["notes"]
    print("\nStatistics:")
    unknown = [key for key, value in statistics.items() if isinstance(value, float) and math.isnan(value)]
    for key, value in statistics.items():
        if key not in unknown:
            print(f"  {key:22} {value}")
    print(f"  not measured (the notes say why): {', '.join(unknown)}")
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
