"""What policies and plans are in every door: their JSON, their rules, and policies as code. Imports no framework.

The torch door (policy.py) and the Keras door (keras_plan.py) add what walks the layers of a model. Both hand texts to
the same core, the one through `torch.classes`, the other through ctypes (policy_library.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self

PRECISIONS = ("float32", "tfloat32", "float16", "bfloat16", "int8")
HALVES = ("float16", "bfloat16")
INHERITS = "never called: inherits from "
_MOST_BYTES = 2**20  # PrecisionPolicy::kMaxBytes


class PlannedLayer(NamedTuple):
    """One layer of a plan: its qualified name, its class, its precision (see PRECISIONS) and why."""

    name: str
    type: str
    precision: str
    reason: str

    @property
    def inherits(self) -> bool:
        """Whether its forward is never called, so that what uses its parameters decides. The reason says of whom."""
        return self.reason.startswith(INHERITS)


class Plan(Mapping):
    """The precision of every layer of one model: a mapping of qualified names to PlannedLayer, in the model's order.

    Made by a policy's plan(model), or read from JSON. Plans compare, pickle, and go through JSON unchanged.
    """

    def __init__(self, policy: str, layers: Iterable[PlannedLayer]) -> None:
        entries = [layer._asdict() for layer in layers]
        self._set(self._class()(json.dumps({"policy": policy, "layers": entries}), "plan"))

    @classmethod
    def _class(cls) -> Any:
        """Return the door's class of plans, which is made of (json, source)."""
        raise NotImplementedError

    def _set(self, plan: Any) -> None:
        self._plan = plan
        self._layers = {layer[0]: PlannedLayer(*layer) for layer in plan.layers()}

    @classmethod
    def _of(cls, plan: Any) -> Self:
        """Wrap a plan of the library."""
        wrapped = cls.__new__(cls)
        wrapped._set(plan)
        return wrapped

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Self:
        """Read what to_json() wrote; ValueError names `source`, the line and the key of what is wrong."""
        return cls._of(cls._class()(text, source))

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return self._plan.to_json()

    @property
    def policy(self) -> str:
        """The name of the policy that made it."""
        return self._plan.policy()

    def explain(self) -> str:
        """Return a table of layer, type, precision and reason."""
        return self._plan.explain()

    def diff(self, other: Plan) -> str:
        """Return what `other` decides otherwise, a line each; "" if nothing."""
        if not isinstance(other, type(self)):
            raise TypeError(f"other is {type(other).__name__}, expected {type(self).__name__}")
        return self._plan.diff(other._plan)

    def __getitem__(self, name: str) -> PlannedLayer:
        return self._layers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def layers(self) -> list[PlannedLayer]:
        """Return all layers in order."""
        return list(self._layers.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.policy!r}, {len(self)} layers\n{self.explain()}"

    def __reduce__(self) -> Any:
        return type(self).from_json, (self.to_json(),)


class Policy:
    """Ordered rules, of which the first that matches a layer decides its precision.

    name: of the policy. default: the precision where no rule matches. rules: mappings with "precision" and, of these at
    least one, "name" and "type": globs of the layer's qualified name and class; "reason" is for people.
    """

    def __init__(self, name: str, default: str, rules: Iterable[Mapping[str, str]] = ()) -> None:
        rules = list(rules)
        for what, value in {"name": name, "default": default}.items():
            if not isinstance(value, str):
                raise TypeError(f"{what} is {value!r}, expected a str")
        for index, rule in enumerate(rules):
            if not isinstance(rule, Mapping) or not all(isinstance(value, str) for value in rule.values()):
                raise TypeError(f"rules[{index}] is {rule!r}, expected a mapping of str to str")
        text = json.dumps({"name": name, "default": default, "rules": [dict(rule) for rule in rules]})
        self._policy = self._class()(text, "policy")

    @classmethod
    def _class(cls) -> Any:
        """Return the door's class of policies, which is made of (json, source) or by named(name)."""
        raise NotImplementedError

    @classmethod
    def named(cls, name: str) -> Self:
        """Return "mixed_float16", "mixed_bfloat16" or "float32": one precision for all layers."""
        return cls._of(cls._class().named(name))

    @classmethod
    def _of(cls, policy: Any) -> Self:
        """Wrap a policy of the library."""
        wrapped = cls.__new__(cls)
        wrapped._policy = policy
        return wrapped

    @classmethod
    def from_json(cls, text: str, source: str = "policy") -> Self:
        """Read JSON (docs/policy.schema.json); ValueError names `source`, the line and the key of what is wrong."""
        return cls._of(cls._class()(text, source))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a JSON file of at most 1 MiB."""
        return cls.from_json(read_file(path), str(path))

    def to_json(self) -> str:
        """Return the policy as JSON."""
        return self._policy.to_json()

    @property
    def name(self) -> str:
        """The policy's name."""
        return self._policy.name()

    def decide(self, name: str, type: str) -> tuple[str, str]:
        """Return the precision of one layer and the reason."""
        return self._policy.decide(name, type)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        return f"{type(self).__name__}.from_json('''{self.to_json()}''')"

    def __reduce__(self) -> Any:
        return type(self).from_json, (self.to_json(),)


