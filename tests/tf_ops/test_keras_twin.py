"""The copies of a Keras model that are measured, and that the model itself is not touched."""

from __future__ import annotations

import itertools
import random
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from halfstep import MixedPrecisionManager, keras_twin
from halfstep.keras_twin import CannotMeasure, layer_bytes, step_seconds, undisturbed
from halfstep.loss_scale_optimizer import LossScaleOptimizer

NO_STEPS = dict.fromkeys(LossScaleOptimizer(keras.optimizers.SGD()).counters(), 0)
POLICIES = {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}


@pytest.fixture(params=POLICIES)
def half(request: pytest.FixtureRequest) -> str:
    """Keras' global policy is a mixed one, whose half dtype this is."""
    keras.config.set_dtype_policy(request.param)
    return POLICIES[request.param]


def batch(*shape: int, outputs: int = 1):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    return x, np.ones((shape[0], outputs), "float32"), None


class Clock:
    """Seconds that pass only when a copy trains."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def __call__(self) -> float:
        return self.now


# ----------------------------------------------------------------------------------------------------------- memory


def test_bytes_of_a_dense_net_by_hand(half: str) -> None:
    model = keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(512, activation="relu"),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(10, activation="softmax", dtype="float32"),
        ]
    )
    numbers = 2 * 512 + 2 * 256  # of Dense and of Dropout, in half
    assert layer_bytes(model, batch(128, 784)) == (128 * (2 * numbers + 4 * 10), 128 * 4 * (numbers + 10))


def test_views_and_inputs_are_not_counted(half: str) -> None:
    x = keras.Input((6, 4))
    y = keras.layers.Reshape((4, 6))(keras.layers.Activation("linear")(x))  # the input, cast
    y = keras.layers.Dense(5, activation="linear")(y)  # a tensordot, which ends in a reshape
    y = keras.layers.Flatten()(y)
    model = keras.Model(x, keras.layers.Activation("linear", dtype="float32")(keras.layers.Dense(1)(y)))
    same, full = layer_bytes(model, batch(3, 6, 4))
    # Casts are made by layers on the way in, not put out; but what Activation hands on is one.
    dense = 3 * 4 * 5 + 3
    assert full == 4 * dense
    assert same == 2 * (dense + 3 * 6 * 4) + 4 * 3


def test_convolutions_norms_and_additions_by_hand(half: str) -> None:
    x = keras.Input((8, 8, 3))
    y = keras.layers.Conv2D(4, 3, padding="same")(x)
    y = keras.layers.BatchNormalization()(y)
    z = keras.layers.Conv2D(4, 3, padding="same")(y) + y  # an operation between layers
    z = keras.layers.MaxPooling2D()(z)
    model = keras.Model(x, keras.layers.Dense(2, dtype="float32")(keras.layers.GlobalAveragePooling2D()(z)))
    numbers = 4 * 8 * 8 * 4 + 4 * 4 * 4 + 4
    assert layer_bytes(model, batch(5, 8, 8, 3)) == (5 * (2 * numbers + 8), 5 * 4 * (numbers + 2))


def test_attention_counts_what_is_inside(half: str) -> None:
    x = keras.Input((6, 8))
    model = keras.Model(x, keras.layers.MultiHeadAttention(num_heads=2, key_dim=4, flash_attention=False)(x, x))
    same, full = layer_bytes(model, batch(3, 6, 8))
    assert full == 2 * same
    # query, key, value and the output are layers; the scores' softmax may or may not be one.
    assert full in (4 * 3 * (4 * 6 * 8 + scores) for scores in (0, 2 * 6 * 6, 2 * 2 * 6 * 6))


def test_nested_recurrent_and_integer_layers(half: str) -> None:
    inner = keras.Sequential([keras.Input((7,)), keras.layers.Dense(5, name="inside")], name="inner")
    words = keras.Input((9,), dtype="int32")
    y = keras.layers.Embedding(20, 6)(words)
    y = keras.layers.Bidirectional(keras.layers.LSTM(7), merge_mode="sum")(y)
    model = keras.Model(words, keras.layers.Dense(1, dtype="float32")(inner(y)))
    x = np.ones((4, 9), "int32")
    same, full = layer_bytes(model, (x, None, None))
    # Embedding; the LSTM of each direction; their sum; the Dense inside. What a cell puts out in a loop is not kept.
    half_numbers = 4 * (9 * 6 + 2 * 7 + 7 + 5)
    assert (same, full) == (2 * half_numbers + 16, 4 * half_numbers + 16)


def test_dicts_and_several_outputs(half: str) -> None:
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    shared = keras.layers.Dense(6)
    model = keras.Model({"a": a, "b": b}, {"one": shared(a), "two": keras.layers.Dense(2, dtype="float32")(shared(b))})
    x = {"a": np.ones((3, 4), "float32"), "b": np.ones((3, 4), "float32")}
    assert layer_bytes(model, (x, None, None)) == (3 * (2 * 12 + 4 * 2), 3 * 4 * 14)


def test_shapes_that_are_not_known_are_said() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential([keras.layers.Lambda(lambda x: tf.boolean_mask(x, x[:, 0] > 0)), keras.layers.Dense(2)])
    model(batch(3, 4)[0])
    with pytest.raises(CannotMeasure, match="the shape of what lambda.* returns is not known before it runs"):
        layer_bytes(model, batch(3, 4))


# ----------------------------------------------------------------------------------------------- the float32 twin


def pair(model: keras.Model, x) -> tuple[keras.Model, keras.Model]:
    with undisturbed():
        twins = keras_twin._pair(model, x)
        for twin in twins:
            twin.set_weights(model.get_weights())
        return twins


def test_the_twin_is_float32_throughout_and_computes_the_same(half: str) -> None:
    x = keras.Input((6, 8))
    y = keras.layers.MultiHeadAttention(2, 4)(x, x)
    y = keras.layers.LayerNormalization()(x + y)
    y = keras.layers.TimeDistributed(keras.layers.Dense(3, activation="gelu"))(y)
    y = keras.layers.RNN([keras.layers.GRUCell(4), keras.layers.LSTMCell(5)])(y)
    y = keras.ops.cast(y, half)
    model = keras.Model(x, keras.layers.Dense(2)(y))
    model.layers[-1].trainable = False
    data = batch(4, 6, 8)[0]
    same, full = pair(model, data)
    assert [layer.compute_dtype for layer in same._flatten_layers()] == [
        layer.compute_dtype for layer in model._flatten_layers()
    ]
    assert {layer.compute_dtype for layer in full._flatten_layers()} == {"float32"}
    assert len(full.trainable_weights) == len(model.trainable_weights) == len(model.weights) - 2
    assert full(data).dtype == tf.float32
    assert np.array_equal(same(data), model(data))
    expected, got = full(data).numpy(), model(data).numpy().astype("float32")
    assert not np.array_equal(expected, got)
    assert np.allclose(expected, got, atol=0.1)


def test_dtypes_that_were_set_after_the_making_are_kept() -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    model.layers[0].dtype_policy = "mixed_float16"
    same, full = pair(model, batch(2, 4)[0])
    assert [layer.compute_dtype for layer in same.layers] == ["float16", "float32"]
    assert [layer.compute_dtype for layer in full.layers] == ["float32", "float32"]


def test_a_subclassed_model_without_get_config(half: str) -> None:
    class Net(keras.Model):
        def __init__(self, width: int = 6) -> None:
            super().__init__()
            self.hidden = [keras.layers.Dense(width), keras.layers.Dense(width, dtype="float32")]

        def call(self, x, training=False):
            for layer in self.hidden:
                x = layer(x)
            return x

    model = Net()
    data = batch(5, 4)[0]
    expected = model(data)
    model.hidden[1].trainable = False
    same, full = pair(model, data)
    assert np.array_equal(same(data), expected)
    assert [layer.compute_dtype for layer in full.hidden] == ["float32"] * 2
    assert len(same.trainable_weights) == 2
    assert layer_bytes(model, batch(5, 4)) == (5 * 6 * (2 + 4), 5 * 6 * 8)
    other = Net(7)  # of which Keras' get_config() does not know
    other(data)
    with pytest.raises(CannotMeasure, match="weights of other shapes than it has"):
        layer_bytes(other, batch(5, 4))


def test_custom_layers_and_functions_need_not_be_registered(half: str) -> None:
    class Twice(keras.layers.Layer):
        def call(self, x):
            return 2 * x

    def thrice(x):
        return 3 * x

    class Boxed(keras.Model):
        pass

    x = keras.Input((4,))
    y = keras.layers.Dense(3, activation=thrice)(Twice()(x))
    y = keras.layers.Lambda(lambda x: tf.negative(x), output_shape=lambda shape: shape)(y)
    y = keras.layers.Lambda(thrice)(keras.layers.Dense(2, activation=lambda x: 2.0 * x)(y))
    model = Boxed(x, y)
    data = batch(5, 4)[0]
    same, full = pair(model, data)
    assert np.array_equal(same(data), model(data))
    assert np.allclose(full(data), model(data).numpy().astype("float32"), rtol=0.05, atol=0.1)


def test_models_that_cannot_be_copied_say_why(half: str) -> None:
    class Closed(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.layer = keras.layers.Dense(1)

        def call(self, x):
            return self.layer(x)

        def get_config(self):
            raise NotImplementedError("no config here")

    class Stubborn(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.layer = keras.layers.Dense(2, dtype=f"mixed_{half}")
            self.layer.dtype_policy = f"mixed_{half}"

        def call(self, x):
            return self.layer(x)

    class Growing(keras.Model):
        made = 0

        def __init__(self) -> None:
            super().__init__()
            Growing.made += 1
            self.stack = [keras.layers.Dense(1) for _ in range(Growing.made)]

        def call(self, x):
            return sum(layer(x) for layer in self.stack)

    data = batch(3, 4)
    closed, grown, stubborn = Closed(), Growing(), Stubborn()
    with pytest.raises(CannotMeasure, match="the model has no weights yet: its first call makes them"):
        layer_bytes(stubborn, data)
    for model in (closed, grown, stubborn):
        model(data[0])
    with pytest.raises(CannotMeasure, match="the model cannot be copied: NotImplementedError: no config here"):
        layer_bytes(closed, data)
    with pytest.raises(CannotMeasure, match=r"its get_config\(\) makes other layers than it has"):
        layer_bytes(grown, data)
    assert layer_bytes(stubborn, data) == (12, 24), "a dtype in its code is changed after the making"
    with pytest.raises(CannotMeasure, match="a copy of the model cannot be called: "):
        layer_bytes(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]), batch(3, 5))


def test_float32_models_and_strategies_are_not_measured(two_replicas) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    with pytest.raises(CannotMeasure, match="no layer of the model computes in half precision"):
        layer_bytes(model, batch(3, 4))
    keras.config.set_dtype_policy("mixed_float16")
    with two_replicas.scope():
        mirrored = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    with pytest.raises(CannotMeasure, match=r"the model is under a tf\.distribute strategy"):
        layer_bytes(mirrored, batch(3, 4))
    mp = MixedPrecisionManager("tensorflow", initial_loss_scale=2.0**6)
    mp.setup_tensorflow_policy()
    with two_replicas.scope():
        mirrored.compile(mp.wrap_optimizer("sgd"), "mse")
    history = mirrored.fit(*batch(4, 4)[:2], verbose=0).history
    assert (history["loss_scale"], history["skipped_steps"]) == ([2.0**6], [0])
    every = mp.get_comprehensive_stats()
    assert every["steps"] == 1
    for name in ("training_speedup", "memory_reduction", "memory_saved_bytes"):
        assert "tf.distribute strategy" in every["notes"][name]


# ------------------------------------------------------------------------------------------------------- the times


@pytest.mark.parametrize("settings", [{}, {"jit_compile": True}, {"run_eagerly": True}])
def test_steps_are_timed_as_the_model_is_compiled(monkeypatch: pytest.MonkeyPatch, settings: dict) -> None:
    keras.config.set_dtype_policy("mixed_float16")
    twins = []
    compile_ = keras_twin._compile

    def noting(twin, model, *, scaling):
        compile_(twin, model, scaling=scaling)
        twins.append((twin, twin.get_weights()))

    monkeypatch.setattr(keras_twin, "_compile", noting)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1, dtype="float32")])
    inner = keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9), global_clipnorm=2.0)
    model.compile(LossScaleOptimizer(inner, 2.0**20, min_scale=2.0), "mse", loss_weights=0.5, **settings)
    x, y, _ = batch(8, 4)
    model.fit(x, y, verbose=0)
    model.optimizer.dynamic_scale.assign(2.0**6)
    ticks = itertools.count()  # a clock of its own: how many steps there are depends on the time they take
    speed = step_seconds(model, (x, y, np.ones(8, "float32")), clock=lambda: next(ticks) / 1000)
    assert (len(speed.mixed), len(speed.full)) == (15, 15)
    assert all(seconds > 0 for seconds in (*speed.mixed, *speed.full))
    (mixed, start), (full, _) = twins
    for twin in (mixed, full):
        assert (twin.jit_compile, twin.run_eagerly) == (model.jit_compile, model.run_eagerly)
        assert twin.loss == "mse"
        assert int(twin.optimizer.iterations) == 17
        assert twin.get_compile_config()["loss_weights"] == 0.5
    assert type(mixed.optimizer) is LossScaleOptimizer
    assert mixed.optimizer.get_config()["initial_scale"] == 2.0**20
    assert mixed.optimizer.rule == model.optimizer.rule
    assert mixed.optimizer.scale() == 2.0**6
    assert mixed.optimizer.counters() == {**NO_STEPS, "steps": 17}, "no step was skipped"
    assert type(full.optimizer) is keras.optimizers.Adam
    assert full.optimizer.get_config() == inner.get_config()
    assert all(np.array_equal(a, b) for a, b in zip(start, model.get_weights(), strict=True))
    assert speed.skipped == 0


def stand_in_steps(monkeypatch: pytest.MonkeyPatch, clock: Clock, mixed: float, full: float, first: float = 0.0):
    """Let the training steps of copies take so many seconds of `clock`, and their first ones `first` more."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    calls = []

    def step(twin, data):
        half = keras_twin.computes_in_half(twin.layers[0])
        calls.append(half)
        clock.now += (mixed if half else full) + (first if len(calls) <= 2 else 0)

    monkeypatch.setattr(keras_twin, "_train_step", step)
    return model, calls


