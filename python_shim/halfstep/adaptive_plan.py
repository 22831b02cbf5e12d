"""Which layers an adaptive training monitors, and how its plan gets into the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halfstep.policy import (
    CustomPrecisionPolicy,
    PlannedLayer,
    PrecisionPlan,
    PrecisionPolicy,
    class_of,
    layers_of,
    named_modules,
    with_inherited,
)
from halfstep.scopes import DTYPES, LayerScope, apply_plan, planned_dtypes, remove_plan
from halfstep.watched import Around, beside_watched, take_out

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def base_plan(model: nn.Module, half: torch.dtype, policy: Any) -> PrecisionPlan:
    """Return the plan to start from, with every module as a layer of its own, under its first name.

    A policy covers the layers that it is asked about. The others, which hold layers and compute what lies between them,
    are half. Raises ValueError for a precision that does not run, and for layers in the other half type.
    """
    name = _NAMES[half]
    if isinstance(policy, CustomPrecisionPolicy):
        given = policy.plan(model, name)
    elif isinstance(policy, PrecisionPolicy):
        given = policy.plan(model)
    else:
        given = policy
    if given is not None:
        planned_dtypes(model, given)
    known: dict[nn.Module, None] = {}
    layers = []
    for path, module in named_modules(model):
        if module in known:
            continue
        known[module] = None
        precision, reason = name, "adaptive"
        if given is not None and path in given:
            precision, reason = given[path].precision, given[path].reason
        elif given is None and isinstance(scope := beside_watched(module), LayerScope):
            precision, reason = _NAMES[scope.dtype], "as planned before"
        if precision not in ("float32", name):
            raise ValueError(f"layer {path!r} is planned as {precision}, expected float32 or {name}, which adapts")
        layers.append(PlannedLayer(path, class_of(module), precision, reason))
    return PrecisionPlan("adaptive", layers)


def watched_layers(model: nn.Module, plan: PrecisionPlan) -> dict[nn.Module, int]:
    """Return the modules whose results are looked at, with their numbers in the plan: those that compute themselves."""
    modules = dict(named_modules(model))
    numbers = {name: number for number, name in enumerate(plan)}
    return {modules[name]: numbers[name] for name, _, same in layers_of(model) if not same and name in numbers}


class AdaptiveForward(Around):
    """The `forward` of an adaptive training's model: autocast while a context is open, float32 results.

    Copies and pickles of it are without their training, and do nothing.
    """

    remedy = "release(model) of its AdaptivePrecisionManager"

    def __init__(self, module: nn.Module, training: Any) -> None:
        super().__init__(module, module.__dict__.get("forward"))
        self.training = training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns, in float32 while a context is open."""
        if self.training is None or torch.compiler.is_compiling() or not self.training.is_open:
            return self._forward(*args, **kwargs)
        return self.training.run(self._forward, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "training": None}


class Installed:
    """The plan and the forward of a training in its model, from the constructor to remove()."""

    def __init__(self, model: nn.Module, training: Any, half: torch.dtype, base: PrecisionPlan, policy: Any) -> None:
        self._training = training
        self._half = half
        self._base = base
        self._planned_before = policy is None
        self._precisions = self._of(base)
        if self._planned_before or not self._has_float32(base):
            self._put(model)
        else:
            self._replace(model, base)

    @staticmethod
    def _of(plan: PrecisionPlan) -> list[str]:
        return [layer.precision for layer in plan.layers()]

    def _has_float32(self, plan: PrecisionPlan) -> bool:
        return "float32" in self._of(plan)

    def _put(self, model: nn.Module) -> None:
        if isinstance(model, torch.jit.ScriptModule):
            _ = model.forward  # its class has none; this puts the compiled method where others have theirs
        model.forward = AdaptiveForward(model, self._training)

    def _replace(self, model: nn.Module, plan: PrecisionPlan) -> None:
        """Put scopes in anew: the one of the model itself must be inside of its autocast."""
        take_out(model, AdaptiveForward)
        apply_plan(model, with_inherited(plan, model), self._half)
        self._put(model)

    def apply(self, model: nn.Module, plan: PrecisionPlan) -> None:
        """Put another plan into force."""
        if self._of(plan) != self._precisions:
            self._replace(model, plan)
            self._precisions = self._of(plan)

    def remove(self, model: nn.Module) -> None:
        """Give the model the forward methods that it had."""
        take_out(model, AdaptiveForward)
        if self._planned_before and self._precisions == self._of(self._base):
            return
        remove_plan(model)
        if self._planned_before and self._has_float32(self._base):
            apply_plan(model, with_inherited(self._base, model), self._half)
