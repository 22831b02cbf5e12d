"""Small networks learn under both mixed policies what they learn in float32."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from halfstep.tensorflow import LossScaleOptimizer
from sklearn.datasets import load_digits


def images() -> tuple[np.ndarray, np.ndarray]:
    digits = load_digits()
    return (digits.images[..., None] / 16.0).astype(np.float32), digits.target


def network(kind: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    body = {
        "mlp": [layers.Flatten(), layers.Dense(64, "relu"), layers.Dense(32, "relu")],
        "cnn": [
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Flatten(),
        ],
    }[kind]
    return keras.Sequential([keras.Input([8, 8, 1]), *body, layers.Dense(10, dtype="float32")])


def accuracy(kind: str, policy: str) -> tuple[float, float, keras.optimizers.Optimizer]:
    keras.config.set_dtype_policy(policy)
    model, (x, y) = network(kind), images()
    optimizer = keras.optimizers.Adam(3e-3)
    if policy == "mixed_float16":
        optimizer = LossScaleOptimizer(optimizer, dynamic_growth_steps=100)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    history = model.fit(x[:1347], y[:1347], batch_size=32, epochs=10, verbose=0)
    return model.evaluate(x[1347:], y[1347:], verbose=0)[1], history.history["loss"][-1], model.optimizer


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_digits_are_learned_under_both_policies(kind: str) -> None:
    best, loss, _ = accuracy(kind, "float32")
    assert best > 0.9
    for policy in ("mixed_float16", "mixed_bfloat16"):
        reached, final, optimizer = accuracy(kind, policy)
        assert reached > best - 0.02
        assert final < 2 * loss + 0.01
        if policy == "mixed_float16":
            counters = optimizer.counters()
            # The scale grows until an overflow skips a step, and the network learns all the same.
            assert counters["steps"] == 430
            assert counters["growths"] >= 3
            assert counters["skipped"] <= 5