def test_the_ratio_is_that_of_the_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    model, calls = stand_in_steps(monkeypatch, clock, mixed=0.01, full=0.03)
    speed = step_seconds(model, batch(2, 4), clock=clock)
    assert speed.median == pytest.approx(3.0)
    assert speed.peak == pytest.approx(3.0)
    assert calls[:4] == [True, True, False, False], "both warm up"
    assert calls[4:] == [True, False] * 15, "and take turns"
    assert keras_twin.Speed((1.0, 2.0, 9.0), (3.0, 8.0, 9.0), 0).median == 4.0
    assert keras_twin.Speed((1.0, 2.0, 9.0), (3.0, 8.0, 9.0), 0).peak == 4.0


def test_the_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    model, calls = stand_in_steps(monkeypatch, clock, mixed=2.0, full=0.5)
    speed = step_seconds(model, batch(2, 4), clock=clock)
    assert clock.now < 23
    assert len(speed.mixed) == 6, "after 5 seconds of warming up, 2.5 each until 20 are over"
    clock = Clock()
    model, calls = stand_in_steps(monkeypatch, clock, mixed=0.01, full=0.01, first=60.0)
    assert len(step_seconds(model, batch(2, 4), clock=clock).mixed) == 2, "two in any case"
    assert len(calls) == 2 + 4


