"""The LossScaleOptimizer against Keras' own and in every way that Keras runs a step."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from halfstep import tensorflow_ops
from halfstep.tensorflow import LossScaleOptimizer

KerasLSO = keras.optimizers.LossScaleOptimizer


@pytest.fixture(params=["custom", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(tensorflow_ops, "why_plain", lambda: "tested")
        monkeypatch.setattr("halfstep.loss_scale_optimizer.why_plain", lambda: "tested")
    return request.param


def variables(seed: int = 0) -> list[keras.Variable]:
    rng = np.random.default_rng(seed)
    return [
        keras.Variable(rng.standard_normal(shape).astype(np.float32), name=f"v{i}")
        for i, shape in enumerate([(4, 3), (3,), (2, 2, 2)])
    ]


def gradient_lists(steps: int, overflows: set[int], seed: int = 1) -> list[list[np.ndarray]]:
    """Gradients of (4, 3), (3,) and (2, 2, 2), as scaled by 1024; those of `overflows` hold an infinity or a NaN."""
    rng = np.random.default_rng(seed)
    lists = []
    for step in range(steps):
        grads = [rng.standard_normal(shape).astype(np.float32) * 1024 for shape in [(4, 3), (3,), (2, 2, 2)]]
        if step in overflows:
            grads[step % 3].reshape(-1)[-1] = (np.inf, np.nan)[step % 2]
        lists.append(grads)
    return lists


def train(optimizer, steps, *, jit: bool | None = False, seed: int = 0) -> tuple[list[np.ndarray], list[float]]:
    """Apply all gradients; return the variables and the scale after each step. jit: None for eager calls."""
    params = variables(seed)
    optimizer.build(params)

    def step(grads: list[tf.Tensor]) -> None:
        optimizer.apply(grads, params)

    run = step if jit is None else tf.function(step, jit_compile=jit)
    scales = []
    for grads in steps:
        run([tf.constant(grad) for grad in grads])
        scales.append(float(optimizer.dynamic_scale.numpy()))
    return [param.numpy() for param in params], scales


OVERFLOWS = {3, 4, 17, 40, 41, 42, 77}
INNER = {
    "sgd": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw_clipped": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.5),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3),
    "ema": lambda: keras.optimizers.SGD(0.01, use_ema=True, ema_overwrite_frequency=5),
}


@pytest.mark.parametrize("jit", [None, False, True], ids=["eager", "graph", "xla"])
@pytest.mark.parametrize("inner", INNER)
def test_scale_and_parameters_are_keras_own(inner: str, jit: bool | None) -> None:
    steps = gradient_lists(100, OVERFLOWS)
    settings = {"initial_scale": 1024.0, "dynamic_growth_steps": 10}
    want, scales = train(KerasLSO(INNER[inner](), **settings), steps, jit=jit)
    ours = LossScaleOptimizer(INNER[inner](), **settings)
    got, our_scales = train(ours, steps, jit=jit)
    assert our_scales == scales
    assert len(set(scales)) > 4
    for a, b in zip(got, want, strict=True):
        # Keras divides by the scale, we multiply by its inverse: a power of 2 here, so there is no difference.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6) if jit else np.testing.assert_array_equal(a, b)
    counters = ours.counters()
    assert (counters["steps"], counters["skipped"]) == (100, len(OVERFLOWS))
    assert counters["backoffs"] == len(OVERFLOWS)
    assert counters["growths"] > 0
    assert int(ours.iterations.numpy()) == (100 - len(OVERFLOWS)) // (3 if inner == "accumulating" else 1)


@pytest.mark.parametrize("graph", [None, False], ids=["eager", "graph"])
@pytest.mark.parametrize("inner", INNER)
def test_custom_and_plain_ops_give_the_same_parameters(
    monkeypatch: pytest.MonkeyPatch, inner: str, graph: bool | None
) -> None:
    steps = gradient_lists(60, {5, 6, 30})
    settings = {"initial_scale": 1000.0, "dynamic_growth_steps": 7, "growth_factor": 1.3, "backoff_factor": 0.6}
    custom = LossScaleOptimizer(INNER[inner](), **settings)
    first = train(custom, steps, jit=graph)
    assert custom.explain() == "custom ops of halfstep's TensorFlow library"
    monkeypatch.setattr(tensorflow_ops, "why_plain", lambda: "tested")
    plain = LossScaleOptimizer(INNER[inner](), **settings)
    second = train(plain, steps, jit=graph)
    assert first[1] == second[1]
    assert custom.counters() == plain.counters()
    for a, b in zip(first[0], second[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert custom.overflowed() == plain.overflowed() != {}


def test_under_xla_plain_ops_run_and_agree() -> None:
    steps = gradient_lists(60, {5, 6, 30})
    settings = {"initial_scale": 1000.0, "growth_factor": 1.3, "backoff_factor": 0.6, "dynamic_growth_steps": 7}
    custom, xla = LossScaleOptimizer(INNER["adam"](), **settings), LossScaleOptimizer(INNER["adam"](), **settings)
    first, second = train(custom, steps), train(xla, steps, jit=True)
    assert "XLA" in xla.explain()
    assert first[1] == second[1]
    assert custom.counters() == xla.counters()
    assert custom.overflowed() == xla.overflowed()
    for a, b in zip(first[0], second[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7)  # the bound that docs/tensorflow.md states


def test_what_happened_is_told(path: str) -> None:
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=1024.0)
    assert optimizer.counters()["steps"] == 0
    assert math.isnan(optimizer.gradient_norm())
    assert optimizer.overflowed() == {}
    assert optimizer.scale() == 1024.0
    assert optimizer.explain() == "no step was traced yet"
    params = variables()
    grads = [tf.ones([4, 3]), tf.ones([3]), tf.ones([2, 2, 2])]
    optimizer.apply(grads, params)
    assert optimizer.gradient_norm() == pytest.approx(math.sqrt(23) / 1024)
    bad = [tf.constant([[math.inf] * 3] * 4), tf.ones([3]), tf.constant([[[math.nan, 1.0]] * 2] * 2)]
    before = [param.numpy() for param in params]
    optimizer.apply(bad, params)
    assert optimizer.overflowed() == {"v0": 12, "v2": 4}
    assert list(optimizer.overflowed()) == ["v0", "v2"]
    assert math.isnan(optimizer.gradient_norm())
    assert optimizer.scale() == 512.0
    for param, value in zip(params, before, strict=True):
        np.testing.assert_array_equal(param.numpy(), value)
    optimizer.apply(grads, params)
    assert optimizer.overflowed() == {"v0": 12, "v2": 4}  # of the last skipped step
    assert optimizer.counters() == {
        "steps": 3, "skipped": 1, "consecutive_skipped": 0, "growths": 0, "backoffs": 1, "at_floor": 0,
        "nan_steps": 1, "inf_steps": 0,
    }  # fmt: skip


def test_bounds_hysteresis_and_presets() -> None:
    steps = gradient_lists(12, set(range(12)))
    bounded = LossScaleOptimizer(keras.optimizers.SGD(0.0), initial_scale=1024.0, min_scale=100.0, hysteresis=2)
    _, scales = train(bounded, steps)
    assert scales[0] == 1024.0
    assert scales[1] == 512.0
    assert scales[-1] == 100.0
    assert bounded.counters()["at_floor"] > 0
    grown = LossScaleOptimizer(keras.optimizers.SGD(0.0), 1024.0, 1, max_scale=3000.0)
    assert train(grown, gradient_lists(3, set()))[1] == [2048.0, 3000.0, 3000.0]
    megatron = LossScaleOptimizer(keras.optimizers.SGD(), preset="megatron")
    assert (megatron.initial_scale, megatron.dynamic_growth_steps, megatron.rule.hysteresis) == (2.0**32, 1000, 2)


@pytest.mark.parametrize("how", [{}, {"jit_compile": True}, {"run_eagerly": True}])
def test_a_growth_delay_holds_from_the_first_step_of_fit(how: dict) -> None:
    """Keras builds the optimizer while it traces the step: what is assigned there would be no start."""
    model, (x, y) = small_model(), data(64)
    settings = {"initial_scale": 4.0, "dynamic_growth_steps": 2, "growth_delay": 3}
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.01), **settings)
    model.compile(optimizer, "sparse_categorical_crossentropy", **how)
    scales = []
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: scales.append(optimizer.scale()))
    model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[callback])
    assert scales == [4.0, 4.0, 4.0, 4.0, 8.0, 8.0, 16.0, 16.0]


def test_growth_steps_set_later_hold() -> None:
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.0), 8.0)
    optimizer.dynamic_growth_steps = 2
    assert optimizer.get_config()["dynamic_growth_steps"] == optimizer.rule.growth_interval == 2
    assert train(optimizer, gradient_lists(4, set()))[1] == [8.0, 16.0, 16.0, 32.0]
    with pytest.raises(ValueError, match="growth_interval is 0"):
        optimizer.dynamic_growth_steps = 0


def test_the_case_in_which_keras_destroys_the_weights_is_survived(path: str) -> None:
    """A scale halved down to 0: good gradients are 0 then, Keras finds 0 finite, and divides it by 0."""
    bad, good = gradient_lists(1, {0})[0], [np.zeros_like(grad) for grad in gradient_lists(1, set())[0]]
    steps = [bad] * 170 + [good] * 3
    theirs, scales = train(KerasLSO(keras.optimizers.SGD(0.1)), steps)
    assert scales[-1] == 0.0
    assert all(np.isnan(value).all() for value in theirs)

    start = [param.numpy() for param in variables()]
    ours = LossScaleOptimizer(keras.optimizers.SGD(0.1))
    kept, our_scales = train(ours, steps)
    assert our_scales == scales
    for value, before in zip(kept, start, strict=True):
        np.testing.assert_array_equal(value, before)
    assert ours.counters()["at_floor"] > 0

    floored = LossScaleOptimizer(keras.optimizers.SGD(0.1), min_scale=1.0)
    train(floored, [bad] * 170 + gradient_lists(5, set()))
    counters = floored.counters()
    assert floored.scale() == 1.0
    assert counters["consecutive_skipped"] == 0
    assert counters["skipped"] == 170
    assert int(floored.iterations.numpy()) == 5  # it trains on


def test_none_gradients_keep_their_places(path: str) -> None:
    params = variables()
    before = params[1].numpy()
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=4.0)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([tf.ones([4, 3]), None, tf.ones([2, 2, 2])], params)
    np.testing.assert_array_equal(params[1].numpy(), before)
    np.testing.assert_allclose(params[2].numpy(), variables()[2].numpy() - 0.25)
    optimizer.apply([None, None, tf.constant([[[math.inf, 1.0]] * 2] * 2)], params)
    assert optimizer.overflowed() == {"v2": 4}
    with pytest.raises(ValueError, match="No gradients"):
        optimizer.apply([None, None, None], params)


def test_calls_that_cannot_be_are_errors_and_change_nothing() -> None:
    params = variables()
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=4.0)
    grads = [tf.ones([4, 3]), tf.ones([3]), tf.ones([2, 2, 2])]
    with pytest.raises(ValueError, match="no trainable_variables, which the first call"):
        optimizer.apply(grads)
    optimizer.build(params)
    for given, variables_of_call in ((grads[:2], params), (grads, params[:1]), (grads[:2], None)):
        with pytest.raises(ValueError, match=f"got {len(given)} gradients for"):
            optimizer.apply(given, variables_of_call)
    with pytest.raises(TypeError, match="gradient of v1 is of int32, expected floats"):
        optimizer.apply([grads[0], tf.ones([3], tf.int32), grads[2]], params)
    other = keras.Variable(np.ones(3, np.float32), name="other")
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply([grads[1]], [other])
    assert optimizer.counters()["steps"] == 0
    for param, start in zip(params, variables(), strict=True):
        np.testing.assert_array_equal(param.numpy(), start.numpy())


def test_an_optimizer_of_another_model_is_refused_as_keras_refuses_it() -> None:
    optimizer, (x, y) = LossScaleOptimizer(keras.optimizers.Adam()), data()
    first, second = small_model(), small_model()
    for model in (first, second):
        model.compile(optimizer, "sparse_categorical_crossentropy")
    first.fit(x, y, verbose=0)
    with pytest.raises(ValueError, match="Unknown variable"):
        second.fit(x, y, verbose=0)


def test_indexed_slices_stay_sparse(path: str) -> None:
    table = keras.Variable(np.zeros((6, 2), np.float32), name="table")
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=8.0)
    seen = []
    inner_apply = optimizer.inner_optimizer.apply
    optimizer.inner_optimizer.apply = lambda grads, **kwargs: (seen.extend(grads), inner_apply(grads, **kwargs))[1]

    def slices(*rows: float) -> tf.IndexedSlices:
        return tf.IndexedSlices(tf.constant([[row, row] for row in rows]), tf.constant([1, 4]), tf.constant([6, 2]))

    optimizer.apply([slices(8.0, 16.0)], [table])
    assert isinstance(seen[0], tf.IndexedSlices)
    assert seen[0].values.shape == (2, 2)
    np.testing.assert_array_equal(table.numpy()[:, 0], [0, -1, 0, 0, -2, 0])
    optimizer.apply([slices(math.inf, 0.0)], [table])
    assert optimizer.overflowed() == {"table": 2}
    assert optimizer.scale() == 4.0
    np.testing.assert_array_equal(table.numpy()[:, 0], [0, -1, 0, 0, -2, 0])


def test_values_that_overwrite_variables_are_checked_but_not_unscaled(path: str) -> None:
    params = variables()
    params[1].overwrite_with_gradient = True
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=4.0)
    optimizer.apply([tf.ones([4, 3]), tf.fill([3], 7.0), tf.ones([2, 2, 2])], params)
    np.testing.assert_array_equal(params[1].numpy(), [7.0] * 3)
    optimizer.apply([tf.ones([4, 3]), tf.fill([3], math.nan), tf.ones([2, 2, 2])], params)
    np.testing.assert_array_equal(params[1].numpy(), [7.0] * 3)
    assert optimizer.counters()["skipped"] == 1


def test_a_subset_and_another_order_of_the_variables(path: str) -> None:
    params = variables()
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=4.0)
    optimizer.build(params)
    optimizer.apply([tf.fill([2, 2, 2], math.inf), tf.ones([4, 3])], [params[2], params[0]])
    assert optimizer.overflowed() == {"v2": 8}


def test_half_gradients_of_half_variables(path: str) -> None:
    params = [keras.Variable(np.ones(5, np.float32), dtype=dtype, name=dtype) for dtype in ("float16", "bfloat16")]
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=4.0)
    optimizer.apply([tf.ones([5], tf.float16), tf.ones([5], tf.bfloat16)], params)
    for param in params:
        np.testing.assert_array_equal(tf.cast(param.value, tf.float32).numpy(), [0.75] * 5)


# ----------------------------------------------------------------------------------------------------- whole models


def small_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input([8]), keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3, dtype="float32")]
    )


def data(rows: int = 96) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, 8)).astype(np.float32), rng.integers(0, 3, rows)


@pytest.mark.parametrize("how", [{}, {"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 3}])
def test_fit_with_compile(mixed_float16: None, how: dict) -> None:
    model = small_model()
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.01))
    model.compile(optimizer, "sparse_categorical_crossentropy", **how)
    assert model.optimizer is optimizer  # not wrapped again
    x, y = data()
    x[70] = 6e4
    history = model.fit(x, y, batch_size=16, epochs=3, verbose=0, shuffle=False)
    counters = optimizer.counters()
    assert counters["steps"] == 18
    assert counters["skipped"] == 3
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    assert ("XLA" in optimizer.explain()) == ("jit_compile" in how)
    assert len(history.history["loss"]) == 3


def test_automatic_clustering_leaves_the_custom_ops_alone(mixed_float16: None) -> None:
    """tf.config.optimizer.set_jit(True), as the users' document has it."""
    before = tf.config.optimizer.get_jit()
    tf.config.optimizer.set_jit(True)
    try:
        model, (x, y) = small_model(), data()
        optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.01))
        model.compile(optimizer, "sparse_categorical_crossentropy")
        model.fit(x, y, batch_size=16, epochs=1, verbose=0)
        assert optimizer.explain().startswith("custom ops")
        assert optimizer.counters()["steps"] == 6
    finally:
        tf.config.optimizer.set_jit(before or False)


