"""The loss scaler's part of a training step in TensorFlow: Keras' LossScaleOptimizer against halfstep's, on the CPU.

    .venv-tf/bin/python bench/tensorflow_step.py [--repeats 40]

A step makes fresh gradients, as a backward pass does, and applies SGD to them: alone, below Keras' scaler, and below
halfstep's (as it is with the library, and with plain ops alone). The scaler's part is the step less the step without
one. All are tf.functions in graph mode, called in turns; the medians are printed. The limit is that of the bytes: Keras
reads and writes 14 bytes an element of float32 (isfinite 4 + 1, all 1, divide 4 + 4), one pass 8.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf
from halfstep import tensorflow_ops
from halfstep.tensorflow import LossScaleOptimizer
from halfstep.tensorflow_ops import why_plain

SHAPES = ((160, 100), (400, 1000), (200, 100_000), (20, 1_000_000), (8, 8_000_000))


def make_step(count: int, size: int, optimizer: keras.optimizers.Optimizer, *, plain: bool = False):
    """Return a traced step on `count` variables of `size` elements."""
    variables = [keras.Variable(tf.ones([size]), name=f"v{i}") for i in range(count)]
    sources = [tf.Variable(tf.random.normal([size])) for _ in range(count)]
    optimizer.build(variables)

    @tf.function
    def step(factor: tf.Tensor) -> None:
        optimizer.apply([source * factor for source in sources], variables)

    factor = tf.constant(1024.0)
    with mock.patch.object(tensorflow_ops, "why_plain", return_value="measured" if plain else why_plain()):
        step(factor)

    def run() -> float:
        start = time.perf_counter()
        step(factor)
        return time.perf_counter() - start

    return run


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    repeats = parser.parse_args().repeats

    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {os.cpu_count()} processors; medians in ms")
    print(f"{'tensors':>16} {'SGD':>8} {'Keras':>8} {'plain':>8} {'op':>8} {'Keras/plain':>12} {'Keras/op':>9}")
    for count, size in SHAPES:
        sgd = keras.optimizers.SGD
        steps = {
            "SGD": make_step(count, size, sgd()),
            "Keras": make_step(count, size, keras.optimizers.LossScaleOptimizer(sgd())),
            "plain": make_step(count, size, LossScaleOptimizer(sgd()), plain=True),
            "op": make_step(count, size, LossScaleOptimizer(sgd())),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        many = max(repeats, min(2000, int(repeats * 2e7 / (count * size))))
        for _ in range(many):
            for name, run in steps.items():
                times[name].append(run())
        medians = {name: statistics.median(values[len(values) // 5 :]) * 1e3 for name, values in times.items()}
        part = {name: medians[name] - medians["SGD"] for name in ("Keras", "plain", "op")}
        columns = (medians["SGD"], part["Keras"], part["plain"], part["op"])
        row = " ".join([f"{f'{count} x {size}':>16}", *(f"{value:8.3f}" for value in columns)])
        print(f"{row} {part['Keras'] / part['plain']:12.2f} {part['Keras'] / part['op']:9.2f}", flush=True)


if __name__ == "__main__":
    main()
