"""halfstep's GradScaler: torch.amp.GradScaler with one-read checks, a richer scale rule and a memory.

It is a subclass: protocol, errors and checkpoints are torch's. What differs is under the hood (the ops of the compiled
library) and in the additions that the class names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state

from halfstep import _library
from halfstep.checkpoints import check_keys, check_kinds, check_number, integral
from halfstep.config import check_scale
from halfstep.errors import ScaleCollapsed
from halfstep.gradients import (
    check_gradient,
    count_in_words,
    element_count,
    local_shard,
    moved,
    named_parameters,
    reduce_over_meshes,
)

_library.load_library()
_ops = torch.ops.halfstep

# Layout of the ops' tensors: csrc/include/halfstep/scaling.h and gradients.h.
COUNTERS = ("steps", "skipped", "consecutive_skipped", "growths", "backoffs", "at_floor", "nan_steps", "inf_steps")
HISTORY_SHAPE = (1024, 4)
GRADIENT_STATISTICS = ("non_finite", "max_magnitude", "sum_of_squares", "zeros", "below_half", "elements")

_TORCH_KEYS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
_OWN_KEY = "halfstep"
_OWN_KEYS = ("min_scale", "max_scale", "hysteresis", "refill", "growth_delay", "hysteresis_left", "counters")
_MAX_FLOAT32 = torch.finfo(torch.float32).max


@dataclasses.dataclass(frozen=True)
class ScaleRecord:
    """One update of the scale: its number from 1, the scale in force before it, whether it skipped, the norm.

    `norm` is the L2 norm of the unscaled gradients of all optimizers, NaN where none was taken (sharded gradients).
    """

    step: int
    scale: float
    skipped: bool
    norm: float


class GradScaler(torch.amp.GradScaler):
    """A drop-in for torch.amp.GradScaler.

    The first six parameters are torch's. With them alone the scale moves exactly as torch's does, bit for bit.

    min_scale, max_scale: bounds of the scale, 0 and the largest float32 by default.
    hysteresis: how many overflows a credit tolerates before the scale backs off; 1: every overflow backs off.
    refill: when the credit is restored: "on_growth", "on_clean_step" or "on_clean_step_and_backoff".
    growth_delay: clean steps after the start or an overflow that do not count towards growth_interval.
    allow_fp16_gradients: unscale float16 gradients (of float16 parameters) instead of raising as torch does.
    max_consecutive_skips: raise ScaleCollapsed after so many skipped steps in a row, naming the parameters with the
        most infinite or NaN elements. This reads one counter on the host at each update(). None: never.

    Beyond torch: bfloat16 (and all other floating) gradients may be mixed in one optimizer on every device; an
    overflow that unscaling itself makes is found; a step that overflowed on two devices is skipped by fused
    optimizers too; gradients that were freed, resized or added between unscale_() and step() are an error; counters()
    and history() tell what happened.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        min_scale: float = 0.0,
        max_scale: float = _MAX_FLOAT32,
        hysteresis: int = 1,
        refill: str = "on_clean_step",
        growth_delay: int = 0,
        allow_fp16_gradients: bool = False,
        max_consecutive_skips: int | None = None,
    ) -> None:
        if not isinstance(device, str):
            raise TypeError(
                f"device is {device!r}, expected a device type such as 'cuda' or 'cpu' (init_scale comes second)"
            )
        numbers = {"init_scale": init_scale, "growth_factor": growth_factor, "backoff_factor": backoff_factor}
        numbers |= {"min_scale": min_scale, "max_scale": max_scale}
        growth_interval = integral(growth_interval)
        integers = {"growth_interval": growth_interval, "hysteresis": hysteresis, "growth_delay": growth_delay}
        check_kinds(numbers, (int, float), "a number")
        check_kinds(integers, (int,), "an integer")
        check_kinds({"refill": refill}, (str,), "a str")
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        if max_consecutive_skips is not None and (
            not isinstance(max_consecutive_skips, int) or max_consecutive_skips < 1
        ):
            raise ValueError(f"max_consecutive_skips is {max_consecutive_skips!r}, expected None or an integer >= 1")
        if self._enabled:
            _ops.check_scale_rule(
                init_scale,
                growth_factor,
                backoff_factor,
                growth_interval,
                min_scale,
                max_scale,
                hysteresis,
                refill,
                growth_delay,
            )
        self._min_scale = min_scale
        self._max_scale = max_scale
        self._hysteresis = hysteresis
        self._refill = refill
        self._growth_delay = growth_delay
        self._allow_fp16_gradients = allow_fp16_gradients
        self._max_consecutive_skips = max_consecutive_skips
        self._max_norm: float | None = None  # set by a manager that was given a config
        self._init_growth_tracker = -growth_delay
        self._init_hysteresis_left = hysteresis
        self._init_counters = [0] * len(COUNTERS)
        self._hysteresis_left: torch.Tensor | None = None
        self._counters: torch.Tensor | None = None
        self._history: torch.Tensor | None = None
        self._warned_of_autocast = False
        self._unscaled_while_disabled: set[int] = set()
        self.host_syncs = 0  # steps that waited for the device to learn whether to skip

    @classmethod
    def from_preset(cls, preset: str, device: str = "cuda", enabled: bool = True, **overrides: Any) -> GradScaler:
        """Make a scaler that follows a peer: "torch", "keras", "megatron", "deepspeed", "apex" or "paddle".

        The preset gives the peer's rule with its default numbers; keyword arguments replace single ones.
        """
        names = (
            "init_scale",
            "growth_factor",
            "backoff_factor",
            "growth_interval",
            "min_scale",
            "max_scale",
            "hysteresis",
            "refill",
            "growth_delay",
        )
        rule = dict(zip(names, _ops.scale_preset(preset), strict=True))
        return cls(device, enabled=enabled, **{**rule, **overrides})

    # ------------------------------------------------------------------------------------------------ state

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        super()._lazy_init_scale_growth_tracker(dev)
        self._hysteresis_left = torch.full((), self._init_hysteresis_left, dtype=torch.int32, device=dev)
        self._counters = torch.tensor(self._init_counters, dtype=torch.int64).to(dev)
        self._history = torch.zeros(HISTORY_SHAPE, dtype=torch.float64, device=dev)

    def set_growth_factor(self, new_factor: float) -> None:
        """Set the growth factor, >= 1 (1: the scale never grows)."""
        self._check_rule(growth_factor=new_factor)
        super().set_growth_factor(new_factor)

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set the backoff factor, > 0 and <= 1 (1: the scale never backs off)."""
        self._check_rule(backoff_factor=new_factor)
        super().set_backoff_factor(new_factor)

    def set_growth_interval(self, new_interval: int) -> None:
        """Set the growth interval, an integer >= 1."""
        new_interval = integral(new_interval)
        self._check_rule(growth_interval=new_interval)
        super().set_growth_interval(new_interval)

    def _check_rule(self, **changes: Any) -> None:
        """Raise unless an update could run with these parameters in place of the scaler's own."""
        if self._enabled:
            _ops.check_scale_rule(self._init_scale, **{**self._rule(), **changes}, update_only=True)

    def _rule(self) -> dict[str, Any]:
        """Return what an update of the scale needs, by the names of the op's parameters."""
        return {
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            **self._own_rule(),
        }

    def _own_rule(self) -> dict[str, Any]:
        """Return the part of the rule that torch's scaler does not have."""
        return {
            "min_scale": self._min_scale,
            "max_scale": self._max_scale,
            "hysteresis": self._hysteresis,
            "refill": self._refill,
            "growth_delay": self._growth_delay,
        }

    def counters(self) -> dict[str, int]:
        """Return how many updates there were, and of which kind (waits for the device).

        steps; skipped; consecutive_skipped; growths; backoffs; at_floor (skipped with the scale at min_scale);
        nan_steps and inf_steps (skipped ones by what their gradients held).
        """
        if not self._enabled:
            return dict.fromkeys(COUNTERS, 0)
        values = self._init_counters if self._counters is None else self._counters.tolist()
        return dict(zip(COUNTERS, values, strict=True))

    def history(self) -> list[ScaleRecord]:
        """Return the records of the last updates since the scaler was made or loaded, at most 1024, oldest first."""
        if not self._enabled or self._history is None:
            return []
        rows = [row for row in self._history.tolist() if row[0] > 0]
        return [ScaleRecord(int(s), scale, found != 0, norm) for s, scale, found, norm in sorted(rows)]

    # ----------------------------------------------------------------------------------------------- scaling

    def scale(self, outputs: Any) -> Any:
        """Multiply a tensor, or each tensor of an iterable, by the scale."""
        if self._enabled and not self._warned_of_autocast and torch.is_autocast_enabled(self._device):
            self._warned_of_autocast = True
            warnings.warn(
                "GradScaler.scale() was called where autocast is on: if backward() runs there too, its products are "
                "cast to half once more. Leave the autocast context before scale(loss).backward().",
                stacklevel=2,
            )
        return super().scale(outputs)

    def _check_gradients(
        self,
        optimizer: torch.optim.Optimizer,
        scale: torch.Tensor,
        found: torch.Tensor,
        *,
        allow_fp16: bool,
        unscale: bool,
    ) -> dict[torch.device, torch.Tensor]:
        """Read the gradients once and return the flag of each device.

        With `unscale`, `scale` is the inverse of the loss scale and the gradients are replaced by the unscaled ones.
        """
        named = [(name, parameter) for name, parameter in named_parameters(optimizer) if parameter.grad is not None]
        for name, parameter in named:  # all of them, before anything is written
            check_gradient(name, parameter.grad, allow_fp16=allow_fp16, written=unscale)
        by_device: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
        names: dict[torch.device, list[str]] = defaultdict(list)
        meshes: dict[torch.device, dict[Any, None]] = {}
        with torch.no_grad():
            for name, parameter in named:
                mesh, grad = local_shard(parameter.grad)
                if mesh is not None:
                    meshes.setdefault(grad.device, {})[mesh] = None
                if grad.is_sparse:
                    if grad.dtype is torch.float16:  # duplicate indices can overflow only when they are summed
                        grad = parameter.grad = grad.coalesce()
                    grad = grad._values()
                by_device[grad.device].append(grad)
                names[grad.device].append(name)
            counts = [element_count(parameter) for _, parameter in named_parameters(optimizer)]

            state = self._per_optimizer_states[id(optimizer)]
            founds: dict[torch.device, torch.Tensor] = {}
            norms: list[torch.Tensor] = []
            statistics: list[tuple[list[str], torch.Tensor]] = []
            for device, grads in by_device.items():
                flag = found.to(device, copy=True)
                norm = torch.empty((), dtype=torch.float32, device=device)
                table = None
                if self._max_consecutive_skips is not None:
                    table = torch.empty((len(grads), len(GRADIENT_STATISTICS)), dtype=torch.float32, device=device)
                    statistics.append((names[device], table))
                local_scale = moved(scale, device)
                if unscale:
                    _ops.unscale_(grads, local_scale, flag, norm, table, scale_is_inverse=True)
                else:
                    _ops.check_gradients_(grads, local_scale, flag, norm, table)
                founds[device] = flag
                norms.append(norm)
                if device in meshes:
                    reduce_over_meshes(flag, meshes[device])
        state.update(norms=norms, sharded=bool(meshes), elements=counts, statistics=statistics)
        return founds

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        allow_fp16 = allow_fp16 or self._allow_fp16_gradients
        return self._check_gradients(optimizer, inv_scale, found_inf, allow_fp16=allow_fp16, unscale=True)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, torch.Tensor]:
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        found = torch.zeros((), dtype=torch.float32, device=scale.device)
        founds = self._check_gradients(optimizer, scale, found, allow_fp16=True, unscale=False)
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = founds
        self._combine_devices(optimizer)
        return self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]

    def _combine_devices(self, optimizer: torch.optim.Optimizer) -> None:
        """Make one flag of several devices' flags. torch adds them, and its fused optimizers skip on exactly 1."""
        state = self._per_optimizer_states.get(id(optimizer)) if self._enabled else None
        founds = state["found_inf_per_device"] if state else {}
        if len(founds) > 1:
            device = self._scale.device
            combined = _ops.combine_found([moved(found, device) for found in founds.values()])
            state["found_inf_per_device"] = {device: combined}

    @contextlib.contextmanager
    def _no_trace_of_a_refusal(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Drop the record that torch has begun for an optimizer whose gradients were then refused unread."""
        known = id(optimizer) in self._per_optimizer_states if self._enabled else True
        try:
            yield
        except BaseException:
            if not known and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
                del self._per_optimizer_states[id(optimizer)]
            raise

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, once before step(). A refusal changes nothing."""
        if not self._enabled:
            self._unscaled_while_disabled.add(id(optimizer))  # step() must not clip by itself then
            return
        with self._no_trace_of_a_refusal(optimizer):
            super().unscale_(optimizer)

    def _maybe_opt_step(
        self, optimizer: torch.optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        self.host_syncs += 1
        return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)

    def step(
        self, optimizer: torch.optim.Optimizer, *args: Any, max_norm: float | None = None, **kwargs: Any
    ) -> float | None:
        """Unscale the gradients unless unscale_() has, and step the optimizer unless one of them is infinite or NaN.

        max_norm: clip the L2 norm of this optimizer's unscaled gradients first.
        Returns what optimizer.step() returns, None for a skipped step. Further arguments go to optimizer.step().
        """
        if max_norm is not None and not (isinstance(max_norm, (int, float)) and max_norm > 0):
            raise ValueError(f"GradScaler.step: max_norm is {max_norm!r}, expected a number > 0")
        # Not [...]: that would leave a record of a step that then raises.
        state = self._per_optimizer_states.get(id(optimizer)) if self._enabled else None
        state = state or {"stage": OptState.READY}
        if state["stage"] is OptState.UNSCALED:
            self._check_unchanged(optimizer, state)
        elif max_norm is None and id(optimizer) not in self._unscaled_while_disabled:
            max_norm = self._max_norm
        self._unscaled_while_disabled.discard(id(optimizer))
        if max_norm is not None and "closure" not in kwargs and state["stage"] is not OptState.STEPPED:
            if self._enabled and state["stage"] is OptState.READY:
                self.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named_parameters(optimizer)], max_norm)
        self._combine_devices(optimizer)
        with self._no_trace_of_a_refusal(optimizer):
            result = super().step(optimizer, *args, **kwargs)
        # An enclosing autocast region must not go on with casts of the weights as they were.
        torch.clear_autocast_cache()
        return result

    def _check_unchanged(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Raise if gradients were freed, resized or added since unscale_(): they would be applied unchecked."""
        before = state.get("elements")
        if before is None:
            return
        named = list(named_parameters(optimizer))
        if len(named) != len(before):
            raise RuntimeError(
                f"GradScaler.step: the optimizer has {len(named)} parameters, but had {len(before)} when unscale_() "
                "read their gradients. Add parameters before unscale_() or after step()."
            )
        for (name, parameter), count in zip(named, before, strict=True):
            now = element_count(parameter)
            if now != count:
                raise RuntimeError(
                    f"GradScaler.step: the gradient of {name} was freed, resized or added since unscale_(): it had "
                    f"{count_in_words(count)} and has {count_in_words(now)}. Nothing was stepped."
                )

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Apply the scale rule to what was found since the last update, or set the scale.

        new_scale: a number > 0 within float32 and the scaler's bounds, or a 1-element tensor (whose value is not
        checked: that would wait for the device).
        """
        if not self._enabled:
            return
        if new_scale is not None:
            if not isinstance(new_scale, torch.Tensor):
                check_scale("new_scale", new_scale)
                if not self._min_scale <= new_scale <= self._max_scale:
                    raise ValueError(
                        f"new_scale is {new_scale!r}, expected min_scale ({self._min_scale:g}) to max_scale "
                        f"({self._max_scale:g})"
                    )
                new_scale = float(new_scale)
            super().update(new_scale)
            return

        scale, tracker = self._check_scale_growth_tracker("update")
        states = list(self._per_optimizer_states.values())
        founds = [moved(found, scale.device) for state in states for found in state["found_inf_per_device"].values()]
        if not founds:
            raise AssertionError("No inf checks were recorded prior to update.")
        norms = [moved(norm, scale.device) for state in states for norm in state.get("norms", ())]
        if any(state.get("sharded") for state in states):
            norms = []  # the norm of one rank's shards is not the gradients'
        _ops.update_scale_(
            scale,
            tracker,
            self._hysteresis_left,
            self._counters,
            self._history,
            founds,
            norms,
            **self._rule(),
        )
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        if self._max_consecutive_skips is not None:
            self._raise_if_collapsed(states)

    def _raise_if_collapsed(self, states: list[dict[str, Any]]) -> None:
        skips = self.counters()["consecutive_skipped"]
        if skips < self._max_consecutive_skips:
            return
        worst = sorted(
            (
                (row[0], row[5], name)
                for state in states
                for names, table in state.get("statistics", ())
                for name, row in zip(names, table.tolist(), strict=True)
                if row[0] > 0
            ),
            reverse=True,
        )
        listed = "; ".join(f"{name}: {bad:.0f} of {total:.0f}" for bad, total, name in worst[:5])
        raise ScaleCollapsed(
            f"{skips} steps in a row had infinite or NaN gradients; the loss scale is {self.get_scale():g} (min_scale "
            f"{self._min_scale:g}). Parameters with the most infinite or NaN gradient elements: {listed or 'none now'}."
        )

    # ------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return torch's entries, which torch.amp.GradScaler loads, and under "halfstep" the rest (waits)."""
        if not self._enabled:
            return {}
        left = self._init_hysteresis_left if self._hysteresis_left is None else self._hysteresis_left.tolist()
        own = {**self._own_rule(), "hysteresis_left": left, "counters": self.counters()}
        return {**super().state_dict(), _OWN_KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() of this class or of torch.amp.GradScaler returned.

        torch's checkpoints leave bounds and hysteresis as they are and the counters at 0. A scaler with a fixed scale
        (min_scale == max_scale) and one with a moving scale take only each other's counters, with a warning. A
        missing, foreign or senseless entry raises and changes nothing.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"GradScaler.load_state_dict: state_dict is {type(state_dict).__name__}, expected a dict")
        if not self._enabled or len(state_dict) == 0:
            super().load_state_dict(state_dict)  # a no-op, or torch's error
            return
        own = self._checked_own_state(state_dict)
        if (own["min_scale"] == own["max_scale"]) != (self._min_scale == self._max_scale) or (
            _OWN_KEY not in state_dict and self._min_scale == self._max_scale
        ):
            # bfloat16's scaler stands still at 1, float16's moves: neither may turn into the other.
            warnings.warn(
                "GradScaler.load_state_dict: the checkpoint is of a scaler whose scale moves and this one's is fixed, "
                "or the reverse (another precision policy?). Only its counters are taken; scale and rule stay.",
                stacklevel=2,
            )
            self._load_counters(own["counters"])
            return
        super().load_state_dict({key: state_dict[key] for key in _TORCH_KEYS})
        self._growth_interval = integral(self._growth_interval)
        self._min_scale = own["min_scale"]
        self._max_scale = own["max_scale"]
        self._hysteresis = own["hysteresis"]
        self._refill = own["refill"]
        self._growth_delay = own["growth_delay"]
        self._init_hysteresis_left = own["hysteresis_left"]
        if self._scale is not None:
            self._hysteresis_left.fill_(self._init_hysteresis_left)
        self._load_counters(own["counters"])

    def _load_counters(self, counters: dict[str, int]) -> None:
        self._init_counters = [counters[name] for name in COUNTERS]
        if self._scale is not None:
            self._counters.copy_(torch.tensor(self._init_counters, dtype=torch.int64))
            self._history.zero_()

    def _checked_own_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the "halfstep" part, or this scaler's settings for a checkpoint of torch; raise if anything is off."""
        check_keys("", state_dict, _TORCH_KEYS, optional=(_OWN_KEY,))
        own = state_dict.get(_OWN_KEY)
        if own is None:
            counters = dict.fromkeys(COUNTERS, 0)
            own = {**self._own_rule(), "hysteresis_left": self._hysteresis, "counters": counters}
        check_keys("['halfstep']", own, _OWN_KEYS)
        check_keys("['halfstep']['counters']", own["counters"], COUNTERS)
        check_number("scale", state_dict["scale"], float, 0.0, _MAX_FLOAT32)
        for key in ("growth_factor", "backoff_factor"):
            check_number(key, state_dict[key], float, 0.0, _MAX_FLOAT32)
        for key in ("growth_interval", "_growth_tracker"):
            check_number(key, integral(state_dict[key]), int, -(2**31), 2**31 - 1)
        for key in ("min_scale", "max_scale"):
            check_number(key, own[key], float, 0.0, _MAX_FLOAT32)
        for key in ("hysteresis", "growth_delay", "hysteresis_left"):
            check_number(key, own[key], int, -(2**31), 2**31 - 1)
        if not isinstance(own["refill"], str):
            raise TypeError(f"GradScaler.load_state_dict: 'refill' is {own['refill']!r}, expected a str")
        for key in COUNTERS:
            check_number(key, own["counters"][key], int, 0, 2**63 - 1)
        self._check_rule(
            growth_factor=state_dict["growth_factor"],
            backoff_factor=state_dict["backoff_factor"],
            growth_interval=integral(state_dict["growth_interval"]),
            **{key: own[key] for key in ("min_scale", "max_scale", "hysteresis", "refill", "growth_delay")},
        )
        return own

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self._enabled:
            state["_init_counters"] = list(self.counters().values())
            if self._hysteresis_left is not None:
                state["_init_hysteresis_left"] = self._hysteresis_left.tolist()
            state.update(_hysteresis_left=None, _counters=None, _history=None)
        return state
