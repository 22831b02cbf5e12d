"""Gradients of 500 steps with planted overflows, the same on every machine, and what the doors must make of them.

    python tests/scale_gradients.py     with torch: writes tests/data/scale_steps.json

The torch door has written that file; tests/python/test_scaling.py compares it with the file, and tests/tf_ops compares
TensorFlow's. No test then needs both frameworks.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

STEPS = 500
NORMS = 25  # the norm of every so many steps is kept
FILE = Path(__file__).parent / "data" / "scale_steps.json"
# Rules that between them use every parameter; intervals are short, so that 500 steps go through all of it.
RULES = {
    "keras": {"init_scale": 2.0**15, "growth_interval": 20},
    "megatron": {
        "init_scale": 2.0**12,
        "growth_interval": 16,
        "min_scale": 4096.0,
        "hysteresis": 2,
        "refill": "on_growth",
    },
    "deepspeed": {
        "init_scale": 2.0**10,
        "growth_interval": 8,
        "min_scale": 64.0,
        "hysteresis": 3,
        "refill": "on_growth",
        "growth_delay": 1,
    },
    "paddle": {
        "init_scale": 2.0**8,
        "growth_interval": 12,
        "hysteresis": 2,
        "refill": "on_clean_step_and_backoff",
        "max_scale": 2.0**9,
    },
    "odd": {"init_scale": 3.7, "growth_interval": 10, "growth_factor": 1.3, "backoff_factor": 0.7},
}
SIZES = {"float32": (1000, 7), "float16": (500, 33), "bfloat16": (300, 1), "float64": (65,)}
BF16_INF, BF16_NAN = 0x7F80, 0x7FC0


def numbers(count: int, seed: int) -> np.ndarray:
    """Return float64 numbers of both signs over some powers of two, by integer arithmetic alone."""
    state = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(6364136223846793005) + np.uint64(seed)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    state ^= state >> np.uint64(29)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    fraction = (state >> np.uint64(40)).astype(np.float64) / 2.0**24 + 0.5
    sign = np.where(state & np.uint64(1), 1.0, -1.0)
    return sign * fraction * 2.0 ** ((state >> np.uint64(8)) % np.uint64(8)).astype(np.float64)


def gradients(step: int) -> list[tuple[str, np.ndarray]]:
    """Return (dtype, array) of each gradient of a step; bfloat16 ones as the upper halves of float32, uint16."""
    result: list[tuple[str, np.ndarray]] = []
    for dtype, sizes in SIZES.items():
        for size in sizes:
            values = numbers(size, step * 1000 + len(result))
            if dtype == "bfloat16":
                result.append((dtype, (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)))
            else:
                result.append((dtype, values.astype(dtype)))
    for where, what in planted(step):
        dtype, array = result[where]
        if dtype == "bfloat16":
            array[-1] = BF16_NAN if np.isnan(what) else BF16_INF
        else:
            array[-1] = what
    return result


def planted(step: int) -> list[tuple[int, float]]:
    """Return (index of a gradient, infinity or NaN): now and then, twice in a row, and in a long burst."""
    overflows = step % 37 in (5, 6) or step % 101 == 50 or 300 <= step < 306
    if not overflows:
        return []
    what = (np.inf, -np.inf, np.nan)[step % 3]
    both = [(step % 7, what)]
    return [*both, ((step + 3) % 7, np.nan)] if step % 5 == 0 else both


def hexadecimal(values: list[float]) -> list[str]:
    """Return exact texts, NaN and infinities included."""
    return [float(value).hex() for value in values]


def expected() -> dict:
    """Return what the torch door has written."""
    return json.loads(FILE.read_text())


def torch_door(rule: dict) -> dict:
    """Run the torch door's ops over all steps."""
    import torch
    from halfstep import load_library
    from halfstep.scale_rule import ScaleRule

    load_library()
    rule = ScaleRule(**rule)
    scale = torch.tensor(rule.init_scale)
    tracker = torch.tensor(-rule.growth_delay, dtype=torch.int32)
    credit = torch.tensor(rule.hysteresis, dtype=torch.int32)
    counters = torch.zeros(8, dtype=torch.int64)
    trace: dict = {"scale": [], "found": [], "norm": []}
    for step in range(STEPS):
        grads = [
            torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            if dtype == "bfloat16"
            else torch.from_numpy(array)
            for dtype, array in gradients(step)
        ]
        found, norm = torch.zeros(()), torch.empty(())
        torch.ops.halfstep.unscale_(grads, scale, found, norm, None)
        torch.ops.halfstep.update_scale_(
            scale, tracker, credit, counters, None, [found], [norm], rule.growth_factor, rule.backoff_factor,
            rule.growth_interval, rule.min_scale, rule.max_scale, rule.hysteresis, rule.refill, rule.growth_delay,
        )  # fmt: skip
        trace["scale"].append(scale.item())
        trace["found"].append(int(found.item()))
        trace["norm"].append(norm.item())
    return {
        "scale": hexadecimal(trace["scale"]),
        "found": trace["found"],
        "norm": hexadecimal(trace["norm"][::NORMS]),
        "counters": counters.tolist(),
        "hysteresis_left": credit.item(),
        "growth_tracker": tracker.item(),
    }


if __name__ == "__main__":
    lines = [f'"{name}": {json.dumps(torch_door(rule))}' for name, rule in RULES.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
