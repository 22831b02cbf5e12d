"""Which precision each layer of a torch model runs in, and why: policies, which decide, and plans, which they make."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from halfstep._library import load_library
from halfstep.policies import INHERITS, PRECISIONS, CustomPrecisionPolicy, Plan, PlannedLayer, Policy, ask

load_library()

__all__ = ["PRECISIONS", "CustomPrecisionPolicy", "PlannedLayer", "PrecisionPlan", "PrecisionPolicy"]


class PrecisionPlan(Plan):
    """The precision of every layer of one model: a mapping of qualified names to PlannedLayer, in the model's order.

    Made by a policy's plan(model), or read from JSON. Plans compare, pickle, and go through JSON unchanged.
    """

    @classmethod
    def _class(cls) -> Any:
        return torch.classes.halfstep.PrecisionPlan


class PrecisionPolicy(Policy):
    """Ordered rules, of which the first that matches a layer decides its precision.

    name: of the policy. default: the precision where no rule matches. rules: mappings with "precision" and, of these at
    least one, "name" and "type": globs of the layer's qualified name and class; "reason" is for people.

        policy = PrecisionPolicy("careful", "float16", [
            {"type": "*Norm*", "precision": "float32"},
            {"name": "head.*", "precision": "float32", "reason": "logits"},
        ])
        print(policy.plan(model).explain())
    """

    @classmethod
    def _class(cls) -> Any:
        return torch.classes.halfstep.PrecisionPolicy

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


def plan_of_answers(
    policy: CustomPrecisionPolicy, model: nn.Module, half: str, example: Any, kwargs: Mapping[str, Any] | None
) -> PrecisionPlan:
    """Ask a policy once per layer of the model: CustomPrecisionPolicy.plan."""
    layers = list(layers_of(model))
    columns = [list(column) for column in zip(*layers, strict=True)]
    made = torch.classes.halfstep.PrecisionPlan.of_answers(type(policy).__name__, half, *columns, ask(policy, layers))
    return _where_called(PrecisionPlan._of(made), model, example, kwargs)


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
            reason = INHERITS + (outer or "the model")
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
