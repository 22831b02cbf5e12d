"""What StepGraph is made of: what happens while a step runs, one capture of it, and what would make that wrong."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from halfstep.arguments import UnsupportedArgument, flatten, rebuild
from halfstep.gradients import parameters_of
from halfstep.graph_capture import NotCapturable, capturing
from halfstep.half_weights import HalfWeights
from halfstep.optimizer import FusedStep, current

FusedSteps = dict[torch.optim.Optimizer, FusedStep]


class Recorder:
    """Stands between GradScaler and the optimizers while a step runs: its own fused steps, and half gradients.

    fused: filled as the step uses optimizers; while capturing it must hold all of them already.
    """

    def __init__(self, fused: FusedSteps, half: list[HalfWeights], *, capturing: bool = False) -> None:
        self._fused = fused
        self._half = half
        self._capturing = capturing
        self._stepping: torch.optim.Optimizer | None = None
        self.reason = ""  # why the step needs the host
        self.updated: dict[Any, None] = {}  # the scalers whose update() the step has called

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Run a step."""
        before = getattr(current, "recorder", None)
        if before is not None:
            raise RuntimeError("a captured step was called within a captured step")
        hooks = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        current.recorder = self
        try:
            with contextlib.ExitStack() as stack:
                for half in self._half:
                    stack.enter_context(half.active())
                yield
        finally:
            current.recorder = None
            for hook in hooks:
                hook.remove()

    def fused_step(self, optimizer: torch.optim.Optimizer) -> FusedStep:
        """Return the fused step that belongs to this step."""
        self._stepping = optimizer
        fused = self._fused.get(optimizer)
        if fused is None or (self._capturing and fused.is_outdated(optimizer)):
            if self._capturing:
                raise NotCapturable(f"{type(optimizer).__name__} was stepped for the first time, or has changed")
            copies = {parameter: copy for half in self._half for parameter, copy in half.copies.items()}
            fused = self._fused[optimizer] = FusedStep(optimizer, copies)
        return fused

    def refused(self, optimizer: torch.optim.Optimizer, reason: str) -> None:
        """Note that torch steps this optimizer."""
        self._stepping = None
        self.reason = reason
        self.before_unscale(optimizer)

    def stepped(self, parameters: list[torch.Tensor]) -> None:
        """Note which parameters, and their copies with them, the fused step has written."""
        copies = self._fused[self._stepping].half_copies
        self._stepping = None
        for half in self._half:
            half.written(parameters, copies)

    def before_unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer float32 gradients."""
        parameters = parameters_of(optimizer)
        for half in self._half:
            half.to_float32(parameters)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is self._stepping:
            return
        self.before_unscale(optimizer)
        if any(value is not None for value in (*args[1:2], kwargs.get("closure"))):
            self.reason = f"{type(optimizer).__name__} is stepped with a closure"
            for half in self._half:
                half.begin_closure()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for half in self._half:
            half.end_closure()


class Watch:
    """Modules, parameters and buffers of models: which objects they are, where they lie, whether they are trained.

    And the `forward` that a module has in place of its class's, which is where plans stand.
    """

    def __init__(self, models: list[torch.nn.Module]) -> None:
        self._modules = [module for model in models for module in model.modules()]
        self._forwards = self._forwards_now()
        self._held = [
            held for module in self._modules for held in (module._parameters, module._buffers, module._modules)
        ]
        self._slots = [(held, name, value) for held in self._held for name, value in held.items()]
        self.parameters = list({parameter: None for model in models for parameter in model.parameters()})
        self._tensors = [value for _, _, value in self._slots if isinstance(value, torch.Tensor)]
        self._now = self._look()

    def modes(self) -> tuple[bool, ...]:
        """Return which modules are in training mode."""
        return tuple([module.training for module in self._modules])

    def _forwards_now(self) -> list[Any]:
        return [module.__dict__.get("forward") for module in self._modules]

    def _look(self) -> tuple[list[int], list[bool]]:
        return list(map(torch.Tensor.data_ptr, self._tensors)), list(map(_requires_grad, self.parameters))

    def changed(self) -> str:
        """Return "" or what has changed."""
        for held, name, value in self._slots:
            if held.get(name) is not value:
                return f"{name} was replaced"
        if sum(map(len, self._held)) != len(self._slots):
            return "a module, parameter or buffer was added"
        if any(map(operator.is_not, self._forwards, self._forwards_now())):
            return "a module's forward was replaced"
        pointers, trained = self._look()
        if pointers != self._now[0]:
            return "a parameter or buffer has moved"
        if trained != self._now[1]:
            return "a parameter was frozen or unfrozen"
        return ""


class CapturedStep:
    """One CUDA graph of one step for arguments of one shape. Raises NotCapturable, or what the step raises.

    All that a replay reads or leaves behind lives here: arguments, results, gradients, the tables of the fused steps.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        arguments: Any,
        fused: FusedSteps,
        half: list[HalfWeights],
        scalers: list[Any],
        watch: Watch,
        pool: Any,
        stream: torch.cuda.Stream,
    ) -> None:
        self._fused = fused
        self._half = half
        self._scalers = scalers
        self._parameters = watch.parameters
        self._settings = _settings_of(scalers)
        for optimizer, fused_step in fused.items():
            if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
                raise NotCapturable(f"{type(optimizer).__name__} has step hooks, which run on the host")
            reason = fused_step.prepare_capture(optimizer)
            if reason:
                raise NotCapturable(reason)
        given: list[torch.Tensor] = []
        flatten(arguments, given)
        self._inputs = [tensor.detach().clone() for tensor in given]
        args, kwargs = rebuild(arguments, iter(self._inputs))
        recorder = Recorder(fused, half, capturing=True)
        entry = [parameter.grad for parameter in self._parameters]
        self._graph = torch.cuda.CUDAGraph()
        with _undone_on_failure(scalers, self._parameters, entry):
            with capturing(self._graph, pool, stream), recorder.recording():
                self._result = detached(step(*args, **kwargs))
            if recorder.reason:
                raise NotCapturable(recorder.reason)
            self._outputs = _checked_outputs(self._result, stream.device)
        self._updated = [scaler for scaler in scalers if scaler in recorder.updated]
        torch.cuda.synchronize(stream.device)  # the tables were filled on another stream
        self._gradients = [parameter.grad for parameter in self._parameters]
        # A gradient that was there and is another object now was dropped within the step, whatever it was.
        self._required = [
            (parameter, before)
            for parameter, before, after in zip(self._parameters, entry, self._gradients, strict=True)
            if before is None or before is after
        ]
        self._half_gradients = [half.gradients for half in half]
        stepped = [part.params for fused_step in fused.values() for part in fused_step.parts]
        self._written = list({parameter: None for params in stepped for parameter in params})
        self._tables = [scaler._tables for scaler in scalers]
        self.bytes = pool_bytes(pool)

    def outdated(self) -> str:
        """Return "" or what has changed that is part of the capture."""
        if _settings_of(self._scalers) != self._settings:
            return "settings of the scaler changed"
        for optimizer, fused_step in self._fused.items():
            if fused_step.is_outdated(optimizer):
                return f"parameters or states of {type(optimizer).__name__} were replaced"
        for parameter, gradient in self._required:
            if parameter.grad is not gradient:
                return "gradients were set or dropped between the steps"
        return ""

    def replay(self, tensors: list[torch.Tensor], *, copy_outputs: bool) -> Any:
        """Train one step on these arguments, on the current stream."""
        if tensors:
            torch._foreach_copy_(self._inputs, tensors)
        for optimizer, fused_step in self._fused.items():
            fused_step.follow(optimizer)
        self._graph.replay()
        for scaler in self._updated:
            scaler.after_replay()
        torch.autograd.graph.increment_version(self._written)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient
        for half, gradients in zip(self._half, self._half_gradients, strict=True):
            half.gradients = gradients
            half.stepped()
        for scaler, tables in zip(self._scalers, self._tables, strict=True):
            scaler._tables = tables
        outputs = [output.clone() for output in self._outputs] if copy_outputs else self._outputs
        return rebuild(self._result, iter(outputs))

    def close(self) -> None:
        """Forget the optimizers."""
        for fused_step in self._fused.values():
            fused_step.close()


