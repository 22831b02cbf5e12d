"""LossScaleCallback: what it writes into the logs, and when it ends a training."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import math
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from halfstep import ScaleCollapsed
from halfstep.loss_scale_callback import LossScaleCallback
from halfstep.loss_scale_optimizer import LossScaleOptimizer

X = np.linspace(-1, 1, 48, dtype="float32").reshape(12, 4)
Y = X.sum(1, keepdims=True)


def trained(callbacks, *, x=X, epochs: int = 2, optimizer=None, scale: float = 2.0**8, **settings):
    """Train a small float16 model in 3 steps an epoch; return (history, optimizer)."""
    layers = [keras.Input((4,)), keras.layers.Dense(3, name="first"), keras.layers.Dense(1, dtype="float32")]
    with_policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential(layers)
    keras.config.set_dtype_policy(with_policy)
    if optimizer is None:
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.01), scale, **settings)
    model.compile(optimizer, "mse")
    history = model.fit(x, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return history.history, optimizer


def with_nan(*rows: int) -> np.ndarray:
    x = X.copy()
    x[list(rows)] = np.nan
    return x


def test_the_epoch_logs_have_scale_skips_and_norm() -> None:
    seen = []

    class Norm(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((logs["gradient_norm"], self.model.optimizer.gradient_norm()))

    history, optimizer = trained([LossScaleCallback(), Norm()], x=with_nan(5), epochs=3)
    # One step in three is skipped and halves the scale.
    assert history["loss_scale"] == [2.0**7, 2.0**6, 2.0**5]
    assert history["skipped_steps"] == [1, 2, 3]
    assert history["gradient_norm"] == [norm for norm, _ in seen]
    assert all(norm == own and 0 < norm < 100 for norm, own in seen)
    assert optimizer.counters()["steps"] == 9


def test_batch_logs_on_request() -> None:
    batches = []

    class Probe(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            batches.append((logs.get("loss_scale"), logs.get("skipped_steps"), logs.get("gradient_norm")))

    trained([LossScaleCallback(per_batch=True), Probe()], x=with_nan(5), epochs=1)
    assert [entry[:2] for entry in batches] == [(2.0**8, 0), (2.0**7, 1), (2.0**7, 1)]
    assert math.isfinite(batches[0][2])
    assert math.isnan(batches[1][2])
    batches.clear()
    history, _ = trained([LossScaleCallback(), Probe()], epochs=1)
    assert batches == [(None, None, None)] * 3
    assert set(history) == {"loss", "loss_scale", "skipped_steps", "gradient_norm"}


def test_the_metrics_of_the_epoch_stay_keras() -> None:
    keras.utils.set_random_seed(3)
    plain, _ = trained([])
    keras.utils.set_random_seed(3)
    logged, _ = trained([LossScaleCallback(per_batch=True)])
    assert logged["loss"] == plain["loss"]


def written_by_tensorflow(name: str, data: float, step: int) -> None:
    tf.summary.write(name, tf.constant(data, tf.float32), step)


def test_csv_logger_and_tensorboard_see_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, board = tmp_path / "log.csv", tmp_path / "board"
    if importlib.util.find_spec("tensorboard") is None:
        # Keras' callback calls scalar(), which TensorFlow takes from the package tensorboard; the writer is its own.
        monkeypatch.setattr(importlib.import_module("tensorflow.summary"), "scalar", written_by_tensorflow)
    callbacks = [LossScaleCallback(), keras.callbacks.CSVLogger(str(table)), keras.callbacks.TensorBoard(str(board))]
    history, _ = trained(callbacks, x=with_nan(5))
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss_scale"]) for row in rows] == history["loss_scale"] == [2.0**7, 2.0**6]
    assert [float(row["gradient_norm"]) for row in rows] == history["gradient_norm"]

    written: dict[str, dict[int, float]] = {}
    for path in map(str, board.glob("train/events*")):
        for record in tf.data.TFRecordDataset(path):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                if value.HasField("tensor") and value.tensor.dtype == tf.float32.as_datatype_enum:
                    written.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
    for name in ("loss_scale", "skipped_steps"):
        assert written[f"epoch_{name}"] == dict(enumerate(map(float, history[name])))
    assert written["epoch_gradient_norm"] == pytest.approx(dict(enumerate(history["gradient_norm"])))


@pytest.mark.parametrize("per_batch", [False, True])
def test_a_run_that_only_skips_ends_with_names(per_batch: bool) -> None:
    callback = LossScaleCallback(per_batch=per_batch, max_consecutive_skips=2)
    with pytest.raises(ScaleCollapsed) as caught:
        trained([callback], x=with_nan(*range(12)))
    skipped, scale = (2, 64) if per_batch else (3, 32)
    message = str(caught.value)
    assert message.startswith(f"{skipped} steps in a row had infinite or NaN gradients; the loss scale is {scale}. ")
    assert "sequential" in message
    assert "first/kernel: 12;" in message, "4 x 3 elements, the most"
    assert "first/bias: 3" in message


def test_skips_between_clean_steps_end_nothing() -> None:
    callback = LossScaleCallback(per_batch=True, max_consecutive_skips=2)
    history, _ = trained([callback], x=with_nan(0, 9), epochs=1)
    assert history["skipped_steps"] == [2]
    with pytest.raises(ScaleCollapsed, match="2 steps in a row"):  # the last of an epoch and the first of the next
        trained([callback], x=with_nan(0, 9), epochs=2)


def test_a_scale_of_zero_is_warned_of_once() -> None:
    with pytest.warns(UserWarning, match="the loss scale has become 0") as caught:
        history, optimizer = trained([LossScaleCallback()], x=with_nan(0), scale=2.0**-126, epochs=4)
    assert len([entry for entry in caught if "become 0" in str(entry.message)]) == 1
    assert history["loss_scale"][-1] == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained([LossScaleCallback()], x=with_nan(0), scale=2.0**-126, min_scale=2.0**-126)


def test_other_optimizers_are_left_alone() -> None:
    for optimizer in (keras.optimizers.SGD(), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())):
        history, _ = trained([LossScaleCallback(True, 1)], x=with_nan(0), optimizer=optimizer)
        assert set(history) == {"loss"}


def test_of_several_the_first_acts() -> None:
    writers = []

    class Noting(LossScaleCallback):
        def __init__(self, name: str, **settings) -> None:
            super().__init__(**settings)
            self.name = name

        def on_epoch_end(self, epoch, logs=None):
            before = dict(logs)
            super().on_epoch_end(epoch, logs)
            if logs != before:
                writers.append(self.name)

    first, second = Noting("first"), Noting("second", max_consecutive_skips=1)
    history, _ = trained([first, second], x=with_nan(11))
    assert writers == ["first", "first"], "and the second does not raise"
    assert history["skipped_steps"] == [1, 2]
    with pytest.raises(ScaleCollapsed):
        trained([second, first], x=with_nan(11))


def test_another_callback_acts_in_the_next_training() -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(LossScaleOptimizer(keras.optimizers.SGD()), "mse")
    first, second = LossScaleCallback(max_consecutive_skips=1), LossScaleCallback()
    with pytest.raises(ScaleCollapsed):
        model.fit(with_nan(0), Y, verbose=0, callbacks=[first])
    assert model.fit(X, Y, verbose=0, callbacks=[second]).history["skipped_steps"] == [1]
    assert model.fit(X, Y, verbose=0, callbacks=[first]).history["skipped_steps"] == [1]


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="per_batch is 1, expected True or False"):
        LossScaleCallback(per_batch=1)
    with pytest.raises(ValueError, match="max_consecutive_skips is 0, expected an integer from 1"):
        LossScaleCallback(max_consecutive_skips=0)
    with pytest.raises(TypeError, match="max_consecutive_skips is 2.5, expected an integer"):
        LossScaleCallback(max_consecutive_skips=2.5)
