"""Policies by layer for Keras models: what they decide, what layers then compute in, and the way back."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from halfstep import CustomPrecisionPolicy
from halfstep.keras_policy import (
    KerasPlan,
    KerasPolicy,
    apply_plan,
    apply_policy,
    needs_loss_scaling,
    plan,
    remove_policy,
)
from halfstep.policies import PlannedLayer
from keras import layers

DATA = Path(__file__).resolve().parents[1] / "data"
X = np.random.default_rng(0).standard_normal((4, 6, 8)).astype("float32")
CAREFUL = [
    {"name": "head", "precision": "float32", "reason": "logits"},
    {"type": "*Normalization", "precision": "float32"},
]


def careful(half: str = "bfloat16") -> KerasPolicy:
    return KerasPolicy("careful", half, CAREFUL)


def network(dtype: str | None = None) -> keras.Model:
    """Return a functional model with a composite, a wrapper, a norm and a head."""
    x = keras.Input((6, 8))
    y = layers.MultiHeadAttention(2, 4, name="attention", dtype=dtype)(x, x)
    y = layers.LayerNormalization(name="norm", dtype=dtype)(y)
    y = layers.Bidirectional(layers.LSTM(4, name="lstm", dtype=dtype), name="both", dtype=dtype)(y)
    y = layers.Dense(5, name="hidden", dtype=dtype)(y)
    y = layers.Activation("relu", name="relu", dtype=dtype)(y)
    return keras.Model(x, layers.Dense(2, name="head", dtype=dtype)(y))


def dtypes(model: keras.Layer) -> dict[str, str]:
    """Return what each layer at any depth computes in, by its place."""
    found = {"": model.compute_dtype}
    for index, layer in enumerate(model._flatten_layers(include_self=False, recursive=False)):
        found |= {f"{index}/{place}": dtype for place, dtype in dtypes(layer).items()}
    return found


# The model of tests/python/test_policy.py, its classes named as torch's.
class Linear(layers.Dense):
    pass


class Embedding(layers.Embedding):
    pass


class Conv1d(layers.Conv1D):
    pass


class BatchNorm1d(layers.BatchNormalization):
    pass


class LayerNorm(layers.LayerNormalization):
    pass


class GELU(layers.Layer):
    pass


class Container(layers.Layer):
    """Layers under names of their own."""

    def __init__(self, name: str, inner: list[layers.Layer]) -> None:
        super().__init__(name=name)
        self.inner = inner

    def call(self, x):
        for layer in self.inner:
            x = layer(x)
        return x


def block(name: str) -> Container:
    attention = [Linear(8, name=part) for part in ("query", "key", "value", "out")]
    mlp = [Linear(16, name="0"), GELU(name="1"), layers.Dropout(0.1, name="2"), Linear(8, name="3")]
    return Container(name, [Container("attention", attention), LayerNorm(name="norm"), Container("mlp", mlp)])


class Encoder(keras.Model):
    """A weight of its own, blocks, and a layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.position = self.add_weight(shape=(4, 8), name="position")
        self.embedding = Embedding(16, 8, name="embedding")
        self.convolution = Conv1d(8, 1, name="convolution")
        self.batch_norm = BatchNorm1d(name="batch_norm")
        self.recurrent = layers.LSTM(8, name="recurrent")
        self.blocks = Container("blocks", [block("0"), block("1")])
        self.tied = Container("tied", [self.blocks.inner[1].inner[0].inner[2]])
        self.head = Linear(4, name="head")


class Conservative(CustomPrecisionPolicy):
    def should_use_fp16(self, layer_type: str, layer_name: str) -> bool:
        return "Norm" not in layer_type and not layer_name.startswith("head")


@pytest.mark.parametrize("answers", [False, True], ids=["rules", "code"])
def test_one_model_in_two_frameworks_has_one_plan(answers: bool) -> None:
    """tests/python/test_policy.py compares the plans of the same model in torch with the same files."""
    file = DATA / ("encoder_answers.json" if answers else "encoder_plan.json")
    torchs = KerasPlan.from_json(file.read_text(), str(file))
    # A layer's name is its own in Keras, so the one that is shared cannot be called "tied" too.
    wanted = [each._replace(name="tied.value") if each.name == "tied" else each for each in torchs.layers()]
    made = (
        Conservative().plan(Encoder(), "bfloat16")
        if answers
        else KerasPolicy.load(DATA / "encoder_policy.json").plan(Encoder())
    )
    assert isinstance(made, KerasPlan)
    assert made == KerasPlan(torchs.policy, wanted)
    assert set(torchs.diff(made).splitlines()) == {
        f"tied: {torchs['tied'].precision} -> not there",
        f"tied.value: not there -> {torchs['tied'].precision} (the same module as blocks.1.attention.value)",
    }


