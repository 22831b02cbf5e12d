"""Which precision each layer of a model runs in, and why: policies, which decide, and plans, which they make."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from halfstep._library import load_library

load_library()

PRECISIONS = ("float32", "tfloat32", "float16", "bfloat16", "int8")


class PlannedLayer(NamedTuple):
    """One layer of a plan: its qualified name, its class, its precision (see PRECISIONS) and why."""

    name: str
    type: str
    precision: str
    reason: str


class PrecisionPlan:
    """The precision of every layer of one model: a mapping of qualified names to PlannedLayer, in the model's order.

    Made by a policy's plan(model), or read from JSON. Plans compare, pickle, and go through JSON unchanged.
    """

    def __init__(self, policy: str, layers: Iterable[PlannedLayer]) -> None:
        entries = [layer._asdict() for layer in layers]
        self._set(torch.classes.halfstep.PrecisionPlan(json.dumps({"policy": policy, "layers": entries}), "plan"))

    def _set(self, plan: Any) -> None:
        self._plan = plan
        self._layers = {layer[0]: PlannedLayer(*layer) for layer in plan.layers()}

    @classmethod
    def _of(cls, plan: Any) -> PrecisionPlan:
        """Wrap a plan of the library."""
        wrapped = cls.__new__(cls)
        wrapped._set(plan)
        return wrapped

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> PrecisionPlan:
        """Read what to_json() wrote; ValueError names `source`, the line and the key of what is wrong."""
        return cls._of(torch.classes.halfstep.PrecisionPlan(text, source))

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

    def diff(self, other: PrecisionPlan) -> str:
        """Return what `other` decides otherwise, a line each; "" if nothing."""
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
        return isinstance(other, PrecisionPlan) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        return f"PrecisionPlan of {self.policy!r}, {len(self)} layers\n{self.explain()}"

    def __reduce__(self) -> Any:
        return PrecisionPlan.from_json, (self.to_json(),)


class PrecisionPolicy:
    """Ordered rules, of which the first that matches a layer decides its precision.

    name: of the policy. default: the precision where no rule matches. rules: mappings with "precision" and, of these at
    least one, "name" and "type": globs of the layer's qualified name and class; "reason" is for people.

        policy = PrecisionPolicy("careful", "float16", [
            {"type": "*Norm*", "precision": "float32"},
            {"name": "head.*", "precision": "float32", "reason": "logits"},
        ])
        print(policy.plan(model).explain())
    """

    def __init__(self, name: str, default: str, rules: Iterable[Mapping[str, str]] = ()) -> None:
        text = json.dumps({"name": name, "default": default, "rules": [dict(rule) for rule in rules]})
        self._policy = torch.classes.halfstep.PrecisionPolicy(text, "policy")

    @classmethod
    def named(cls, name: str) -> PrecisionPolicy:
        """Return "mixed_float16", "mixed_bfloat16" or "float32": one precision for all layers."""
        return cls._of(torch.classes.halfstep.PrecisionPolicy.named(name))

    @classmethod
    def _of(cls, policy: Any) -> PrecisionPolicy:
        """Wrap a policy of the library."""
        wrapped = cls.__new__(cls)
        wrapped._policy = policy
        return wrapped

    @classmethod
    def from_json(cls, text: str, source: str = "policy") -> PrecisionPolicy:
        """Read JSON (docs/policy.schema.json); ValueError names `source`, the line and the key of what is wrong."""
        return cls._of(torch.classes.halfstep.PrecisionPolicy(text, source))

    @classmethod
    def load(cls, path: str | Path) -> PrecisionPolicy:
        """Read a JSON file of at most 1 MiB."""
        path = Path(path)
        if path.stat().st_size > 2**20:  # before it is read
            raise ValueError(f"{path}: has {path.stat().st_size} bytes, expected at most {2**20}")
        return cls.from_json(path.read_text(encoding="utf-8"), str(path))

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

    def plan(self, model: nn.Module) -> PrecisionPlan:
        """Decide once per layer of the model. Layers are the modules without children, and those with own parameters.

        A module under two names is decided under the first; the second says so.
        """
        layers = list(layers_of(model))
        made = self._policy.plan(
            [name for name, _, _ in layers], [kind for _, kind, _ in layers], [same for _, _, same in layers]
        )
        return PrecisionPlan._of(made)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrecisionPolicy) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        return f"PrecisionPolicy.from_json('''{self.to_json()}''')"

    def __reduce__(self) -> Any:
        return type(self).from_json, (self.to_json(),)


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

    def plan(self, model: nn.Module, half: str = "float16") -> PrecisionPlan:
        """Ask once per layer. half: the half precision of this model's policy, "float16" or "bfloat16"."""
        if half not in ("float16", "bfloat16"):
            raise ValueError(f"half is {half!r}, expected 'float16' or 'bfloat16'")
        planned: dict[str, PlannedLayer] = {}
        for name, kind, same_as in layers_of(model):
            if same_as:
                first = planned[same_as]
                planned[name] = PlannedLayer(name, kind, first.precision, f"the same module as {same_as}")
                continue
            answer = self.should_use_fp16(kind, name)
            if not isinstance(answer, bool):
                raise TypeError(f"should_use_fp16({kind!r}, {name!r}) returned {answer!r}, expected True or False")
            reason = f"{type(self).__name__}.should_use_fp16 is {answer}"
            planned[name] = PlannedLayer(name, kind, half if answer else "float32", reason)
        return PrecisionPlan(type(self).__name__, planned.values())


def layers_of(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield (qualified name, class, name under which the same module came before or "") of what a plan covers."""
    known: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if next(module.children(), None) is not None and not module._parameters:
            continue
        yield name, class_of(module), known.get(module, "")
        known.setdefault(module, name)


def class_of(module: nn.Module) -> str:
    """Return the name of a module's class; of a scripted or traced one that of the class it was made from."""
    return module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__