class OwnStep(keras.Sequential):
    """A model with a train_step of its own, as Keras' guide writes it."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.optimizer.scale_loss(self.compute_loss(x, y, self(x, training=True)))
        self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
        return {"loss": loss}


def test_a_train_step_of_the_users_is_given_what_fit_gives_it() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = OwnStep([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, y, _ = batch(8, 4)
    model.fit(x, y, verbose=0)
    assert len(step_seconds(model, (x, y, None)).mixed) >= 2


def test_skipped_steps_are_said() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    mp = MixedPrecisionManager("tensorflow")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(mp.wrap_optimizer("sgd"), "mse")
    x, y, _ = batch(4, 4)
    x[0, 0] = np.inf
    model.train_on_batch(x, y)
    mp.watch(model, x, y)
    note = mp.get_comprehensive_stats()["notes"]["training_speedup"]
    timed, skipped = re.fullmatch(r"of (\d+) training steps .*; (\d+) of the former were skipped.*", note).groups()
    assert timed == skipped


# ---------------------------------------------------------------------------------- what the user has stays as it is


def everything(model: keras.Model) -> list[np.ndarray]:
    """Return all that a training changes, and the states of all generators of random numbers."""
    seeds = [layer.seed_generator.state for layer in model._flatten_layers() if hasattr(layer, "seed_generator")]
    assert seeds, "the model should have some"
    metrics = [variable for metric in model.metrics for variable in metric.variables]
    own = keras.src.random.seed_generator.global_seed_generator().state
    variables = [*model.variables, *model.optimizer.variables, *metrics, *seeds, own]
    variables += model.optimizer.memory.variables if hasattr(model.optimizer, "memory") else []
    python, legacy = random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    return [*(variable.numpy() for variable in variables), np.array(python[1]), legacy.copy()]


class Drawing(keras.layers.Layer):
    """Noise from Keras' global generator."""

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), dtype=x.dtype)


