"""PrecisionPolicyMap: rules by path, in order, as Keras' global policy and as a layer's dtype; files of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from halfstep import CustomPrecisionPolicy
from halfstep.keras_policy import KerasPolicy, PrecisionPolicyMap, apply_policy, needs_loss_scaling
from keras import layers

X = np.random.default_rng(0).standard_normal((4, 6, 8)).astype("float32")
RULES = [
    {"name": "head", "precision": "float32", "reason": "logits"},
    {"name": "*attention.query", "precision": "float32"},
    {"name": "*query", "precision": "bfloat16"},
    {"name": "hidden_*", "precision": "float16"},
]


def policy(default: str = "bfloat16", rules: list[dict[str, str]] = RULES) -> KerasPolicy:
    return KerasPolicy("by name", default, rules)


@pytest.fixture(autouse=True)
def _global_policy() -> Iterator[None]:
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


def network() -> keras.Model:
    x = keras.Input((6, 8))
    y = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    y = layers.Dense(5, name="hidden_1")(y)
    return keras.Model(x, layers.Dense(2, name="head")(y))


def computed_in(model: keras.Layer) -> dict[str, str]:
    return {layer.path: layer.compute_dtype for layer in model._flatten_layers() if layer.weights and layer.path}


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("head", "float32"),
        ("sequential_3/head", "float32"),
        ("model/encoder/head", "bfloat16"),  # "encoder.head" is not "head"
        ("attention/query", "float32"),
        ("model/block/attention/query", "float32"),  # two rules match, and the first decides
        ("model/block/query", "bfloat16"),
        ("model/hidden_12", "float16"),
        ("hidden_12/sub/layer", "float16"),  # * is any run of characters, dots included
        ("hidden", "bfloat16"),
        ("Head", "bfloat16"),
    ],
)
def test_paths(path: str, wanted: str) -> None:
    lookup = PrecisionPolicyMap(policy())
    for _ in range(2):  # asked, and remembered
        assert lookup[path].compute_dtype == wanted
        assert lookup[path].variable_dtype == "float32"
    assert lookup.get(path) is lookup[path]


def test_as_the_global_policy() -> None:
    keras.config.set_dtype_policy(PrecisionPolicyMap(policy()))
    model = network()
    assert model(X).dtype == tf.float32
    found = computed_in(model)
    assert found.pop("functional" if "functional" in found else model.path) == "bfloat16"
    assert found == {
        "attention": "bfloat16",
        "attention/query": "float32",
        "attention/key": "bfloat16",
        "attention/value": "bfloat16",
        "attention/attention_output": "bfloat16",
        "hidden_1": "float16",
        "head": "float32",
    }
    outputs = [model.get_layer(name).output for name in ("attention", "hidden_1", "head")]
    assert [y.dtype.name for y in keras.Model(model.input, outputs)(X)] == ["bfloat16", "float16", "float32"]
    assert {weight.dtype for weight in model.weights} == {"float32"}
    stacked = keras.Sequential([layers.Dense(3, name="hidden_2"), layers.Dense(2, name="head")], name="stack")
    stacked(X)
    assert computed_in(stacked) == {"stack": "bfloat16", "stack/hidden_2": "float16", "stack/head": "float32"}


def test_as_the_dtype_of_one_layer() -> None:
    layer = layers.MultiHeadAttention(2, 4, name="attention", dtype=PrecisionPolicyMap(policy()))
    assert layer(X, X).dtype == tf.bfloat16
    assert computed_in(layer)["attention/query"] == "float32"
    assert computed_in(layer)["attention/key"] == "bfloat16"
    assert layers.Dense(2).compute_dtype == "float32", "others keep the global policy"
    twin = layers.MultiHeadAttention.from_config(layer.get_config())
    assert twin.dtype_policy == layer.dtype_policy
    twin(X, X)
    twin.set_weights(layer.get_weights())
    assert np.array_equal(twin(X, X), layer(X, X))


def test_training_scales_the_loss_where_float16_is_possible() -> None:
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(PrecisionPolicyMap(policy()))
    model = network()
    assert needs_loss_scaling(model)
    model.compile("adam", "mse")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    before = [keras.ops.convert_to_numpy(weight) for weight in model.trainable_weights]
    losses = model.fit(X, np.zeros((4, 6, 2)), epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all(not np.array_equal(old, new) for old, new in zip(before, model.trainable_weights, strict=True))
    keras.config.set_dtype_policy(PrecisionPolicyMap(policy(rules=RULES[:3])))
    model = network()
    assert not needs_loss_scaling(model)
    model.compile("adam", "mse")
    assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


def test_what_is_not_built_may_still_become_float16() -> None:
    assert needs_loss_scaling(layers.Dense(2, name="hidden_1", dtype=PrecisionPolicyMap(policy())))
    assert not needs_loss_scaling(layers.Dense(2, dtype=PrecisionPolicyMap(policy(rules=RULES[:3]))))
    own = keras.dtype_policies.DTypePolicyMap(keras.DTypePolicy("float32"), {"a": keras.DTypePolicy("mixed_float16")})
    assert needs_loss_scaling(layers.Dense(2, dtype=own))
    layer = layers.Dense(2, name="hidden", dtype=PrecisionPolicyMap(policy()))
    layer(X)
    assert not needs_loss_scaling(layer), "once it is built its path decides"


@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_through_a_file(kind: str, tmp_path: Path) -> None:
    keras.config.set_dtype_policy(PrecisionPolicyMap(policy()))
    stacked = keras.Sequential([keras.Input((6, 8)), layers.Dense(5, name="hidden_1"), layers.Dense(2, name="head")])
    model = network() if kind == "functional" else stacked
    model.save(tmp_path / "model.keras")
    keras.config.set_dtype_policy("float32")
    twin = keras.models.load_model(tmp_path / "model.keras")
    wanted, found = computed_in(model), computed_in(twin)
    wanted.pop(model.path), found.pop(twin.path)  # of the models themselves Keras stores no policy
    shorter = {path.removeprefix(f"{model.path}/"): dtype for path, dtype in wanted.items()}
    assert {path.removeprefix(f"{twin.path}/"): dtype for path, dtype in found.items()} == shorter
    assert len(shorter) >= 2
    assert {type(layer.dtype_policy) for layer in twin.layers if layer.weights} == {PrecisionPolicyMap}
    assert np.array_equal(twin(X), model(X))


def test_configs_go_round() -> None:
    lookup = PrecisionPolicyMap(policy())
    lookup["model/head"] = "mixed_float16"
    for twin in (
        PrecisionPolicyMap.from_config(lookup.get_config()),
        keras.dtype_policies.get(keras.dtype_policies.serialize(lookup)),
        copy.deepcopy(lookup),
    ):
        assert type(twin) is PrecisionPolicyMap
        assert twin == lookup
        assert twin.get_config() == lookup.get_config()
        assert (twin["model/head"].name, twin["head"].name) == ("mixed_float16", "float32")
    assert lookup != PrecisionPolicyMap(policy())
    assert PrecisionPolicyMap(policy()) != keras.DTypePolicy("mixed_bfloat16")
    assert repr(lookup) == "<PrecisionPolicyMap of 'by name', 4 rules, 1 entries>"
    assert keras.DTypePolicy("float32") != lookup


def test_a_layer_writes_an_entry_for_itself_alone() -> None:
    lookup = PrecisionPolicyMap(policy())
    keras.config.set_dtype_policy(lookup)
    model = network()
    model.get_layer("head").dtype_policy = "mixed_bfloat16"
    assert model.get_layer("head").compute_dtype == "bfloat16"
    assert dict(lookup) == {"head": keras.DTypePolicy("mixed_bfloat16")}
    assert model.get_layer("hidden_1").compute_dtype == "float16"
    with pytest.raises(ValueError, match="layer 'attention' cannot have .* has a PrecisionPolicyMap"):
        apply_policy(model, KerasPolicy.named("float32"))


def test_the_name_is_one_that_keras_understands() -> None:
    for default, rules, name in (
        ("float32", [], "float32"),
        ("bfloat16", RULES[:3], "mixed_bfloat16"),
        ("float32", RULES, "mixed_float16"),
        ("float16", [], "mixed_float16"),
    ):
        lookup = PrecisionPolicyMap(policy(default, rules))
        keras.config.set_dtype_policy(lookup)
        assert lookup.name == keras.DTypePolicy().name == name
    assert PrecisionPolicyMap(policy("float32")).compute_dtype == "float32", "the default's"


def test_layers_that_build_nothing_have_the_default() -> None:
    """As the docstring says: Keras gives them no path. Should it do so one day, this tells."""
    keras.config.set_dtype_policy(PrecisionPolicyMap(policy(rules=[{"name": "*", "precision": "float32"}])))
    model = keras.Sequential([layers.Dense(2), layers.Activation("relu", name="relu")])
    model(X)
    assert [layer.compute_dtype for layer in model.layers] == ["float32", "bfloat16"]


def test_what_a_path_does_not_show_is_refused() -> None:
    typed = policy(rules=[RULES[0], {"name": "a", "type": "*Norm*", "precision": "float32"}])
    with pytest.raises(ValueError, match=r"policy 'by name': rules\[1\] is for the type '\*Norm\*'.*apply_policy"):
        PrecisionPolicyMap(typed)
    with pytest.raises(TypeError, match=r"policy is CustomPrecisionPolicy, which asks for the type.*apply_policy"):
        PrecisionPolicyMap(CustomPrecisionPolicy())
    with pytest.raises(
        ValueError, match=r"policy 'by name': rules\[0\].precision is int8, expected float32, float16, bf"
    ):
        PrecisionPolicyMap(policy(rules=[{"name": "a", "precision": "int8"}]))
    with pytest.raises(ValueError, match="policy 'by name': default is tfloat32, expected float32"):
        PrecisionPolicyMap(policy("tfloat32"))
    with pytest.raises(TypeError, match="policy is NoneType, expected a KerasPolicy"):
        PrecisionPolicyMap(None)
    assert PrecisionPolicyMap(policy(rules=[{"name": "a", "type": "*", "precision": "float32"}]))["a"].name == "float32"
