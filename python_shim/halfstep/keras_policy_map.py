"""PrecisionPolicyMap: a policy's rules for names as a dtype policy of Keras, which layers look up by their path."""

from __future__ import annotations

import json
from typing import Any

import keras

from halfstep.keras_plan import POLICY_OF, KerasPolicy, policy_of


@keras.saving.register_keras_serializable(package="halfstep")
class PrecisionPolicyMap(keras.dtype_policies.DTypePolicyMap):
    """A policy by names as a Keras dtype policy: the global one, or the `dtype` of one layer and those it makes.

        policy = KerasPolicy("careful", "bfloat16", [{"name": "*attention.query", "precision": "float32"}])
        keras.config.set_dtype_policy(PrecisionPolicyMap(policy))
        layer = keras.layers.MultiHeadAttention(8, 64, name="attention", dtype=PrecisionPolicyMap(policy))

    policy: a KerasPolicy or whatever has its JSON as to_json(). Its precisions are float32, float16 and bfloat16, and
        its rules have names alone: a path does not show the type of a layer, for which there is apply_policy().

    A layer that has weights asks with its path once it is built. Rules have dots where the path has slashes, and the
    first that matches decides, the default where none does. The path may have the model's name in front, as in a
    Sequential, or not, as in a functional model, so its first part may be missing from what a rule matches:
    {"name": "head"} is for "head" and for "model/head". A path shows what was being built around the layer; the name of
    a functional model within another one does not show. Names that Keras gives, such as dense_3, count on through a
    program, so that they differ in the next model: name layers of which rules speak, or write dense*.

    Keras gives no path to a layer that has nothing to build, such as Activation, Dropout or the softmax of attention:
    it has the default, whatever the rules say, and so has every layer before it is built. Rules for these need
    apply_policy(), which sees the model as it is.

    `name` is "mixed_float16" if anything may be float16, so that compile() scales the loss. `layer.dtype_policy = ...`
    writes an entry for that path alone, as in Keras' own map. Such a map is saved with the model, and loaded in
    programs that have imported this module; what apply_policy() has set needs no halfstep to be loaded.
    """

    def __init__(self, policy: Any, policy_map: dict[str, keras.DTypePolicy] | None = None) -> None:
        if callable(getattr(policy, "should_use_fp16", None)):
            raise TypeError(
                f"policy is {type(policy).__name__}, which asks for the type of a layer. A path does not show it: use "
                "apply_policy(model, policy)"
            )
        self.policy = policy_of(policy)
        content = json.loads(self.policy.to_json())
        for index, rule in enumerate(content["rules"]):
            if "type" in rule:
                raise ValueError(
                    f"policy {self.policy.name!r}: rules[{index}] is for the type {rule['type']!r}. A path does not "
                    "show it: use apply_policy(model, policy)"
                )
        where = f"policy {self.policy.name!r}"
        self._rules = [
            _policy(rule["precision"], f"{where}: rules[{index}].precision")
            for index, rule in enumerate(content["rules"])
        ]
        default = _policy(content["default"], f"{where}: default")
        self._found: dict[str, keras.DTypePolicy] = {}  # of the paths that were asked for: rules do not change
        super().__init__(default, policy_map)

    @property
    def name(self) -> str:
        """A name that compile() and DTypePolicy(None) understand."""
        policies = [self.default_policy, *self._rules, *self.values()]
        names = [policy.name for policy in policies]
        return "mixed_float16" if "mixed_float16" in names else names[0]

    def __getitem__(self, path: str) -> keras.DTypePolicy:
        """Return the policy of a layer by its path, such as "encoder/attention/query"."""
        if path in self:
            return super().__getitem__(path)
        if path not in self._found:
            names = [part.replace("/", ".") for part in (path, path.partition("/")[2]) if part]
            matched = [rule for rule in self.policy.match(names) if rule >= 0]
            self._found[path] = self._rules[min(matched)] if matched else self.default_policy
        return self._found[path]

    def get_config(self) -> dict[str, Any]:
        """Return the policy's JSON, and the entries that were set."""
        return {"policy": self.policy.to_json(), "policy_map": super().get_config()["policy_map"]}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> PrecisionPolicyMap:
        """Return the map of what get_config() has returned."""
        entries = keras.saving.deserialize_keras_object(config["policy_map"], custom_objects=custom_objects)
        return cls(KerasPolicy.from_json(config["policy"]), entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrecisionPolicyMap) and self.get_config() == other.get_config()

    __hash__ = object.__hash__  # it changes

    def __repr__(self) -> str:
        return f"<PrecisionPolicyMap of {self.policy.name!r}, {len(self._rules)} rules, {len(self)} entries>"


def _policy(precision: str, where: str) -> keras.DTypePolicy:
    if precision not in POLICY_OF:
        raise ValueError(f"{where} is {precision}, expected {', '.join(POLICY_OF)}: Keras layers have no other policy")
    return keras.DTypePolicy(POLICY_OF[precision])
