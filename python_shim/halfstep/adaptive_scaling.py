"""The loss scale of a loop that has no scaler: applied in backward(), undone at the leaves, overflows skipped."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from halfstep.grad_scaler import GradScaler
from halfstep.gradients import moved, parameters_of

_ops = torch.ops.halfstep

_scalings: weakref.WeakSet[LossScaling] = weakref.WeakSet()
_flagged: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # were given a flag for their next step
_open: list[LossScaling] = []  # those whose contexts are entered, the innermost last
_scaled = WeakTensorKeyDictionary()  # what a GradScaler has scaled while a context was open, and which
_torchs_backward = torch.autograd.backward
_torchs_scale = torch.amp.GradScaler.scale


class _Leaves:
    """Leaves in the place of an optimizer, for the scaler's check of gradients."""

    def __init__(self, leaves: list[torch.Tensor]) -> None:
        self.param_groups = [{"params": leaves}]


class LossScaling:
    """Scales what backward() starts from while it is open, and unscales each gradient before it reaches `.grad`.

    So `.grad` holds true gradients, summed over any number of backward passes, whatever the loss is made of: outputs
    of the model, penalties on parameters, losses with parameters of their own. Hooks of parameters see true ones too,
    hooks on results in between, and their retained gradients, scaled ones. What torch.autograd.grad returns never has a
    scale, and what a GradScaler has scaled gets no second one.

    The gradients of a pass are looked at when it ends, whatever is done to them afterwards. An optimizer that is to
    step with one that was infinite or NaN gets none at all: without gradients it changes neither parameters nor states.
    This reads a flag on the host, but for torch's optimizers with fused=True, which skip by themselves on a flag on
    the device. The rule then moves the scale (finish()).

    scaler: whose rule and counters are used; a GradScaler of its own, which nobody else calls.
    scales: False looks for infinite and NaN gradients alone (bfloat16).
    """

    def __init__(self, model: nn.Module, scaler: GradScaler, device: torch.device, *, scales: bool) -> None:
        self.scaler = scaler
        self.scales = scales
        self.in_fp32 = False  # the pass runs in float32, without a scale, and says nothing about it
        self.other_scaler: Any = None  # the GradScaler of the loop's own, in this context
        self.skipped_in_fp32 = 0  # steps; the others are in the scaler's counters
        self.thread = 0  # that has opened it
        self.depth = 0  # of backward passes within each other
        self._model = weakref.ref(model)
        self._own: set[int] | None = None  # the model's parameters, by id, once a pass has asked in this context
        self._reached: set[int] = set()  # leaves with gradients that no finish() has followed
        self._flag: torch.Tensor | None = None  # whether one of those gradients is infinite or NaN
        self._checked: list[_Leaves] = []
        self._stepped = False  # an optimizer has, with such gradients
        self._unscaler = torch.classes.halfstep.GradientUnscaler()
        scaler._lazy_init_scale_growth_tracker(device)
        self._one = torch.full((), 1.0, dtype=torch.float32, device=device)
        _scalings.add(self)
        _look_at_steps()

    def open(self) -> None:
        """Begin: from now on backward() on this thread is scaled."""
        self.finish()  # of a step that came after its context
        self.in_fp32 = False
        self.other_scaler = None
        self.thread = threading.get_ident()
        self._own = None
        if not _open:
            torch.autograd.backward = _backward
            torch.amp.GradScaler.scale = _scale
        _open.append(self)

    def close(self) -> None:
        """End."""
        _open.remove(self)
        if not _open:  # where somebody has put another one around it, that stays, and finds nothing open
            if torch.autograd.backward is _backward:
                torch.autograd.backward = _torchs_backward
            if torch.amp.GradScaler.scale is _scale:
                torch.amp.GradScaler.scale = _torchs_scale

    def finish(self) -> None:
        """Move the scale by what was found before the steps since the last call, if there was one."""
        if not self._stepped:
            return
        self._stepped = False
        self._reached.clear()
        self._flag = None
        self._checked.clear()
        if self.scaler._per_optimizer_states:
            self.scaler.update()

    def backward(self, tensors: Any, grad_tensors: Any, run: Callable[[Any], None]) -> None:
        """Run a backward pass, run(gradients), with the scale."""
        roots = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        given = [grad_tensors] if isinstance(grad_tensors, (torch.Tensor, type(None))) else list(grad_tensors)
        given += [None] * (len(roots) - len(given))
        outer = self.depth == 0
        if outer:
            self.other_scaler = next((_scaled[root] for root in roots if root in _scaled), self.other_scaler)
        implicit = any(gradient is None and root.numel() != 1 for root, gradient in zip(roots, given, strict=True))
        if self.other_scaler is not None or implicit:  # the latter is torch's error
            run(grad_tensors)
            return
        leaves = self._unscaler.leaves(roots)
        if not outer:  # others are where an inner pass only cuts the graph: their gradients go on in the outer one
            leaves = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
        scale = self.scaler._scale if self.scales and not self.in_fp32 else None
        scaled, number = self._unscaler.begin(roots, given, leaves, scale, outer)
        self.depth += 1
        try:
            run(scaled if outer and scale is not None else grad_tensors)
        finally:
            self.depth -= 1
            reached = self._unscaler.end(number)
        for scaling in _open:
            scaling.check([leaf for leaf in reached if id(leaf) in scaling.own()])
        owned = set().union(*(scaling.own() for scaling in _open))
        self.check([leaf for leaf in reached if id(leaf) not in owned])

    def own(self) -> set[int]:
        """Return the ids of the model's parameters."""
        if self._own is None:
            self._own = {id(parameter) for parameter in self._model().parameters()}
        return self._own

    def check(self, leaves: list[torch.Tensor]) -> None:
        """Look at the gradients of these leaves, which a pass has just added to."""
        leaves = [leaf for leaf in leaves if leaf.grad is not None]
        if not leaves:
            return
        if self._stepped:
            self.finish()
        before = torch.zeros_like(self._one) if self._flag is None else self._flag
        group = _Leaves(leaves)
        found = self.scaler._check_gradients(group, self._one, before, allow_fp16=True, unscale=False)
        states = self.scaler._per_optimizer_states
        if self.in_fp32:
            del states[id(group)]
        else:
            states[id(group)]["found_inf_per_device"] = found
            self._checked.append(group)  # the scaler knows it by its id
        flags = [moved(flag, self._one.device) for flag in found.values()]
        self._flag = flags[0] if len(flags) == 1 else _ops.combine_found(flags)
        self._reached.update(map(id, leaves))

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Let the optimizer skip its step if a gradient was infinite or NaN; return other arguments for it, or None."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None and self in _open:

            @functools.wraps(closure)
            def held() -> Any:
                result = closure()
                self._hold(optimizer, on_host=True)
                return result

            if "closure" in kwargs:
                return args, {**kwargs, "closure": held}
            return (args[0], held, *args[2:]), kwargs
        if self.depth:  # from a hook, in the middle of a pass
            self.check(parameters_of(optimizer))
        self._hold(optimizer, on_host=False)
        return None

    def _hold(self, optimizer: torch.optim.Optimizer, *, on_host: bool) -> None:
        if self._flag is None:
            return
        parameters = parameters_of(optimizer)
        if not any(id(parameter) in self._reached for parameter in parameters):
            return
        self._stepped = True
        fused = all(group.get("fused") for group in optimizer.param_groups)
        if fused and not on_host and not self.in_fp32 and len({p.device for p in parameters}) == 1:
            optimizer.found_inf = moved(self._flag, parameters[0].device)  # as torch.amp.GradScaler hands it over
            _flagged.add(optimizer)
        elif self._flag.item():
            self.skipped_in_fp32 += self.in_fp32
            for parameter in parameters:
                parameter.grad = None


