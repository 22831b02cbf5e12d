"""Policies by layer for Keras models: they set the dtype policy of each layer, and take it back.

All that is for users is here: policies and plans (keras_plan.py), and PrecisionPolicyMap (keras_policy_map.py).
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import keras

from halfstep.keras_layers import all_layers, check_model, layers_of, layers_within, wrappers_of
from halfstep.keras_plan import POLICY_OF, KerasPlan, KerasPolicy, plan
from halfstep.keras_policy_map import PrecisionPolicyMap
from halfstep.policies import PlannedLayer

__all__ = [
    "KerasPlan",
    "KerasPolicy",
    "PlannedLayer",
    "PrecisionPolicyMap",
    "apply_plan",
    "apply_policy",
    "needs_loss_scaling",
    "plan",
    "remove_policy",
]

# Of each layer that has a policy from here: the one before, and ours.
_applied: weakref.WeakKeyDictionary[keras.Layer, tuple[keras.DTypePolicy, keras.DTypePolicy]]
_applied = weakref.WeakKeyDictionary()


def apply_policy(model: keras.Layer, policy: Any, half: str = "float16") -> KerasPlan:
    """Make the plan of a policy for this model, give each layer its dtype policy, and return the plan.

    policy, half: see plan(). ValueError where the plan cannot be applied: see apply_plan().
    """
    made = plan(model, policy, half)
    _apply(model, made)
    return made


def apply_plan(model: keras.Layer, plan: KerasPlan) -> None:
    """Set the `dtype_policy` of each layer that the plan names: "mixed_float16", "mixed_bfloat16" or "float32".

    Variables stay float32, so this works before and after build, and between fits: functions that the model and the
    models in it have traced are made anew. What contains layers, such as a Sequential, keeps its own policy, and casts
    its inputs as before. Compile with a LossScaleOptimizer where needs_loss_scaling(model): Keras adds one by itself
    only where the policy of the model as a whole is "mixed_float16". A saved file, clone_model() and get_config() have
    the policies of all layers that they list; layers that a class of yours makes itself are not listed: apply again.

    ValueError, with nothing changed, for int8 and tfloat32, for names that the model does not have, and for layers that
    are quantized, have a DTypePolicyMap, or have weights in another floating-point type.
    """
    if not isinstance(plan, KerasPlan):
        raise TypeError(f"plan is {type(plan).__name__}, expected KerasPlan")
    _apply(model, plan)


def _apply(model: keras.Layer, plan: KerasPlan) -> None:
    overridden = []  # layers that were given float32 while others were to be half
    half_globally = keras.config.dtype_policy().compute_dtype != "float32"
    for layer, policy in _policies(model, plan):
        before, ours = _applied.get(layer, (layer.dtype_policy, None))
        if ours is not None and layer.dtype_policy is not ours:  # another has been set since
            before = layer.dtype_policy
        if half_globally and ours is None and before.compute_dtype == "float32" != policy.compute_dtype:
            overridden.append(layer.name)
        _set(layer, policy)
        _applied[layer] = before, policy
    if overridden:
        warnings.warn(
            f"{', '.join(overridden)}: made in float32 under a half policy, and the plan has it in half. Give what is "
            "to stay float32 a rule.",
            stacklevel=3,
        )
    _forget_functions(model)
    optimizer = getattr(model, "optimizer", None)
    if optimizer and needs_loss_scaling(model) and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        warnings.warn(
            "the model is compiled without loss scaling, and now has float16 layers, in which small gradients become "
            "0: compile it with a LossScaleOptimizer",
            stacklevel=3,
        )


def remove_policy(model: keras.Layer) -> None:
    """Give each layer back the dtype policy that it had before, unless it has been given another one meanwhile.

    Copies of the model, and what was loaded from a file, have nothing to go back to and stay as they are.
    """
    check_model(model)
    for layer in all_layers(model):
        before, ours = _applied.pop(layer, (None, None))
        if ours is not None and layer.dtype_policy is ours:
            _set(layer, before)
    _forget_functions(model)


def needs_loss_scaling(model: keras.Layer) -> bool:
    """Return whether any layer computes in float16, so that small gradients become 0 unless the loss is scaled."""
    check_model(model)
    return any(_computes_in_float16(layer) for layer in all_layers(model))


def _computes_in_float16(layer: keras.Layer) -> bool:
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap) and layer.path is None:  # who knows which it will be
        policies = [policy.default_policy, *policy.values()]
        return policy.name == "mixed_float16" or any(each.compute_dtype == "float16" for each in policies)
    return layer.compute_dtype == "float16"


def _policies(model: keras.Layer, plan: KerasPlan) -> list[tuple[keras.Layer, keras.DTypePolicy]]:
    """Return the policy of each layer that the plan speaks of; ValueError where it cannot be."""
    found = {entry.name: entry.layer for entry in layers_of(model)}
    missing = [name for name in plan if name not in found]
    if missing:
        raise ValueError(f"the plan has {len(missing)} layers that the model has not, such as {missing[0]!r}")
    impossible = [layer for layer in plan.layers() if layer.precision not in POLICY_OF]
    if impossible:
        raise ValueError(_cannot_be(impossible[0], len(impossible) - 1))
    policies = {name: keras.DTypePolicy(name) for name in POLICY_OF.values()}
    wrappers = wrappers_of(model)
    chosen: dict[int, tuple[keras.Layer, keras.DTypePolicy, str]] = {}
    for name, planned in plan.items():
        layer, policy = found[name], policies[POLICY_OF[planned.precision]]
        for one in [layer, *layers_within(layer), *wrappers.get(id(layer), [])]:
            _check(name, one, policy)
            _, other, other_name = chosen.setdefault(id(one), (one, policy, name))
            if other is not policy:
                raise ValueError(
                    f"the plan has layer {name!r} in {planned.precision} and {other_name!r} in {other.compute_dtype}, "
                    f"expected one precision: both are or share the layer {one.name!r}"
                )
    return [(layer, policy) for layer, policy, _ in chosen.values()]


def _cannot_be(planned: PlannedLayer, others: int) -> str:
    further = f" (and {others} more)" if others else ""
    instead = {
        "int8": 'model.quantize("int8") does that, for inference',
        "tfloat32": "tf.config.experimental.enable_tensor_float_32_execution() decides that for all float32 layers",
    }
    return (
        f"layer {planned.name!r}{further} is planned in {planned.precision} ({planned.reason}), expected float32, "
        f"float16 or bfloat16: {instead[planned.precision]}"
    )


def _check(name: str, layer: keras.Layer, policy: keras.DTypePolicy) -> None:
    """Raise ValueError if a layer, of or around the one of this name, cannot have the policy."""
    what = f"layer {name!r} cannot have the policy {policy.name}"
    if isinstance(layer.dtype_policy, keras.dtype_policies.DTypePolicyMap):
        raise ValueError(f"{what}: {layer.name!r} has a {type(layer.dtype_policy).__name__}, which other layers share")
    if layer.dtype_policy.quantization_mode is not None:
        raise ValueError(f"{what}: {layer.name!r} is quantized ({layer.dtype_policy.name})")
    for weight in layer.weights:
        if keras.backend.is_float_dtype(weight.dtype) and weight.dtype != "float32":
            raise ValueError(f"{what}: its weight {weight.path!r} is {weight.dtype}, expected float32")


def _set(layer: keras.Layer, policy: keras.DTypePolicy) -> None:
    layer.dtype_policy = policy
    if isinstance(layer, keras.layers.Normalization) and layer.built:  # it keeps a cast mean and variance
        if layer.input_mean is None:
            layer.finalize_state()
        else:
            layer.build_from_config(layer.get_build_config())


def _forget_functions(model: keras.Layer) -> None:
    """Let the models in a model trace their steps anew: in what was traced dtypes are fixed."""
    for layer in all_layers(model):
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None
