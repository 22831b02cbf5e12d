"""The TensorFlow blocks of the user's document: as they stand, and with fewer rows and epochs."""

from __future__ import annotations

import ast
import contextlib
import io
import math
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from seed_document import block


def run(code: str) -> tuple[str, dict]:
    output, namespace = io.StringIO(), {"__name__": "seed"}
    with contextlib.redirect_stdout(output):
        exec(compile(code, "seed.md", "exec"), namespace)
    return output.getvalue(), namespace


def check(printed: str, namespace: dict, *, epochs: int, steps: int) -> None:
    """Look at what has come out, of a model whose layers put out 1536 numbers in half and 10 in float32."""
    model, history, stats = namespace["model"], namespace["history"].history, namespace["tf_stats"]
    assert [layer.compute_dtype for layer in model.layers] == ["float16"] * 4 + ["float32"]
    assert all(np.isfinite(weight).all() and weight.dtype == np.float32 for weight in model.get_weights())
    assert all(len(values) == epochs for values in history.values())
    assert set(history) >= {"loss", "val_accuracy", "loss_scale", "skipped_steps", "gradient_norm"}
    # The norm is that of an epoch's last step, which may be one that was skipped.
    assert all(math.isfinite(value) for key in set(history) - {"gradient_norm"} for value in history[key])
    assert history["loss"][-1] < history["loss"][0], "the training set is learnt by heart"
    optimizer = model.optimizer
    assert history["loss_scale"][-1] == optimizer.scale() == stats["loss_scale"]
    assert history["skipped_steps"][-1] == stats["skipped_steps"] < epochs * steps / 2
    assert stats["steps"] == epochs * steps
    assert int(optimizer.iterations) == epochs * steps - stats["skipped_steps"]

    assert stats["memory_saved_bytes"] == 128 * 1536 * 2
    assert stats["memory_reduction"] == pytest.approx(1536 * 2 / (1546 * 4))
    assert re.findall(r"Epoch (\d+): Memory saved: 0\.4 MB\n", printed) == list(map(str, range(epochs)))
    assert "  Memory usage reduction: 49.7%\n" in printed
    speedup = stats["training_speedup"]
    assert speedup > 0
    assert f"  Training speedup: {speedup:.2f}x\n" in printed
    assert f"  Final validation accuracy: {history['val_accuracy'][-1]:.4f}\n" in printed


def test_the_block_with_fewer_rows_and_epochs() -> None:
    code = block("TensorFlow Mixed Precision")
    for before, after in (("10000", "512"), ("2000", "256"), ("epochs=10", "epochs=2")):
        assert before in code
        code = code.replace(before, after)
    check(*run(code), epochs=2, steps=4)


@pytest.mark.slow
def test_the_block() -> None:
    """Word for word: float16 on a processor takes up to about 15 minutes, less on some."""
    check(*run(block("TensorFlow Mixed Precision")), epochs=10, steps=79)


def test_the_optimizations_specific_to_tensorflow() -> None:
    """In a process of their own: the switch for XLA stays on. A model of the same kind trains under them."""
    function = next(
        part
        for part in ast.parse(block("2. Framework-Specific Optimizations")).body
        if isinstance(part, ast.FunctionDef) and part.name == "optimize_tensorflow_mixed_precision"
    )
    program = f"""
import sys
sys.path[:0] = {sys.path!r}
import numpy as np, tensorflow as tf
{ast.unparse(function)}
optimize_tensorflow_mixed_precision()
from halfstep import MixedPrecisionManager
assert tf.config.optimizer.get_jit() == "autoclustering", tf.config.optimizer.get_jit()
manager = MixedPrecisionManager("tensorflow", initial_loss_scale=2.0**8)
model = tf.keras.Sequential([tf.keras.layers.Dense(8), tf.keras.layers.Dense(1, dtype="float32")])
model.compile(manager.wrap_optimizer("sgd"), "mse")
x = np.linspace(-1, 1, 48).reshape(12, 4)
manager.setup_tensorflow_policy()
history = model.fit(x, x.sum(1), batch_size=4, epochs=5, verbose=0).history
assert history["loss"][-1] < history["loss"][0]
stats = manager.get_comprehensive_stats()
print(tf.keras.config.dtype_policy().name, model.layers[0].compute_dtype, stats["steps"], stats["training_speedup"] > 0)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout == "mixed_float16 float16 15 True\n", result.stderr
    assert keras.config.dtype_policy().name == "float32", "this process is as it was"
