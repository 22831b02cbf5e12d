"""Trains a small convolutional network on handwritten digits in float32 and in both mixed policies, with Keras.

    make demo-tf      or, in an environment with TensorFlow and halfstep: python examples/tensorflow_digits.py

float16 is slow on a CPU, where TensorFlow has no arithmetic of its own for it; bfloat16 is not.
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from halfstep import MixedPrecisionManager
from sklearn.datasets import load_digits


def make_model() -> keras.Model:
    """Return the network, the same weights each time; its layers follow Keras' global policy."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([8, 8, 1]),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, dtype="float32"),  # logits, and with them the loss, stay float32
        ]
    )


def main(epochs: int = 8) -> dict[str, float]:
    """Train with each policy, print a line for each, and return the accuracies on digits that were not trained on."""
    digits = load_digits()
    images = (digits.images[..., None] / 16.0).astype(np.float32)
    train, test = slice(0, 1347), slice(1347, None)
    accuracies = {}
    for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
        manager = MixedPrecisionManager(framework="tensorflow", precision_policy=policy)
        with manager.autocast_context():
            model = make_model()
            optimizer = manager.wrap_optimizer(keras.optimizers.Adam(3e-3))
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizer, loss, metrics=["accuracy"])
            begin = time.perf_counter()
            model.fit(images[train], digits.target[train], batch_size=32, epochs=epochs, verbose=0)
            seconds = time.perf_counter() - begin
            accuracies[policy] = model.evaluate(images[test], digits.target[test], verbose=0)[1]
        scaled = policy == "mixed_float16"
        note = f", loss scale {optimizer.scale():.0f}, skipped {optimizer.counters()['skipped']}" if scaled else ""
        print(f"{policy:15} accuracy {accuracies[policy]:.3f} in {seconds:.1f} s{note}")
    return accuracies


if __name__ == "__main__":
    main()
