"""Fit the costs of the Hopper int8 product's tiles: the table of csrc/cuda/int8_hopper.cu.

    ninja -C build/... halfstep_int8_tiles
    python bench/int8_tiles.py build/.../tests/halfstep_int8_tiles [--times FILE]

The model is that of int8_tile_for: launch + rounds * (each + slices * slice), where a round is a tile on each processor
(or pair of them) and a slice 128 terms. The three costs of a tile are fitted to the relative error, so small sizes
count as much as large ones. Prints the table, and what its choices lose against the fastest tile of each size, beside
what those of the table that is compiled in lose.
"""

from __future__ import annotations

import argparse
import subprocess
from collections import defaultdict
from pathlib import Path

import numpy as np

PROCESSORS = 132
TILES = (
    ("kPair256x256", 256, 256, 2),
    ("k128x256", 128, 256, 1),
    ("kPair256x128", 256, 128, 2),
    ("k128x128", 128, 128, 1),
    ("k64x64", 64, 64, 1),
)
Size = tuple[int, int, int]


def terms_of(size: Size, tile: int) -> np.ndarray:
    """Return what launch, each and slice are multiplied by."""
    rows, terms, channels = size
    _, tile_rows, tile_channels, blocks = TILES[tile]
    tiles = -(-rows // tile_rows) * -(-channels // tile_channels)
    rounds = -(-tiles // (PROCESSORS // blocks))
    return np.array([1.0, rounds, rounds * -(-terms // 128)])


def fitted(times: dict[Size, dict[int, float]], tile: int) -> np.ndarray:
    """Return the costs of one tile, none of them negative."""
    factors = np.array([terms_of(size, tile) / found[tile] for size, found in times.items()])
    wanted = np.ones(len(factors))
    free = [0, 1, 2]
    while True:
        costs = np.zeros(3)
        costs[free] = np.linalg.lstsq(factors[:, free], wanted, rcond=None)[0]
        if (costs >= 0).all():
            return costs
        free.remove(int(np.argmin(costs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("--times", type=Path, help="keep what the program prints, or read it if the file is there")
    options = parser.parse_args()
    if options.times and options.times.exists():
        text = options.times.read_text()
    else:
        text = subprocess.run([str(options.program)], check=True, capture_output=True, text=True).stdout
        if options.times:
            options.times.write_text(text)
    times: dict[Size, dict[int, float]] = defaultdict(dict)
    for line in text.splitlines():
        rows, terms, channels, tile, microseconds = line.split()
        times[int(rows), int(terms), int(channels)][int(tile)] = float(microseconds)

    costs = [fitted(times, tile) for tile in range(len(TILES))]
    for (name, rows, channels, blocks), (launch, each, a_slice) in zip(TILES, costs, strict=True):
        print(f"    {{Int8Tile::{name}, {rows}, {channels}, {blocks}, {launch:.2f}, {each:.2f}, {a_slice:.3f}}},")
    losses = {"fitted": [], "compiled in": []}
    for size, found in times.items():
        fastest = min(found[tile] for tile in range(len(TILES)))
        chosen = min(range(len(TILES)), key=lambda tile: float(costs[tile] @ terms_of(size, tile)))
        losses["fitted"].append(found[chosen] / fastest)
        losses["compiled in"].append(found[-1] / fastest)
    for name, ratios in losses.items():
        print(f"{name}: {np.mean(ratios):.3f} of the fastest tile's time in the mean, {max(ratios):.3f} at most")


if __name__ == "__main__":
    main()