def detached(result: Any) -> Any:
    """Return what a step returned, without the graph that computed it."""
    tensors: list[torch.Tensor] = []
    try:
        flatten(result, tensors)
    except UnsupportedArgument:
        return result
    return rebuild(result, iter([tensor.detach() for tensor in tensors]))


def _checked_outputs(result: Any, device: torch.device) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []
    try:
        flatten(result, outputs)
    except UnsupportedArgument as error:
        raise NotCapturable(f"what the step returns cannot be replayed: {error}") from None
    for output in outputs:
        if output.device != device:
            raise NotCapturable(f"the step returns a tensor on {output.device}")
    if _numbers(result):
        raise NotCapturable("the step returns a Python number, which a replay would not compute: return the tensor")
    return outputs


def _numbers(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_numbers, value))
    if isinstance(value, Mapping):
        return any(map(_numbers, value.values()))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _settings_of(scalers: list[Any]) -> list[Any]:
    """Return what of the scalers is a constant in a capture."""
    return [(scaler.is_enabled(), scaler._max_norm, id(scaler._scale), scaler._rule()) for scaler in scalers]


@contextlib.contextmanager
def _undone_on_failure(
    scalers: list[Any], parameters: list[torch.nn.Parameter], gradients: list[Any]
) -> Iterator[None]:
    """Let a capture that fails leave no trace: it has computed nothing, but Python code ran."""
    attributes = [{**scaler.__dict__} for scaler in scalers]
    states = [copy.copy(scaler._per_optimizer_states) for scaler in scalers]
    try:
        yield
    except BaseException:
        for scaler, before, per_optimizer in zip(scalers, attributes, states, strict=True):
            scaler.__dict__.update(before)
            scaler._per_optimizer_states = per_optimizer
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        raise


def pool_bytes(pool: Any) -> int:
    """Return the bytes of device memory that a graph pool holds."""
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(pool))


_requires_grad = operator.attrgetter("requires_grad")