def test_a_custom_loop(mixed_float16: None) -> None:
    model, (x, y) = small_model(), data()
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.01))
    losses = []

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            raw = keras.losses.sparse_categorical_crossentropy(y, model(x, training=True), from_logits=True)
            loss = tf.reduce_mean(raw)
            scaled = optimizer.scale_loss(loss)
        optimizer.apply_gradients(
            zip(tape.gradient(scaled, model.trainable_variables), model.trainable_variables, strict=True)
        )
        return loss

    for _ in range(30):
        losses.append(float(step(x, y)))
    assert losses[-1] < losses[0]
    assert optimizer.counters()["steps"] == 30


def test_embeddings_train_in_half(mixed_float16: None) -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Embedding(20, 4), keras.layers.Flatten(), keras.layers.Dense(1)])
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1))
    model.compile(optimizer, "mse")
    tokens = np.random.default_rng(0).integers(0, 10, (64, 5))
    model.build((None, 5))
    before = model.layers[0].embeddings.numpy()
    model.fit(tokens, tokens.sum(1, keepdims=True) / 50, epochs=1, verbose=0)
    after = model.layers[0].embeddings.numpy()
    np.testing.assert_array_equal(after[10:], before[10:])
    assert np.all(np.any(after[:10] != before[:10], axis=1))
    assert optimizer.counters()["skipped"] == 0


