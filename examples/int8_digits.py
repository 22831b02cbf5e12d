"""Train a small convolutional network on scikit-learn's digits and optimize it for inference in int8.

`python examples/int8_digits.py` runs on the GPU if there is one. It prints the report, the accuracy and the times.
"""

from __future__ import annotations

import argparse
import time

import torch
from halfstep import InferencePrecisionOptimizer
from sklearn.datasets import load_digits
from torch import nn


def network() -> nn.Sequential:
    """Return an untrained network: three convolutions with batch norms, and a linear head."""
    blocks: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 64, 1), (64, 128, 2), (128, 128, 2)):
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        blocks += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """Train by Adam, in float32."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(50):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def judge(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return the accuracy, and the milliseconds of the fastest of some calls."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        right = (model(images).argmax(1) == labels).float().mean().item()  # waits for the GPU
        times.append(1e3 * (time.perf_counter() - start))
    return right, min(times)


def main() -> None:
    """Train, optimize, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.02, help="largest accepted drop of the accuracy")
    parser.add_argument("--keep-int8", action="store_true", help="keep int8 layers even where they are slower")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_digits()
    images = nn.functional.interpolate(torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, size=16)
    images, labels = images.to(device), torch.tensor(data.target, device=device)
    model = network().to(device)
    train(model, images[:1200], labels[:1200], arguments.epochs)

    inference = InferencePrecisionOptimizer(
        accuracy_threshold=arguments.threshold, calibration_samples=1200, speed_guard=not arguments.keep_int8
    )
    batches = [(images[i : i + 60], labels[i : i + 60]) for i in range(0, 1200, 60)]
    optimized = inference.optimize_for_inference(model, batches, target_device=device)
    print(inference.explain())
    for name, each in (("float32", model), ("optimized", optimized)):
        accuracy, milliseconds = judge(each, images[1200:], labels[1200:])
        print(
            f"{name:10} accuracy {accuracy:.3f} on {len(labels) - 1200} digits it has not seen, {milliseconds:.2f} ms"
        )


if __name__ == "__main__":
    main()
