"""Policies and plans for Keras models: the same JSON as in PyTorch, decided by the same code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from halfstep import policy_library
from halfstep.keras_layers import layers_of
from halfstep.policies import Plan, Policy, ask, check_half

# Of the precisions that a Keras layer can have: its policy, under which variables are float32.
POLICY_OF = {"float32": "float32", "float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}


class KerasPlan(Plan):
    """The precision of every layer of one Keras model: a mapping of qualified names to PlannedLayer, in its order.

    Made by a policy's plan(model), or read from JSON. Plans compare, pickle, and go through JSON unchanged.
    """

    @classmethod
    def _class(cls) -> Any:
        return policy_library.Plan


class KerasPolicy(Policy):
    """Ordered rules, of which the first that matches a layer decides its precision.

    name: of the policy. default: the precision where no rule matches. rules: mappings with "precision" and, of these at
    least one, "name" and "type": globs of the layer's qualified name and class; "reason" is for people.

        policy = KerasPolicy("careful", "float16", [
            {"type": "*Normalization", "precision": "float32"},
            {"name": "head*", "precision": "float32", "reason": "logits"},
        ])
        print(policy.plan(model).explain())
        apply_policy(model, policy)
    """

    @classmethod
    def _class(cls) -> Any:
        return policy_library.Policy

    def match(self, names: Sequence[str]) -> list[int]:
        """Return for each name the number of the first rule that matches it, as a layer without a type; -1 for none."""
        return self._policy.match(names, [""] * len(names))

    def plan(self, model: keras.Layer) -> KerasPlan:
        """Decide once per layer of the model, as the function `plan` does."""
        return plan(model, self)


def plan(model: keras.Layer, policy: Any, half: str = "float16") -> KerasPlan:
    """Decide once per layer of a Keras model, built or not.

    policy: a KerasPolicy, whatever has its JSON as to_json(), such as a PrecisionPolicy, or whatever has
        should_use_fp16(layer_type, layer_name), such as a CustomPrecisionPolicy.
    half: the half precision of a yes of should_use_fp16(), "float16" or "bfloat16".

    Layers are those without sublayers and those with weights of their own. Their names are the names of the layers they
    are in and their own, joined by dots, without the model's; their types are their classes. A layer under two names is
    decided under the first. Attention and recurrent layers are decided as one, with all that is in them; Bidirectional
    and other wrappers follow what they wrap; InputLayer and layers without floats, such as StringLookup, have none.
    What a layer of yours makes in its build() is seen only once it is built.
    """
    check_half(half)
    found = layers_of(model)
    names, types = [entry.name for entry in found], [type(entry.layer).__name__ for entry in found]
    same_as = [entry.same_as for entry in found]
    if callable(getattr(policy, "should_use_fp16", None)) and not isinstance(policy, type):
        answers = ask(policy, zip(names, types, same_as, strict=True))
        made = policy_library.Plan.of_answers(type(policy).__name__, half, names, types, same_as, answers)
    else:
        made = policy_of(policy)._policy.plan(names, types, same_as)
    return KerasPlan._of(made)


def policy_of(policy: Any) -> KerasPolicy:
    """Return a policy of any door as one of this; TypeError for what is none, or no rules."""
    if isinstance(policy, KerasPolicy):
        return policy
    if isinstance(policy, (Plan, type)) or not callable(getattr(policy, "to_json", None)):
        hint = ", which apply_plan() takes" if isinstance(policy, Plan) else ""
        raise TypeError(
            f"policy is {policy.__name__ if isinstance(policy, type) else type(policy).__name__}{hint}, expected a "
            "KerasPolicy, a PrecisionPolicy or an instance of a CustomPrecisionPolicy"
        )
    return KerasPolicy.from_json(policy.to_json())
