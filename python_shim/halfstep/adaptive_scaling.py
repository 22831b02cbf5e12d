"""The loss scale of a loop that has no scaler: applied in backward(), undone at the leaves, overflows skipped."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from halfstep.grad_scaler import GradScaler, before_scale

_scalings: weakref.WeakSet[LossScaling] = weakref.WeakSet()
_flagged: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # were given a flag for their next step
_open: list[LossScaling] = []  # those whose contexts are entered, the innermost last
_torchs_backward = torch.autograd.backward


class LossScaling:
    """Scales what backward() starts from while it is open, and unscales each gradient before it reaches `.grad`.

    So `.grad` holds true gradients, summed over any number of backward passes, whatever the loss is made of: outputs of
    the model, penalties on parameters, losses with parameters of their own. What torch.autograd.grad returns never has
    a scale. Hooks on, and retained gradients of, results in between see scaled ones.

    An optimizer's step is looked at before it happens: if a gradient is infinite or NaN, all gradients of that
    optimizer are dropped, and a step without gradients changes neither parameters nor states. This reads a flag on the
    host, but for torch's optimizers with fused=True, which skip by themselves on a flag on the device. The rule then
    moves the scale (finish()).

    scaler: whose rule and counters are used; a GradScaler of its own, which nobody else calls.
    scales: False looks for infinite and NaN gradients alone (bfloat16).
    """

    def __init__(self, scaler: GradScaler, device: torch.device, *, scales: bool) -> None:
        self.scaler = scaler
        self.scales = scales
        self.off = False  # for the context that is open: another scaler is at work, or the pass runs in float32
        self.other_scaler: Any = None  # a GradScaler of the loop's own, once there is one
        self.skipped_in_fp32 = 0  # steps; the others are in the scaler's counters
        self.thread = 0  # that has opened it
        self.depth = 0  # of backward passes within each other
        self._reaching = False  # whether gradients have come to leaves that no step has looked at
        self._looked = self._moves = False  # since finish(): gradients were, and the scale is to follow
        self._unscaler = torch.classes.halfstep.GradientUnscaler()
        scaler._lazy_init_scale_growth_tracker(device)
        self._one = torch.full((), 1.0, dtype=torch.float32, device=device)
        _scalings.add(self)
        _look_at_steps()

    def open(self) -> None:
        """Begin: from now on backward() of this process is scaled."""
        self.finish()  # of a step that came after its context
        self.off = self.other_scaler is not None
        self.thread = threading.get_ident()
        if not _open:
            torch.autograd.backward = _backward
            before_scale.append(leave_scaling)
        _open.append(self)

    def close(self) -> None:
        """End."""
        _open.remove(self)
        if not _open:
            before_scale.remove(leave_scaling)
            if torch.autograd.backward is _backward:  # else somebody has put another one around it
                torch.autograd.backward = _torchs_backward

    def finish(self) -> None:
        """Move the scale by what the steps since the last call have found, if there was one."""
        if self._looked:
            self._looked = self._reaching = False
            self._unscaler.forget()
        if self._moves:
            self._moves = False
            self.scaler.update()

    def backward(self, tensors: Any, grad_tensors: Any, run: Any) -> None:
        """Run a backward pass, run(gradients), with the scale."""
        if self.other_scaler is not None:
            run(grad_tensors)
            return
        roots = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        given = [grad_tensors] if isinstance(grad_tensors, (torch.Tensor, type(None))) else list(grad_tensors)
        given += [None] * (len(roots) - len(given))
        if any(gradient is None and root.numel() != 1 for root, gradient in zip(roots, given, strict=True)):
            run(grad_tensors)  # torch's error
            return
        outer = self.depth == 0
        scale = self.scaler._scale if self.scales and not self.off else None
        if outer and any(root.dtype is torch.float16 for root in roots):
            scale = None  # which may be infinite there
        self._reaching = True
        scaled, number = self._unscaler.begin(roots, given, scale, outer)
        self.depth += 1
        try:
            run(scaled if outer and scale is not None else grad_tensors)
        finally:
            self.depth -= 1
            self._unscaler.end(number)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer skip its step if a gradient is infinite or NaN."""
        if not self._reaching or self.other_scaler is not None:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not self._unscaler.reached(parameters):
            return
        self._looked = True
        if self.scales and not self.off:
            self.other_scaler = _scaler_that_steps()
            if self.other_scaler is not None:
                return
        found = self.scaler._check_gradients(
            optimizer, self._one, torch.zeros_like(self._one), allow_fp16=True, unscale=False
        )
        if self.off:  # a pass in float32 says nothing about the scale
            del self.scaler._per_optimizer_states[id(optimizer)]
        elif found:
            self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
            self._moves = True
        if len(found) == 1 and not self.off and all(group.get("fused") for group in optimizer.param_groups):
            (optimizer.found_inf,) = found.values()  # as torch.amp.GradScaler hands it over
            _flagged.add(optimizer)
        elif any(flag.item() for flag in found.values()):
            self.skipped_in_fp32 += self.off
            for parameter in parameters:
                parameter.grad = None


def leave_scaling(scaler: Any) -> None:
    """Tell the open contexts that the loop scales by itself, with this GradScaler."""
    for scaling in _open:
        if scaling.scaler is not scaler:
            scaling.off = True
            scaling.other_scaler = scaler


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


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for scaling in list(_scalings):
        scaling.before_step(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _flagged:
        _flagged.remove(optimizer)
        del optimizer.found_inf


_TORCHS_STEP = torch.amp.GradScaler._maybe_opt_step.__code__


def _scaler_that_steps() -> Any:
    """Return the torch.amp.GradScaler whose step() is on this thread's stack, None if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _TORCHS_STEP:
            return frame.f_locals["self"]  # of no other frame: reading them keeps all its variables alive
        frame = frame.f_back
    return None