def read_file(path: str | Path) -> str:
    """Return the text of a policy's file; ValueError if it has more than 1 MiB or is no UTF-8."""
    path = Path(path)
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)  # whatever the file is, and however long
    if len(content) > _MOST_BYTES:
        size = path.stat().st_size
        raise ValueError(f"{path}: has {size if size > _MOST_BYTES else 'more'} bytes, expected at most {_MOST_BYTES}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 text ({error})") from error


class CustomPrecisionPolicy:
    """A policy as code: subclass it and override what you decide.

    should_use_fp16() is asked once per layer when a plan is made, never while the model runs.
    """

    def __init__(self) -> None:
        pass

    def should_use_fp16(self, layer_type: str, layer_name: str) -> bool:
        """Return whether a layer, of this class and under this qualified name, runs in half precision."""
        return True

    def get_loss_scale_factor(self, gradient_norm: float) -> float | None:
        """Return the loss scale that follows from the L2 norm of a step's unscaled gradients, or None to leave it."""
        return None

    def chooses_loss_scale(self) -> bool:
        """Return whether get_loss_scale_factor() is another one than this class's."""
        mine = getattr(self.get_loss_scale_factor, "__func__", self.get_loss_scale_factor)
        return mine is not CustomPrecisionPolicy.get_loss_scale_factor

    def plan(
        self,
        model: Any,
        half: str = "float16",
        example: Any = None,
        *,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Ask once per layer of a torch or Keras model, and return the PrecisionPlan or KerasPlan.

        half: the half precision of this model's policy, "float16" or "bfloat16".
        example, kwargs: see PrecisionPolicy.plan, as for what is never called; for torch models alone.
        """
        check_half(half)
        if _is_of_keras(model):
            if example is not None or kwargs is not None:
                raise ValueError("example and kwargs are for torch models: a Keras layer says itself what it calls")
            from halfstep.keras_plan import plan

            return plan(model, self, half)
        from halfstep.policy import plan_of_answers

        return plan_of_answers(self, model, half, example, kwargs)

    def tune(
        self,
        model: Any,
        example: Any = None,
        half: str = "float16",
        *,
        kwargs: Mapping[str, Any] | None = None,
        backward: bool | None = None,
        margin: float = 0.02,
    ) -> Plan:
        """Make the plan, and keep in float32 what half makes slower on this machine: see PrecisionPolicy.tune."""
        if _is_of_keras(model):
            raise TypeError(f"model is {type(model).__name__}, expected torch.nn.Module: tune() times torch's layers")
        from halfstep.tuning import tune

        return tune(self.plan(model, half), model, example, kwargs, backward, margin)


def check_half(half: str) -> None:
    """Raise ValueError unless `half` names a half precision."""
    if half not in HALVES:
        raise ValueError(f"half is {half!r}, expected 'float16' or 'bfloat16'")


def ask(policy: Any, layers: Iterable[tuple[str, str, str]]) -> list[bool]:
    """Return what policy.should_use_fp16() says of each (name, type, same_as); True, unasked, of what is the same.

    TypeError for answers that are no bool, of Python or NumPy.
    """
    return [bool(same_as) or _answer(policy, kind, name) for name, kind, same_as in layers]


def _answer(policy: Any, kind: str, name: str) -> bool:
    answer = policy.should_use_fp16(kind, name)
    if type(answer).__module__ == "numpy" and hasattr(answer, "item"):  # of a comparison
        answer = answer.item()
    if not isinstance(answer, bool):
        raise TypeError(f"should_use_fp16({kind!r}, {name!r}) returned {answer!r}, expected True or False")
    return answer


def _is_of_keras(model: Any) -> bool:
    """Whether it is a Keras model, of another backend than torch, whose layers are torch's modules as well."""
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    return keras is not None and isinstance(model, keras.Layer) and not (torch and isinstance(model, torch.nn.Module))
