"""A small model for the tests of the TensorFlow manager, and managers."""

from __future__ import annotations

import keras
import numpy as np
from halfstep import MixedPrecisionManager

X = np.linspace(-1, 1, 48, dtype="float32").reshape(12, 4)
Y = X.sum(1, keepdims=True)


def manager(policy: str = "mixed_float16", **settings) -> MixedPrecisionManager:
    return MixedPrecisionManager("tensorflow", policy, **settings)


def small(name: str | None = None) -> keras.Model:
    layers = [keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1, dtype="float32")]
    return keras.Sequential(layers, name=name)


def compiled(mp: MixedPrecisionManager, optimizer="sgd", **arguments) -> keras.Model:
    model = small()
    model.compile(mp.wrap_optimizer(optimizer), "mse", **arguments)
    return model


def policy_name() -> str:
    return keras.config.dtype_policy().name


def kept(mp: MixedPrecisionManager):
    """Return the batch that a manager has kept, or None."""
    return mp._manager._watched.batch
