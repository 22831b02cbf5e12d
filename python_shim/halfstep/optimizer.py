"""The fused step of torch.optim's Adam, AdamW and SGD on their own parameters, states and param groups.

An optimizer stays what it is: the same state keys, exchangeable checkpoints, hooks, schedulers. While halfstep steps
it, Adam's state["step"] lives on the parameter's device, as torch keeps it under fused=True; state_dict() and release()
give it back on the CPU where torch would have it there. With keep_masters() the states of half parameters are float32,
and so is state["master"], the value that the parameter is the rounded copy of.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_pre_hook,
)

from halfstep import _library
from halfstep.gradients import moved, parameter_name

_library.load_library()

_KINDS = {torch.optim.Adam: "adam", torch.optim.AdamW: "adam", torch.optim.SGD: "sgd"}
_STEPS = {kind: kind.step for kind in _KINDS}  # before torch has put its hooks around them
_MADE_OF_OTHERS = ("no longer idle", "no longer half")  # what collect() says where the parts must be made anew
_HALF = (torch.float16, torch.bfloat16)
_END = object()
_fused_steps: weakref.WeakKeyDictionary[torch.optim.Optimizer, FusedStep] = weakref.WeakKeyDictionary()
# SGD keeps no step count; its first applied step writes the momentum buffer in another way than later ones.
# Per optimizer: id(buffer): (buffer, applied steps).
_buffer_counts: weakref.WeakKeyDictionary[torch.optim.Optimizer, dict[int, tuple[torch.Tensor, torch.Tensor]]] = (
    weakref.WeakKeyDictionary()
)
# Optimizers whose half parameters have float32 masters, with the hooks that let load_state_dict() keep float32, and
# what such a load has under way.
_masters: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Any]] = weakref.WeakKeyDictionary()
_loading: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Any]] = weakref.WeakKeyDictionary()
# .recorder: the step graph whose step this thread runs. It has fused steps of its own.
# .stepping: the optimizer that this thread steps here, with its hooks.
current = threading.local()


def obstacle(optimizer: torch.optim.Optimizer) -> str:
    """Return "" or why this optimizer, whatever its gradients, must be stepped by torch."""
    kind = type(optimizer)
    if kind not in _KINDS:
        return f"{kind.__name__} is not exactly Adam, AdamW or SGD"
    hooked = kind.step
    if hooked is not _STEPS[kind] and getattr(hooked, "__wrapped__", None) is not _STEPS[kind]:
        return f"{kind.__name__}.step was replaced"
    patched = optimizer.__dict__.get("step")
    if patched is not None and not (
        getattr(patched, "_wrapped_by_lr_sched", False) and getattr(patched, "__wrapped__", None) is hooked
    ):
        return "step was replaced on this optimizer"
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            return "differentiable=True"
        if any(isinstance(beta, torch.Tensor) for beta in group.get("betas", ())):
            return "betas are tensors"
    return ""


def fused_step(optimizer: torch.optim.Optimizer) -> FusedStep:
    """Return the optimizer's fused step, the same one every time."""
    recorder = getattr(current, "recorder", None)
    if recorder is not None:
        return recorder.fused_step(optimizer)
    found = _fused_steps.get(optimizer)
    if found is None:
        found = _fused_steps[optimizer] = FusedStep(optimizer)
    return found


def is_half(param: torch.Tensor) -> bool:
    """Return whether the parameter can have a float32 master."""
    return param.dtype in _HALF