# ------------------------------------------------------------------------------------------------ saving and loading


def trained(optimizer: keras.optimizers.Optimizer) -> keras.Model:
    model = small_model()
    model.compile(optimizer, "sparse_categorical_crossentropy", auto_scale_loss=False)
    x, y = data()
    model.fit(x, y, batch_size=16, epochs=5, verbose=0)
    return model


def moments(optimizer: keras.optimizers.Optimizer) -> list[np.ndarray]:
    return [variable.numpy() for variable in optimizer.inner_optimizer.variables]


def test_a_compiled_model_is_saved_and_loaded_whole(mixed_float16: None, tmp_path) -> None:
    optimizer = LossScaleOptimizer(
        keras.optimizers.Adam(0.01), 2.0**30, 3, min_scale=2.0, hysteresis=2, refill="on_growth"
    )
    model = trained(optimizer)
    assert optimizer.counters()["skipped"] > 0
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, LossScaleOptimizer)
    assert loaded.optimizer.rule == optimizer.rule
    assert loaded.optimizer.counters() == optimizer.counters()
    assert loaded.optimizer.scale() == optimizer.scale()
    assert list(loaded.optimizer.overflowed().values()) == list(optimizer.overflowed().values())
    hysteresis = [int(each.memory.hysteresis_left.numpy()) for each in (loaded.optimizer, optimizer)]
    assert hysteresis[0] == hysteresis[1]
    for a, b in zip(moments(loaded.optimizer), moments(optimizer), strict=True):
        np.testing.assert_array_equal(a, b)
    x, y = data()
    for each in (model, loaded):  # and they go on alike
        each.fit(x, y, batch_size=16, epochs=1, verbose=0, shuffle=False)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("theirs_first", [True, False])