def test_names_types_and_order_of_nested_models() -> None:
    encoder = keras.Sequential([layers.Dense(8, name="a"), layers.Dropout(0.1, name="b")], name="encoder")
    x = keras.Input((8,))
    shared = layers.Dense(8, name="shared")
    model = keras.Model(x, layers.Dense(2, name="head")(shared(shared(encoder(x)))))
    made = careful("float16").plan(model)
    assert [(layer.name, layer.type, layer.precision) for layer in made.layers()] == [
        ("encoder.a", "Dense", "float16"),
        ("encoder.b", "Dropout", "float16"),
        ("shared", "Dense", "float16"),
        ("head", "Dense", "float32"),
    ]
    assert made["head"] == PlannedLayer("head", "Dense", "float32", "logits (rule 0 name head)")
    assert list(careful().plan(layers.Dense(2))) == [""], "the model itself"
    assert len(careful().plan(keras.Sequential())) == 1, "which holds nothing yet"


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.MultiHeadAttention(2, 4, name="x"),
        lambda: layers.GroupQueryAttention(4, 2, 1, name="x"),
        lambda: layers.LSTM(4, name="x"),
        lambda: layers.RNN([layers.LSTMCell(4), layers.GRUCell(3)], name="x"),
        lambda: layers.Bidirectional(layers.GRU(4, name="y"), name="x"),
        lambda: layers.TimeDistributed(layers.Dense(4, name="y"), name="x"),
        lambda: layers.SpectralNormalization(layers.Dense(4, name="y"), name="x"),
        lambda: layers.Bidirectional(layers.RNN(layers.SimpleRNNCell(4), name="y"), name="x"),
    ],
)
def test_composites_have_one_plan_and_one_dtype_built_or_not(make) -> None:
    inputs = (X, X) if "Attention" in type(make()).__name__ else (X,)
    built, unbuilt = make(), make()
    built(*inputs)
    policy = KerasPolicy("p", "bfloat16")
    assert plan(built, policy) == plan(unbuilt, policy)
    for layer in (built, unbuilt):
        apply_policy(layer, policy)
        assert tf.nest.flatten(layer(*inputs))[0].dtype == tf.bfloat16
        assert set(dtypes(layer).values()) == {"bfloat16"}
    remove_policy(built)
    assert set(dtypes(built).values()) == {"float32"}
    assert tf.nest.flatten(built(*inputs))[0].dtype == tf.float32


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("built", [False, True])
def test_layers_hand_on_what_the_plan_says(half: str, built: bool) -> None:
    model = keras.Sequential(
        [layers.Dense(8), layers.LayerNormalization(), layers.Softmax(), layers.Dense(2, name="head")]
    )
    if built:
        assert model(X).dtype == tf.float32
    made = apply_policy(model, careful(half))
    assert {name: layer.precision for name, layer in made.items()} == {
        layer.name: layer.compute_dtype for layer in model.layers
    }
    y = X
    for layer in model.layers:
        y = layer(y)
        assert y.dtype == made[layer.name].precision
        assert {weight.dtype for weight in layer.weights} <= {"float32"}
    assert [made[layer.name].precision for layer in model.layers] == [half, "float32", half, "float32"]


