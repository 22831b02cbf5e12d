"""The LossScaleOptimizer on two replicas, which compute on halves of a batch and step together."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from halfstep import tensorflow_ops
from halfstep.tensorflow import LossScaleOptimizer


@pytest.fixture(params=["custom", "plain"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(tensorflow_ops, "why_plain", lambda: "tested")
    return request.param


def replica_step(strategy, optimizer, variable: keras.Variable):
    """Return a step that applies on each replica its own gradient: one of `values`."""

    @tf.function
    def step(values: tf.Tensor) -> None:
        def one() -> None:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            optimizer.apply([tf.fill([3], values[replica])], [variable])

        strategy.run(one)

    return lambda *values: step(tf.constant(values, tf.float32))


def make(strategy, kind=LossScaleOptimizer, **settings):
    with strategy.scope():
        variable = keras.Variable(np.ones(3, np.float32), name="v")
        optimizer = kind(keras.optimizers.SGD(1.0), initial_scale=8.0, **settings)
        optimizer.build([variable])
    return variable, optimizer, replica_step(strategy, optimizer, variable)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 1])
def test_an_overflow_on_one_replica_skips_the_step_of_all(two_replicas, where: int, bad: float) -> None:
    variable, optimizer, step = make(two_replicas)
    step(4.0, 12.0)
    np.testing.assert_array_equal(variable.numpy(), [-1.0] * 3)  # 1 - (4 + 12) / 8
    step(*((bad, 8.0) if where == 0 else (8.0, bad)))
    for copy in two_replicas.experimental_local_results(variable.value):
        np.testing.assert_array_equal(copy.numpy(), [-1.0] * 3)
    assert optimizer.scale() == 4.0
    assert optimizer.overflowed() == {"v": 3}
    assert optimizer.counters()["skipped"] == 1
    assert optimizer.counters()["steps"] == 2
    assert optimizer.counters()["nan_steps"] == int(math.isnan(bad))
    for copy in two_replicas.experimental_local_results(optimizer.dynamic_scale.value):
        assert float(copy) == 4.0
    step(4.0, 4.0)
    np.testing.assert_array_equal(variable.numpy(), [-3.0] * 3)
    assert optimizer.gradient_norm() == pytest.approx(math.sqrt(6))  # of both replicas


def test_keras_lets_an_overflow_on_the_last_replica_through(two_replicas) -> None:
    """What the override is for. If this fails, Keras has mended it."""
    variable, _, step = make(two_replicas, keras.optimizers.LossScaleOptimizer)
    step(8.0, math.inf)
    assert np.all(np.isneginf(variable.numpy()))


def test_the_scale_moves_as_on_one_device(two_replicas) -> None:
    _, optimizer, step = make(two_replicas, dynamic_growth_steps=2, hysteresis=2)
    scales = []
    for values in [(1, 1), (1, 1), (math.inf, 1), (1, math.inf), (math.nan, math.inf), (1, 1), (1, 1)]:
        step(*map(float, values))
        scales.append(optimizer.scale())
    assert scales == [8.0, 16.0, 16.0, 8.0, 4.0, 4.0, 8.0]
    assert optimizer.counters()["skipped"] == 3


def small_model(clip: float | None) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([8]), keras.layers.Dense(16, "tanh"), keras.layers.Dense(1, dtype="float32")])
    inner = keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=clip)
    model.compile(LossScaleOptimizer(inner), "mse")
    return model


@pytest.mark.parametrize("clip", [None, 0.05])
def test_fit_learns_what_one_device_learns(two_replicas, mixed_float16: None, clip: float | None) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 8)).astype(np.float32)
    y = x[:, :1] * 0.5
    y[40] = 1e30  # in the second half of the third batch: on the last replica
    alone = small_model(clip)
    with two_replicas.scope():
        together = small_model(clip)
    together.set_weights(alone.get_weights())
    for model in (alone, together):
        model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
    assert alone.optimizer.counters()["skipped"] == together.optimizer.counters()["skipped"] == 3
    if clip is None:  # with it each replica clips its own gradients, in Keras
        for a, b in zip(alone.get_weights(), together.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=0.02, atol=2e-3)
    assert all(np.isfinite(weight).all() for weight in together.get_weights())


@pytest.mark.parametrize("scaled", [False, True])
def test_accumulation_is_what_keras_cannot_do_here(two_replicas, scaled: bool) -> None:
    """Its own condition around a merge_call: the inner optimizer alone fails alike. docs/tensorflow.md says so."""
    with two_replicas.scope():
        variable = keras.Variable(np.ones(3, np.float32), name="v")
        optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2)
        optimizer = LossScaleOptimizer(optimizer) if scaled else optimizer
        optimizer.build([variable])
    with pytest.raises(RuntimeError, match="merge_call"):
        replica_step(two_replicas, optimizer, variable)(8.0, 8.0)


def test_apply_outside_of_a_replica_is_an_error(two_replicas) -> None:
    variable, optimizer, _ = make(two_replicas)
    with two_replicas.scope(), pytest.raises(ValueError, match="must be called in a replica context"):
        optimizer.apply([tf.ones([3])], [variable])