def test_own_variables_go_both_ways_between_keras_and_us(mixed_float16: None, theirs_first: bool, recwarn) -> None:
    kinds = [KerasLSO, LossScaleOptimizer] if theirs_first else [LossScaleOptimizer, KerasLSO]
    source, target = (trained(kind(keras.optimizers.Adam(0.01), 2.0**30)).optimizer for kind in kinds)
    store: dict = {}
    source.save_own_variables(store)
    for variable in target.variables:
        variable.assign(tf.zeros_like(variable.value))
    target.load_own_variables(store)
    assert float(target.dynamic_scale.numpy()) == float(source.dynamic_scale.numpy()) > 0
    for a, b in zip(moments(source), moments(target), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(np.any(value != 0) for value in moments(target)[2:])
    assert not [warning for warning in recwarn if "Skipping variable loading" in str(warning.message)]


@pytest.mark.parametrize("theirs_first", [True, False])
def test_checkpoints_of_tensorflow_go_both_ways(mixed_float16: None, theirs_first: bool, tmp_path) -> None:
    kinds = [KerasLSO, LossScaleOptimizer] if theirs_first else [LossScaleOptimizer, KerasLSO]
    source, target = (trained(kind(keras.optimizers.Adam(0.01), 2.0**30)) for kind in kinds)
    path = tf.train.Checkpoint(model=source, optimizer=source.optimizer).save(str(tmp_path / "checkpoint"))
    for variable in target.optimizer.variables:
        variable.assign(tf.zeros_like(variable.value))
    tf.train.Checkpoint(model=target, optimizer=target.optimizer).restore(path).expect_partial()
    assert float(target.optimizer.dynamic_scale.numpy()) == float(source.optimizer.dynamic_scale.numpy()) > 0
    for a, b in zip(moments(source.optimizer), moments(target.optimizer), strict=True):
        np.testing.assert_array_equal(a, b)
    if not theirs_first:
        again = trained(LossScaleOptimizer(keras.optimizers.Adam(0.01)))
        tf.train.Checkpoint(model=again, optimizer=again.optimizer).restore(path).assert_existing_objects_matched()
        assert again.optimizer.counters() == source.optimizer.counters()


def test_a_whole_file_of_keras_optimizer_is_taken_over(mixed_float16: None, tmp_path) -> None:
    """Load the model as Keras saved it, then give its optimizer's state to ours."""
    theirs = trained(KerasLSO(keras.optimizers.Adam(0.01), 2.0**30))
    theirs.save(tmp_path / "theirs.keras")
    loaded = keras.models.load_model(tmp_path / "theirs.keras")
    ours = LossScaleOptimizer.from_keras(loaded.optimizer)
    assert ours.scale() == float(theirs.optimizer.dynamic_scale.numpy())
    assert int(ours.iterations.numpy()) == int(theirs.optimizer.iterations.numpy()) > 0
    loaded.compile(ours, "sparse_categorical_crossentropy")
    x, y = data()
    for model in (theirs, loaded):
        model.fit(x, y, batch_size=16, epochs=2, verbose=0, shuffle=False)
    for a, b in zip(theirs.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_get_config_goes_round() -> None:
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.25), preset="deepspeed", max_scale=2.0**20, name="scaler")
    config = keras.optimizers.serialize(optimizer)
    again = keras.optimizers.deserialize(config)
    assert isinstance(again, LossScaleOptimizer)
    assert again.rule == optimizer.rule
    assert again.name == "scaler"
    assert float(again.inner_optimizer.learning_rate.numpy()) == 0.25
    again.learning_rate = 0.5
    assert float(again.inner_optimizer.learning_rate.numpy()) == 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"preset": "mine"}, ValueError, "preset is 'mine', expected one of 'torch', 'keras'"),
        ({"growth_factor": 1.0}, ValueError, "growth_factor is 1.0"),
        ({"backoff_factor": 1.5}, ValueError, "backoff_factor is 1.5"),
        ({"min_scale": -1.0}, ValueError, "min_scale is -1.0"),
        ({"min_scale": 8.0, "max_scale": 4.0}, ValueError, "min_scale is 8.0, expected at most max_scale"),
        ({"initial_scale": 0.0}, ValueError, "^initial_scale is 0.0"),
        ({"initial_scale": 2.0, "min_scale": 4.0}, ValueError, "^initial_scale is 2.0"),
        ({"dynamic_growth_steps": 2.5}, TypeError, "^dynamic_growth_steps is 2.5"),
        ({"hysteresis": 0}, ValueError, "hysteresis is 0"),
        ({"refill": "never"}, ValueError, "refill is 'never'"),
        ({"growth_delay": -1}, ValueError, "growth_delay is -1, expected an integer from 0"),
        ({"global_clipnorm": 1.0}, ValueError, "set `global_clipnorm` on the `inner_optimizer`"),
        ({"clip": 1.0}, ValueError, "does not support arguments"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LossScaleOptimizer(keras.optimizers.SGD(), **arguments)


def test_what_is_no_plain_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="inner_optimizer is 'adam', expected a keras.optimizers.Optimizer"):
        LossScaleOptimizer("adam")
    with pytest.raises(ValueError, match="scales the loss already"):
        LossScaleOptimizer(KerasLSO(keras.optimizers.SGD()))