MAKERS = {
    "dense": lambda **k: layers.Dense(3, kernel_regularizer="l2", **k),
    "einsum": lambda **k: layers.EinsumDense("abc,cd->abd", (None, 3), bias_axes="d", **k),
    "convolution": lambda **k: layers.Conv1D(3, 2, **k),
    "separable": lambda **k: layers.SeparableConv1D(3, 2, **k),
    "attention": lambda **k: layers.MultiHeadAttention(2, 4, **k),
    "lstm": lambda **k: layers.LSTM(4, return_sequences=True, **k),
    "stateful": lambda **k: layers.GRU(4, stateful=True, **k),
    "convolution lstm": lambda **k: layers.ConvLSTM1D(2, 2, **k),
    "batch norm": lambda **k: layers.BatchNormalization(**k),
    "layer norm": lambda **k: layers.LayerNormalization(**k),
    "group norm": lambda **k: layers.GroupNormalization(2, **k),
    "softmax": lambda **k: layers.Softmax(**k),
    "dropout": lambda **k: layers.Dropout(0.3, seed=1, **k),
    "embedding": lambda **k: layers.Embedding(9, 4, **k),
    "normalization": lambda **k: layers.Normalization(**k),
    "constants": lambda **k: layers.Normalization(mean=[0.1] * 8, variance=[1.7] * 8, **k),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_a_built_layer_computes_the_bits_of_one_that_was_made_so(name: str, training: bool) -> None:
    """Nothing that build() or a call has kept stays in the old dtype, and remove_policy() brings the old bits back."""
    inputs = {"attention": (X, X), "embedding": (np.arange(8).reshape(2, 4),), "convolution lstm": (X[..., None],)}.get(
        name, (X,)
    )
    wanted, layer = MAKERS[name](name="x", dtype="mixed_bfloat16"), MAKERS[name](name="x")
    wanted(*inputs)
    before = [layer(*inputs), layer(*inputs)][1]
    if name == "normalization":
        layer.adapt(X), wanted.adapt(X)
        before = layer(*inputs)
    wanted.set_weights(layer.get_weights())
    for each in (layer, wanted):
        if name == "stateful":
            each.reset_state()
    apply_policy(layer, KerasPolicy.named("mixed_bfloat16"))

    def call(one: layers.Layer) -> tf.Tensor:
        return one(*inputs, training=training) if one._call_has_training_arg else one(*inputs)

    result, reference = call(layer), call(wanted)
    assert result.dtype == reference.dtype == tf.bfloat16
    assert np.array_equal(result, reference)
    assert layer.get_config()["dtype"] == wanted.get_config()["dtype"]
    if training or name == "stateful":
        return
    remove_policy(layer)
    assert layer(*inputs).dtype == tf.float32
    assert np.array_equal(layer(*inputs), before)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_training_in_a_plan(jit_compile: bool) -> None:
    keras.utils.set_random_seed(0)
    model = network()
    apply_policy(model, careful())
    model.compile("adam", "mse", jit_compile=jit_compile)
    before = [np.array(weight) for weight in model.trainable_weights]
    losses = model.fit(X, X[:, 0, :2], epochs=12, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert weight.dtype == "float32"
        assert np.isfinite(weight).all()
        assert not np.array_equal(weight, old), weight.path


def test_what_was_traced_before_is_traced_anew() -> None:
    inner = keras.Sequential([layers.Dense(8, name="a")], name="inner")
    model = keras.Sequential([inner, layers.Dense(2, name="b")])
    for each in (inner, model):
        each.compile("sgd", "mse")
    x, y = X[:, 0], np.zeros((4, 2))
    assert (model.predict(x, verbose=0).dtype, inner.predict(x, verbose=0).dtype) == ("float32", "float32")
    model.fit(x, y, verbose=0)
    model.evaluate(x, y, verbose=0)
    apply_policy(model, KerasPolicy.named("mixed_bfloat16"))
    assert (model.predict(x, verbose=0).dtype, inner.predict(x, verbose=0).dtype) == ("bfloat16", "bfloat16")
    traced: list[str] = []
    model.layers[1].activation = lambda z: traced.append(z.dtype.name) or z
    model.fit(x, y, verbose=0)
    model.evaluate(x, y, verbose=0)
    assert traced == ["bfloat16", "bfloat16"]
    remove_policy(model)
    assert model.predict(x, verbose=0).dtype == "float32"


def test_the_way_back_keeps_what_others_have_set() -> None:
    model = network()
    model.get_layer("relu").dtype_policy = "float64"  # has no weights
    before = {id(layer): layer.dtype_policy for layer in model._flatten_layers()}
    apply_policy(model, careful())
    apply_policy(model, KerasPolicy.named("mixed_float16"))
    assert model.get_layer("relu").compute_dtype == "float16"
    mine = keras.DTypePolicy("mixed_bfloat16")
    model.get_layer("hidden").dtype_policy = mine
    remove_policy(model)
    changed = [layer.name for layer in model._flatten_layers() if layer.dtype_policy is not before[id(layer)]]
    assert changed == ["hidden"]
    assert model.get_layer("hidden").dtype_policy is mine
    apply_policy(model, careful())
    model.get_layer("hidden").dtype_policy = other = keras.DTypePolicy("float32")
    apply_policy(model, careful())
    remove_policy(model)
    assert model.get_layer("hidden").dtype_policy is other
    remove_policy(model)  # has nothing to do
    assert model.get_layer("hidden").dtype_policy is other


@pytest.mark.parametrize("how", ["file", "clone", "config", "copy"])
def test_copies_of_a_model_keep_the_policies(how: str, tmp_path: Path) -> None:
    model = network()
    apply_policy(model, careful("float16"))
    if how == "file":
        model.save(tmp_path / "model.keras")
        twin = keras.models.load_model(tmp_path / "model.keras")
    elif how == "clone":
        twin = keras.models.clone_model(model)
    elif how == "config":
        twin = keras.Model.from_config(model.get_config())
    else:
        twin = copy.deepcopy(model)
    assert list(dtypes(twin).values()) == list(dtypes(model).values())
    assert {"float16", "float32"} == set(dtypes(twin).values())
    twin.set_weights(model.get_weights())
    assert np.array_equal(twin(X), model(X))


def test_a_file_needs_no_halfstep(tmp_path: Path) -> None:
    model = network()
    apply_policy(model, careful("float16"))
    model.save(tmp_path / "model.keras")
    code = (
        "import sys, keras\nmodel = keras.models.load_model('model.keras')\n"
        "print([layer.compute_dtype for layer in model.layers[1:]], 'halfstep' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"{[layer.compute_dtype for layer in model.layers[1:]]} False\n", done.stderr


@keras.saving.register_keras_serializable("halfstep_test")
class Made(layers.Layer):
    """Makes a layer itself, which no config lists."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.inner = layers.Dense(3, name="inner")

    def call(self, x):
        return self.inner(x)


def test_layers_that_no_config_lists_need_the_policy_again(tmp_path: Path) -> None:
    """As the docstring of apply_plan() says."""
    model = keras.Sequential([keras.Input((8,)), Made(name="made"), layers.Dense(2, name="head")])
    made = apply_policy(model, careful())
    assert made["made.inner"].precision == model.layers[0].inner.compute_dtype == "bfloat16"
    model.save(tmp_path / "model.keras")
    twin = keras.models.load_model(tmp_path / "model.keras")
    assert twin.layers[0].inner.compute_dtype == "float32"
    apply_plan(twin, KerasPlan.from_json(made.to_json()))
    assert np.array_equal(twin(X[:, 0]), model(X[:, 0]))


def test_policies_and_plans_go_through_json_and_pickle(tmp_path: Path) -> None:
    policy = careful()
    (tmp_path / "policy.json").write_text(policy.to_json())
    assert KerasPolicy.load(tmp_path / "policy.json") == policy == pickle.loads(pickle.dumps(policy))
    assert eval(repr(policy)) == policy
    made = policy.plan(network())
    twin = pickle.loads(pickle.dumps(made))
    assert isinstance(twin, KerasPlan)
    assert twin == made == KerasPlan.from_json(made.to_json())
    assert hash(twin) == hash(made)
    assert made != careful("float16").plan(network())
    assert made.diff(careful("float16").plan(network())).splitlines()[0] == (
        "attention: bfloat16 -> float16 (the default of careful)"
    )
    assert made.explain().splitlines()[0].split() == ["layer", "type", "precision", "reason"]
    assert policy.decide("head", "Dense") == ("float32", "logits (rule 0 name head)")
    assert (policy.name, made.policy, len(made)) == ("careful", "careful", 7)


def test_policies_of_other_doors_count() -> None:
    class Elsewhere:
        def to_json(self) -> str:
            return careful().to_json()

    class Asked:
        def __init__(self) -> None:
            self.asked: list[tuple[str, str]] = []

        def should_use_fp16(self, layer_type: str, layer_name: str) -> object:
            self.asked.append((layer_type, layer_name))
            return np.bool_(layer_name != "head")

    model = network()
    assert apply_policy(model, Elsewhere()) == careful().plan(model)
    asked = Asked()
    assert apply_policy(model, asked, "float16")["head"].reason == "Asked.should_use_fp16 is False"
    assert asked.asked == [(layer.type, layer.name) for layer in careful().plan(model).layers()]
    assert (model.get_layer("hidden").compute_dtype, model.get_layer("head").compute_dtype) == ("float16", "float32")


def test_loss_scaling_is_asked_of_all_layers() -> None:
    model = network()
    assert not needs_loss_scaling(model)
    apply_policy(model, careful())
    assert not needs_loss_scaling(model)
    model.compile("adam", "mse")
    only_head = KerasPolicy("p", "float32", [{"name": "head", "precision": "float16"}])
    with pytest.warns(UserWarning, match="compiled without loss scaling, and now has float16 layers"):
        apply_policy(model, only_head)
    assert needs_loss_scaling(model)
    assert model.dtype_policy.name == "float32", "so that Keras would not scale the loss"
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_policy(model, only_head)
    remove_policy(model)
    assert not needs_loss_scaling(model)


def test_layers_without_floats_have_no_plan() -> None:
    words = keras.Sequential([layers.StringLookup(vocabulary=["a", "b"]), layers.Embedding(4, 3, name="embedding")])
    assert list(apply_policy(words, careful())) == ["embedding"]
    assert words(tf.constant([["a", "b"]])).dtype == tf.bfloat16
    assert list(careful().plan(layers.TextVectorization())) == []
