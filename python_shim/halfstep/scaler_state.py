"""The state of halfstep's GradScaler: its rule, what it remembers, and its checkpoints."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from halfstep import _library
from halfstep.checkpoints import check_keys, check_kinds, check_number, integral
from halfstep.config import check_bool, check_scale
from halfstep.scale_request import ScaleRequest
from halfstep.scale_rule import COUNTERS
from halfstep.step_report import Reporter, StepReport, Tables

_library.load_library()
_ops = torch.ops.halfstep

# Layout of the ops' tensors: csrc/include/halfstep/scaling.h and gradients.h.
HISTORY_SHAPE = (1024, 4)

_TORCH_KEYS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
_OWN_KEY = "halfstep"
_REQUEST_KEYS = ("limit", "norm")
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


class ScalerState(torch.amp.GradScaler):
    """Everything of GradScaler that outlives a step. Parameters: see GradScaler."""

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
        master_state: bool = False,
        max_consecutive_skips: int | None = None,
        name_overflows: bool = False,
        scale_from_norm: Callable[[float], float | None] | None = None,
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
        check_bool("master_state", master_state)
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        if max_consecutive_skips is not None and (
            not isinstance(max_consecutive_skips, int) or max_consecutive_skips < 1
        ):
            raise ValueError(f"max_consecutive_skips is {max_consecutive_skips!r}, expected None or an integer >= 1")
        if scale_from_norm is not None and not callable(scale_from_norm):
            raise TypeError(f"scale_from_norm is {scale_from_norm!r}, expected a function of the gradient norm")
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
        self._master_state = master_state
        self._max_consecutive_skips = max_consecutive_skips
        self._statistics = name_overflows or max_consecutive_skips is not None
        self._tables: Tables = []  # of the last update: names and gradient statistics
        self._reporter = Reporter()
        self._request = ScaleRequest(scale_from_norm, max_scale) if scale_from_norm and enabled else None
        self._max_norm: float | None = None  # set by a manager that was given a config
        self._underflow: Any = None  # set by a manager that monitors
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
    def from_preset(cls, preset: str, device: str = "cuda", enabled: bool = True, **overrides: Any) -> ScalerState:
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

    def set_scale(self, scale: float) -> None:
        """Set the running scale, a number > 0 within float32. With scale_from_norm no more is granted for now."""
        check_scale("scale", scale)
        if self._scale is None:
            self._init_scale = float(scale)
        else:
            self._scale.fill_(scale)
        if self._request is not None:
            self._request.set_limit(scale)

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

    def last_step(self, *, wait: bool = False) -> StepReport | None:
        """Return what the last update did, as far as the device has reported it; never waits unless asked to.

        Called once a step it is one or two steps behind a busy GPU; its `step` says which one it is of. With wait=True
        it is the last one. None before the first report.
        """
        if not self._enabled or self._history is None:
            return None
        return self._reporter.poll(self._counters, self._history, self._tables, wait=wait)

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped, by the newest report that has arrived (see last_step). Does not wait."""
        report = self.last_step()
        return self._init_counters[1] if report is None else report.skipped_steps

    # ------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return torch's entries, which torch.amp.GradScaler loads, and under "halfstep" the rest (waits)."""
        if not self._enabled:
            return {}
        left = self._init_hysteresis_left if self._hysteresis_left is None else self._hysteresis_left.tolist()
        own = {**self._own_rule(), "hysteresis_left": left, "counters": self.counters()}
        if self._request is not None:
            own["request"] = dict(zip(_REQUEST_KEYS, self._request.state(), strict=True))
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
        if self._request is not None:
            request = own.get("request", {"limit": self._max_scale, "norm": math.nan})
            self._request.set_state(request["limit"], request["norm"])

    def _load_counters(self, counters: dict[str, int]) -> None:
        self._init_counters = [counters[name] for name in COUNTERS]
        if self._scale is not None:
            self._counters.copy_(torch.tensor(self._init_counters, dtype=torch.int64))
            self._history.zero_()
            self._reporter = Reporter()

    def _checked_own_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the "halfstep" part, or this scaler's settings for a checkpoint of torch; raise if anything is off."""
        check_keys("", state_dict, _TORCH_KEYS, optional=(_OWN_KEY,))
        own = state_dict.get(_OWN_KEY)
        if own is None:
            counters = dict.fromkeys(COUNTERS, 0)
            own = {**self._own_rule(), "hysteresis_left": self._hysteresis, "counters": counters}
        check_keys("['halfstep']", own, _OWN_KEYS, optional=("request",))
        if "request" in own:
            check_keys("['halfstep']['request']", own["request"], _REQUEST_KEYS)
            check_number("limit", own["request"]["limit"], float, 0.0, _MAX_FLOAT32)
            if own["request"]["norm"] == own["request"]["norm"]:  # NaN: none yet
                check_number("norm", own["request"]["norm"], float, 0.0, _MAX_FLOAT32)
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
        state["_underflow"] = None
        if self._enabled:
            state["_init_counters"] = list(self.counters().values())
            if self._hysteresis_left is not None:
                state["_init_hysteresis_left"] = self._hysteresis_left.tolist()
            state.update(_hysteresis_left=None, _counters=None, _history=None, _tables=[], _reporter=Reporter())
        return state
