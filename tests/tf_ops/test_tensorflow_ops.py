"""The ops of the TensorFlow door against NumPy in float64, against plain ops, and against the torch door."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest
import scale_gradients
import tensorflow as tf
from halfstep import tensorflow_ops
from halfstep.scale_rule import PRESETS, ScaleRule, rule_of
from halfstep.tensorflow_library import library
from halfstep.tensorflow_ops import State, check_and_unscale, count_non_finite, update_scale

DTYPES = ("float16", "bfloat16", "float32", "float64")
EDGES = [0.0, -0.0, 1.0, -3.5, 1e-7, 6e-8, 1e-40, 65504.0, 1e-8]
ops = library()


@pytest.fixture(params=["custom", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(tensorflow_ops, "why_plain", lambda: "tested")
    else:
        assert tensorflow_ops.why_plain() == ""
    return request.param


def bits(tensor: tf.Tensor) -> np.ndarray:
    array = tensor.numpy()
    return array.reshape(-1).view({2: np.uint16, 4: np.uint32, 8: np.uint64}[array.dtype.itemsize])


def mixed(seed: int = 0, sizes: tuple[int, ...] = (1, 31, 32, 33, 1000)) -> list[tf.Tensor]:
    rng = np.random.default_rng(seed)
    values = [rng.standard_normal(size) * 10.0 ** rng.integers(-6, 4, size) for size in sizes]
    return [tf.constant(value, dtype) for dtype in DTYPES for value in values]


def as_tensors(grads: list[tuple[str, np.ndarray]]) -> list[tf.Tensor]:
    return [
        tf.bitcast(tf.constant(array), tf.bfloat16) if dtype == "bfloat16" else tf.constant(array)
        for dtype, array in grads
    ]


@pytest.mark.parametrize("scale", [1.0, 1024.0, 3.7, 2.0**-10])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unscaled_values_are_the_nearest(path: str, dtype: str, scale: float) -> None:
    grad = tf.constant([value for value in EDGES if abs(value / scale) < 6e4], dtype)
    [unscaled], found, norm = check_and_unscale([grad], tf.constant(scale))
    inverse = float(np.float32(1.0 / scale))
    product = grad.numpy().astype(np.float64) * inverse
    rounded = product.astype(np.float32) if dtype != "float64" else product  # 24 bits times 24 bits: rounded once
    want = rounded.astype(grad.dtype.as_numpy_dtype)
    tiny = np.finfo(np.float32).tiny  # what is below, before or after, may be flushed to 0: TensorFlow's threads do so
    subnormal = np.minimum(np.abs(want.astype(np.float64)), np.abs(grad.numpy().astype(np.float64))) < tiny
    np.testing.assert_array_equal(unscaled.numpy()[~subnormal], want[~subnormal])
    assert np.all(np.abs(unscaled.numpy()[subnormal].astype(np.float64)) <= np.abs(want[subnormal].astype(np.float64)))
    assert found.numpy() == 0.0
    assert norm.numpy() == pytest.approx(np.linalg.norm(want.astype(np.float64)), rel=1e-6)


@pytest.mark.parametrize("where", [0, 40, -1])
@pytest.mark.parametrize("what", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_non_finite_element_is_found(path: str, dtype: str, what: float, where: int) -> None:
    values = np.ones(77)
    values[where] = what
    grads = [tf.ones([5]), tf.constant(values, dtype), tf.zeros([0], tf.float16)]
    _, found, norm = check_and_unscale(grads, tf.constant(2.0))
    assert found.numpy() == 1.0
    assert np.isnan(norm.numpy()) if np.isnan(what) else np.isinf(norm.numpy())
    assert count_non_finite(grads).numpy().tolist() == [0, 1, 0]


def test_what_unscaling_itself_makes_infinite_is_found(path: str) -> None:
    [unscaled], found, _ = check_and_unscale([tf.constant([60000.0], tf.float16)], tf.constant(0.5))
    assert np.isinf(unscaled.numpy()[0])
    assert found.numpy() == 1.0
    _, found, _ = check_and_unscale([tf.constant([60000.0], tf.float32)], tf.constant(0.5))
    assert found.numpy() == 0.0
    for value in (1.0, 0.0):  # a scale of 0: Keras divides by it
        _, found, _ = check_and_unscale([tf.constant([value])], tf.constant(0.0))
        assert found.numpy() == 1.0


def test_large_finite_elements_are_not_found_though_their_squares_are_infinite(path: str) -> None:
    _, found, norm = check_and_unscale([tf.constant([1e30, 1.0])], tf.constant(1.0))
    assert found.numpy() == 0.0
    assert np.isinf(norm.numpy())


def test_lists_without_elements(path: str) -> None:
    unscaled, found, norm = check_and_unscale([], tf.constant(2.0))
    assert (unscaled, found.numpy(), norm.numpy()) == ([], 0.0, 0.0)
    [unscaled], found, norm = check_and_unscale([tf.zeros([3, 0])], tf.constant(2.0))
    assert (unscaled.shape, found.numpy(), norm.numpy()) == ((3, 0), 0.0, 0.0)
    assert count_non_finite([]).shape == (0,)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("scale", [1024.0, 3.7, 1.0 / 3.0])
def test_custom_and_plain_ops_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, scale: float, graph: bool) -> None:
    def run(grads: list[tf.Tensor], scale: tf.Tensor) -> list[tf.Tensor]:
        return check_and_unscale([grad * 1 for grad in grads], scale)[0]

    wrap = tf.function if graph else (lambda function: function)
    custom = wrap(run)(mixed(), tf.constant(scale))
    monkeypatch.setattr(tensorflow_ops, "why_plain", lambda: "tested")
    plain = wrap(run)(mixed(), tf.constant(scale))
    for a, b, grad in zip(custom, plain, mixed(), strict=True):
        assert a.dtype == b.dtype == grad.dtype
        assert a.shape == grad.shape
        np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("planted", [None, (0, np.inf), (1, np.nan), (3, -np.inf)])
def test_large_gradients_among_small_ones(monkeypatch: pytest.MonkeyPatch, planted: tuple[int, float] | None) -> None:
    """The large ones go another way; nothing of the result may show it."""
    arrays = [tf.constant(np.random.default_rng(i).standard_normal(size), dtype) for i, (size, dtype) in enumerate(
        [(5, "float32"), (200_000, "float32"), (33, "float16"), (150_000, "bfloat16"), (131_071, "float32")]
    )]  # fmt: skip
    if planted:
        index, value = planted
        array = arrays[index].numpy()
        array[-1] = value
        arrays[index] = tf.constant(array)
    scale = tf.constant(3.7)
    unscaled, found, norm = tf.function(check_and_unscale)(arrays, scale)
    monkeypatch.setattr(tensorflow_ops, "why_plain", lambda: "tested")
    want, want_found, want_norm = tf.function(check_and_unscale)(arrays, scale)
    for got, other in zip(unscaled, want, strict=True):
        np.testing.assert_array_equal(bits(got), bits(other))
    assert found.numpy() == want_found.numpy() == float(planted is not None)
    np.testing.assert_allclose(norm.numpy(), want_norm.numpy(), rtol=1e-6)
    flat = np.concatenate([tensor.numpy().astype(np.float64) for tensor in unscaled])
    np.testing.assert_allclose(norm.numpy(), np.linalg.norm(flat), rtol=1e-5)


def test_gradients_that_somebody_holds_are_not_written() -> None:
    grads = mixed()
    before = [bits(grad).copy() for grad in grads]
    unscaled, _, _ = check_and_unscale(grads, tf.constant(8.0))

    @tf.function
    def both(grads: list[tf.Tensor]) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        made = [grad + 0 for grad in grads]
        return made, check_and_unscale(made, tf.constant(8.0))[0]

    made, again = both(grads)
    for grad, copy, want, one, other in zip(grads, made, before, unscaled, again, strict=True):
        np.testing.assert_array_equal(bits(grad), want)
        np.testing.assert_array_equal(copy.numpy(), grad.numpy())
        np.testing.assert_array_equal(bits(one), bits(other))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    grads = mixed(sizes=(700_001, 300_000, 5))
    results = [ops.halfstep_check_and_unscale(grads, 3.0, threads=threads) for threads in (1, 2, 3, 16, 0)]
    for other in results[1:]:
        for a, b in zip(results[0].unscaled, other.unscaled, strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))
        assert bits(results[0].norm) == bits(other.norm)


def test_subnormals_are_those_of_plain_operations_on_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow's threads flush them to 0. So must those that the op starts, wherever it is called."""
    rng = np.random.default_rng(0)
    arrays = [tf.constant(rng.standard_normal(100_000) * 1e-37, tf.float32) for _ in range(8)]

    def check(grads: list[tf.Tensor], scale: tf.Tensor) -> list[tf.Tensor]:
        return check_and_unscale(grads, scale)[0]

    custom = tf.function(check)(arrays, tf.constant(8.0))
    monkeypatch.setattr(tensorflow_ops, "why_plain", lambda: "tested")
    plain = tf.function(check)(arrays, tf.constant(8.0))
    for a, b in zip(custom, plain, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
    assert 0 < np.count_nonzero(custom[0].numpy() == 0) < 100_000, "some would be subnormal, and some are not"


def test_calls_from_many_threads_do_not_meet() -> None:
    grads = {seed: mixed(seed, (100_000, 7)) for seed in range(8)}
    alone = {seed: [bits(t) for t in check_and_unscale(grads[seed], tf.constant(3.0))[0]] for seed in grads}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for seed, (unscaled, _, _) in pool.map(
            lambda i: (i % 8, check_and_unscale(grads[i % 8], tf.constant(3.0))), range(64)
        ):
            for got, want in zip(unscaled, alone[seed], strict=True):
                np.testing.assert_array_equal(bits(got), want)


def test_statistics_against_numpy() -> None:
    grads = mixed(3)
    rows = ops.halfstep_gradient_statistics(grads, 4.0).numpy()
    for grad, row in zip(grads, rows, strict=True):
        wide = np.float64 if grad.dtype == tf.float64 else np.float32
        u = grad.numpy().astype(wide) * wide(0.25)
        below = np.count_nonzero((u != 0) & (np.abs(u) < 2.0**-14))
        want = [0, np.abs(u).max(), np.square(u.astype(np.float64)).sum(), np.count_nonzero(u == 0), below, u.size]
        np.testing.assert_allclose(row, want, rtol=1e-5)


def test_shapes_are_known_while_tracing() -> None:
    @tf.function(input_signature=[tf.TensorSpec([None, 3]), tf.TensorSpec(None, tf.float16)])
    def trace(a: tf.Tensor, b: tf.Tensor) -> tuple:
        unscaled, found, norm = check_and_unscale([a, b], tf.constant(2.0))
        assert [u.shape for u in unscaled] == [a.shape, b.shape]
        assert unscaled[0].shape.as_list() == [None, 3]
        assert found.shape == norm.shape == ()
        assert ops.halfstep_gradient_statistics([a, b], 2.0).shape == (2, 6)
        return unscaled, found, norm

    assert trace(tf.ones([2, 3]), tf.ones([4], tf.float16))[2].numpy() == pytest.approx(np.sqrt(10) / 2)
    with pytest.raises(ValueError, match="rank 0"):
        tf.function(lambda: ops.halfstep_check_and_unscale([tf.ones([2])], tf.ones([1])))()


# ------------------------------------------------------------------------------------------------------- the scale rule


def first_state(rule: ScaleRule) -> State:
    return State(
        tf.constant(rule.init_scale, tf.float32),
        tf.constant(-rule.growth_delay, tf.int64),
        tf.constant(rule.hysteresis),
        tf.zeros([8], tf.int64),
    )


@pytest.mark.parametrize("name", scale_gradients.RULES)
def test_500_steps_are_those_of_the_torch_door(path: str, name: str) -> None:
    expected = scale_gradients.expected()[name]
    rule = ScaleRule(**scale_gradients.RULES[name])

    @tf.function
    def step(grads: list[tf.Tensor], state: State) -> tuple:
        _, found, norm = check_and_unscale(grads, state.scale)
        return update_scale(state, rule, found[None], norm[None]), found, norm

    state, scales, founds, norms = first_state(rule), [], [], []
    for number in range(scale_gradients.STEPS):
        state, found, norm = step(as_tensors(scale_gradients.gradients(number)), state)
        scales.append(float(state.scale))
        founds.append(int(found))
        norms.append(float(norm))
    assert scale_gradients.hexadecimal(scales) == expected["scale"]
    assert founds == expected["found"]
    assert 10 < sum(founds) < 100
    assert state.counters.numpy().tolist() == expected["counters"]
    assert int(state.hysteresis_left) == expected["hysteresis_left"]
    assert int(state.growth_tracker) == expected["growth_tracker"]
    want = [float.fromhex(text) for text in expected["norm"]]
    if path == "custom":
        assert scale_gradients.hexadecimal(norms[:: scale_gradients.NORMS]) == expected["norm"]
    else:  # summed in another order
        np.testing.assert_allclose(norms[:: scale_gradients.NORMS], want, rtol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plain_rule_is_the_cores_in_random_runs(monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    rng = np.random.default_rng(list(PRESETS).index(preset))
    changes = {"growth_interval": int(rng.integers(1, 6)), "max_scale": 2.0**20, "init_scale": 2.0**10}
    if preset in ("apex", "torch"):
        changes |= {"growth_factor": 1.7, "backoff_factor": 0.3, "min_scale": 0.7}
    rule = rule_of(preset, **changes)
    custom = plain = first_state(rule)
    for _ in range(200):
        flags = (rng.random(3) < 0.15).astype(np.float32)
        norms = np.where(flags > 0, rng.choice([np.inf, np.nan], 3), 1.0).astype(np.float32)
        custom = update_scale(custom, rule, flags, norms)
        with monkeypatch.context() as patch:
            patch.setattr(tensorflow_ops, "why_plain", lambda: "tested")
            plain = update_scale(plain, rule, tf.constant(flags), tf.constant(norms))
        for name, a, b in zip(State._fields, custom, plain, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": [1.0]}, "scale has 1 dimensions, expected a scalar"),
        ({"growth_tracker": [1]}, "growth_tracker has 1 dimensions, expected a scalar"),
        ({"growth_tracker": 2**40}, "growth_tracker is 1099511627776, expected an int32"),
        ({"hysteresis_left": [1]}, "hysteresis_left has 1 dimensions"),
        ({"counters": [0] * 7}, "counters has 7 elements, expected 8"),
        ({"found": []}, "found is empty"),
        ({"found": [0.0] * 65}, "65"),
        ({"factors": [2.0, 0.5, 0.0]}, "factors has 3 elements, expected 4"),
        ({"factors": [0.5, 0.5, 0.0, 1.0]}, "growth_factor is 0.5"),
        ({"factors": [2.0, np.nan, 0.0, 1.0]}, "backoff_factor is nan"),
        ({"growth_interval": 0}, "growth_interval is 0"),
        ({"refill": "never"}, "refill is 'never'"),
        ({"hysteresis": -1}, "hysteresis is -1"),
    ],
)
def test_bad_arguments_of_the_update_are_errors(change: dict, message: str) -> None:
    good = {
        "scale": 2.0,
        "growth_tracker": 0,
        "hysteresis_left": 1,
        "counters": [0] * 8,
        "found": [0.0],
        "norm": [1.0],
        "factors": [2.0, 0.5, 0.0, 1e30],
        "growth_interval": 5,
    }
    assert float(ops.halfstep_update_scale(**good).new_scale) == 2.0
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        ops.halfstep_update_scale(**{**good, **change})


def test_bad_arguments_of_the_check_are_errors() -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="scale has 1 dimensions, expected a scalar"):
        ops.halfstep_check_and_unscale([tf.ones([2])], [1.0])
    with pytest.raises((TypeError, tf.errors.InvalidArgumentError)):
        ops.halfstep_check_and_unscale([tf.ones([2], tf.int32)], 1.0)
    with pytest.raises(tf.errors.InvalidArgumentError, match="threads"):
        ops.halfstep_check_and_unscale([tf.ones([2])], 1.0, threads=-1)
