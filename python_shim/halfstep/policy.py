"""Which precision each layer of a model runs in, and why: policies, which decide, and plans, which they make."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from halfstep._library import load_library

load_library()

PRECISIONS = ("float32", "tfloat32", "float16", "bfloat16", "int8")
_INHERITS = "never called: inherits from "


class PlannedLayer(NamedTuple):
    """One layer of a plan: its qualified name, its class, its precision (see PRECISIONS) and why."""

    name: str
    type: str
    precision: str
    reason: str

    @property
    def inherits(self) -> bool:
        """Whether its forward is never called, so that what uses its parameters decides. The reason says of whom."""
        return self.reason.startswith(_INHERITS)


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
        if not isinstance(other, PrecisionPlan):
            raise TypeError(f"other is {type(other).__name__}, expected PrecisionPlan")
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
        rules = list(rules)
        for what, value in {"name": name, "default": default}.items():
            if not isinstance(value, str):
                raise TypeError(f"{what} is {value!r}, expected a str")
        for index, rule in enumerate(rules):
            if not isinstance(rule, Mapping) or not all(isinstance(value, str) for value in rule.values()):
                raise TypeError(f"rules[{index}] is {rule!r}, expected a mapping of str to str")
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
        path, most = Path(path), 2**20
        with path.open("rb") as file:
            content = file.read(most + 1)  # whatever the file is, and however long
        if len(content) > most:
            size = path.stat().st_size
            raise ValueError(f"{path}: has {size if size > most else 'more'} bytes, expected at most {most}")
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is no UTF-8 text ({error})") from error
        return cls.from_json(text, str(path))

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

    def plan(self, model: nn.Module, example: Any = None, *, kwargs: Mapping[str, Any] | None = None) -> PrecisionPlan:
        """Decide once per layer of the model. Layers are the modules without children, and those with own parameters.

        A module under two names is decided under the first; the second says so. A layer whose forward is never called,
        such as the out_proj of torch's MultiheadAttention, inherits the precision of the layer it is in.
        example, kwargs: the model's arguments, a tensor or a tuple, and its keyword arguments. The model is called once
        on them, as tune() does it, and what that does not call inherits too.
        """
        layers = list(layers_of(model))
        made = self._policy.plan(
            [name for name, _, _ in layers], [kind for _, kind, _ in layers], [same for _, _, same in layers]
        )
        return _where_called(PrecisionPlan._of(made), model, example, kwargs)

    def tune(
        self,
        model: nn.Module,
        example: Any = None,
        *,
        kwargs: Mapping[str, Any] | None = None,
        backward: bool | None = None,
        margin: float = 0.02,
    ) -> PrecisionPlan:
        """Make the plan, and keep in float32 what half makes slower on this machine; the reasons have the times.

        example, kwargs: the model's arguments, a tensor or a tuple, and its keyword arguments, on the model's device.
            The model is called once on them, under autocast, as it is: in training or in eval mode.
        backward: time the backward pass too; None for yes where the model is in training mode and gradients are on.
        margin: how much slower half must be, as a share of float32's time, to lose its place.

        Each layer that the plan has in half and that the example calls is timed alone on its inputs in that call, in
        half and in float32, eagerly, with all casts of inputs and weights that each needs; the calls of a layer that is
        called several times together. Layers alike with alike inputs are timed once. Half loses where its median is
        beyond the margin, and further than two standard errors of the difference. Inputs of the layers are kept
        meanwhile, once for layers alike; the model's call runs on a copy, which shares the parameters' memory.
        The model stays as it is: parameters, gradients, buffers, modes, hooks, plans applied to it; so do the states of
        random numbers and of autocast. Forward hooks run in the one call, on the copy, and are not timed.
        Raises ValueError for a plan with int8 or tfloat32, an example or parameters on other devices than one CPU or
        one GPU, and for DistributedDataParallel (pass its `module`); what the model raises on the example comes out.
        """
        from halfstep.tuning import tune

        return tune(self.plan(model), model, example, kwargs, backward, margin)

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

    def chooses_loss_scale(self) -> bool:
        """Return whether get_loss_scale_factor() is another one than this class's."""
        mine = getattr(self.get_loss_scale_factor, "__func__", self.get_loss_scale_factor)
        return mine is not CustomPrecisionPolicy.get_loss_scale_factor

    def plan(
        self,
        model: nn.Module,
        half: str = "float16",
        example: Any = None,
        *,
        kwargs: Mapping[str, Any] | None = None,
    ) -> PrecisionPlan:
        """Ask once per layer. half: the half precision of this model's policy, "float16" or "bfloat16".

        example, kwargs: see PrecisionPolicy.plan, as for what is never called.
        """
        if half not in ("float16", "bfloat16"):
            raise ValueError(f"half is {half!r}, expected 'float16' or 'bfloat16'")
        layers = list(layers_of(model))
        answers = [bool(same_as) or self._answer(kind, name) for name, kind, same_as in layers]
        columns = [list(column) for column in zip(*layers, strict=True)]
        made = torch.classes.halfstep.PrecisionPlan.of_answers(type(self).__name__, half, *columns, answers)
        return _where_called(PrecisionPlan._of(made), model, example, kwargs)

    def _answer(self, kind: str, name: str) -> bool:
        answer = self.should_use_fp16(kind, name)
        if type(answer).__module__ == "numpy" and hasattr(answer, "item"):  # of a comparison
            answer = answer.item()
        if not isinstance(answer, bool):
            raise TypeError(f"should_use_fp16({kind!r}, {name!r}) returned {answer!r}, expected True or False")
        return answer

    def tune(
        self,
        model: nn.Module,
        example: Any = None,
        half: str = "float16",
        *,
        kwargs: Mapping[str, Any] | None = None,
        backward: bool | None = None,
        margin: float = 0.02,
    ) -> PrecisionPlan:
        """Make the plan, and keep in float32 what half makes slower on this machine: see PrecisionPolicy.tune."""
        from halfstep.tuning import tune

        return tune(self.plan(model, half), model, example, kwargs, backward, margin)


