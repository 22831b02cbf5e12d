"""Data to observe, and the observer of them, for test_calibration.py and test_observer.py."""

from __future__ import annotations

import numpy as np
import torch
from halfstep import load_library

load_library()

METHODS = ["min_max", "moving_average", "percentile", "entropy", "mse"]


def observer_of(*tensors: torch.Tensor | np.ndarray, channels_dim: int | None = None):
    observer = torch.classes.halfstep.Observer(channels_dim)
    for tensor in tensors:
        observer.observe(torch.as_tensor(tensor))
    return observer


def normal(size: int = 20000) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(size).astype(np.float32)


def mixed_modes() -> np.ndarray:
    return np.concatenate([normal() * 0.1 - 2.0, normal() * 0.3 + 5.0])


def outliers() -> np.ndarray:
    data = normal()
    data[[5, 77]] = [60.0, -25.0]
    return data


CASES = {
    "normal": normal(),
    "relu": np.maximum(normal(), 0.0),
    "negative": -np.abs(normal()) - 0.5,
    "heavy": normal() ** 5,
    "two modes": mixed_modes(),
    "far from 0": normal() * 0.1 + 3.0,
    "outliers": outliers(),
    "constant": np.full(1000, 2.7, np.float32),
    "one value": np.array([-0.3], np.float32),
    "two values": np.array([0.0, 1.0] * 50, np.float32),
    "small": normal() * np.float32(1e-34),
    "huge": np.clip(normal().astype(np.float64) * 1e38, -3e38, 3e38).astype(np.float32),
}
