"""What the scaler adds to a step: unscale, clip to a norm, step the optimizer, update the scale; against torch.amp.

    python bench/scaler_path.py [--device cuda|cpu] [--optimizer adam|adamw|sgd]

torch: scaler.unscale_, clip_grad_norm_(foreach=True), scaler.step, scaler.update, the optimizer fused and foreach.
Ours: scaler.step(optimizer, max_norm=1.0), scaler.update(), called, and replayed from a CUDA graph. Limit: the bytes
that must move (gradients read twice, parameters and states read and written) over the bandwidth of a large copy,
measured in the same run.
"""

from __future__ import annotations

import argparse

import torch
from halfstep import GradScaler
from timing import copy_bandwidth, machine, measure, replayed
from torch import nn

OPTIMIZERS = {
    # class, settings, states
    "adam": (torch.optim.Adam, {"lr": 1e-5}, 2),
    "adamw": (torch.optim.AdamW, {"lr": 1e-5, "weight_decay": 0.01}, 2),
    "sgd": (torch.optim.SGD, {"lr": 1e-5, "momentum": 0.9}, 1),
}


def resnet50() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, (shape[0],), (shape[0],)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2(width: int, layers: int) -> list[tuple[int, ...]]:
    block = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *block * layers, (width,), (width,)]


def workloads(device: torch.device) -> dict[str, list[tuple[int, ...]]]:
    sets = {"ResNet-50": resnet50(), "GPT-2 small": gpt2(768, 12), "1000 x (100 x 100)": [(100, 100)] * 1000}
    if device.type == "cuda":
        sets |= {"GPT-2 medium": gpt2(1024, 24), "64 x 4096 x 4096": [(4096, 4096)] * 64}
    return sets


class Run:
    """One parameter set with gradients in place, an optimizer and a scaler."""

    def __init__(self, shapes, device: torch.device, optimizer: str, scaler_class, **settings) -> None:
        kind, own, _ = OPTIMIZERS[optimizer]
        self.params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for param in self.params:
            param.grad = torch.randn_like(param)
        self.optimizer = kind(self.params, **own, **settings)
        # A scale of 1 that stays, since the gradients are not made anew: torch unscales them in place.
        self.scaler = scaler_class(device.type, init_scale=1.0, growth_interval=2**31 - 1)
        self.loss = torch.ones((), device=device)

    def torchs(self) -> None:
        """Do what a loop with torch.amp and clipping does after backward()."""
        self.scaler.scale(self.loss)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def ours(self) -> None:
        """Do the same with halfstep."""
        self.scaler.scale(self.loss)
        self.scaler.step(self.optimizer, max_norm=1.0)
        self.scaler.update()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="default: one after the other")
    arguments = parser.parse_args()
    for optimizer in [arguments.optimizer] if arguments.optimizer else OPTIMIZERS:
        print_table(torch.device(arguments.device), optimizer)


def print_table(device: torch.device, optimizer: str) -> None:
    bandwidth = copy_bandwidth(device)
    states = OPTIMIZERS[optimizer][2]
    bytes_per_element = 4 * (2 + 2 + 2 * states)
    print(f"{machine(device)}, copy {bandwidth / 1e9:.0f} GB/s, {optimizer}, ms\n")
    print("| parameters | torch fused | torch foreach | ours | ours captured | limit | torch fused / ours |")
    print("|---|---|---|---|---|---|---|")
    for name, shapes in workloads(device).items():
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        times: dict[str, float] = {}
        for column, settings in (("fused", {"fused": True}), ("foreach", {"foreach": True})):
            run = Run(shapes, device, optimizer, torch.amp.GradScaler, **settings)
            times[column] = measure(run.torchs, device)
            del run
        run = Run(shapes, device, optimizer, GradScaler)
        times["ours"] = measure(run.ours, device)
        captured = f"{measure(replayed(run.ours, device), device):.3f}" if device.type == "cuda" else "-"
        assert run.scaler.host_syncs == 0
        del run
        limit = elements * bytes_per_element / bandwidth * 1e3
        print(
            f"| {name}: {elements / 1e6:.1f} M in {len(shapes)} | {times['fused']:.3f} | {times['foreach']:.3f} "
            f"| {times['ours']:.3f} | {captured} | {limit:.3f} | {times['fused'] / times['ours']:.2f}x |",
            flush=True,
        )
    print()


if __name__ == "__main__":
    main()