class Block(keras.layers.Layer):
    """A layer that makes layers which are named by a counter."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.inner = keras.layers.Dense(8)

    def call(self, x):
        return self.inner(x)


@pytest.mark.parametrize("settings", [{}, {"run_eagerly": True}])
def test_the_users_model_stays_bit_for_bit(half: str, settings: dict) -> None:
    layers = [
        keras.Input((4,)),
        keras.layers.Dense(8),
        keras.layers.BatchNormalization(),
        Block(),
        Drawing(),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(1, dtype="float32"),
    ]
    mp = MixedPrecisionManager("tensorflow", f"mixed_{half}")
    mp.setup_tensorflow_policy()
    model = keras.Sequential(layers)
    model.compile(mp.wrap_optimizer("adam"), "mse", metrics=["mae"], **settings)
    x, y, _ = batch(8, 4)
    model.fit(x, y, verbose=0)
    before, policies = everything(model), [layer.dtype_policy.name for layer in model.layers]
    functions, optimizer, loss = model.train_function, model.optimizer, model.loss
    name = keras.layers.Dense(1).name
    every = mp.get_comprehensive_stats()
    assert every["training_speedup"] > 0, every["notes"]
    assert every["memory_saved_bytes"] > 0
    random_before = everything(model)
    following = keras.layers.Dense(1).name
    assert int(following.split("_")[-1]) == int(name.split("_")[-1]) + 1, "names go on as if no copy had been made"
    assert keras.config.dtype_policy().name == f"mixed_{half}"
    assert [layer.dtype_policy.name for layer in model.layers] == policies
    assert (model.train_function, model.optimizer, model.loss) == (functions, optimizer, loss)
    for a, b in zip(before[:-2], random_before[:-2], strict=True):
        assert np.array_equal(a, b, equal_nan=True)


def test_measuring_draws_no_random_number() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dropout(0.5), Drawing()])
    model.compile("adam", "mse")
    x, y, _ = batch(8, 4, outputs=8)
    model.train_on_batch(x, y)
    before = everything(model)
    layer_bytes(model, (x, y, None))
    step_seconds(model, (x, y, None))
    for a, b in zip(before, everything(model), strict=True):
        assert np.array_equal(a, b)


def test_training_goes_on_as_if_nothing_had_been_measured() -> None:
    def run(measured: bool) -> list[np.ndarray]:
        keras.utils.clear_session()
        keras.utils.set_random_seed(5)
        mp = MixedPrecisionManager("tensorflow", initial_loss_scale=2.0**6)
        mp.setup_tensorflow_policy()
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dropout(0.5)])
        model.compile(mp.wrap_optimizer("adam"), "mse")
        x, y, _ = batch(32, 4, outputs=8)

        class Asking(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                if measured:
                    assert mp.get_comprehensive_stats()["training_speedup"] > 0

        model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[Asking()])
        mp.restore_tensorflow_policy()
        return [*model.get_weights(), np.array(keras.random.normal((3,))), np.array(random.random())]

    for a, b in zip(run(False), run(True), strict=True):
        assert np.array_equal(a, b)
