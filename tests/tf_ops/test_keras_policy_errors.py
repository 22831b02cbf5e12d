"""What policies for Keras refuse, in which words, and that nothing has changed then."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
from halfstep import CustomPrecisionPolicy
from halfstep.keras_policy import (
    KerasPlan,
    KerasPolicy,
    PrecisionPolicyMap,
    apply_plan,
    apply_policy,
    needs_loss_scaling,
    plan,
    remove_policy,
)
from keras import layers

HALF = KerasPolicy.named("mixed_bfloat16")


def network() -> keras.Sequential:
    return keras.Sequential([layers.Dense(4, name="a"), layers.Dense(4, name="b"), layers.Dense(2, name="c")])


def refused(model: keras.Layer, policy: KerasPolicy, message: str) -> None:
    before = [layer.dtype_policy for layer in model._flatten_layers()]
    with pytest.raises(ValueError, match=message):
        apply_policy(model, policy)
    assert [layer.dtype_policy for layer in model._flatten_layers()] == before


def test_precisions_that_keras_has_not() -> None:
    rules = [{"name": name, "precision": "int8"} for name in "bc"]
    refused(
        network(),
        KerasPolicy("p", "float16", rules),
        r"layer 'b' \(and 1 more\) is planned in int8 \(rule 0 name b\), expected float32, float16 or bfloat16: "
        r'model.quantize\("int8"\)',
    )
    refused(
        network(),
        KerasPolicy("p", "float16", [{"name": "c", "precision": "tfloat32", "reason": "why"}]),
        r"layer 'c' is planned in tfloat32 \(why \(rule 0 name c\)\).*enable_tensor_float_32_execution",
    )


def test_layers_that_cannot_have_a_policy() -> None:
    model = network()
    model.layers[1].dtype_policy = "float16"
    model.build((None, 4))
    refused(
        model,
        HALF,
        r"layer 'b' cannot have the policy mixed_bfloat16: its weight '.*b/kernel' is float16, expected float32",
    )
    model = network()
    model.build((None, 4))
    model.layers[2].quantize("int8")
    refused(model, HALF, r"layer 'c' cannot have .*: 'c' is quantized \(int8_from_float32\)")
    model = keras.Sequential([layers.Dense(4, name="a"), layers.Dense(4, name="b", dtype=PrecisionPolicyMap(HALF))])
    refused(model, HALF, "layer 'b' cannot have .*: 'b' has a PrecisionPolicyMap, which other layers share")
    inner = layers.MultiHeadAttention(1, 2, name="attention")
    inner(np.ones((1, 2, 4)), np.ones((1, 2, 4)))
    inner.query_dense.quantize("int8")
    refused(inner, HALF, "layer '' cannot have .*: 'query' is quantized")


def test_names() -> None:
    model = keras.Model()
    model.inner = [layers.Dense(2, name="same"), layers.Dense(2, name="same")]
    with pytest.raises(ValueError, match="two layers are named 'same', expected names of their own: pass name="):
        HALF.plan(model)
    made = HALF.plan(network())
    other = keras.Sequential([layers.Dense(2, name="a")])
    with pytest.raises(ValueError, match="the plan has 2 layers that the model has not, such as 'b'"):
        apply_plan(other, made)
    assert other.layers[0].compute_dtype == "float32"


def test_a_plan_that_contradicts_itself() -> None:
    shared = layers.Dense(2, name="shared")
    model = keras.Model()
    model.outer = keras.Sequential([shared], name="outer")
    model.again = shared
    text = HALF.plan(model).to_json()
    assert text.count('"bfloat16"') == 2
    with pytest.raises(ValueError, match="layer 'shared' in float32 and 'outer.shared' in bfloat16, expected one"):
        apply_plan(model, KerasPlan.from_json("float32".join(text.rsplit("bfloat16", 1))))
    assert shared.compute_dtype == "float32"


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (None, "policy is NoneType, expected a KerasPolicy, a PrecisionPolicy or an instance of a Custom"),
        ("mixed_float16", "policy is str, expected"),
        (CustomPrecisionPolicy, "policy is CustomPrecisionPolicy, expected .* an instance"),
        (KerasPolicy, "policy is KerasPolicy, expected"),
        (HALF.plan(network()), r"policy is KerasPlan, which apply_plan\(\) takes, expected"),
    ],
)
def test_what_is_no_policy(policy: object, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        apply_policy(network(), policy)


def test_what_is_no_model_plan_or_half() -> None:
    for call in (HALF.plan, remove_policy, needs_loss_scaling, lambda model: apply_policy(model, HALF)):
        with pytest.raises(TypeError, match=r"model is list, expected a keras.Model or keras.Layer"):
            call([layers.Dense(2)])
    with pytest.raises(TypeError, match="plan is KerasPolicy, expected KerasPlan"):
        apply_plan(network(), HALF)
    with pytest.raises(TypeError, match="other is KerasPolicy, expected KerasPlan"):
        HALF.plan(network()).diff(HALF)
    for half in ("float32", "mixed_float16", None):
        with pytest.raises(ValueError, match=f"half is {half!r}, expected 'float16' or 'bfloat16'"):
            plan(network(), CustomPrecisionPolicy(), half)


def test_policies_as_code_know_which_framework_they_are_asked_by() -> None:
    class Wrong(CustomPrecisionPolicy):
        def should_use_fp16(self, layer_type: str, layer_name: str):
            return "yes"

    with pytest.raises(TypeError, match=r"should_use_fp16\('Dense', 'a'\) returned 'yes', expected True or False"):
        Wrong().plan(network())
    with pytest.raises(ValueError, match="example and kwargs are for torch models"):
        CustomPrecisionPolicy().plan(network(), "float16", np.ones((1, 4)))
    with pytest.raises(TypeError, match=r"model is Sequential, expected torch.nn.Module: tune\(\) times"):
        CustomPrecisionPolicy().tune(network())


def test_files_and_rules_are_refused_in_the_words_of_torch(tmp_path: Path) -> None:
    """tests/python/test_policy.py has the same; test_policy_library.py there compares the words of both doors."""
    path = tmp_path / "policy.json"
    path.write_text('{"name": "n",\n "default": "float16",\n "rulse": []}')
    with pytest.raises(ValueError, match=r"policy.json, line 3: unknown key 'rulse', expected name, default, rules"):
        KerasPolicy.load(path)
    path.write_text(" " * (2**20 + 1))
    with pytest.raises(ValueError, match="policy.json: has 1048577 bytes, expected at most 1048576"):
        KerasPolicy.load(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="policy.json: is no UTF-8 text"):
        KerasPolicy.load(path)
    with pytest.raises(ValueError, match=r"rules\[0\].precision: got 'half', expected one of float32"):
        KerasPolicy("n", "float32", [{"type": "Linear", "precision": "half"}])
    with pytest.raises(TypeError, match=r"rules\[0\] is 'float32', expected a mapping"):
        KerasPolicy("n", "float16", ["float32"])
    with pytest.raises(TypeError, match="default is 16, expected a str"):
        KerasPolicy("n", 16)
    with pytest.raises(ValueError, match="name is 'half', expected one of 'mixed_float16'"):
        KerasPolicy.named("half")