def _scale(scaler: Any, outputs: Any) -> Any:
    """torch.amp.GradScaler.scale while a context is open: remembers what it returns."""
    result = _torchs_scale(scaler, outputs)
    if scaler.is_enabled():
        for tensor in [result] if isinstance(result, torch.Tensor) else result if isinstance(result, list) else []:
            if isinstance(tensor, torch.Tensor):
                _scaled[tensor] = scaler
    return result


def _backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> None:
    """torch.autograd.backward while a context is open."""

    def run(gradients: Any) -> None:
        _torchs_backward(tensors, gradients, retain_graph, create_graph, grad_variables, inputs)

    # A result in between has no accumulation to hook.
    wanted: Iterable[Any] = [] if inputs is None else [inputs] if isinstance(inputs, torch.Tensor) else inputs
    plain = grad_variables is not None or any(
        not isinstance(tensor, torch.Tensor) or not tensor.is_leaf for tensor in wanted
    )
    scaling = None if plain else _scaling_here()
    if scaling is None:
        run(grad_tensors)
    else:
        scaling.backward(tensors, grad_tensors, run)


def _scaling_here() -> LossScaling | None:
    """Return what this thread has opened, or, on a thread of autograd, what a pass within a pass belongs to."""
    thread = threading.get_ident()
    mine = [scaling for scaling in _open if scaling.thread == thread]
    running = [scaling for scaling in _open if scaling.depth > 0]
    return (mine or running or [None])[-1]


@functools.cache
def _look_at_steps() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    changed = None
    for scaling in list(_scalings):
        result = scaling.before_step(optimizer, args, kwargs)
        if result is not None:
            args, kwargs = changed = result
    return changed


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _flagged:
        _flagged.remove(optimizer)
        del optimizer.found_inf
