"""What a layer scope costs: calls of an empty layer under autocast, with and without a plan's scope.

    python bench/scopes.py [--calls 20000]

Inputs have the dtype that the layer computes in, so that no cast is timed: casts are the plan's price, not the scope's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from halfstep import PrecisionPlan, apply_plan
from halfstep.policy import PlannedLayer
from timing import machine
from torch import nn


def nanoseconds(layer: nn.Module, x: torch.Tensor, calls: int) -> float:
    """Return the time of one call of the layer, the median of 15 rounds."""
    rounds = []
    for _ in range(15):
        begin = time.perf_counter_ns()
        for _ in range(calls):
            layer(x)
        rounds.append((time.perf_counter_ns() - begin) / calls)
    return statistics.median(rounds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20000)
    options = parser.parse_args()
    print(f"{machine(torch.device('cpu'))}; microseconds per call\n")
    print("| layer | without a scope | with it | the scope |")
    print("|---|---|---|---|")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for precision in ("float32", "float16"):
            layer, x = nn.Identity(), torch.ones(1, dtype=getattr(torch, precision))
            plain = nanoseconds(layer, x, options.calls)
            apply_plan(layer, PrecisionPlan("bench", [PlannedLayer("", "Identity", precision, "")]))
            scoped = nanoseconds(layer, x, options.calls)
            cells = f"{plain / 1e3:.2f} | {scoped / 1e3:.2f} | {(scoped - plain) / 1e3:.2f}"
            print(f"| {precision} under bfloat16 autocast | {cells} |")


if __name__ == "__main__":
    main()
