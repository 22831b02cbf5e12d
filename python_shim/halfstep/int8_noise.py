"""Noise in outputs: its power and that of what was expected, and the share that the one is of the other."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from halfstep._library import load_library

load_library()

Powers = tuple[float, float]  # of the noise in a sample, and of what was expected


def powers_of(expected: torch.Tensor, output: torch.Tensor) -> list[Powers]:
    """Return the powers of each sample: squared norms of output - expected, and of expected (waits for the device).

    A sample is an element of the first dimension. What was expected has a NaN where its power is NaN.
    """
    noise, power = torch.ops.halfstep.noise_powers(expected, output).tolist()
    return list(zip(noise, power, strict=True))


def finite_of(samples: Iterable[Powers]) -> list[Powers]:
    """Return the samples of which finite values were expected: whatever comes of the others is not to blame."""
    return [sample for sample in samples if math.isfinite(sample[1])]


def share_of(samples: Iterable[Powers]) -> float:
    """Return the noise of all samples together over their power. Nothing of nothing is 0, something of nothing 1."""
    samples = list(samples)
    noise, power = (math.fsum(sample[which] for sample in samples) for which in (0, 1))
    if power == 0.0:
        return noise if math.isnan(noise) else float(noise > 0.0)
    return noise / power


def is_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether all values are finite (waits for the device)."""
    held = [tensor.detach() for tensor in tensors if tensor.numel()]
    for tensor in held:
        found = torch.zeros((), dtype=torch.float32, device=tensor.device)
        norm = torch.empty((), dtype=torch.float32, device=tensor.device)
        one = torch.full((), 1.0, dtype=torch.float32, device=tensor.device)
        torch.ops.halfstep.check_gradients_([tensor], one, found, norm)
        if found.item():
            return False
    return True