# Of torch.compile, FullyShardedDataParallel and checkpoint_wrapper: the attribute that holds what is wrapped.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (qualified name, module) of all modules, under each of their names, as if nothing wrapped them.

    What torch.compile, DistributedDataParallel, DataParallel and the like put around a module is left out, with its
    part of the names: so rules and plans are the same for the model as it was written.
    TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected torch.nn.Module")
    yield from _walk(model, "")


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    names = _WRAPPED
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        names = ("module",)
    children = [(key, child) for key, child in module._modules.items() if child is not None]
    if len(children) == 1 and children[0][0] in names:
        yield from _walk(children[0][1], name)
        return
    yield name, module
    for key, child in children:
        yield from _walk(child, f"{name}.{key}" if name else key)


def layers_of(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield (qualified name, class, name under which the same module came before or "") of what a plan covers."""
    known: dict[nn.Module, str] = {}
    for name, module in named_modules(model):
        has_parameters = next(module.parameters(recurse=False), None) is not None
        if next(module.children(), None) is not None and not has_parameters:
            continue
        yield name, class_of(module), known.get(module, "")
        known.setdefault(module, name)


def parent_of(name: str, layers: Collection[str]) -> str | None:
    """Return the name of the innermost of `layers` that the layer `name` is in, or None."""
    while name:
        name = name.rpartition(".")[0]
        if name in layers:
            return name
    return None


def with_inherited(plan: PrecisionPlan, model: nn.Module, uncalled: Collection[nn.Module] = ()) -> PrecisionPlan:
    """Return the plan in which layers that are never called have the precision of the layer they are in.

    uncalled: modules beside those whose kind says that nobody calls them.
    """
    modules = dict(named_modules(model))
    never = {*uncalled, *_never_called(model)}
    decided: dict[nn.Module, PlannedLayer] = {}
    layers: dict[str, PlannedLayer] = {}
    for layer in plan.layers():
        module, outer = modules[layer.name], parent_of(layer.name, layers)
        if module in decided:
            layer = layer._replace(precision=decided[module].precision)
        elif module in never and outer is not None:
            reason = _INHERITS + (outer or "the model")
            layer = layer._replace(precision=layers[outer].precision, reason=reason)
        elif module in never and not layer.reason.endswith("; never called"):
            layer = layer._replace(reason=f"{layer.reason}; never called")
        decided.setdefault(module, layer)
        layers[layer.name] = layer
    return plan if list(layers.values()) == plan.layers() else PrecisionPlan(plan.policy, layers.values())


def _never_called(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of `model` whose parameters others read: they have no forward, or torch never calls it."""
    for module in model.modules():
        forward = getattr(type(module), "forward", None)  # None for what TorchScript has compiled
        if forward is nn.Module.forward and "forward" not in module.__dict__:
            yield module
        elif forward is nn.MultiheadAttention.forward:
            yield module.out_proj


def _where_called(
    plan: PrecisionPlan, model: nn.Module, example: Any, kwargs: Mapping[str, Any] | None
) -> PrecisionPlan:
    if example is None and kwargs is None:
        return with_inherited(plan, model)
    from halfstep.calls import uncalled

    return with_inherited(plan, model, uncalled(plan, model, example, kwargs))


def class_of(module: nn.Module) -> str:
    """Return the name of a module's class; of a scripted or traced one that of the class it was made from."""
    return module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__