def keep_masters(optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer's half parameters through float32 masters, from its next fused step until release()."""
    if optimizer not in _masters:
        _masters[optimizer] = [
            optimizer.register_load_state_dict_pre_hook(_before_load),
            optimizer.register_load_state_dict_post_hook(_after_load),
        ]


def _before_load(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Note the float32 states of half parameters, which torch rounds to the parameters' dtype."""
    keys = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    _loading[optimizer] = [
        (param, key, value)
        for index, param in zip(keys, params, strict=False)  # torch complains of other lengths
        if is_half(param)
        for key, value in state_dict["state"].get(index, {}).items()
        if isinstance(value, torch.Tensor) and value.dtype is torch.float32 and value.shape == param.shape
        if key != "step"
    ]


def _after_load(optimizer: torch.optim.Optimizer) -> None:
    for param, key, value in _loading.pop(optimizer, ()):
        optimizer.state[param][key] = torch.empty_like(param, dtype=torch.float32, requires_grad=False).copy_(value)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether somebody else's hooks run around the optimizer's steps."""
    return _has_pre_hooks(optimizer) or _foreign(_global_optimizer_post_hooks, optimizer._optimizer_step_post_hooks)


def _has_pre_hooks(optimizer: torch.optim.Optimizer) -> bool:
    return _foreign(_global_optimizer_pre_hooks, optimizer._optimizer_step_pre_hooks)


def _foreign(*hooks: Mapping[int, Any]) -> bool:
    each = itertools.chain.from_iterable(map(dict.values, hooks))
    return any(not str(getattr(hook, "__module__", "")).startswith("halfstep.") for hook in each)


@functools.cache
def _watch_torchs_steps() -> None:
    """Have every optimizer's step ask _before_step first. Not a hook of each optimizer: those rule out a capture."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Let torch take a step from its own states: no masters, no buffers that no step has written (waits)."""
    if getattr(current, "stepping", None) is optimizer:
        return
    if optimizer in _masters:
        release(optimizer)
    counts = _buffer_counts.get(optimizer)
    if not counts:
        return
    _drop_unwritten_buffers(counts, dict(optimizer.state), optimizer.state)
    counts.clear()  # what is left was written, and whatever torch makes will be


def release(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's state back as torch keeps it, for a loop without halfstep (waits for the device).

    Without it torch's optimizer still computes the same, but reads a step count on the host per parameter.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"release: got a {type(optimizer).__name__}, expected an optimizer of torch.optim")
    found = _fused_steps.pop(optimizer, None)
    if found is None and type(optimizer) in _KINDS:  # a step graph may have moved its counts
        found = FusedStep(optimizer)
    if found is not None:
        found.release(optimizer)
    for hook in _masters.pop(optimizer, ()):
        hook.remove()
    _drop_masters(optimizer)


def _drop_masters(optimizer: torch.optim.Optimizer) -> None:
    """Give half parameters states of their own dtype again."""
    for param, entry in list(optimizer.state.items()):
        if "master" not in entry:
            continue
        kept = {key: value for key, value in entry.items() if key != "master"}
        halves = {
            key: value.to(param.dtype)
            for key, value in kept.items()
            if key != "step" and isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        optimizer.state[param] = {**kept, **halves}
        if not kept:
            del optimizer.state[param]


class Part:
    """The parameters of one device whose states have the same shape of entry."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self.kind = kind
        self.device = device
        self.params: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []  # what is stepped: the parameters or their masters
        self.states: list[list[torch.Tensor]] = [[], [], []]
        self.steps: list[torch.Tensor] = []
        self.groups: list[int] = []
        self.names: list[str] = []
        self.idle: list[torch.Tensor] = []
        self.fused: Any = None

    def build(self, half_copies: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Make the C++ side; raise where a state does not fit its parameter."""
        self.fused = torch.classes.halfstep.FusedOptimizer(
            self.kind, self.values, self.states, self.steps, self.groups, self.idle
        )
        copied = [i for i, param in enumerate(self.params) if param in half_copies]
        self.fused.set_half_copies(copied, [half_copies[self.params[i]] for i in copied])
        mastered = [i for i, param in enumerate(self.params) if self.values[i] is not param]
        self.fused.set_masters(mastered, [self.params[i] for i in mastered])

    def near(self, learning_rates: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return the learning rates that are tensors as the kernels read them."""
        return [None if lr is None else lr.to(self.device, torch.float32) for lr in learning_rates]

    def collected_names(self) -> list[str]:
        """Return the names of the parameters whose gradients were collected."""
        return [self.names[i] for i in self.fused.collected()]


class FusedStep:
    """What halfstep knows of one optimizer between its steps.

    half_copies: copies of float32 parameters that each step writes as well.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, half_copies: Mapping[torch.Tensor, torch.Tensor] | None = None
    ) -> None:
        self.parts: list[Part] = []
        self.half_copies = half_copies or {}
        self._objects: list[Any] = [None]  # what the parts were made of: nothing
        self._layout: list[Any] = []
        self._reason = ""
        self._hyperparameters: Any = None  # those that a captured step reads
        self._counts = _buffer_counts.setdefault(optimizer, {})
        mine = weakref.ref(self)

        def on_state_dict(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
            alive = mine()
            return None if alive is None else alive._as_torch_keeps_it(state_dict)

        # Nothing stays behind on the optimizer when a step graph is dropped.
        self._unhook = weakref.finalize(self, optimizer.register_state_dict_post_hook(on_state_dict).remove)
        self._unhook.atexit = False
        _watch_torchs_steps()

    # -------------------------------------------------------------------------------------------------- gradients

    def collect(self, optimizer: torch.optim.Optimizer, allow_float16: bool) -> str:
        """Find the gradients of now. Return "" or why torch must take this step; nothing has changed then."""
        if self.is_outdated(optimizer):
            self._rebuild(optimizer)
        reason = self._collect_parts(allow_float16)
        if reason in _MADE_OF_OTHERS:
            self._rebuild(optimizer)
            reason = self._collect_parts(allow_float16)
        return reason

    def is_outdated(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether parameters, states or their layout are others than this was made of."""
        # Objects by identity: == would compare the tensors' values. _END tells a list from a longer one.
        return not all(map(operator.is_, _objects(optimizer), self._objects)) or _layout(optimizer) != self._layout

    def _collect_parts(self, allow_float16: bool) -> str:
        if self._reason:
            return self._reason
        reasons = (part.fused.collect(allow_float16) for part in self.parts)
        return next((reason for reason in reasons if reason), "")

    def has_gradients(self) -> bool:
        """Return whether collect() found any."""
        return any(part.fused.count() for part in self.parts)

    # ------------------------------------------------------------------------------------------------------- step

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        found: dict[torch.device, torch.Tensor],
        scale: torch.Tensor | None,
        norm: torch.Tensor | None,
        max_norm: float | None,
    ) -> list[torch.Tensor]:
        """Step what collect() found, with the optimizer's hooks around it; return what it was, if any has copies."""
        stepped: list[torch.Tensor] = []

        def apply(optimizer: torch.optim.Optimizer) -> None:
            if _has_pre_hooks(optimizer):
                self._collect_after_hooks(optimizer)
            if self.half_copies:
                stepped.extend(part.params[i] for part in self.parts for i in part.fused.collected())
            numbers, learning_rates = hyperparameters(optimizer)
            for part in self.parts:
                part.fused.step(
                    numbers,
                    part.near(learning_rates),
                    found.get(part.device),
                    None if scale is None else moved(scale, part.device),
                    None if norm is None else moved(norm, part.device),
                    max_norm or 0.0,
                )

        current.stepping = optimizer
        try:
            torch.optim.Optimizer.profile_hook_step(apply)(optimizer)
        finally:
            current.stepping = None
        optimizer._opt_called = True  # or LRScheduler.step() warns
        return stepped

    def _collect_after_hooks(self, optimizer: torch.optim.Optimizer) -> None:
        """Find the gradients that pre-hooks of this step have left: they may have replaced or dropped them."""
        reason = self.collect(optimizer, allow_float16=True)
        if reason:
            raise RuntimeError(f"GradScaler.step: a hook before the step left what cannot be stepped here: {reason}")

    # --------------------------------------------------------------------------------------------- in a CUDA graph

    def prepare_capture(self, optimizer: torch.optim.Optimizer) -> str:
        """Make all that a captured step needs outside of the graph's memory. Return "" or why it cannot be fused."""
        self._rebuild(optimizer)
        for part in self.parts:
            part.fused.reserve(len(optimizer.param_groups))
            part.fused.refresh_masters(False)  # or each replay would
        return self._reason

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Give a captured step the hyperparameters of now, and masters their parameters of now, before a replay."""
        for part in self.parts:
            part.fused.refresh_masters(True)
        now = hyperparameters(optimizer)
        numbers, learning_rates = now
        before = self._hyperparameters
        if before is not None and numbers == before[0] and all(map(operator.is_, learning_rates, before[1])):
            return
        for part in self.parts:
            part.fused.set_groups(numbers, part.near(learning_rates))
        in_place = all(lr is None or lr.dtype is torch.float32 for lr in learning_rates)
        self._hyperparameters = now if in_place else None

    def close(self) -> None:
        """Forget the optimizer."""
        self._unhook()

    # ------------------------------------------------------------------------------------------------------ state

    def _rebuild(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at every parameter and state anew; make the states that are missing where there is a gradient."""
        self._reason = ""
        parts: dict[Any, Part] = {}
        counts = self._counts
        kind = _KINDS[type(optimizer)]
        for number, group in enumerate(optimizer.param_groups):
            keys = _state_keys(kind, group)
            for index, param in enumerate(group["params"]):
                name = parameter_name(group, number, index)
                self._reason = _unsupported(name, param)
                if self._reason:
                    self._objects, self._layout = list(_objects(optimizer)), _layout(optimizer)
                    return
                state = optimizer.state.get(param) or {}
                mastered = is_half(param) and (optimizer in _masters or _is_master(state.get("master")))
                part = parts.setdefault((param.device, keys), Part(kind, param.device))
                # It gets its state with its first gradient.
                if param.grad is None and not state and (keys or mastered):
                    part.idle.append(param)
                    continue
                part.params.append(param)
                part.names.append(name)
                part.groups.append(number)
                if keys or mastered:
                    state = optimizer.state[param]
                if mastered:
                    self._widen(state, keys)
                step = None if kind == "sgd" else _device_step(state, param)  # first, as torch orders the state
                for slot, key in enumerate(keys):
                    if state.get(key) is None:
                        state[key] = _zeros(param, torch.float32 if mastered else param.dtype)
                    elif kind == "sgd" and id(state[key]) not in counts:
                        counts[id(state[key])] = (state[key], _count(1.0, param.device))
                    part.states[slot].append(state[key])
                part.steps.append(self._applied(state, param) if step is None else step)
                part.values.append(_master(state, param, name) if mastered else param)
                if not mastered:
                    state.pop("master", None)  # of a checkpoint, or of what was half
        kept = {id(state.get("momentum_buffer")) for state in optimizer.state.values()}
        for gone in counts.keys() - kept:
            del counts[gone]
        try:
            for part in parts.values():
                part.build(self.half_copies)
        except (TypeError, ValueError, RuntimeError) as error:
            self._reason = str(error).splitlines()[0]
        self.parts = list(parts.values())
        self._objects, self._layout = list(_objects(optimizer)), _layout(optimizer)

    def _widen(self, state: dict[str, Any], keys: tuple[str, ...]) -> None:
        """Make float32 states of those that torch, or a step without masters, has left in half."""
        for key in keys:
            value = state.get(key)
            if value is not None and is_half(value):
                state[key] = value.float()
                if id(value) in self._counts:
                    self._counts[id(state[key])] = (state[key], self._counts[id(value)][1])

    def _applied(self, state: dict[str, Any], param: torch.Tensor) -> torch.Tensor:
        """Return SGD's count of applied steps, kept with the momentum buffer that it is about."""
        buffer = state.get("momentum_buffer")
        if buffer is None:  # no momentum: the count decides nothing
            return _count(0.0, param.device)
        return self._counts.setdefault(id(buffer), (buffer, _count(0.0, param.device)))[1]

    def _as_torch_keeps_it(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state dict with counts on the CPU and without the momentum buffers that no step has written."""
        on_device = {
            index
            for group in state_dict["param_groups"]
            if group.get("fused") or group.get("capturable")
            for index in group["params"]
        }
        state = dict(state_dict["state"])
        self._to_host({index: entry for index, entry in state.items() if index not in on_device}, state)
        return {**state_dict, "state": state}

    def _to_host(self, entries: dict[Any, dict[str, Any]], target: Any) -> None:
        steps = {
            key: entry["step"]
            for key, entry in entries.items()
            if isinstance(entry.get("step"), torch.Tensor) and entry["step"].is_cuda
        }
        for key, value in zip(steps, _read(list(steps.values())), strict=True):
            target[key] = {**target[key], "step": torch.tensor(value, dtype=_step_dtype())}
        _drop_unwritten_buffers(self._counts, entries, target)

    def release(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the optimizer's own state back as torch keeps it."""
        self._unhook()
        hosted = {
            param
            for group in optimizer.param_groups
            if not (group.get("fused") or group.get("capturable"))
            for param in group["params"]
        }
        self._to_host({param: entry for param, entry in optimizer.state.items() if param in hosted}, optimizer.state)
        self._counts.clear()


def _unsupported(name: str, param: torch.Tensor) -> str:
    """Return "" or why torch must step this parameter."""
    if type(param) not in (torch.nn.Parameter, torch.Tensor):
        return f"{name} is a {type(param).__name__}"
    return "" if param.device.type in ("cpu", "cuda") else f"{name} is on {param.device}"


def _is_master(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32


def _master(state: dict[str, Any], param: torch.Tensor, name: str) -> torch.Tensor:
    """Return the parameter's master, made of the parameter where there is none."""
    if not _is_master(state.get("master")):
        if "master" in state:
            warnings.warn(
                f"the float32 master of {name} was rounded when its checkpoint was loaded, and training goes on from "
                "rounded values. Call GradScaler.prepare(optimizer) before optimizer.load_state_dict().",
                stacklevel=2,
            )
        state["master"] = param.detach().to(torch.float32, copy=True)
    return state["master"]


def _zeros(param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)


def _drop_unwritten_buffers(
    counts: Mapping[int, tuple[torch.Tensor, torch.Tensor]], entries: dict[Any, dict[str, Any]], target: Any
) -> None:
    """Put None, as torch has it then, where no applied step has written the momentum buffer yet (waits)."""
    buffers = {key: id(entry["momentum_buffer"]) for key, entry in entries.items() if "momentum_buffer" in entry}
    buffers = {key: buffer for key, buffer in buffers.items() if buffer in counts}
    for key, value in zip(buffers, _read([counts[buffer][1] for buffer in buffers.values()]), strict=True):
        if value == 0:
            target[key] = {**target[key], "momentum_buffer": None}


def _device_step(state: dict[str, Any], param: torch.Tensor) -> torch.Tensor:
    """Return Adam's step count, made or moved to the parameter's device."""
    step = state.get("step", 0.0)
    if not isinstance(step, torch.Tensor):
        step = _count(float(step), param.device)
    state["step"] = step.to(param.device, torch.float32, non_blocking=param.is_cuda)
    return state["step"]


def _count(value: float, device: torch.device) -> torch.Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def _step_dtype() -> torch.dtype:
    """Return the dtype that torch gives the step counts of optimizers that are not fused."""
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32


def _read(scalars: list[torch.Tensor]) -> list[float]:
    """Return the values of scalars on one or several devices, with one wait per device."""
    values: dict[int, float] = {}
    by_device: dict[torch.device, list[int]] = {}
    for index, scalar in enumerate(scalars):
        by_device.setdefault(scalar.device, []).append(index)
    for indices in by_device.values():
        values.update(zip(indices, torch.stack([scalars[i] for i in indices]).tolist(), strict=True))
    return [values[i] for i in range(len(scalars))]


def _state_keys(kind: str, group: dict[str, Any]) -> tuple[str, ...]:
    if kind == "sgd":
        return ("momentum_buffer",) if group["momentum"] != 0 else ()
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")


def _objects(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    """Return all parameters, all that their states hold, and _END."""
    return itertools.chain(
        *(group["params"] for group in optimizer.param_groups),
        itertools.chain.from_iterable(map(dict.values, optimizer.state.values())),
        (_END,),
    )


def _layout(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return what else decides how the parts are made: masters, sizes of groups, and which states they have."""
    return [
        optimizer in _masters,
        *(
            (len(group["params"]), bool(group.get("amsgrad")), group.get("momentum", 0) != 0)
            for group in optimizer.param_groups
        ),
    ]


def hyperparameters(optimizer: torch.optim.Optimizer) -> tuple[list[float], list[torch.Tensor | None]]:
    """Return the numbers of all groups, in the order that FusedOptimizer reads, and learning rates on a GPU."""
    numbers: list[float] = []
    learning_rates: list[torch.Tensor | None] = []
    adamw = type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        lr = group["lr"]
        on_gpu = isinstance(lr, torch.Tensor) and lr.is_cuda
        learning_rates.append(lr if on_gpu else None)
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        numbers += (
            0.0 if on_gpu else float(lr),
            group["weight_decay"],
            beta1,
            beta2,
            group.get("eps", 0.0),
            group.get("momentum", 0.0),
            group.get("dampening", 0.0),
            float(group.get("decoupled_weight_decay", adamw)),
            float(group.get("nesterov", False)),
            float(group["maximize"]),
        )
    return numbers, learning_rates
